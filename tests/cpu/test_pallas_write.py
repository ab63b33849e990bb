"""Our own kernel for writing keys and values, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_case import interpreter

from pallas_kernels import xla
from pallas_kernels.mosaic import MosaicKernels
from pallas_kernels.shapes import Tuning

KERNELS = MosaicKernels(Tuning(512, 64, 2, 1), own_write=True)


@pytest.mark.parametrize(
    ("K", "D", "dtype", "pages_dtype"),
    [
        (2, 64, "bfloat16", "bfloat16"),
        (1, 128, "float32", "float16"),
        (1, 64, "float16", "float16"),
    ],
)
def test_writing_touches_its_slots_only_and_leaves_them_finite(K, D, dtype, pages_dtype):
    rng = np.random.default_rng(0)
    pages = jnp.array(rng.normal(size=(9, K, 2, 16, D)), pages_dtype)
    k, v = (jnp.array(rng.normal(size=(4, K, D)), dtype) for _ in range(2))
    k = k.at[0, 0, 0].set(jnp.nan).at[3, 0, 5].set(-jnp.inf)
    if dtype != pages_dtype:
        v = v.at[1, 0, 1].set(1e6)  # overflows in float16
    page, slot = np.array([5, 5, 8, 1]), np.array([0, 15, 3, 2])
    want = xla.write_kv(pages, k, v, page, slot)
    with interpreter() as has_raced:
        got = jax.block_until_ready(KERNELS.write_kv(pages, k, v, page, slot))
        assert not has_raced()
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert np.isfinite(np.asarray(got, np.float32)).all()


def test_two_tokens_in_one_place_are_a_race():
    pages, new = jnp.zeros((3, 1, 2, 16, 64), "bfloat16"), jnp.ones((2, 1, 64), "bfloat16")
    place = np.array([1, 1])
    with interpreter() as has_raced:
        jax.block_until_ready(KERNELS.write_kv(pages, new, new, place, place))
        assert has_raced()

"""The launcher's marker under XLA itself, on the processor: what it does when nothing is recorded.

Recording needs a GPU; the calls that XLA makes to begin with are the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duetjax.runtime import placeholders

_launcher = pytest.importorskip("duetjax._launcher", reason="no C compiler when installed")

TARGET = "duetjax_test_marker"


@pytest.fixture(scope="module", autouse=True)
def _registered():
    jax.ffi.register_ffi_target(TARGET, placeholders.marker_handlers(), platform="cpu")


def marked(x, **attributes):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call(TARGET, shape, input_output_aliases={0: 0})(x, **attributes)


def test_the_marker_of_programs_is_the_launcher_s():
    assert placeholders.marker_handlers() == dict.fromkeys(
        ("initialize", "execute"), _launcher.marker
    )


@pytest.mark.parametrize("attributes", [{}, {"program": np.int64(3)}])
def test_a_program_runs_as_if_it_had_no_marker(attributes):
    run = jax.jit(lambda x: marked(x * 2, **attributes))
    for _ in range(2):
        np.testing.assert_array_equal(run(jnp.arange(4)), [0, 2, 4, 6])


def test_a_number_of_another_kind_is_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="`program` must be an int64"):
        jax.jit(lambda x: marked(x, program=np.int32(3)))(jnp.arange(4)).block_until_ready()

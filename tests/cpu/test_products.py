"""Products of few rows in the launcher's C: right, a row's own, and in the lanes' programs alone.

Each processor's code, threads and frames that no program makes are tested in
tests/native/test_launcher_product.c.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from duetjax.build_device import plan_programs
from duetjax.config import Backend, EngineConfig, ModelConfig
from duetjax.devices import find_device
from duetjax.model import layers
from duetjax.model.decoder import Definition, causal_attention
from duetjax.policy.launch import Program
from duetjax.runtime import host_kernels
from duetjax.runtime.host_kernels import FEW_ROWS

if host_kernels._launcher is None:
    pytest.skip("no C compiler when installed", allow_module_level=True)

host_kernels.register()

CALL = "duetjax_host_product"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
ERROR = {"float32": 5e-7, "bfloat16": 2**-8}  # float32: of its sums; bfloat16: a rounding


def drawn(shape, dtype, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(DTYPES[dtype])


def multiplied(x, weight, dtype=None):
    return np.asarray(jax.jit(lambda x, w: host_kernels.product(x, w, dtype))(x, weight))


def error(y, x, weight):
    """The norm of what y is beside a product in float64, over that product's own or its usual one.

    The larger of the two: a product that is small by chance, whose terms cancel, has no smaller
    errors in its sums, and one that is large by chance is rounded by as much more.
    """
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    right = x @ weight.T
    usual = np.linalg.norm(x) * np.linalg.norm(weight) / np.sqrt(x.shape[1])
    return np.linalg.norm(y.astype(np.float64) - right) / max(usual, np.linalg.norm(right))


def as_bits(array):
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


def operations(product, x, weight):
    return jax.jit(product).lower(x, weight).as_text()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, FEW_ROWS),
    width=st.integers(1, 300),
    outputs=st.integers(1, 70),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_few_rows_of_any_size_give_the_product(rows, width, outputs, dtype):
    x, weight = drawn((rows, width), dtype), drawn((outputs, width), dtype, 1)
    y = multiplied(x, weight)
    assert y.dtype == x.dtype
    assert error(y, x, weight) < ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(768, 768), (2048, 768), (768, 4096), (100, 32001)], ids=str)
def test_weights_that_threads_share_give_the_product(shape, dtype):
    width, outputs = shape
    x, weight = drawn((3, width), dtype), drawn((outputs, width), dtype, 1)
    assert error(multiplied(x, weight), x, weight) < ERROR[dtype]


def test_narrow_rows_can_have_a_wide_result_which_is_not_rounded_twice():
    x, weight = drawn((4, 500), "bfloat16"), drawn((60, 500), "bfloat16", 1)
    y = multiplied(x, weight, jnp.float32)
    assert y.dtype == np.float32
    assert error(y, x, weight) < ERROR["float32"]
    narrow = multiplied(x, weight)
    np.testing.assert_array_equal(as_bits(narrow), as_bits(y.astype(narrow.dtype)))


@pytest.mark.parametrize("axes", [(), (5,), (2, 3), (1, 2, 4)], ids=str)
def test_leading_axes_are_kept(axes):
    x, weight = drawn((*axes, 20), "float32"), drawn((7, 20), "float32", 1)
    y = multiplied(x, weight)
    assert y.shape == (*axes, 7)
    rows = multiplied(x.reshape(-1, 20), weight)
    np.testing.assert_array_equal(y.reshape(-1, 7), rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_in_any_company(dtype):
    x, weight = drawn((FEW_ROWS, 770), dtype), drawn((1280, 770), dtype, 1)
    together = as_bits(multiplied(x, weight))
    for rows in (1, 2, 3, 5, 8):
        for first in range(0, FEW_ROWS - rows + 1, 3):
            some = as_bits(multiplied(x[first : first + rows], weight))
            np.testing.assert_array_equal(some, together[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_comes_out_as_in_xla(dtype):
    x, weight = drawn((6, 77), dtype), drawn((40, 77), dtype, 1)
    x[1, 76], x[3, 0], x[4, 8], weight[11, 5], weight[30, 76] = np.inf, np.nan, 0, np.inf, -np.inf
    x[4, 5] = 0  # times an infinity
    ours = multiplied(x, weight)
    xla = np.asarray(jax.jit(layers.product)(x, weight))
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(xla))
    np.testing.assert_array_equal(np.isposinf(ours), np.isposinf(xla))
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(xla))
    assert np.isnan(ours[3]).all()
    assert np.isfinite(np.delete(np.delete(ours, [1, 3], 0), [11, 30], 1)).all()


def test_many_rows_are_left_to_xla():
    x, weight = drawn((FEW_ROWS + 1, 64), "float32"), drawn((32, 64), "float32", 1)
    assert CALL not in operations(host_kernels.product, x, weight)
    assert CALL in operations(host_kernels.product, x[1:], weight)
    assert error(multiplied(x, weight), x, weight) < ERROR["float32"]


MISFITS = {
    "x of a product": ((2, 8), np.int32, (3, 8), np.float32, (2, 3), np.float32),
    "no matrix of x's type": ((2, 8), np.float32, (3, 8), np.float16, (2, 3), np.float32),
    "rows of another length": ((2, 8), np.float32, (3, 9), np.float32, (2, 3), np.float32),
    "the result": ((2, 8), np.float32, (3, 8), np.float32, (2, 3), np.float16),
    r"\[B, out\]": ((2, 8), np.float32, (3, 8), np.float32, (3, 2), np.float32),
}


@pytest.mark.parametrize("what", MISFITS)
def test_operands_that_do_not_fit_are_refused_by_name(what):
    x, x_type, weight, weight_type, y, y_type = MISFITS[what]
    call = jax.jit(jax.ffi.ffi_call(CALL, jax.ShapeDtypeStruct(y, y_type)))
    with pytest.raises(jax.errors.JaxRuntimeError, match=what):
        jax.block_until_ready(call(np.ones(x, x_type), np.ones(weight, weight_type)))


# In the model.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_a_model_says_the_same_with_either_product(name, dtype):
    config, tokens = ModelConfig.from_hf(tiny.CONFIGS[name]), tiny.prompt(name, 12)
    fused = dict(Definition(config, dtype).fusion.fuse(tiny.weights(tiny.CONFIGS[name])))

    def logits(product):
        definition = Definition(config, dtype, product)
        leaves = definition.ordered({n: jnp.asarray(v, dtype) for n, v in fused.items()})

        @jax.jit
        def run(leaves):
            decoder = definition.bind(leaves)
            return decoder.logits(decoder(tokens, jnp.arange(len(tokens)), causal_attention))

        return np.asarray(run(leaves))

    ours, theirs = logits(host_kernels.product), logits(layers.product)
    assert ours.dtype == theirs.dtype == np.float32
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert 0 < difference < {"float32": 1e-5, "bfloat16": 0.03}[dtype]


@pytest.mark.parametrize("backend", [Backend.LANES, Backend.JAX])
def test_the_lanes_decode_program_has_these_products_and_no_other(backend):
    config = ModelConfig.from_hf(tiny.CONFIGS["llama-biases"])
    engine = EngineConfig(backend=backend, max_num_seqs=4, max_model_len=64)
    programs, _, _ = plan_programs(config, engine, find_device(engine))
    text = programs.lower((Program.DECODE, 4)).as_text()
    in_lanes = backend is Backend.LANES
    assert text.count(f"@{CALL}") == (4 * config.num_layers + 1 if in_lanes else 0)
    assert ("dot_general" in text) is not in_lanes

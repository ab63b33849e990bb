"""The prefill kernel compiled for absent GPUs: what the assembler says, and what is around it."""

import jax
import jax.numpy as jnp
import pytest
from device_table import HAS_CUDA_WHEELS, WHY_NOT
from test_decode_kernel_compiled import SHARED_MEMORY, assembled, kernels_for  # noqa: F401

from duetjax.model.kv_pages import KVLayout
from duetjax.runtime.inspection import inspect_program
from duetjax.runtime.placeholders import mark
from duetjax.runtime.target import absent_gpu
from pallas_kernels.choice import ModelShapes
from pallas_kernels.pages import FP8
from pallas_kernels.prefill import FEWEST_REGISTERS, MOST_REGISTERS, prefill_tiles
from pallas_kernels.shapes import PLAIN_SCORES, Scores, Sizes
from pallas_kernels.tiles import WARPGROUPS

pytestmark = pytest.mark.skipif(not HAS_CUDA_WHEELS, reason=WHY_NOT)

R, M, P = 32, 64, 32
FEW, MANY = 256, 2048
"""Tokens: tiles of few have spans, which those of many need not."""

FORMS = [
    (ModelShapes(32, 8, 128, 64, "bfloat16"), PLAIN_SCORES),
    (ModelShapes(7, 1, 64, 16, "float16"), Scores(window=1000)),
    (ModelShapes(16, 8, 256, 128, "bfloat16"), Scores(soft_cap=50.0, window=1000)),
    (ModelShapes(16, 8, 128, 64, FP8), Scores(soft_cap=50.0, window=1000)),
    # Those with the most heads in a tile are the nearest to spilling.
    (ModelShapes(64, 8, 256, 64, "bfloat16"), Scores(soft_cap=50.0, window=1000)),
    (ModelShapes(8, 8, 256, 64, FP8), Scores(soft_cap=50.0)),
    (ModelShapes(32, 8, 256, 128, FP8), Scores(window=1000)),
    (ModelShapes(64, 8, 256, 64, FP8), PLAIN_SCORES),
    (ModelShapes(16, 1, 256, 128, FP8), Scores(soft_cap=50.0, window=1000)),
    # Of the warpgroup that loads, those with the most pages in a step.
    (ModelShapes(64, 8, 64, 16, "float16"), Scores(soft_cap=50.0, window=1000)),
]


def operands(target, shapes, T=FEW):
    """q, pages, page table, row offsets, cached lengths, and scales of pages in fp8."""
    K, S, D = shapes.num_kv_heads, shapes.page_size, shapes.head_dim
    is_fp8 = shapes.dtype == FP8
    scales = [target.abstract((P, K, 2), jnp.float32)] * is_fp8
    return (
        target.abstract((T, shapes.num_heads, D), "bfloat16" if is_fp8 else shapes.dtype),
        target.abstract((P, K, 2, S, D), shapes.dtype),
        target.abstract((R, M), jnp.int32),
        target.abstract((R + 1,), jnp.int32),
        target.abstract((R,), jnp.int32),
        *scales,
    )


@pytest.mark.parametrize(
    ("shapes", "scores", "T"),
    [*((*form, FEW) for form in FORMS), (*FORMS[0], MANY), (*FORMS[2], MANY), (*FORMS[7], MANY)],
    ids=str,
)
def test_a_form_spills_nothing_and_has_the_memory_that_it_says(shapes, scores, T, assembled):  # noqa: F811
    target, tuning = absent_gpu("h200-sxm"), kernels_for(shapes, scores).tuning
    arguments = operands(target, shapes, T)
    sizes = Sizes.of(*arguments[:3], tuning, scores, interpreted=False)

    def prefill(q, pages, table, offsets, cached, scales=None):
        return prefill_tiles(q, pages, table, (offsets, cached), sizes, scales)

    found, spilled = assembled(target, prefill, arguments)
    [(registers, shared)] = [found["prefill_tiles"]]
    assert T == FEW or "combine_spans" not in found
    assert spilled == 0
    assert abs(shared - sizes.prefill_shared_bytes) < 1024
    assert shared + 512 <= SHARED_MEMORY["of a block"]  # 512: barriers
    # The loader gives registers back, and those that compute take no more than that.
    assert MOST_REGISTERS * WARPGROUPS + FEWEST_REGISTERS <= registers * (WARPGROUPS + 1) <= 512


@pytest.mark.parametrize(("gpu", "dtype"), [("h100-sxm", "bfloat16"), ("h200-sxm", FP8)])
def test_layers_prefill_in_place_without_loops_and_with_one_text_of_each_kernel(gpu, dtype):
    target, num_layers = absent_gpu(gpu), 4
    layout = KVLayout(128, 64, 8, 128, num_layers, dtype)
    kernels = kernels_for(ModelShapes(32, 8, 128, 64, dtype))

    def program(kv, x, place, table, offsets, cached):
        written = []
        for pages in kv:
            k = x[:, ::4]  # any keys
            written.append(kernels.write_kv(pages, k, k * 2, *place))
            x = x + kernels.prefill_attention(x, written[-1], table, offsets, cached)
        return mark([*jax.tree.leaves(written), x])

    pages = [layout.operand(target.abstract)] * layout.num_arrays
    x, place = target.abstract((FEW, 32, 128), "bfloat16"), target.abstract((FEW,), jnp.int32)
    rows = operands(target, ModelShapes(32, 8, 128, 64, "bfloat16"))[2:5]
    with target.context():
        jitted = jax.jit(program, donate_argnums=0)
        lowered = jitted.lower(pages, x, (place, place), *rows)
    assert lowered.as_text().count("mosaic_gpu_v2") == 4
    facts = inspect_program(lowered, target, layout)
    assert facts.violations == ()
    assert "kWhile" not in facts.thunks
    assert facts.alias_bytes == layout.num_pages * layout.page_bytes
    assert facts.custom_calls["mosaic_gpu_v2"] == num_layers * 4


def test_a_few_tokens_are_more_than_one_box_of_them():
    """Of a dimension with one box TMA is not told where in it to begin; no interpreter shows it."""
    target, shapes = absent_gpu("h200-sxm"), ModelShapes(8, 1, 128, 64, "bfloat16")
    q, *others = operands(target, shapes)
    few = target.abstract((8, *q.shape[1:]), q.dtype)
    with target.context():
        lowered = jax.jit(kernels_for(shapes).prefill_attention).lower(few, *others)
    assert "tensor<16x8x128xbf16>" in lowered.as_text()

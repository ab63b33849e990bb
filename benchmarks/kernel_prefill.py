"""Prefill by our kernel, by cuDNN's attention on the dense equivalent, and by XLA's kernels."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from pallas_kernels import xla, xla_fixed
from pallas_kernels.cost import Heads
from pallas_kernels.mosaic import MosaicKernels
from pallas_kernels.pages import FP8
from pallas_kernels.tiles import Spans, Tiling
from pallas_kernels.timing import (
    CALLS,
    TABLE_TOKENS,
    Attention,
    PrefillLoad,
    in_wide_table,
    seconds_per_call,
)

LLAMA, LLAMA_FP8 = Heads(32, 8, 128, 2), Heads(32, 8, 128, 2, 1)
LOADS = (
    PrefillLoad(1, 8192, 0, LLAMA, 64, "bfloat16"),
    PrefillLoad(1, 2048, 0, LLAMA, 64, "bfloat16"),
    PrefillLoad(4, 2048, 0, LLAMA, 64, "bfloat16"),
    PrefillLoad(16, 512, 0, LLAMA, 64, "bfloat16"),
    PrefillLoad(1, 2048, 6144, LLAMA, 64, "bfloat16"),
    PrefillLoad(1, 256, 0, LLAMA, 64, "bfloat16"),
    PrefillLoad(1, 256, 7936, LLAMA, 64, "bfloat16"),
    PrefillLoad(1, 32, 32736, LLAMA, 64, "bfloat16"),
    PrefillLoad(1, 8192, 0, LLAMA, 16, "bfloat16"),
    PrefillLoad(1, 8192, 0, LLAMA_FP8, 64, FP8),
    PrefillLoad(1, 8192, 0, Heads(40, 8, 128, 2), 64, "float16"),
    PrefillLoad(1, 8192, 0, Heads(32, 8, 64, 2), 64, "bfloat16"),
    PrefillLoad(1, 8192, 0, Heads(16, 8, 256, 2), 64, "bfloat16"),
)
GOAL = 550e12
"""FLOP/s of both products, of the first load on an H200; and never fewer than cuDNN."""

TOYS = (
    PrefillLoad(2, 20, 30, Heads(8, 2, 128, 2), 64, "bfloat16"),
    PrefillLoad(1, 40, 0, Heads(2, 2, 64, 2), 16, "float16"),
)


@dataclass(frozen=True)
class Row:
    """What was measured for one load, in 10^12 FLOPs per second of both products.

    uncut_microseconds: with no row's keys cut into spans, where there are too few tiles to fill a
    GPU. cudnn_tflops: None where there are keys before the queries or in fp8, and without a GPU.
    """

    load: PrefillLoad
    microseconds: float
    uncut_microseconds: float | None
    tflops: float
    cudnn_tflops: float | None
    xla_tflops: float
    worst_error: float

    def __str__(self) -> str:
        load, (H, K, D) = self.load, self.load.heads[:3]
        uncut = self.uncut_microseconds
        uncut = f"{'-':>9}" if uncut is None else f"{uncut:9.1f}"
        cudnn = "-" if self.cudnn_tflops is None else f"{self.cudnn_tflops:.0f}"
        return (
            f"{load.rows:4} {load.new:5} {load.cached:6} {f'{H}/{K}':>6} {D:4} {load.page_size:4}"
            f" {self.microseconds:10.1f} {uncut} {self.tflops:8.1f} {cudnn:>6}"
            f" {self.xla_tflops:6.1f} {self.worst_error:.1e}"
        )


HEADER = "rows   new cached    H/K    D    S         us     uncut  TFLOP/s  cuDNN    XLA error"


def measured(load: PrefillLoad, kernels: MosaicKernels, *, on_gpu: bool) -> Row:
    """Times all three, and compares ours with XLA's."""
    operands = load.operands()
    q, pages, table, *rows = operands
    ours = (q, pages, in_wide_table(table, load.page_size) if on_gpu else table, *rows)
    calls = CALLS if on_gpu else 1
    seconds = seconds_per_call(kernels.prefill_attention, ours, calls)
    uncut, tuning = None, kernels.tuning
    blocks = Tiling.of(load.heads.num_heads // load.heads.num_kv_heads).blocks(*q.shape[:2])
    spans = Spans.of(blocks, TABLE_TOKENS, tuning.prefill_span, tuning.prefill_step)
    if on_gpu and spans.most > 1:
        whole = replace(kernels, tuning=replace(tuning, prefill_span=TABLE_TOKENS))
        uncut = seconds_per_call(whole.prefill_attention, ours, calls) * 1e6
    others = seconds_per_call(xla_fixed.prefill_attention, operands, 1)
    dense = None
    if on_gpu and load.cached == 0 and load.dtype != FP8:
        cudnn = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        dense = load.flops / seconds_per_call(cudnn, load.dense()) / 1e12
    return Row(
        load,
        seconds * 1e6,
        uncut,
        load.flops / seconds / 1e12,
        dense,
        load.flops / others / 1e12,
        worst_error(kernels.prefill_attention, xla.prefill_attention, load.operands(seed=1)),
    )


def worst_error(ours: Attention, xlas: Attention, operands: tuple[jax.Array, ...]) -> float:
    """The norm of a head's error against XLA's kernels, over that of the result, at its worst."""
    got, want = (np.asarray(jax.jit(each)(*operands), np.float32) for each in (ours, xlas))
    return float((np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)).max())

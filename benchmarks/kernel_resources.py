"""What NVIDIA's assembler says of every form of the kernels, compiled for an absent GPU."""

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from duetjax.runtime.target import Target, absent_gpu
from pallas_kernels.mosaic import MosaicKernels
from pallas_kernels.pages import FP8
from pallas_kernels.shapes import DTYPES, HEAD_DIMS, PAGE_SIZES, PLAIN_SCORES, Scores
from pallas_kernels.tuning import Case, tuning_for

B, K, PAGES, TABLE_WIDTH = 64, 8, 64, 128
T = 256  # few enough for prefill to have spans, and `combine_spans` something to do
SPECIAL = (Scores(soft_cap=50.0), Scores(window=4096))


def every_form(gpu: str) -> list[dict[str, object]]:
    """A row per head_dim, page size and dtype, and per special score; prints each."""
    target = absent_gpu(gpu)
    rows = []
    for dtype in DTYPES:
        for D in HEAD_DIMS:
            for S in PAGE_SIZES:
                if tuning_for(Case("sm_90", D, S, dtype)) is None:
                    continue
                for scores in (PLAIN_SCORES, *SPECIAL) if S == 64 else (PLAIN_SCORES,):
                    row = {"head_dim": D, "page_size": S, "dtype": dtype, "scores": str(scores)}
                    row |= resources(target, Case("sm_90", D, S, dtype), scores)
                    rows.append(row)
                    print(row, flush=True)
    return rows


def resources(target: Target, case: Case, scores: Scores, group: int = 4) -> dict[str, object]:
    """Registers, bytes of spills and of shared memory by kernel, and seconds to compile all.

    Registers of prefill are those that every thread begins with; see `prefill.MOST_REGISTERS`.
    serialized: products wait for each other; the assembler says so where it cannot order them else.
    """
    entry = tuning_for(case)
    assert entry is not None, case
    kernels, D, S = MosaicKernels(entry.tuning, scores), case.head_dim, case.page_size
    is_fp8 = case.dtype == FP8
    arguments = (
        target.abstract((T, K * group, D), "bfloat16" if is_fp8 else case.dtype),
        target.abstract((PAGES, K, 2, S, D), case.dtype),
        target.abstract((B, TABLE_WIDTH), jnp.int32),
        (target.abstract((B + 1,), jnp.int32), target.abstract((B,), jnp.int32)),
        *[target.abstract((PAGES, K, 2), jnp.float32)] * is_fp8,
    )
    os.environ.update(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_RESOURCES="1")
    start = time.perf_counter()
    with printed() as report:
        with target.context():
            lowered = jax.jit(kernels.prefill_with_lse).lower(*arguments)
        target.compile(lowered)
    seconds, text = time.perf_counter() - start, report[0]
    names = re.findall(r"entry function '(\w+)_mosaic_gpu_kernel'", text)
    registers = map(int, re.findall(r"Used (\d+) registers", text))
    shared = map(int, re.findall(r"smem_scratch_bytes=(\d+)", text))
    spilled = sum(map(int, re.findall(r"frame, (\d+) bytes spill stores", text)))
    in_program = sorted(names, key=lowered.as_text().index)  # the order in which they are lowered
    return {
        "registers": dict(zip(names, registers, strict=True)),
        "shared_bytes": dict(zip(in_program, shared, strict=True)),
        "spilled_bytes": spilled,
        "serialized": "serialized" in text,
        "compile_seconds": round(seconds, 2),
    }


@contextmanager
def printed() -> Iterator[list[str]]:
    """Catches what is printed by libraries too; the text is the list's element behind the block."""
    caught: list[str] = []
    sys.stdout.flush()
    ours = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield caught
        finally:
            sys.stdout.flush()
            os.dup2(ours, 1)
            os.close(ours)
            file.seek(0)
            caught.append(file.read().decode())

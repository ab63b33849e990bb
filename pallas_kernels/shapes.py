"""What fixes a kernel: the shapes of a call, how it is tuned, and which form of it runs."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.pages import FP8
from pallas_kernels.work_list import Chunks

type Shaped = jax.Array | jax.ShapeDtypeStruct

type Ref = Any
"""Memory that a kernel reads and writes, in global or shared memory or in accumulators."""

WGMMA_ROWS = 64
LSE_LANES = 32
"""Of log-sum-exps that decode copies to global memory; the first ones are heads."""

MOST_GROUP = 16
HEAD_DIMS = (64, 96, 128, 256)
STEPS = (64, 128)
PAGE_SIZES = (16, 32, 64, 128)
WIDE_DTYPES = ("bfloat16", "float16")
DTYPES = (*WIDE_DTYPES, FP8)
LEAST_FP8_PAGE = 64
"""A step of the softmax has one page's scale."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is worth measuring. Chunks and steps change results, in their last bits.

    Of decode: chunk: tokens of KV per item of work, at least; step: tokens per step of the softmax,
    64 or 128; stages: steps in flight per block; blocks: of the constant grid. Of prefill: its step
    and stages, two or more: a step's values are read with the next one's keys; prefill_span: keys
    of a row for which there is another block, where tiles are few.
    """

    chunk: int
    step: int
    stages: int
    blocks: int
    prefill_step: int = 64
    prefill_stages: int = 2
    prefill_span: int = 1024

    def __post_init__(self) -> None:
        steps, cuts = {self.step, self.prefill_step}, (self.chunk, self.prefill_span)
        is_power = all(cut.bit_count() == 1 for cut in cuts)
        if not steps <= set(STEPS) or not is_power or min(cuts) < max(STEPS):
            raise ValueError(
                f"chunks and spans are powers of two from {max(STEPS)}, steps {STEPS}: {self}"
            )
        if min(self.stages, self.prefill_stages - 1, self.blocks) < 1:
            raise ValueError(f"stages and blocks are 1 or more, stages of prefill 2: {self}")


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model wants of its scores. None: not at all.

    scale: of q . k, 1 / sqrt(D) if None. soft_cap: scores become cap * tanh(score / cap).
    window: keys that a query sees, its own included.
    """

    scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.scale, self.soft_cap, self.window) if value is not None]
        if min(given, default=1) <= 0:
            raise ValueError(f"scales, caps and windows are positive: {self}")


PLAIN_SCORES = Scores()
"""q . k / sqrt(D), and nothing else."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """One model's kernels: K, G = H / K, S, D, decode's chunks, what `Tuning` and `Scores` say.

    dtype: of the pages. Those in fp8 become float16 in shared memory, as Hopper converts to no
    other, and their scales, one per page, KV head and K or V, go into scores and weights.
    interpreted: the form for Pallas' interpreter, which has no products with operands or initial
    sums in registers. Weights go through shared memory, sums are added up, and slots that a product
    has read are read once more, since its reads are not part of the detection of races.
    """

    num_kv_heads: int
    group: int
    page_size: int
    head_dim: int
    dtype: str
    chunks: Chunks
    tuning: Tuning
    scale: float
    soft_cap: float | None
    interpreted: bool

    @classmethod
    def of(
        cls,
        q: Shaped,
        pages: Shaped,
        page_table: Shaped,
        tuning: Tuning,
        scores: Scores,
        *,
        interpreted: bool,
    ) -> "Sizes":
        """The kernels for operands of these shapes; see `pallas_kernels.xla.decode_attention`.

        Raises ValueError for shapes that it does not take.
        """
        H, D = q.shape[1:]
        K, _, S, _ = pages.shape[1:]
        if (reason := why_not(H, K, S, D, pages.dtype)) is not None:
            raise ValueError(f"no kernel for {reason}")
        if q.dtype != pages.dtype and pages.dtype.name != FP8:
            raise ValueError(f"queries of {q.dtype} do not fit pages of {pages.dtype}")
        if pages.dtype.name == FP8 and max(tuning.step, tuning.prefill_step) > S:
            raise ValueError(f"a step of fp8 pages has one scale: {tuning} for pages of {S}")
        chunks = Chunks.of(page_table.shape[1] * S, tuning.chunk, scores.window)
        scale = D**-0.5 if scores.scale is None else scores.scale
        dtype = pages.dtype.name
        return cls(K, H // K, S, D, dtype, chunks, tuning, scale, scores.soft_cap, interpreted)

    @property
    def head_rows(self) -> int:
        """Rows of a partial result: the heads of a KV head, in boxes of 8."""
        return -(-self.group // 8) * 8

    @property
    def operand_dtype(self) -> str:
        """Of what products take."""
        return "float16" if self.dtype == FP8 else self.dtype

    @property
    def copies(self) -> int:
        """TMA loads per step. K and V of one page are one, those of several lie apart."""
        pages = self.tuning.step // self.page_size
        return 2 * pages if pages > 1 else 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a decode block of the compiled form, barriers apart."""
        D, step, stages = self.head_dim, self.tuning.step, self.tuning.stages
        pair, result = 2 * step * D, WGMMA_ROWS * (D + 1) * 4
        if self.dtype == FP8:
            return WGMMA_ROWS * D * 2 + max(stages * pair, result) + pair * 2
        return WGMMA_ROWS * D * 2 + max(stages * pair * 2, result)

    @property
    def prefill_shared_bytes(self) -> int:
        """Shared memory of a prefill block of the compiled form, barriers apart."""
        D, pair = self.head_dim, 2 * self.tuning.prefill_step * self.head_dim
        stored = pair if self.dtype == FP8 else 0
        slots = self.tuning.prefill_stages * pair * 2
        return 2 * WGMMA_ROWS * (D * 2 + 4) + slots + stored


def head_boxes(sizes: Sizes, index: jax.Array) -> pl.Slice:
    """All rows of `Sizes.head_rows` in global memory; TMA leaves out those beyond the heads.

    jax refuses a slice that it sees reach beyond an array; one that begins at any index of the
    kernel's, times 0, it does not see through.
    """
    return pl.ds(index * 0, sizes.head_rows)


def why_not(
    num_heads: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: jnp.dtype | str
) -> str | None:
    """What the kernels lack for a model of these shapes; None if they can run it."""
    group, name = num_heads // num_kv_heads, jnp.dtype(dtype).name
    if num_heads % num_kv_heads or group > MOST_GROUP:
        return f"{num_heads} heads on {num_kv_heads} KV heads; it takes up to {MOST_GROUP} on one"
    if page_size not in PAGE_SIZES:
        return f"pages of {page_size} tokens; it takes {PAGE_SIZES}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}; it takes {HEAD_DIMS}"
    if name not in DTYPES:
        return f"pages of {name}; it takes {DTYPES}"
    if name == FP8 and page_size < LEAST_FP8_PAGE:
        return f"fp8 pages of {page_size} tokens; it takes {LEAST_FP8_PAGE} or more"
    return None

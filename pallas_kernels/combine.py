"""Puts parts of attention together, in their order and weighted by their sums.

They are the chunks of a decoding row, or the spans of a prefill tile.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.shapes import WGMMA_ROWS, Ref, Sizes, head_boxes
from pallas_kernels.softmax import LN_2
from pallas_kernels.tiles import WARPGROUPS, Tiling

AT_ONCE = 4
"""Partial results loaded together: their latencies overlap."""

_MOST_QUERIES = 16
"""Of a head, that are combined by one block: more of them are fewer blocks, and more registers."""

_TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 32), (2, 32), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
"""8 rows by 32 columns over 128 threads: two rows per warp, two columns per thread."""


def combine(
    values: jax.Array, lse: jax.Array, lengths: jax.Array, sizes: Sizes, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Rows from their chunks: out [B, H, D] in dtype, natural log-sum-exp [B, H] float32.

    values, lse: see `decode_chunks`; lengths [B]. Rows without keys get zeros and minus infinity.
    """
    K, G, D = sizes.num_kv_heads, sizes.group, sizes.head_dim
    B = lengths.shape[0]
    shape = (sizes.head_rows, D)
    out_rows = G if G <= 8 else sizes.head_rows  # boxes of 8 heads; one alone may lack some

    def body(values: Ref, lse: Ref, lengths: Ref, out: Ref, out_lse: Ref, *scratch: Ref) -> None:
        out_s, lse_s = scratch
        row, head = lax.axis_index("row"), lax.axis_index("head")
        first, behind = sizes.chunks.bounds(lengths[row])

        def chunk(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            at = (row * sizes.chunks.per_row + index) * K + head
            return _part(values.at[at], lse.at[at, pl.ds(0, sizes.head_rows)])

        mean, log_sum = _combined(chunk, first, behind, shape)
        out_s[...], lse_s[...] = mean.astype(dtype), log_sum
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out.at[row * K + head, head_boxes(sizes, head)])
        plgpu.copy_smem_to_gmem(lse_s, out_lse.at[row * K + head])
        plgpu.wait_smem_to_gmem(0)

    run: Any = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B * K, out_rows, D), dtype),
            jax.ShapeDtypeStruct((B * K, sizes.head_rows), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM(shape, dtype),
            plgpu.SMEM((sizes.head_rows,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(B, K),
        grid_names=("row", "head"),
        kernel_name="combine_chunks",
    )
    out, out_lse = run(values, lse, lengths)
    return out[:, :G].reshape(B, K * G, D), out_lse[:, :G].reshape(B, K * G)


def combine_spans(
    out: jax.Array, lse: jax.Array, of_spans: list[jax.Array], tiles: jax.Array, tiling: Tiling
) -> tuple[jax.Array, jax.Array]:
    """Results of the tiles that have more than one span; those of others are there.

    out [T, H, D], lse [blocks * WARPGROUPS, 64]: as prefill stores those of tiles. of_spans: means
    [spans * blocks * WARPGROUPS, 64, D] and log-sum-exps in base 2 [spans * blocks * WARPGROUPS,
    64], both float32. tiles: see `TileList`. Returns out and lse, which become what is returned.
    """
    (_, H, D), groups = out.shape, lse.shape[0]
    heads, tokens = tiling.heads, tiling.group_tokens
    rows = min(tokens, _MOST_QUERIES)
    boxes, shape = WGMMA_ROWS // rows, (rows, D)

    def body(
        means: Ref, log_sums: Ref, tiles: Ref, out: Ref, lse: Ref, out_s: Ref, lse_s: Ref
    ) -> None:
        index, part = lax.axis_index("tile"), lax.axis_index("heads")
        box = lax.axis_index("box")
        group, box = lax.div(box, jnp.int32(boxes)), lax.rem(box, jnp.int32(boxes))
        tile, spans = tiles[index, 0], tiles[index, 3]
        place = (tile * (H // heads) + part) * WARPGROUPS + group
        first = pl.multiple_of(box * rows, rows)  # of the queries, one head after the other
        queries = pl.ds(first, rows)

        def span(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            at = index * groups + place
            return _part(means.at[at, queries], log_sums.at[at, queries])

        @pl.when(spans > 1)
        def _() -> None:
            mean, log_sum = _combined(span, jnp.int32(0), spans, shape)
            out_s[...], lse_s[...] = mean.astype(out_s.dtype), log_sum
            plgpu.commit_smem()
            token = tile * tiling.tokens + group * tokens + lax.rem(first, jnp.int32(tokens))
            head = part * heads + lax.div(first, jnp.int32(tokens))
            box_of_out = out.at[pl.ds(pl.multiple_of(token, 8), rows), head]
            plgpu.copy_smem_to_gmem(out_s, box_of_out)
            plgpu.copy_smem_to_gmem(lse_s, lse.at[place, queries])
            plgpu.wait_smem_to_gmem(0)

    run: Any = plgpu.kernel(
        body,
        scratch_types=[plgpu.SMEM(shape, out.dtype), plgpu.SMEM((rows,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(tiles.shape[0], H // heads, WARPGROUPS * boxes),
        grid_names=("tile", "heads", "box"),
        kernel_name="combine_spans",
    )
    refs = jax.new_ref(out), jax.new_ref(lse)
    run(*of_spans, tiles, *refs)
    combined: tuple[jax.Array, jax.Array] = jax.freeze(refs[0]), jax.freeze(refs[1])
    return combined


def _part(values: Ref, log_sums: Ref) -> tuple[jax.Array, jax.Array]:
    """Means [n, D] and log-sum-exps in base 2 [n] of a part, from global memory."""
    log_sum = plgpu.load(log_sums, layout=_TILE.reduce(1), optimized=False)
    return plgpu.load(values, layout=_TILE, optimized=False), log_sum


def _combined(
    part: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    first: jax.Array,
    behind: jax.Array,
    shape: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
    """Means, and natural log-sum-exps, of some parts together; 0 and minus infinity of none."""

    def several(turn: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, mean = state
        start = first + turn * AT_ONCE
        indices = [start + i for i in range(AT_ONCE)]
        parts = [part(jnp.minimum(index, behind - 1)) for index in indices]
        for index, (tile, log_sum) in zip(indices, parts, strict=True):
            # Those behind the last weigh nothing.
            log_sum = log_sum + jnp.where(index < behind, 0.0, -jnp.inf)
            new_peak = jnp.maximum(peak, log_sum)
            kept, weight = jnp.exp2(peak - new_peak), jnp.exp2(log_sum - new_peak)
            total = total * kept + weight
            kept, weight = (lax.broadcast_in_dim(x, shape, [0]) for x in (kept, weight))
            mean, peak = mean * kept + tile * weight, new_peak
        return peak, total, mean

    zeros = jnp.zeros(shape[:1], jnp.float32)
    empty = (
        plgpu.layout_cast(zeros - 1e30, _TILE.reduce(1)),  # finite: no inf - inf
        plgpu.layout_cast(zeros, _TILE.reduce(1)),
        plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _TILE),
    )
    turns = lax.div(behind - first + AT_ONCE - 1, AT_ONCE)
    peak, total, mean = lax.fori_loop(0, turns, several, empty)
    has_keys = total > 0
    share = jnp.where(has_keys, 1 / jnp.where(has_keys, total, 1), 0)
    mean = mean * lax.broadcast_in_dim(share, shape, [0])
    return mean, jnp.where(has_keys, (peak + jnp.log2(total)) * LN_2, -jnp.inf)

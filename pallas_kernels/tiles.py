"""Which tiles of packed queries a prefill has, and which rows lie in them: the longest first.

A tile has the queries of a fixed number of consecutive tokens for some heads of one KV head,
whatever rows these tokens are of: it visits the keys of one row after the other, and a query takes
in those of its own. So how many tiles there are follows from shapes alone, and each of them has its
output for itself. Rows of one query are not prefill's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

WARPGROUPS = 2
"""Of a block; each has wgmma's 64 rows of a tile."""

TILE_ROWS = WARPGROUPS * 64
MOST_HEADS = 8
"""Heads in a tile: with more of them a box of one head's tokens would be less than 8 rows."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Heads of a tile, a power of two, and its tokens: 128 queries together."""

    heads: int
    tokens: int

    @classmethod
    def of(cls, group: int) -> "Tiling":
        """For so many heads on a KV head: as many of them as divide the group evenly."""
        heads = min(group & -group, MOST_HEADS)
        return cls(heads, TILE_ROWS // heads)

    @property
    def group_tokens(self) -> int:
        """Those of one warpgroup."""
        return self.tokens // WARPGROUPS


class TileList(NamedTuple):
    """What a prefill has to do.

    rows [A, 4] int32: of the rows with two queries or more, in order: the row, its first token, the
    one behind its last, and how many keys it has before. tiles [N, 3] int32: the tiles, that with
    the most keys to visit first; the first of `rows` in each, and the one behind the last.
    """

    rows: jax.Array
    tiles: jax.Array


def tile_list(
    row_offsets: jax.Array,
    cached_lengths: jax.Array,
    num_tokens: int,
    tiling: Tiling,
    window: int | None = None,
) -> TileList:
    """Tiles of packed rows; a few small fusions, shared by all layers of a step.

    row_offsets [R + 1], cached_lengths [R]: see `pallas_kernels.xla.prefill_attention`. Sums, sorts
    and searches are comparisons with everything: on a GPU without a loop, and quicker.
    """
    rows, is_row = _longer_rows(row_offsets, cached_lengths, num_tokens)
    _, start, end, cached = rows.T
    index = jnp.arange(-(-num_tokens // tiling.tokens))
    low = index[:, None] * tiling.tokens
    high = low + tiling.tokens
    before, inside = is_row & (end <= low), is_row & (end > low) & (start < high)
    first = jnp.sum(before, axis=1)
    behind = first + jnp.sum(inside, axis=1)
    keys = jnp.minimum(end, high) - start + cached
    if window is not None:
        keys = jnp.minimum(keys, window + tiling.tokens - 1)
    work = jnp.sum(jnp.where(inside, keys, 0), axis=1)
    earlier = (work > work[:, None]) | ((work == work[:, None]) & (index < index[:, None]))
    place = jnp.sum(earlier, axis=1)
    tiles = _placed(jnp.stack([index, first, behind], axis=1), place == index[:, None])
    return TileList(rows, tiles)


def _longer_rows(
    row_offsets: jax.Array, cached_lengths: jax.Array, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """`TileList.rows`, and which of them there are [A]."""
    R = cached_lengths.shape[0]
    row = jnp.arange(R)
    start, end = row_offsets[:-1], row_offsets[1:]
    is_long = end - start > 1
    place = jnp.sum(is_long & (row < row[:, None]), axis=1)
    slot = jnp.arange(max(1, min(R, num_tokens // 2)))  # each row takes two tokens
    columns = jnp.stack([row, start, end, cached_lengths], axis=1)
    return _placed(columns, is_long & (place == slot[:, None])), slot < jnp.sum(is_long)


def _placed(columns: jax.Array, chosen: jax.Array) -> jax.Array:
    """Rows of columns [R, C] in the places [A] that chosen [A, R] gives them; 0 elsewhere."""
    placed = jnp.sum(jnp.where(chosen[:, :, None], columns, 0), axis=1)
    return placed.astype(jnp.int32)

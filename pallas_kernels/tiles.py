"""Which tiles of packed queries a prefill has, and which rows lie in them: the longest first.

A tile has the queries of a fixed number of consecutive tokens for some heads of one KV head,
whatever rows these tokens are of: it visits the keys of one row after the other, and a query takes
in those of its own. So how many tiles there are follows from shapes alone, and each of them has its
output for itself. Rows of one query are not prefill's.

Where tiles are too few to fill a GPU, each of them has several blocks, one per span of its rows'
keys. Where the spans are follows from the row's own numbers of keys and queries.
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

MOST_SPANS = 16
MOST_BLOCKS = 256
"""Of tiles and spans together: two waves of a GPU's, as a block has a multiprocessor for itself.

More would leave smaller shares idle, but those without work cost time, too.
"""


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

    def blocks(self, num_tokens: int, num_heads: int) -> int:
        """Tiles of so many packed tokens, times the blocks that their heads take."""
        return -(-num_tokens // self.tokens) * (num_heads // self.heads)


@dataclass(frozen=True, slots=True)
class Spans:
    """How the keys that a row's queries see are cut: into `most` spans, a power of two, or fewer.

    least: keys for which another span is worth it. step: of the softmax; a span has whole ones.
    """

    most: int
    least: int
    step: int

    @classmethod
    def of(cls, blocks: int, most_keys: int, least: int, step: int) -> "Spans":
        """For so many blocks of tiles, each of which sees so many keys of a row at most."""
        most = 1
        while most < MOST_SPANS and 2 * most * blocks <= MOST_BLOCKS and most * least < most_keys:
            most *= 2
        return cls(most, least, step)

    def cuts(self, first: jax.Array, behind: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the spans of the keys `first` up to `behind` begin, and how long each is."""
        origin = first - first % self.step
        keys = behind - origin
        count = jnp.clip(-(-keys // self.least), 1, self.most)
        return origin, jnp.maximum(-(-keys // (count * self.step)), 1) * self.step


class TileList(NamedTuple):
    """What a prefill has to do.

    rows [A, 6] int32: of the rows with two queries or more, in order: the row, its first token, the
    one behind its last, how many keys it has before, where its spans begin and how long each is.
    tiles [N, 4] int32: the tiles, that with the most keys to visit first; the first of `rows` in
    each, the one behind the last, and how many spans the tile has a block for.
    """

    rows: jax.Array
    tiles: jax.Array


def tile_list(
    row_offsets: jax.Array,
    cached_lengths: jax.Array,
    num_tokens: int,
    tiling: Tiling,
    spans: Spans,
    window: int | None = None,
) -> TileList:
    """Tiles of packed rows; a few small fusions, shared by all layers of a step.

    row_offsets [R + 1], cached_lengths [R]: see `pallas_kernels.xla.prefill_attention`. Sums, sorts
    and searches are comparisons with everything: on a GPU without a loop, and quicker.
    """
    rows, is_row = _longer_rows(row_offsets, cached_lengths, num_tokens)
    _, start, end, cached = rows.T
    first_key = jnp.zeros_like(cached)
    if window is not None:
        first_key = jnp.maximum(cached - window + 1, 0)
    origin, length = spans.cuts(first_key, cached + end - start)
    index = jnp.arange(-(-num_tokens // tiling.tokens))
    low = index[:, None] * tiling.tokens
    high = low + tiling.tokens
    before, inside = is_row & (end <= low), is_row & (end > low) & (start < high)
    first = jnp.sum(before, axis=1)
    behind = first + jnp.sum(inside, axis=1)
    keys = jnp.minimum(end, high) - start + cached
    num_spans = jnp.max(jnp.where(inside, -(-(keys - origin) // length), 0), axis=1)
    if window is not None:
        keys = jnp.minimum(keys, window + tiling.tokens - 1)
    work = jnp.sum(jnp.where(inside, keys, 0), axis=1)
    earlier = (work > work[:, None]) | ((work == work[:, None]) & (index < index[:, None]))
    place = jnp.sum(earlier, axis=1)
    columns = jnp.stack([index, first, behind, num_spans], axis=1)
    tiles = _placed(columns, place == index[:, None])
    rows = jnp.concatenate([rows, jnp.stack([origin, length], axis=1)], axis=1)
    return TileList(rows.astype(jnp.int32), tiles)


def _longer_rows(
    row_offsets: jax.Array, cached_lengths: jax.Array, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """The first columns of `TileList.rows`, and which of them there are [A]."""
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

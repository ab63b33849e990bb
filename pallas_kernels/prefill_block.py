"""What the warpgroups of a prefill block have in common: its memory, its tile and its steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pages import FP8
from pallas_kernels.shapes import WGMMA_ROWS, Ref, Sizes
from pallas_kernels.tiles import WARPGROUPS, Spans, Tiling
from pallas_kernels.wgmma import matrix

K, V = 0, 1
"""Where keys and values lie in a pair of them, as in pages."""

STORED_COLUMNS = 64
"""Columns of fp8 that become float16 at once; more of them are more registers than a loader has."""


def scratch(sizes: Sizes, tiling: Tiling) -> list[Any]:
    """Shared memory and barriers, in the order in which `Block` names them.

    Queries, and in their place results; slots of K, then of V; log-sum-exps. Barriers: queries are
    here, a slot is full, a slot is free, a warpgroup's turn. For fp8 pages K and V of one step as
    stored, and that they are here.
    """
    D, step, stages = sizes.head_dim, sizes.tuning.prefill_step, sizes.tuning.prefill_stages
    is_fp8 = sizes.dtype == FP8
    arrivals = 1 if is_fp8 else max(1, step // sizes.page_size)
    found = [
        matrix((WARPGROUPS, WGMMA_ROWS, D), sizes.operand_dtype),
        matrix((2, stages, step, D), sizes.operand_dtype),
        plgpu.SMEM((WARPGROUPS, WGMMA_ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=tiling.heads, num_barriers=WARPGROUPS),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=2 * stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2 * stages),
        plgpu.Barrier(num_barriers=WARPGROUPS),
    ]
    if is_fp8:
        found += [matrix((2, step, D), sizes.dtype, STORED_COLUMNS), plgpu.Barrier(num_barriers=2)]
    if sizes.interpreted:
        found.append(matrix((WARPGROUPS, WGMMA_ROWS, step), sizes.operand_dtype))
    return found


class Tile(NamedTuple):
    """Tokens and heads from these on, and rows `first` up to `behind` of the list.

    place: where its log-sum-exps go. span: the block's, of so many spans of the rows' keys.
    """

    token: jax.Array
    head: jax.Array
    place: jax.Array
    first: jax.Array
    behind: jax.Array
    span: jax.Array
    spans: jax.Array


class Row(NamedTuple):
    """A row in a tile: its tokens are `start` up to `end`, with so many keys before them.

    first, behind: the steps of it that the tile's queries see, of the block's span.
    """

    row: jax.Array
    start: jax.Array
    end: jax.Array
    cached: jax.Array
    first: jax.Array
    behind: jax.Array


class Block:
    """One block of the grid, with its operands, results and scratch: all of them refs."""

    def __init__(self, sizes: Sizes, tiling: Tiling, spans: Spans, *refs: Ref) -> None:
        self.sizes, self.tiling, self.spans = sizes, tiling, spans
        self.step_keys, self.stages = sizes.tuning.prefill_step, sizes.tuning.prefill_stages
        left = iter(refs)
        is_fp8 = sizes.dtype == FP8
        self.q, self.pages, self.table, self.rows, self.tiles = (next(left) for _ in range(5))
        self.scales = next(left) if is_fp8 else None
        self.out, self.lse = next(left), next(left)
        self.means, self.log_sums = (next(left) if spans.most > 1 else None for _ in range(2))
        self.q_s, self.kv_s, self.lse_s = (next(left) for _ in range(3))
        self.q_here, self.full, self.free, self.turn = (next(left) for _ in range(4))
        self.stored_s, self.stored_here = (next(left) if is_fp8 else None for _ in range(2))
        self.weights_s = next(left) if sizes.interpreted else None
        assert not list(left)

    @property
    def blocks(self) -> int:
        """How many there are for each span."""
        count: int = self.tiles.shape[0] * self.per_tile
        return count

    @property
    def per_tile(self) -> int:
        """Blocks that have heads of the same tokens."""
        return self.sizes.num_kv_heads * self.sizes.group // self.tiling.heads

    def tile(self) -> Tile:
        """The block's tile. Those that share keys in L2 are neighbours.

        They are all blocks of a span of the same row, and among them heads of the same tokens.
        """
        heads, per_tile = self.tiling.heads, self.per_tile
        block, span = lax.axis_index("block"), jnp.int32(0)
        if self.spans.most > 1:
            span, block = lax.div(block, self.blocks), lax.rem(block, self.blocks)
        index, part = lax.div(block, per_tile), lax.rem(block, per_tile)
        tile, first, behind, spans = (self.tiles[index, column] for column in range(4))
        token, place = tile * self.tiling.tokens, tile * per_tile + part
        return Tile(token, part * heads, place, first, behind, span, spans)

    def has_work(self) -> jax.Array:
        """Whether the tile has the block's span; where nobody has keys, the first writes that."""
        tile = self.tile()
        return tile.span < jnp.maximum(tile.spans, 1)

    def row(self, tile: Tile, index: jax.Array) -> Row:
        """The list's row of this index, as far as the tile goes."""
        row, start, end, cached = (self.rows[index, column] for column in range(4))
        position = cached - start  # of token 0, were it in the row
        last = jnp.minimum(end, tile.token + self.tiling.tokens) - 1 + position
        first_key = jnp.int32(0)
        if (window := self.sizes.chunks.window) is not None:
            first_key = jnp.maximum(jnp.maximum(start, tile.token) + position - window + 1, 0)
        step = self.step_keys
        first, behind = lax.div(first_key, step), lax.div(last, step) + 1
        if self.spans.most > 1:
            origin, length = self.rows[index, 4], self.rows[index, 5]
            low = origin + tile.span * length
            first = jnp.maximum(first, lax.div(low, step))
            behind = jnp.minimum(behind, lax.div(low + length, step))
        return Row(row, start, end, cached, first, behind)

    def over_steps[State](
        self, tile: Tile, take: Callable[[Row, jax.Array, jax.Array, State], State], state: State
    ) -> tuple[jax.Array, State]:
        """Takes in all steps of all rows: the row, its step, how many were done, the state so far.

        Returns how many there were, and the last state.
        """

        def of_row(index: jax.Array, carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            row = self.row(tile, index)

            def one(j: jax.Array, carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
                done, state = carry
                return done + 1, take(row, j, done, state)

            taken: tuple[jax.Array, State] = lax.fori_loop(row.first, row.behind, one, carry)
            return taken

        begin = (jnp.int32(0), state)
        done: tuple[jax.Array, State] = lax.fori_loop(tile.first, tile.behind, of_row, begin)
        return done

    def slot(self, done: jax.Array) -> jax.Array:
        """Where the step is that has so many before it."""
        return lax.rem(done, jnp.int32(self.stages))

    def page_ids(self, row: Row, j: jax.Array) -> list[jax.Array]:
        """The pages of step j; the row's last one stands in for those behind it.

        No key in them is seen, but what is multiplied by weights of 0 must be finite.
        """
        step, S = self.step_keys, self.sizes.page_size
        last = lax.div(row.cached + row.end - row.start - 1, S)
        indices = [lax.div(j * step + start, S) for start in range(0, step, S)]
        return [self.table[row.row, jnp.minimum(index, last)] for index in indices]

    def pair(self, tile: Tile, page: jax.Array) -> jax.Array:
        """Keys of the tile's KV head in a page, counted as in memory; values are next to them."""
        head = lax.div(tile.head, self.sizes.group)
        return (page * self.sizes.num_kv_heads + head) * 2

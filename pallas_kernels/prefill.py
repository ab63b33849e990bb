"""Prefill attention over pages on NVIDIA Hopper: a tile of packed queries per block.

Online softmax (Dao 2022), warp-specialised as in FlashAttention-3 (Shah et al. 2024): one warpgroup
loads keys and values, two compute 64 queries each and take turns, so that one has its products
while the other has its softmax. In a turn a warpgroup begins two products back to back, of queries
with the next keys and of the last weights with their values: no softmax lies between them.
`pallas_kernels.tiles` says which tiles there are. The hardware hands them, longest first, to
whichever multiprocessor is free, of all or of a slice. Tiles that are too few to fill it have a
block per span of keys, and `combine` puts the spans together, as decode's chunks.

A query takes in keys in steps that begin at position 0 of its row. A step of which it sees nothing
leaves its sums as they are, so its bits depend on its own row alone, and not on the other queries
of its tile; nor do they on how its row was cut into chunks, where there is but one span.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.combine import combine_spans
from pallas_kernels.prefill_block import Block, K, Row, Tile, V, scratch
from pallas_kernels.prefill_load import Loader
from pallas_kernels.shapes import WGMMA_ROWS, Ref, Sizes
from pallas_kernels.softmax import FP8_WEIGHTS, LN_2, LOG2_E, Softmax, scaled
from pallas_kernels.tiles import WARPGROUPS, Spans, Tiling, tile_list
from pallas_kernels.wgmma import sums

MOST_REGISTERS, FEWEST_REGISTERS = 232, 40
"""Of a thread that computes, and of one that loads: of three warpgroups 65536 at most together."""

_DEPTH = 1e30
"""Peaks begin at minus this: finite, for steps of which a query sees nothing."""

_LEAST_SCALE = 1e-30
"""As good as 0, which would make NaN of the minus infinity of keys that are not seen."""


def prefill_tiles(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    rows: tuple[jax.Array, jax.Array],
    sizes: Sizes,
    scales: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of all queries in rows of two or more; others get 0, and minus infinity.

    q [T, H, D]; pages [P, K, 2, S, D]; page_table [R, M]; rows: row_offsets [R + 1] and
    cached_lengths [R], as `rows_within` gives them; scales [P, K, 2] float32, of pages in fp8
    alone: what their values are multiples of. Returns [T, H, D] in q's dtype, and the natural
    log-sum-exps of scores [T, H] float32.
    """
    T, H, D = q.shape
    tiling, window = Tiling.of(sizes.group), sizes.chunks.window
    blocks, most_keys = tiling.blocks(T, H), page_table.shape[1] * sizes.page_size
    if window is not None:
        most_keys = min(most_keys, window + tiling.tokens)
    spans = Spans.of(blocks, most_keys, sizes.tuning.prefill_span, sizes.tuning.prefill_step)
    work = tile_list(*rows, T, tiling, spans, window)
    count = work.tiles.shape[0]
    queries = q.astype(sizes.operand_dtype)
    # Boxes of 8 tokens, two at least: where there is one, TMA is not told which of them is meant.
    spare = -T % 8 if T > 16 else 16 - T
    queries = jnp.pad(queries, ((0, spare), (0, 0), (0, 0)))
    groups = blocks * WARPGROUPS
    results = [
        jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        jax.ShapeDtypeStruct((groups, WGMMA_ROWS), jnp.float32),
    ]
    if spans.most > 1:
        shape = (spans.most * groups, WGMMA_ROWS)
        results.append(jax.ShapeDtypeStruct((*shape, D), jnp.float32))
        results.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    run: Any = plgpu.kernel(
        lambda *refs: _run(sizes, tiling, spans, *refs),
        out_type=tuple(results),
        scratch_types=scratch(sizes, tiling),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        grid=(blocks * spans.most,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="prefill_tiles",
    )
    of_pages = [] if scales is None else [scales.reshape(-1)]
    pages = pages.reshape(-1, sizes.page_size, D)
    out, lse, *of_spans = run(queries, pages, page_table, *work, *of_pages)
    if of_spans:
        out, lse = combine_spans(out, lse, of_spans, work.tiles, tiling)
    lse = lse.reshape(count, -1, WARPGROUPS, tiling.heads, tiling.group_tokens)
    lse = lse.transpose(0, 2, 4, 1, 3).reshape(-1, H)
    return out[:T].astype(q.dtype), lse[:T]


def _run(sizes: Sizes, tiling: Tiling, spans: Spans, *refs: Ref) -> None:
    """What each warpgroup of a block does."""
    group, block = lax.axis_index("warpgroup"), (sizes, tiling, spans, *refs)

    def work() -> None:
        @pl.when(group < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(MOST_REGISTERS, action="increase")
            _Attention(*block).run(group)

        @pl.when(group == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(FEWEST_REGISTERS, action="decrease")
            Loader(*block).run()

    if spans.most == 1:
        work()
    else:
        pl.when(Block(*block).has_work())(work)


class _State(NamedTuple):
    """Where 64 queries are behind a step, whose values have yet to be added.

    softmax: with that step in peaks and totals, and values scaled to its peaks. weights [64, step]:
    of the values to be added, in the operands' dtype.
    """

    softmax: Softmax
    weights: jax.Array


class _Attention(Block):
    """One of the warpgroups that compute: 64 queries, heads one after the other."""

    def run(self, group: jax.Array) -> None:
        """From the queries of a tile to their results in global memory."""
        self.group, tile = group, self.tile()
        tokens = pl.ds(self.token(tile), self.tiling.group_tokens)
        for head, part in self.parts():
            place = self.q_s.at[group, part]
            source = self.q.at[tokens, tile.head + head]
            plgpu.copy_gmem_to_smem(source, place, self.q_here.at[group])
        plgpu.barrier_wait(self.q_here.at[group])
        pl.when(group == 1)(self.end_turn)  # the other's turn is the first
        weights = jnp.zeros((WGMMA_ROWS, self.step_keys), self.q_s.dtype)
        weights = plgpu.layout_cast(weights, plgpu.Layout.WGMMA)
        start = _State(Softmax.start(self.sizes.head_dim, _DEPTH), weights)
        done, state = self.over_steps(tile, partial(self.step, tile), start)
        values = lax.cond(done > 0, self.last_values, lambda *_: state.softmax.values, done, state)
        pl.when(group == 0)(self.wait_for_turn)  # and the last
        self.store(tile, state.softmax._replace(values=values))

    def token(self, tile: Tile) -> jax.Array:
        """The warpgroup's first one. TMA leaves out those behind the last one of all."""
        first: jax.Array = pl.multiple_of(tile.token + self.group * self.tiling.group_tokens, 8)
        return first

    def parts(self) -> list[tuple[int, Any]]:
        """The tile's heads, and which of the 64 queries are theirs."""
        tokens = self.tiling.group_tokens
        return [(head, pl.ds(head * tokens, tokens)) for head in range(self.tiling.heads)]

    def wait_for_turn(self) -> None:
        """Waits until products of this warpgroup are the next to begin."""
        plgpu.barrier_wait(self.turn.at[self.group])

    def end_turn(self) -> None:
        """Says that the other warpgroup's products may follow those that have begun."""
        plgpu.barrier_arrive(self.turn.at[1 - self.group])

    def step(self, tile: Tile, row: Row, j: jax.Array, done: jax.Array, state: _State) -> _State:
        """Takes in the keys of step j of a row, and the values of the step before.

        The softmax goes on beside the second product (algorithm 2 of FlashAttention-3).
        """
        slot, before = self.slot(done), self.slot(jnp.maximum(done - 1, 0))
        # Before the first step weights are 0, and its keys, which are finite, do for values.
        which = jnp.where(done > 0, V, K)
        scales = self.scales_of(tile, row, j)
        # Where the queries lie is worked out in every step: kept, it would take ten registers.
        queries = self.q_s.at[lax.optimization_barrier(self.group)]
        plgpu.barrier_wait(self.full.at[slot])
        self.wait_for_turn()

        def run(score_sums: Ref, value_sums: Ref) -> _State:
            plgpu.wgmma(score_sums, queries, self.kv_s.at[K, slot].transpose((1, 0)))
            values_when_done = self.plus_weighted(value_sums, state, which, before)
            self.end_turn()
            k_scale, v_scale = scales()
            products = plgpu.wgmma_accumulator_load(score_sums, wait_n=1)
            pl.when(done > 0)(lambda: self.release(K, slot))  # else they stand in for values
            scores, scale = self.scores_of(tile, row, j, products, k_scale)
            peak = jnp.maximum(state.softmax.peak, scores.max(axis=1) * scale)
            kept = jnp.exp2(state.softmax.peak - peak)
            weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(peak, scores.shape, [0]))
            total = state.softmax.total * kept + weights.sum(axis=1)
            weights = weights if v_scale is None else weights * v_scale
            # A wait here keeps the assembler from waiting for the product before the softmax.
            plgpu.barrier_wait(self.full.at[self.stages + slot])
            values = values_when_done()
            self.release(which, before)
            # New operands are made when the product has read the old ones. Made earlier, they
            # would have the assembler serialize all products.
            values, kept, weights = lax.optimization_barrier((values, kept, weights))
            values = values * lax.broadcast_in_dim(kept, values.shape, [0])
            return _State(Softmax(peak, total, values), weights.astype(self.q_s.dtype))

        taken: _State = pl.run_scoped(run, sums(self.step_keys), sums(self.sizes.head_dim))
        return taken

    def last_values(self, done: jax.Array, state: _State) -> jax.Array:
        """The sums with the values of the last of so many steps."""
        slot = self.slot(done - 1)
        self.wait_for_turn()

        def run(value_sums: Ref) -> jax.Array:
            values_when_done = self.plus_weighted(value_sums, state, V, slot)
            self.end_turn()
            return values_when_done()

        values: jax.Array = pl.run_scoped(run, sums(self.sizes.head_dim))
        self.release(V, slot)
        return values

    def plus_weighted(
        self, value_sums: Ref, state: _State, which: jax.Array | int, slot: jax.Array
    ) -> Callable[[], jax.Array]:
        """Begins values + weights @ slot; what is returned waits for all products and gives it."""
        values, matrix = state.softmax.values, self.kv_s.at[which, slot]
        if self.weights_s is None:
            value_sums[...] = values
            plgpu.wgmma(value_sums, state.weights, matrix)
            return lambda: value_sums[...]
        self.weights_s[self.group] = state.weights
        plgpu.commit_smem()
        plgpu.wgmma(value_sums, self.weights_s.at[self.group], matrix)
        return lambda: values + value_sums[...]

    def scales_of(
        self, tile: Tile, row: Row, j: jax.Array
    ) -> Callable[[], tuple[jax.Array | float, jax.Array | None]]:
        """What products with K and weights of V are to be multiplied by in step j, when called.

        The page is read at once, its scales when called: neither is waited for within a turn.
        """
        if self.scales is None:
            return lambda: (self.sizes.scale, None)
        scales, [page] = self.scales, self.page_ids(row, j)

        def of_page() -> tuple[jax.Array, jax.Array]:
            pair = self.pair(tile, page)
            k_scale = jnp.maximum(scales[pair + K] * self.sizes.scale, _LEAST_SCALE)
            return k_scale, scales[pair + V] * FP8_WEIGHTS

        return of_page

    def scores_of(
        self, tile: Tile, row: Row, j: jax.Array, products: jax.Array, scale: jax.Array | float
    ) -> tuple[jax.Array, jax.Array | float]:
        """Scores [64, step] of step j, and what makes them base 2; -inf of keys not seen."""
        if self.sizes.soft_cap is not None:
            products, scale = scaled(products, scale, self.sizes.soft_cap), 1.0
        else:
            scale = scale * LOG2_E
        return self.seen(self.token(tile), row, j, products), scale

    def seen(self, first: jax.Array, row: Row, j: jax.Array, scores: jax.Array) -> jax.Array:
        """The scores of keys that queries see, those of tokens from `first`; others' are -inf.

        Most steps are seen by all queries, and need no comparisons.
        """
        window, tokens = self.sizes.chunks.window, self.tiling.group_tokens
        first_key = j * self.step_keys
        position = row.cached + first - row.start  # of the first token, were it in the row
        all_seen = (row.start <= first) & (first + tokens <= row.end)
        all_seen = all_seen & (first_key + self.step_keys - 1 <= position)
        if window is not None:
            all_seen = all_seen & (first_key > position + tokens - 1 - window)

        def compared(scores: jax.Array) -> jax.Array:
            shape, layout = scores.shape, plgpu.Layout.WGMMA
            index = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=layout.reduce(1))
            key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout) + first_key
            token = first + (index & (tokens - 1))
            last = row.cached + token - row.start
            if window is not None:
                hidden = lax.broadcast_in_dim(last - window, shape, [0])
            last = jnp.where((token >= row.start) & (token < row.end), last, -1)
            seen = key <= lax.broadcast_in_dim(last, shape, [0])
            if window is not None:
                seen = seen & (key > hidden)
            return jnp.where(seen, scores, -jnp.inf)

        chosen: jax.Array = lax.cond(all_seen, lambda scores: scores, compared, scores)
        return chosen

    def release(self, which: jax.Array | int, slot: jax.Array) -> None:
        """Says that a slot has been read."""
        if self.sizes.interpreted:
            _ = self.kv_s[which, slot]
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free.at[which * self.stages + slot])

    def store(self, tile: Tile, state: Softmax) -> None:
        """Writes results: the tile's, or those of its span; 0 for queries that have seen no key."""
        has_keys = state.total > 0
        share = jnp.where(has_keys, 1 / jnp.where(has_keys, state.total, 1), 0)
        share = share * (1.0 if self.scales is None else 1 / FP8_WEIGHTS)
        values = state.values * lax.broadcast_in_dim(share, state.values.shape, [0])
        log_sums = jnp.where(has_keys, state.peak + jnp.log2(state.total), -jnp.inf)
        if self.means is None:
            self.store_tile(tile, values, log_sums)
        else:
            pl.when(tile.spans > 1)(lambda: self.store_span(tile, values, log_sums))
            pl.when(tile.spans <= 1)(lambda: self.store_tile(tile, values, log_sums))

    def store_span(self, tile: Tile, values: jax.Array, log_sums: jax.Array) -> None:
        """Writes what `combine_spans` reads: float32, log-sum-exps in base 2."""
        assert self.means is not None
        assert self.log_sums is not None
        place = (tile.span * self.blocks + tile.place) * WARPGROUPS + self.group
        self.means[place] = values
        self.log_sums[place] = log_sums

    def store_tile(self, tile: Tile, values: jax.Array, log_sums: jax.Array) -> None:
        """Writes the tile's results, by way of where the queries were until now."""
        self.q_s[self.group] = values.astype(self.q_s.dtype)
        self.lse_s[self.group] = log_sums * LN_2
        plgpu.commit_smem()
        tokens = pl.ds(self.token(tile), self.tiling.group_tokens)
        for head, part in self.parts():
            place = self.out.at[tokens, tile.head + head]
            plgpu.copy_smem_to_gmem(self.q_s.at[self.group, part], place)
        place = self.lse.at[tile.place * WARPGROUPS + self.group]
        plgpu.copy_smem_to_gmem(self.lse_s.at[self.group], place)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

"""Which tiles a prefill has and what lies in them, and what prefill costs."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_profiles import small_hardware, small_model

from duetjax.policy.roofline import Roofline
from pallas_kernels.cost import Heads, decode_cost, prefill_cost
from pallas_kernels.tiles import MOST_BLOCKS, MOST_SPANS, TILE_ROWS, Spans, Tiling, tile_list
from pallas_kernels.work_list import rows_within

NUM_TOKENS, NUM_ROWS = 320, 12


def test_rows_go_no_further_than_tokens_and_pages():
    offsets, cached = rows_within(np.array([0, 5, 99]), np.array([500, -3]), 10, most_keys=64)
    assert (offsets.tolist(), cached.tolist()) == ([0, 5, 10], [59, 0])


@given(group=st.integers(1, 16))
def test_a_tile_has_128_queries_of_heads_that_share_a_kv_head(group):
    tiling = Tiling.of(group)
    assert group % tiling.heads == 0
    assert tiling.heads * tiling.tokens == TILE_ROWS
    assert tiling.group_tokens % 8 == 0


@settings(max_examples=25)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 3, 8, 17, 40, 100]), max_size=NUM_ROWS),
    cached=st.lists(st.integers(0, 500), min_size=NUM_ROWS, max_size=NUM_ROWS),
    group=st.sampled_from([1, 4, 8]),
    window=st.sampled_from([None, 1, 60]),
    spans=st.sampled_from([Spans(1, 1024, 64), Spans(4, 128, 64), Spans(8, 128, 128)]),
)
def test_every_longer_row_is_in_its_tiles_and_the_longest_tile_is_first(
    counts, cached, group, window, spans
):
    while sum(counts) > NUM_TOKENS:
        counts = counts[:-1]
    counts = np.array([*counts, *[0] * (NUM_ROWS - len(counts))])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    tiling, cached = Tiling.of(group), np.array(cached, np.int32)
    run = jax.jit(tile_list, static_argnums=(2, 3, 4, 5))
    rows, tiles = map(np.asarray, run(offsets, cached, NUM_TOKENS, tiling, spans, window))
    longer = [row for row in range(NUM_ROWS) if counts[row] > 1]
    want = [(row, offsets[row], offsets[row + 1], cached[row]) for row in longer]
    assert [tuple(row) for row in rows[: len(longer), :4]] == want
    cuts = rows[: len(longer), 4:]
    for (_, start, end, before), (origin, length) in zip(want, cuts, strict=True):
        first = 0 if window is None else max(0, before - window + 1)
        assert origin == first - first % spans.step
        keys = before + end - start - origin
        assert length % spans.step == 0
        assert -(-keys // length) <= min(spans.most, max(1, -(-keys // spans.least)))
    assert sorted(tiles[:, 0]) == list(range(-(-NUM_TOKENS // tiling.tokens)))
    work = []
    for tile, first, behind, num_spans in tiles:
        low, high = tile * tiling.tokens, (tile + 1) * tiling.tokens
        inside = [i for i, (_, start, end, _) in enumerate(want) if start < high and end > low]
        assert inside == list(range(first, behind))
        ends = [min(want[i][2], high) - want[i][1] + want[i][3] for i in inside]
        needed = [-(-(end - cuts[i][0]) // cuts[i][1]) for i, end in zip(inside, ends, strict=True)]
        assert num_spans == max([0, *needed]) <= spans.most
        most = max([0, *ends]) if window is None else window + tiling.tokens - 1
        work.append(sum(min(end, most) for end in ends))
    assert work == sorted(work, reverse=True)


@given(
    blocks=st.integers(1, 5000), most_keys=st.integers(1, 10**6), step=st.sampled_from([64, 128])
)
def test_keys_are_cut_where_tiles_are_few_and_rows_can_be_long(blocks, most_keys, step):
    spans = Spans.of(blocks, most_keys, 1024, step)
    assert spans.most.bit_count() == 1
    assert spans.most <= MOST_SPANS
    assert spans.most == 1 or spans.most * blocks <= MOST_BLOCKS
    doubled = 2 * spans.most
    assert doubled > MOST_SPANS or doubled * blocks > MOST_BLOCKS or spans.most * 1024 >= most_keys


@given(
    rows=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 70)), min_size=1, max_size=9),
    layers=st.integers(1, 80),
)
def test_costs_are_those_of_the_roofline(rows, layers):
    heads = Heads(num_heads=32, num_kv_heads=8, head_dim=128, itemsize=2)
    shapes = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=False))
    model = small_model(num_layers=layers, dtype_bytes=2, **shapes)
    cached, new = np.array(rows).T
    of_roofline = Roofline(model, small_hardware()).rows(new, cached)
    cost = prefill_cost([*rows, (5, 0)], heads)
    assert of_roofline.flops == pytest.approx(layers * cost.flops)
    assert of_roofline.num_bytes == pytest.approx(layers * cost.num_bytes)


@given(cached=st.integers(0, 300), new=st.integers(1, 60), window=st.integers(1, 400))
def test_a_windows_cost_is_that_of_the_keys_it_shows(cached, new, window):
    heads = Heads(num_heads=4, num_kv_heads=2, head_dim=64, itemsize=2)
    whole = prefill_cost([(cached, new)], heads, window)
    each = decode_cost(range(cached + 1, cached + new + 1), heads, window)
    assert whole.flops == each.flops
    keys = min(cached + new, window + new - 1)
    assert whole.num_bytes == 2 * 64 * 2 * (4 * new + 2 * keys)

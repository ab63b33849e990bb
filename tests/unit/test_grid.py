"""What is timed: launches that an engine could make, half of them held out, in bounded time."""

from collections import Counter
from dataclasses import replace

import pytest
from profiled_setup import HARDWARE, LIMITS, a_grid

from duetjax.policy.grid import FEWEST_REPEATS, MOST_REPEATS, STEPS, Kind, repeats
from duetjax.policy.launch import Lane, Program, Split

CASES = a_grid().cases(1120, 1e9)
SHAPES = [shape for case in CASES for shape in case.shapes]


def test_there_are_as_many_points_as_asked_for_and_500_are_held_out():
    assert 1120 <= len(SHAPES) < 1130
    assert sum(len(case.shapes) for case in CASES if case.is_held_out) >= 500


def test_half_of_every_kind_is_held_out():
    kinds = Counter((case.kinds[0], case.is_held_out) for case in CASES)
    for kind in Kind:
        if kind is not Kind.PREFILL_BESIDE:
            assert kinds[kind, True] > 20, kind
            assert abs(kinds[kind, True] - kinds[kind, False]) <= 1, kind


def test_no_shape_is_timed_twice_so_none_is_both_seen_and_held_out():
    assert len({(case.split, case.shapes) for case in CASES}) == len(CASES)


def test_a_seed_gives_the_same_cases_and_another_one_others():
    assert a_grid().cases(100, 1e9) == a_grid().cases(100, 1e9)
    assert a_grid().cases(100, 1e9) != a_grid(seed=1).cases(100, 1e9)


@pytest.mark.parametrize("seed", range(5))
def test_an_engine_could_make_every_launch(seed):
    tight = replace(LIMITS, num_pages=150)
    for case in a_grid(seed, limits=tight).cases(300, 1e9):
        tokens, rows = 0, 0
        pages = 0
        for shape, lane in zip(case.shapes, case.lanes, strict=True):
            new = sum(count for _, count in shape.chunks)
            held = [each + min(STEPS, LIMITS.max_model_len // 4) for each in shape.contexts]
            held += [sum(chunk) for chunk in shape.chunks]
            assert min(shape.contexts, default=1) >= 1
            assert max(held) < LIMITS.max_model_len
            assert min((count for _, count in shape.chunks), default=1) >= 1
            tokens = len(shape.contexts) + new
            buckets = tight.prefill_buckets if shape.chunks else tight.decode_buckets
            assert shape.bucket == min(each for each in buckets if each >= tokens)
            assert (shape.program is Program.PREFILL) == bool(shape.chunks)
            assert shape.k == 1 or not shape.chunks
            assert tokens <= tight.max_num_batched_tokens
            assert (lane is Lane.WHOLE) == (case.split is None)
            rows += len(held)
            pages += sum(map(tight.num_pages_for, held))
        assert rows <= tight.num_slots
        assert pages < tight.num_pages


def test_shapes_reach_from_the_smallest_to_nearly_the_largest():
    prompts = [sum(new for _, new in shape.chunks) for shape in SHAPES if shape.chunks]
    contexts = [max(shape.contexts) for shape in SHAPES if shape.contexts]
    assert min(prompts) < 8
    assert max(prompts) > 400
    assert min(contexts) < 8
    assert max(contexts) > 600
    assert any(len(shape.chunks) > 1 for shape in SHAPES)
    assert any(cached for shape in SHAPES for cached, _ in shape.chunks)
    assert {shape.bucket for shape in SHAPES} == {*LIMITS.decode_buckets, *LIMITS.prefill_buckets}
    assert {case.split for case in CASES} == {None, *HARDWARE.splits()}


def test_less_time_makes_launches_shorter_before_it_makes_them_fewer():
    grid = a_grid()
    costs = [grid._cost_ms(case) for case in CASES]
    cheap = grid.cases(1120, sum(costs) / 1.2)
    assert sum(len(case.shapes) for case in cheap) >= 1000
    assert sum(map(grid._cost_ms, cheap)) <= sum(costs) / 1.2
    assert max(map(grid._cost_ms, cheap)) < max(costs)
    few = grid.cases(1120, sum(costs) / 50)
    assert 0 < len(few) < 300
    assert {case.kinds[0] for case in few} == set(Kind) - {Kind.PREFILL_BESIDE}
    assert sum(map(grid._cost_ms, few)) <= sum(costs) / 50


def test_where_parts_cannot_be_told_apart_no_lane_is_alone():
    kinds = {kind for case in a_grid(has_parts=False).cases(200, 1e9) for kind in case.kinds}
    assert kinds == set(Kind) - {Kind.DECODE_ALONE, Kind.PREFILL_ALONE}


def test_without_splits_everything_runs_on_the_whole_device():
    cases = a_grid(splits=()).cases(200, 1e9)
    assert {case.lanes for case in cases} == {(Lane.WHOLE,)}


def test_a_pair_is_a_decode_and_a_prefill_launch_on_one_split():
    pairs = [case for case in CASES if len(case.shapes) == 2]
    assert len(pairs) > 100
    for case in pairs:
        assert isinstance(case.split, Split)
        assert case.lanes == (Lane.DECODE, Lane.PREFILL)
        assert [bool(shape.chunks) for shape in case.shapes] == [False, True]


def test_a_step_is_foretold_by_its_rows_as_a_scheduler_would_have_them():
    mixed = next(case for case in CASES if case.kinds == (Kind.MIXED,))
    [shape] = mixed.shapes
    step = shape.step(Lane.WHOLE, None, 3)
    rows = len(shape.contexts)
    assert step.cached[:rows].tolist() == [each + 3 for each in shape.contexts]
    assert step.new[:rows].tolist() == [1] * rows
    chunks = zip(step.cached[rows:].tolist(), step.new[rows:].tolist(), strict=True)
    assert tuple(chunks) == shape.chunks


def test_short_steps_are_repeated_more_often():
    assert repeats(1e4) == FEWEST_REPEATS
    assert repeats(0.01) == MOST_REPEATS
    assert repeats(5.0) == 6


def test_one_row_is_never_timed_beside_another():
    alone = replace(LIMITS, num_slots=1, decode_buckets=(1,))
    kinds = {kind for case in a_grid(limits=alone).cases(100, 1e9) for kind in case.kinds}
    assert kinds == {Kind.DECODE, Kind.PREFILL, Kind.DECODE_ALONE, Kind.PREFILL_ALONE}


@pytest.mark.parametrize("longest", [2, 4, 16, 64])
def test_no_launch_takes_more_steps_than_its_rows_have_room_for(longest):
    grid = a_grid(limits=replace(LIMITS, max_model_len=longest))
    shapes = [shape for case in grid.cases(100, 1e9) for shape in case.shapes]
    assert shapes
    assert all(shape.k <= grid.steps for shape in shapes if shape.contexts)

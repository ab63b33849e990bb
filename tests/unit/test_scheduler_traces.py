"""The scheduler on any trace at all: every answer is right, every page returns, runs repeat."""

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_executor import expected
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_run import Run, limits, request

from duetjax.config import InvalidRequest
from duetjax.policy.launch import Split
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.policies import Aggregated, PrefillFirst, StaticSplit


@st.composite
def any_limits(draw):
    """Every second machine has many slots and a pool for little more than the longest request."""
    crowded = draw(st.booleans())
    num_slots = draw(st.integers(3, 5) if crowded else st.integers(1, 5))
    page_size = draw(st.integers(1, 3) if crowded else st.integers(1, 5))
    max_model_len = draw(st.integers(14, 24) if crowded else st.integers(2, 24))
    longest = -(-(max_model_len - 1) // page_size)
    num_pages = 1 + longest + draw(st.integers(0, 2)) if crowded else draw(st.integers(2, 14))
    budget = num_slots + draw(st.integers(1, 16))
    return SchedulerLimits(
        num_pages=num_pages,
        page_size=page_size,
        num_slots=num_slots,
        max_model_len=max_model_len,
        max_num_batched_tokens=budget,
        decode_buckets=tuple(sorted({draw(st.integers(1, num_slots)), num_slots})),
        prefill_buckets=tuple(sorted({draw(st.integers(1, budget)), budget})),
        prefix_caching=draw(st.booleans()),
        deterministic=draw(st.booleans()),
        launches_per_lane=draw(st.integers(1, 2)),
    )


def arrivals(prompt_lens, max_tokens):
    stops, priorities = st.none() | st.integers(0, 12), st.integers(0, 2)
    return st.tuples(st.just("add"), prompt_lens, max_tokens, stops, priorities)


short, any_length = arrivals(st.integers(1, 5), st.integers(8, 20)), st.integers(1, 20)
bursts = st.lists(short, min_size=3, max_size=6)
aborts = st.tuples(st.just("abort"), st.integers(0, 15))
turns = st.tuples(st.just("turn"), st.integers(1, 6))
events = arrivals(any_length, any_length) | short | aborts | turns
traces = st.builds(list.__add__, st.just([]) | bursts, st.lists(events, max_size=30))


def play(bounds, trace, policy=None):
    """Runs a trace to its end; refuses exactly the requests that cannot fit."""
    run = Run(bounds, policy)
    for sequence, (kind, *numbers) in enumerate(trace):
        if kind == "turn":
            for _ in range(numbers[0]):
                run.turn()
        elif kind == "abort":
            ids = ["unknown", *run.added]
            run.abort(ids[numbers[0] % len(ids)])
        else:
            add(run, str(sequence), *numbers)
    return run.finish()


def add(run, request_id, prompt_len, max_tokens, stop_after, priority):
    """Ids with the same digits have prompts that begin alike (see `request`)."""
    bounds, fields = run.bounds, {"seed": int(request_id), "priority": priority}
    new = request(request_id, prompt_len, max_tokens, **fields)
    if stop_after is not None:
        stop = expected(new.prompt, stop_after + 1, seed=int(request_id))[-1]
        new = request(request_id, prompt_len, max_tokens, stop_ids=(stop, 10**6), **fields)
    fed = min(prompt_len + max_tokens, bounds.max_model_len) - 1
    usable_tokens = (bounds.num_pages - 1) * bounds.page_size
    if prompt_len < bounds.max_model_len and fed <= usable_tokens:
        run.add(new)
    else:
        with pytest.raises(InvalidRequest):
            run.scheduler.add(new, run.now)


@given(any_limits(), traces, st.booleans())
@settings(max_examples=150, deadline=None, database=None)
def test_every_trace_gives_every_request_its_tokens_and_returns_every_page(bounds, trace, urgent):
    kind = PrefillFirst if urgent else Aggregated
    play(bounds, trace, kind(bounds.max_num_batched_tokens))


@given(any_limits(), traces, st.sampled_from([1, 8]))
@settings(max_examples=40, deadline=None, database=None)
def test_a_trace_gives_the_same_launches_twice(bounds, trace, k):
    policy = StaticSplit(bounds.max_num_batched_tokens, Split(4, 4), k)
    if bounds.deterministic:
        policy = Aggregated(bounds.max_num_batched_tokens)
    assert play(bounds, trace, policy).launches == play(bounds, trace, policy).launches


@given(any_limits(), st.lists(short, min_size=2, max_size=8))
@settings(max_examples=40, deadline=None, database=None)
def test_every_launch_gives_whoever_decodes_a_token_unless_it_is_preempted(bounds, burst):
    bounds, decoding = replace(bounds, deterministic=False, launches_per_lane=1), set()
    run = Run(bounds)
    for sequence, (_, *numbers) in enumerate(burst):
        add(run, str(sequence), *numbers)
    while run.scheduler.has_work:
        preemptions = run.stats.preemptions
        run.plan()
        preemptions = run.stats.preemptions - preemptions
        heard = {output.id for output in run.finish_launch()}
        assert len(decoding - heard) <= preemptions
        decoding = heard - set(run.finished)
    run.finish()


def long_trace_digest():
    """A trace with preemption, aborts and stops, as one number for another process to compare."""
    draw = random.Random(5)
    trace = []
    for _ in range(80):
        stop_after = draw.choice((None, None, 3))
        numbers = (draw.randint(1, 20), draw.randint(1, 12), stop_after, draw.randint(0, 1))
        trace.append(("add", *numbers))
        trace.append(("turn", draw.randint(1, 4)))
        trace.append(("abort", draw.randint(0, 450)))
    digest = hashlib.sha256()
    for launches_per_lane in (1, 2):
        bounds = limits(num_pages=9, launches_per_lane=launches_per_lane)
        for policy in (None, StaticSplit(8, Split(4, 4), k=4)):
            run = play(bounds, trace, policy)
            assert run.stats.preemptions > 5
            assert len(run.aborted) > 5
            digest.update(repr(run.launches).encode())
    return digest.hexdigest()


def test_two_processes_plan_the_same_launches_whatever_their_hash_seed():
    script = "import test_scheduler_traces; print(test_scheduler_traces.long_trace_digest())"
    digests = {long_trace_digest()}
    for seed in ("1", "2"):
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1

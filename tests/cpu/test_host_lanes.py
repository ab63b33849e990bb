"""Both lanes on the processor: at the same time, with the tokens of one request after another."""

import dataclasses
import itertools
import logging
import threading
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from golden import tiny
from lane_gate import GATE, Hold, Meeting
from lane_plans import MOST_OUTPUT, PATIENCE, Deliveries, Plan, catalogue
from lane_programs import (
    SLOTS,
    Text,
    host_lanes,
    lane_programs,
    open_pool,
    prompt_launch,
)

from duetjax.build_device import plan_programs
from duetjax.config import Backend, ConfigError, EngineConfig, ModelConfig, SamplingParams
from duetjax.devices import find_device
from duetjax.policy.launch import FinishedStep, Lane, Launch, Program, SlotParams, Split, pack
from duetjax.policy.policies import StaticSplit
from duetjax.runtime import host_kernels

if host_kernels._launcher is None:
    pytest.skip("no C compiler when installed", allow_module_level=True)

GREEDY = SamplingParams(temperature=0.0, seed=1)
PLANS = range(200)


class Engine:
    """A started executor, and what it delivers."""

    def __init__(self, pool=None, **executables):
        self.pool = pool or open_pool()
        self.lanes = host_lanes(self.pool, **executables)
        self.deliveries = Deliveries()
        self.lanes.start(self.deliveries.put)

    def run(self, *launches):
        """Submits launches; what they deliver, in that order."""
        for launch in launches:
            self.lanes.submit(launch)
        return [self.deliveries.next() for _ in range(sum(launch.k for launch in launches))]

    def close(self):
        """In a thread, so that a close that never returns fails a test."""
        closing = threading.Thread(target=self.lanes.close, daemon=True)
        closing.start()
        closing.join(PATIENCE)
        assert not closing.is_alive()


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


def decode(ticket, *slots, lane=Lane.DECODE, k=1, **changes):
    return Launch(ticket, Program.DECODE, SLOTS, slots, lane=lane, k=k, **changes)


def prompt(slot, length=20):
    return tuple(tiny.prompt("llama-biases", 80).tolist()[slot : slot + length])


def prefill(ticket, slot, *, lane=Lane.PREFILL, sampling=GREEDY, **changes):
    return prompt_launch(ticket, slot, prompt(slot), sampling, lane=lane, **changes)


def tokens(finished):
    return [each.result.tokens[0] for each in sorted(finished, key=lambda f: (f.ticket, f.step))]


# Side by side.


def one_of_each(first, second):
    """Slot 0 takes a decode step on one lane, slot 1 computes its prompt on another."""
    return decode(1, 0, lane=first), prefill(2, 1, lane=second)


def test_both_lanes_are_inside_an_executable_at_the_same_instant(engine):
    engine.run(prefill(0, 0, lane=Lane.WHOLE))
    with GATE.kept_by(Meeting(PATIENCE)) as meeting:
        engine.run(*one_of_each(Lane.DECODE, Lane.PREFILL))
    assert meeting.outcomes == [True] * 4  # two executables of two layers


def test_launches_of_one_lane_never_meet(engine):
    engine.run(prefill(0, 0, lane=Lane.WHOLE))
    with GATE.kept_by(Meeting(0.5)) as meeting:
        engine.run(*one_of_each(Lane.WHOLE, Lane.WHOLE))
    assert meeting.outcomes == [False] * 4


def test_the_decode_lane_goes_on_while_a_prefill_is_held_inside_its_executable(engine):
    engine.run(prefill(0, 0, lane=Lane.WHOLE))
    with GATE.kept_by(Hold()) as hold:
        engine.lanes.submit(prefill(1, 1))
        assert hold.is_there.wait(PATIENCE)
        steps = engine.run(*(decode(ticket, 0, k=8) for ticket in (2, 3, 4)))
        hold.may_go_on.set()
        prefilled = engine.deliveries.next()
    assert [step.ticket for step in steps] == [2] * 8 + [3] * 8 + [4] * 8
    assert prefilled.ticket == 1


def test_pages_neither_move_nor_change_hands_in_a_thousand_launches(engine):
    address, chains = engine.pool.address, (engine.lanes._decode, engine.lanes._prefill)
    before = [np.asarray(kv).tolist() for lane in chains for kv in lane._chain._state.kv]
    engine.run(prefill(0, 0, lane=Lane.WHOLE), prefill(1, 1, lane=Lane.WHOLE))
    for ticket in range(2, 1002, 20):
        pairs = [(decode(t, 0), prefill(t + 1, 1)) for t in range(ticket, ticket + 20, 2)]
        engine.run(*(launch for pair in pairs for launch in pair))
    assert engine.pool.address == address
    assert [np.asarray(kv).tolist() for lane in chains for kv in lane._chain._state.kv] == before
    assert before == [[engine.pool.number, array] for array in (0, 1)] * 2


# The same tokens.


def test_whatever_is_planned_requests_get_the_tokens_that_they_get_alone(engine):
    """And the plans have everything that could change tokens."""
    counts, same = Counter(), []
    for seed in range(2 * len(PLANS)):  # how often things happen depends on the machine's pace
        if seed >= len(PLANS) and not rarer(counts):
            break
        plan = Plan(seed, engine.lanes, engine.deliveries).play()
        counts += plan.happened()
        same += [asked.check() for asked in plan.asked.values()]
    assert len(same) > 4 * len(PLANS)
    assert sum(same) > 0.99 * len(same)
    assert {f"k={k}" for k in range(1, 17)} <= counts.keys()
    assert rarer(counts) == {}


def rarer(counts):
    """What has not happened as often as it must for the comparison to mean something."""
    wanted = {
        "handovers": 200,
        "preemptions": 50,
        "prefix_hits": 1000,
        "stops": 50,
        "aborts": 20,
        f"{Lane.WHOLE} to {Lane.PREFILL}": 15,
        f"{Lane.PREFILL} to {Lane.WHOLE}": 3,
    }
    return {what: counts[what] for what, least in wanted.items() if counts[what] < least}


def test_a_static_split_gives_the_same_tokens(engine):
    for seed in range(10):
        policy = StaticSplit(64, Split(1, 1), k=1 + seed)
        plan = Plan(seed, engine.lanes, engine.deliveries, policy).play()
        assert all(asked.check() for asked in plan.asked.values())


def test_known_answers_differ_so_that_a_mix_up_would_be_noticed():
    answers = [known.answer for known in catalogue()]
    assert len(set(answers)) == len(answers)
    assert all(len(answer) == MOST_OUTPUT for answer in answers)


# From lane to lane.

PENALTY, BIAS = 2.0, 15.0  # 8 times the penalty is more than the bias


LANES = list(itertools.product((Lane.WHOLE, Lane.PREFILL), repeat=2))


def penalised(token):
    """Draws a token, unless it has been drawn often."""
    return SamplingParams(
        temperature=0.0, seed=1, frequency_penalty=PENALTY, logit_bias={token: BIAS}
    )


def in_two_launches(ticket, slot, text, sampling, lanes):
    """A prompt and its output so far, admitted on one lane and ended on another."""
    known, half = text.prompt + text.output, len(text.prompt) // 2
    owner = SlotParams(slot, sampling, (), len(text.prompt), known)
    first = prompt_launch(
        ticket, slot, known[:half], sampling, lane=lanes[0], samples=(False,), admitted=(owner,)
    )
    rest = known[half:]
    last = Launch(
        ticket + 1,
        Program.PREFILL,
        first.bucket,
        (slot,),
        lane=lanes[1],
        starts=(half,),
        counts=(len(rest),),
        packed=pack(rest),
        samples=(True,),
    )
    return first, last


@pytest.mark.parametrize("lanes", LANES)
def test_penalties_count_the_output_so_far_on_whichever_lane_a_prompt_ends(engine, lanes):
    token = 42
    text, sampling = Text(prompt(0), (token,) * 8), penalised(token)
    for launch in in_two_launches(0, 0, text, sampling, lanes):
        finished = engine.run(launch)
    [drawn] = tokens(finished)
    assert drawn in text.draws(sampling)
    assert drawn != token
    uncounted = dataclasses.replace(sampling, frequency_penalty=0.0)
    assert text.draws(uncounted) == {token}
    handovers = ((0, 1),) if lanes[1] is Lane.PREFILL else ()
    for token in [drawn, *tokens(engine.run(decode(2, 0, k=4, handovers=handovers)))]:
        assert token in text.draws(sampling)
        text = dataclasses.replace(text, output=(*text.output, int(token)))


@pytest.mark.parametrize("lanes", LANES)
def test_a_slots_new_owner_inherits_no_counts_on_either_lane(engine, lanes):
    token = 42
    before, text = Text(prompt(0), (token,) * 8), Text(prompt(1), ())
    for lane in (Lane.WHOLE, Lane.PREFILL):
        engine.run(*in_two_launches(0, 0, before, penalised(token), (lane, lane)))
    for launch in in_two_launches(2, 0, text, penalised(token), lanes):
        finished = engine.run(launch)
    assert tokens(finished) == [token]


def test_a_prompt_is_handed_over_while_others_decode(engine):
    """Row 0 decodes in every launch; rows 1 to 3 join it one after another."""
    sampling = SamplingParams(seed=3)
    engine.run(prefill(0, 0, sampling=sampling, lane=Lane.WHOLE))
    for slot, ticket in ((1, 1), (2, 3), (3, 5)):
        first, *_ = engine.run(prefill(ticket, slot, sampling=sampling))
        joined = decode(ticket + 1, *range(slot + 1), k=4, handovers=((slot, ticket),))
        steps = engine.run(joined)
        text = Text(prompt(slot), ())
        for drawn in (first.result.tokens[0], *(step.result.tokens[slot] for step in steps)):
            assert drawn in text.draws(sampling)
            text = dataclasses.replace(text, output=(*text.output, int(drawn)))


# Failures and the end.


class BrokenError(Exception):
    """What a poisoned executable raises."""


def broken(*_):
    raise BrokenError


def everything(engine):
    """Closes the engine; all that it has ever delivered, tickets for steps."""
    engine.close()
    delivered = []
    while not engine.deliveries.is_empty():
        one = engine.deliveries.take()
        delivered.append(one.ticket if isinstance(one, FinishedStep) else one)
    return delivered


def kinds(delivered):
    return [type(one) for one in delivered]


def test_an_executable_that_raises_is_delivered_once_and_the_other_lane_goes_on():
    engine = Engine(decode=broken)
    for ticket in (0, 1):
        engine.lanes.submit(decode(ticket, 0, k=3))
    engine.lanes.submit(prefill(2, 1))
    assert sorted(map(str, kinds(everything(engine)))) == sorted(map(str, (BrokenError, int)))


def closed_pool():
    """What a pool leaves that nobody holds any more."""
    return SimpleNamespace(number=open_pool().number)


@pytest.mark.parametrize("k", [1, 4])
def test_an_executable_that_fails_inside_is_delivered_once_and_close_returns(k):
    engine = Engine(pool=closed_pool())
    for ticket in range(4):
        engine.lanes.submit(decode(ticket, 0, k=k))
    assert len(everything(engine)) == 1


def fails_inside(weights, kv, *rest):
    """The decode program, on pages that are gone."""
    real = lane_programs()[1][Program.DECODE, SLOTS]
    gone = np.array([255, 0], np.int32)
    return real(weights, [jax.device_put(gone.copy()) for _ in kv], *rest)


def test_a_lane_delivers_nothing_after_its_failure():
    real = lane_programs()[1][Program.DECODE, SLOTS]
    calls = iter((real, real, real, broken))
    engine = Engine(decode=lambda *operands: next(calls)(*operands))
    for ticket in (0, 1):
        engine.lanes.submit(decode(ticket, 0, k=3))
    *steps, failure = everything(engine)
    assert steps == [0, 0, 0]
    assert isinstance(failure, BrokenError)


def test_a_lane_that_fails_with_a_hand_over_behind_it_delivers_its_failure_once():
    engine = Engine(decode=fails_inside)
    engine.run(prefill(0, 1))
    engine.lanes.submit(decode(1, 0, k=4))
    engine.lanes.submit(decode(2, 1, k=4, handovers=((1, 0),)))
    assert len(everything(engine)) == 1


def test_close_waits_for_launches_in_flight():
    engine, order = Engine(), []
    with GATE.kept_by(Hold()) as hold:
        engine.lanes.submit(decode(0, 0, k=4))
        engine.lanes.submit(prefill(1, 1))
        assert hold.is_there.wait(PATIENCE)

        def close():
            engine.lanes.close()
            order.append("closed")

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(0.3)
        assert order == []
        hold.may_go_on.set()
        closing.join(PATIENCE)
    assert order == ["closed"]
    delivered = []
    while not engine.deliveries.is_empty():
        delivered.append(engine.deliveries.take().ticket)
    assert sorted(delivered) == [0] * 4 + [1]


def test_a_closed_executor_gives_its_pages_back():
    engine = Engine()
    engine.run(prefill(0, 0))
    number, engine.pool = engine.pool.number, None
    beside = open_pool()
    assert beside.number != number  # the executor holds it
    engine.close()
    assert open_pool().number == number


def test_two_engines_do_not_disturb_each_other(engine):
    other, sampling = Engine(), SamplingParams(seed=9)
    engine.run(prefill(0, 0, sampling=sampling, lane=Lane.WHOLE))
    other.run(prefill(0, 0, sampling=GREEDY, lane=Lane.WHOLE))
    steps = engine.run(decode(1, 0, k=8))
    alone = other.run(decode(1, 0, k=8))
    other.close()
    first = Text(prompt(0), ())
    for each, how in ((steps, sampling), (alone, GREEDY)):
        text = dataclasses.replace(first, output=(min(first.draws(how)),))
        for drawn in tokens(each):
            assert drawn in text.draws(how)
            text = dataclasses.replace(text, output=(*text.output, int(drawn)))


# Which backend.


def planned(caplog, backend=Backend.AUTO, **changes):
    """How an engine would run the tiny model, and what it warns of."""
    model = ModelConfig.from_hf({**tiny.CONFIGS["mistral"], **changes})
    engine = EngineConfig(
        backend=backend, kv_cache_memory_bytes=1 << 22, max_num_seqs=4, max_model_len=64
    )
    with caplog.at_level(logging.WARNING):
        programs, _, plan = plan_programs(model, engine, find_device(engine))
    assert programs.layout == plan.layout
    return plan.layout.in_pool, caplog.messages


def test_lanes_are_what_runs_a_model_that_the_kernels_can_take(caplog):
    assert planned(caplog) == (True, [])
    assert planned(caplog, Backend.LANES) == (True, [])
    assert planned(caplog, Backend.JAX) == (False, [])


UNFIT = [
    ({"head_dim": 12}, "head_dim 12 is not a multiple of 8 up to 256"),
    ({"head_dim": 264}, "head_dim 264 is not a multiple of 8 up to 256"),
    ({"num_attention_heads": 66}, "33 heads share a KV head, more than 32"),
]


@pytest.mark.parametrize(("changes", "reason"), UNFIT)
def test_lanes_asked_for_in_vain_are_refused_with_the_reason(caplog, changes, reason):
    with pytest.raises(ConfigError, match="--backend lanes") as refused:
        planned(caplog, Backend.LANES, **changes)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("changes", "reason"), UNFIT)
def test_auto_falls_back_to_plain_calls_with_a_warning(caplog, changes, reason):
    in_pool, [warning] = planned(caplog, **changes)
    assert not in_pool
    assert reason in warning


def test_without_the_launcher_the_reason_says_what_to_install(caplog, monkeypatch):
    monkeypatch.setattr(host_kernels, "_launcher", None)
    with pytest.raises(ConfigError, match="install a C compiler"):
        planned(caplog, Backend.LANES)
    in_pool, [_] = planned(caplog)
    assert not in_pool


def test_an_unknown_backend_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="--backend cuda") as refused:
        EngineConfig(backend="cuda")
    assert all(backend in str(refused.value) for backend in Backend)

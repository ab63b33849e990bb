"""Constrained requests among plain ones: in the scheduler's hands, then in the engine's."""

import queue
import random
import threading
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import pytest
from constrained_run import (
    ConstrainedRun,
    Fickle,
    Issuer,
    MaskedExecutor,
    constrained_answer,
    constraint,
)
from fake_executor import VOCAB_SIZE, FakeExecutor
from scheduler_run import limits, request
from test_engine import eventually

from duetjax.config import InvalidRequest
from duetjax.engine import EngineClient, EngineDead
from duetjax.policy.launch import Lane, Program, Split
from duetjax.policy.policies import Aggregate, Duet
from duetjax.policy.request import FinishReason
from duetjax.policy.scheduler import Scheduler
from duetjax.runtime.in_order import InOrder

WAIT = 30.0  # seconds until a hang is called one
SEEDS = range(150)
DETERMINISTIC = {"deterministic": True, "decode_buckets": (4,), "prefill_buckets": (8,)}


def asked(name, text=None, prompt_len=3, max_tokens=6, **fields):
    return replace(request(name, prompt_len, max_tokens, **fields), constraint=constraint(text))


class Always:
    """The same decision, whatever there is."""

    def __init__(self, decision):
        self._decision = decision

    def decide(self, load):
        return self._decision


# The scheduler: plays at random.


def drawn(dice, number, bounds):
    """A request, plain or not; some have a prompt that begins like others'."""
    shared = [7] * dice.choice((0, 4, 9))
    prompt = (*shared, *dice.choices(range(100, 9_000), k=dice.randint(1, 12 - len(shared))))
    kind = dice.choice((None, "one", "one", "some", "some", "fails"))
    text = kind and f"{kind} {dice.randint(0, 9)}"
    new = asked(f"r{number}", text, prompt=prompt, max_tokens=dice.randint(1, 20))
    new = replace(new, priority=dice.randint(0, 1))
    tokens, _ = constrained_answer(new, bounds.max_model_len)
    stops = (tokens[dice.randrange(len(tokens))],) if tokens and dice.random() < 0.3 else ()
    return replace(new, stop_ids=stops)


def play(seed, **changes):
    """One scheduler's life, drawn from a seed; everything is checked on its way."""
    dice = random.Random(seed)
    drawn_limits = {
        "num_pages": dice.randint(9, 14),
        "launches_per_lane": dice.choice((1, 2, 2)),
        "prefix_caching": dice.random() < 0.6,
    }
    bounds = limits(**{**drawn_limits, **changes})
    policy = None if bounds.deterministic else Fickle(dice, bounds.max_num_batched_tokens)
    run = ConstrainedRun(bounds, policy, delays=dice if dice.random() < 0.7 else None)
    for number in range(10):
        run.add(drawn(dice, number, bounds))
        for _ in range(dice.randint(0, 6)):
            run.random_turn(dice)
        if dice.random() < 0.25:
            run.abort(dice.choice([*run.added]))
    run.finish(dice)
    run.happened["preemptions"] = run.stats.preemptions
    run.happened["restarts"] = run.issuer.restarts
    run.happened["prefix hits"] = run.stats.prefix_hits
    return run.happened


def test_whatever_is_planned_each_token_is_sampled_under_its_own_mask():
    happened = sum((play(seed) for seed in SEEDS), Counter())
    rare = [what for what, times in happened.items() if times < 5 and what != "restarts"]
    assert rare == [], happened


def test_deterministic_answers_that_begin_anew_are_the_same():
    happened = sum((play(seed, **DETERMINISTIC) for seed in SEEDS), Counter())
    assert happened["restarts"] > 5, happened


# The scheduler: one thing at a time.


def test_a_row_under_a_grammar_takes_one_step_of_each_launch_and_its_neighbours_take_all():
    bounds = limits(num_pages=100, max_model_len=128, launches_per_lane=2)
    with_it = ConstrainedRun(bounds, Always(Aggregate(8, k=8)))
    plain = [asked(f"p{i}", max_tokens=81) for i in range(3)]
    with_it.add(*plain, asked("g", "one 1", max_tokens=5)).finish()
    without = ConstrainedRun(bounds, Always(Aggregate(8, k=8))).add(*plain).finish()
    assert [with_it.tokens[new.id] for new in plain] == [without.tokens[new.id] for new in plain]
    decodes = [launch for launch in with_it.launches if launch.program is Program.DECODE]
    slot = next(launch for launch in with_it.launches if launch.allowed).allowed[0][0]
    told = [launch for launch in decodes if slot in launch.slots]
    assert [launch.k for launch in told] == [8] * 4
    for launch in told:
        assert dict(launch.allowed).keys() == dict(launch.limits).keys() & {slot} == {slot}
    alone = [launch.k for launch in without.launches if launch.program is Program.DECODE]
    assert [launch.k for launch in decodes] == alone == [8] * 10


def test_a_grammar_row_alone_takes_launches_of_one_step():
    run = ConstrainedRun(limits(), Always(Aggregate(8, k=8))).add(asked("g", "one 1")).finish()
    assert {launch.k for launch in run.launches} == {1}


def test_a_permit_for_many_steps_takes_launches_of_as_many():
    wanted = "some 5"
    run = (
        ConstrainedRun(limits(num_pages=40, max_model_len=64), Always(Aggregate(8, k=16)))
        .add(asked("g", wanted, max_tokens=40))
        .finish()
    )
    assert max(launch.k for launch in run.launches) > 1


def held_alone(text="one 1", **changes):
    """A run whose only request is held: what it sampled is told, and no permit has come."""
    run = ConstrainedRun(limits(**changes), delays=random.Random(0)).add(asked("g", text))
    run.deliver()
    run.turn()
    assert run.scheduler.awaits_permits
    assert run.plan() == ()
    assert run.tokens["g"]
    return run


def test_a_request_that_is_held_waits_for_its_permit_and_for_nothing_else():
    run = held_alone()
    assert run.scheduler.num_in_flight == 0
    run.deliver()
    assert len(run.plan()) == 1
    run.finish()


def test_a_request_is_planned_before_its_first_permit_by_nobody():
    run = ConstrainedRun(limits(), delays=random.Random(0)).add(asked("g", "one 1"))
    assert run.plan() == ()
    assert not run.scheduler.has_work
    run.finish()


def test_who_is_held_keeps_nobody_from_running():
    run = held_alone().add(asked("p"))
    while "p" not in run.finished:
        run.turn()
    assert len(run.tokens["g"]) == 1
    run.finish()


def test_a_request_aborted_while_held_gives_everything_back():
    run = held_alone()
    assert run.abort("g")
    run.finish()
    assert run.stats.pages_held == 0


def test_a_permit_that_comes_after_the_end_has_no_effect():
    run = held_alone()
    run.abort("g")
    run.deliver(10)
    assert run.plan() == ()
    run.finish()


def test_an_error_ends_its_request_and_no_other():
    run = ConstrainedRun(limits()).add(asked("bad", "fails 2"), asked("p"), asked("g", "one 2"))
    run.finish()
    assert run.finished == {
        "bad": FinishReason.CONSTRAINT,
        "p": FinishReason.LENGTH,
        "g": FinishReason.LENGTH,
    }
    assert len(run.tokens["bad"]) == 2


def test_an_error_before_the_first_token_ends_a_request_that_was_never_planned():
    run = ConstrainedRun(limits()).add(asked("bad", "fails 0")).finish()
    assert run.launches == []
    assert run.finished == {"bad": FinishReason.CONSTRAINT}


def test_the_next_owner_of_a_slot_may_sample_anything():
    run = ConstrainedRun(limits(num_slots=1)).add(asked("g", "one 1"), asked("p")).finish()
    assert {slot for launch in run.launches for slot in launch.slots} == {0}


def test_a_prompt_that_ends_on_the_prefill_lane_is_handed_over_and_held_there():
    run = ConstrainedRun(
        limits(num_pages=40, max_model_len=64), Always(Duet(Split(1, 1), 4, 8)), delays=None
    )
    run.add(asked("p", max_tokens=30))
    run.turn()
    run.turn()
    run.add(asked("g", "one 3", prompt_len=10)).finish()
    handed = {slot for launch in run.launches for slot, _ in launch.handovers}
    assert {slot for launch in run.launches for slot, _ in launch.allowed} <= handed
    assert any(launch.lane is Lane.PREFILL and launch.allowed for launch in run.launches)


@pytest.mark.parametrize("launches_per_lane", [1, 2])
def test_a_held_request_is_preempted_like_any_other(launches_per_lane):
    bounds = limits(num_pages=7, prefix_caching=False, launches_per_lane=launches_per_lane)
    run = ConstrainedRun(bounds, delays=random.Random(0))
    run.add(asked("p", prompt_len=8, max_tokens=12), asked("g", "one 1", 8, max_tokens=8))
    run.deliver()
    for _ in range(40):
        if run.happened["preempted while held"] == 0:
            run.turn()
    run.finish()
    assert run.happened["preempted while held"] == run.stats.preemptions == 1


STUCK = limits(num_pages=7, launches_per_lane=2, prefix_caching=False, **DETERMINISTIC)


def lose_and_stop():
    """Two requests; as the last launch of one ends, the other may be admitted again, and is alone.

    The second has lost its pages to the first, which then stops with the launch that named both.
    """
    stopping, losing = asked("p", None, 8, max_tokens=12), asked("g", "free 0", 8, max_tokens=12)
    stop = constrained_answer(stopping, STUCK.max_model_len)[0][4]
    return replace(stopping, stop_ids=(stop,)), losing


def test_a_deterministic_request_begins_anew_when_nothing_else_is_left():
    run = ConstrainedRun(STUCK).add(*lose_and_stop()).finish()
    assert run.issuer.restarts == 1


# The engine.


class Permits(Issuer):
    """Implements `engine.Permits`, on a thread.

    hold: what comes waits for `release`, or one each for `release_one`; `held` is set meanwhile.
    """

    def __init__(self):
        super().__init__()
        self._jobs = queue.SimpleQueue()
        self._num_asked = self._num_done = 0
        self._is_holding = False
        self._passes = threading.Semaphore(0)
        self.held = threading.Event()
        self.num_delivered = 0
        self.was_closed = False

    def hold(self):
        self._is_holding = True
        return self

    def release_one(self):
        self._passes.release()

    def release(self):
        self._is_holding = False
        self._passes.release()

    def start(self, deliver):
        self._thread = threading.Thread(target=self._run, args=(deliver,), daemon=True)
        self._thread.start()

    @property
    def is_idle(self):
        return self._num_asked == self._num_done

    def begin(self, request_id, constraint):
        self._ask(partial(super().begin, request_id, constraint))

    def sampled(self, request_id, token):
        self._ask(partial(super().sampled, request_id, token))

    def end(self, request_id):
        self._ask(partial(super().end, request_id))

    def close(self):
        self.was_closed = True
        self._jobs.put(None)

    def _ask(self, job):
        self._num_asked += 1
        self._jobs.put(job)

    def _run(self, deliver):
        while (job := self._jobs.get()) is not None:
            job()
            if self._is_holding:
                self.held.set()
                self._passes.acquire()
                self.held.clear()
            self._num_done += 1
            deliver(self.came.popleft())
            self.num_delivered += 1


@contextmanager
def engine(permits=None, *, bounds=None, policy=None):
    """A client, its device, who issues its permits, and who takes its outputs."""
    bounds = bounds or limits(num_pages=40, max_model_len=64, launches_per_lane=2)
    device, permits = MaskedExecutor(bounds.page_size), permits or Permits()
    executor = InOrder(device)
    client = EngineClient(
        Scheduler(bounds, policy), executor, vocab_size=VOCAB_SIZE, permits=permits
    )
    frontend = Frontend()
    client.start(frontend.take)
    try:
        yield client, device, permits, frontend
    finally:
        device.release()
        permits.release()
        assert client.shutdown(WAIT)
        assert permits.was_closed


class Frontend:
    """Keeps every output and lets a test wait for last ones."""

    def __init__(self):
        self.tokens = defaultdict(tuple)
        self.ends = defaultdict(list)
        self.blocked = threading.Event()
        self._unblocked = threading.Event()
        self._unblocked.set()
        self._news = threading.Condition()

    def block(self):
        """The engine's thread, at its next outputs, waits for `unblock`; `blocked` is set."""
        self._unblocked.clear()

    def unblock(self):
        self._unblocked.set()

    def take(self, batch):
        if not self._unblocked.is_set():
            self.blocked.set()
            self._unblocked.wait()
        with self._news:
            for output in batch:
                assert not self.ends[output.id], f"{output} after the end"
                self.tokens[output.id] += output.token_ids
                self.ends[output.id] += [output.finish] * (output.finish is not None)
            self._news.notify_all()

    def wait_for(self, condition):
        with self._news:
            assert self._news.wait_for(condition, WAIT), "the engine hangs"

    def wait_for_end(self, *request_ids):
        self.wait_for(lambda: all(self.ends[each] for each in request_ids))
        return [self.ends[each][0] for each in request_ids]

    def check(self, new, max_model_len):
        tokens, finish = constrained_answer(new, max_model_len)
        assert (self.tokens[new.id], self.ends[new.id]) == (tokens, [finish]), new.id


def assert_all_returned(client):
    stats = client.stats()
    assert (stats.running, stats.waiting, stats.pages_held, stats.pages_quarantined) == (0,) * 4
    assert client.num_live == 0


@pytest.mark.parametrize("seed", range(10))
def test_an_engine_gives_everybody_their_own_answer(seed):
    dice = random.Random(seed)
    bounds = limits(num_pages=14, launches_per_lane=2, num_slots=4)
    news = [drawn(dice, number, bounds) for number in range(40)]
    with engine(bounds=bounds, policy=Fickle(dice, 8)) as (client, _, permits, frontend):
        for new in news:
            client.submit(new)
        frontend.wait_for_end(*(new.id for new in news))
        assert_all_returned(client)
        eventually(lambda: permits.num_followed == 0)
    for new in news:
        frontend.check(new, bounds.max_model_len)


def test_without_anybody_to_issue_permits_a_constrained_request_is_refused():
    client = EngineClient(Scheduler(limits()), InOrder(FakeExecutor(4)), vocab_size=VOCAB_SIZE)
    client.start(lambda _: None)
    with pytest.raises(InvalidRequest, match="tokenizer"):
        client.submit(asked("g", "one 1"))
    assert client.num_live == 0
    assert client.shutdown(WAIT)


def test_who_waits_for_permits_keeps_nobody_from_running():
    with engine(Permits().hold()) as (client, _, permits, frontend):
        client.submit(asked("g", "one 1"))
        client.submit(asked("p"))
        assert frontend.wait_for_end("p") == [FinishReason.LENGTH]
        assert frontend.tokens["g"] == ()
        permits.release()
        frontend.wait_for_end("g")


def waiting_for(phase, stack):
    """An engine whose request g has no permit yet, is held, or is in flight."""
    permits = Permits()
    if phase == "before the first permit":
        permits.hold()
    client, device, permits, frontend = stack.enter_context(engine(permits))
    if phase == "in flight":
        device.hold()
    client.submit(asked("g", "one 1", max_tokens=20))
    if phase == "in flight":
        assert device.held.wait(WAIT)
    elif phase == "while held":
        frontend.wait_for(lambda: frontend.tokens["g"])
        permits.hold()
        assert permits.held.wait(WAIT)
    else:
        assert permits.held.wait(WAIT)
    return client, device, permits, frontend


def test_whose_grammar_is_not_ready_waits_and_who_is_held_runs():
    with ExitStack() as stack:
        client, _, permits, frontend = waiting_for("before the first permit", stack)
        client.submit(asked("h", "one 2"))
        eventually(lambda: (client.stats().running, client.stats().waiting) == (0, 2))
        client.abort("h")
        frontend.wait_for_end("h")
        assert (client.stats().running, client.stats().waiting) == (0, 1)
        permits.release()
        frontend.wait_for_end("g")
        assert_all_returned(client)
    with ExitStack() as stack:
        client, _, permits, frontend = waiting_for("while held", stack)
        assert (client.stats().running, client.stats().waiting) == (1, 0)


PHASES = pytest.mark.parametrize("phase", ["before the first permit", "while held", "in flight"])


@PHASES
def test_an_abort_ends_a_request_wherever_it_is(phase):
    with ExitStack() as stack:
        client, device, permits, frontend = waiting_for(phase, stack)
        client.abort("g")
        assert frontend.wait_for_end("g") == [FinishReason.ABORT]
        device.release()
        permits.release()
        client.submit(asked("p"))
        client.submit(asked("h", "one 4"))
        frontend.wait_for_end("p", "h")
        frontend.check(asked("h", "one 4"), 64)
        assert_all_returned(client)


@PHASES
def test_an_abort_unless_begun_spares_who_has_begun(phase):
    with ExitStack() as stack:
        client, device, permits, frontend = waiting_for(phase, stack)
        client.abort("g", unless_begun=True)
        permits.release()
        device.release()
        has_begun = phase != "before the first permit"
        wanted = FinishReason.LENGTH if has_begun else FinishReason.ABORT
        assert frontend.wait_for_end("g") == [wanted]


@PHASES
def test_shutdown_ends_a_request_wherever_it_is(phase):
    with ExitStack() as stack:
        client, device, _, frontend = waiting_for(phase, stack)
        device.release()
        assert client.shutdown(WAIT)
        assert frontend.ends["g"] == [FinishReason.ABORT]
        assert_all_returned(client)


@PHASES
def test_a_failing_device_ends_a_request_wherever_it_is(phase):
    with ExitStack() as stack:
        client, device, _, frontend = waiting_for(phase, stack)
        device.fail()
        client.submit(asked("p"))
        device.release()
        assert frontend.wait_for_end("g", "p") == [FinishReason.ERROR] * 2
        with pytest.raises(EngineDead):
            client.submit(asked("late", "one 1"))


def test_an_error_of_whoever_issues_permits_ends_its_request_alone():
    with engine() as (client, _, _, frontend):
        news = [asked("bad", "fails 2"), asked("worse", "fails 0"), asked("p"), asked("g", "one 2")]
        for new in news:
            client.submit(new)
        frontend.wait_for_end(*(new.id for new in news))
        assert_all_returned(client)
    for new in news:
        frontend.check(new, 64)


@pytest.mark.parametrize("texts", [("one 1", "one 2"), ("fails 0", "one 2"), ("fails 0", None)])
def test_a_permit_for_the_last_owner_of_an_id_is_not_the_next_one_s(texts):
    first, second = (asked("g", text) for text in texts)
    with engine(Permits().hold()) as (client, device, permits, frontend):
        client.submit(first)
        assert permits.held.wait(WAIT)
        client.abort("g")
        assert frontend.wait_for_end("g") == [FinishReason.ABORT]
        frontend.ends["g"].clear()
        device.hold()
        client.submit(second)
        client.submit(asked("p", "one 1"))
        permits.release_one()
        eventually(lambda: permits.num_delivered == 1)
        client.abort("p")  # whose end tells that what came before it has been taken in
        assert frontend.wait_for_end("p") == [FinishReason.ABORT]
        device.release()
        permits.release()
        frontend.wait_for_end("g")
        frontend.check(second, 64)


def test_a_deterministic_engine_does_not_wait_for_what_nobody_was_told():
    """The two requests come in one round, and each step in one of its own: as above."""
    stopping, losing = lose_and_stop()
    with engine(Permits().hold(), bounds=STUCK) as (client, device, permits, frontend):
        device.wait = lambda count: eventually(lambda: client.stats().steps == count)
        client.submit(losing)
        assert permits.held.wait(WAIT)
        frontend.block()
        client.submit(asked("w", max_tokens=1))
        assert frontend.blocked.wait(WAIT)
        client.submit(stopping)
        permits.release()
        eventually(lambda: permits.is_idle)
        frontend.unblock()
        frontend.wait_for_end("w", "p", "g")
    frontend.check(stopping, STUCK.max_model_len)
    frontend.check(losing, STUCK.max_model_len)


def test_two_hundred_constrained_requests_that_are_aborted_at_any_moment_end_once():
    dice = random.Random(4)
    bounds = limits(num_pages=14, launches_per_lane=2)
    with engine(bounds=bounds, policy=Fickle(dice, 8)) as (client, _, permits, frontend):
        news = [drawn(dice, number, bounds) for number in range(200)]
        for new in news:
            client.submit(new)
            if dice.random() < 0.7:
                client.abort(f"r{dice.randint(0, 200)}")
        frontend.wait_for_end(*(new.id for new in news))
        assert_all_returned(client)
        eventually(lambda: permits.num_followed == 0)
    for new in news:
        tokens, finish = constrained_answer(new, bounds.max_model_len)
        if frontend.ends[new.id] == [FinishReason.ABORT]:
            tokens, finish = tokens[: len(frontend.tokens[new.id])], FinishReason.ABORT
        assert (frontend.tokens[new.id], frontend.ends[new.id]) == (tokens, [finish])

"""Many short requests through the real engine and scheduler, on a device that costs nothing.

Prompts that begin alike, more rows than KV pages, stop ids, aborts at random moments, two lanes.
"""

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from os import getpid

from soak_series import WARM_UP, Slope, slope, use_of
from tqdm import tqdm

from duetjax.config import SamplingParams
from duetjax.engine import EngineClient
from duetjax.policy.launch import SlotParams, Split
from duetjax.policy.limits import SchedulerLimits, decode_buckets, prefill_buckets
from duetjax.policy.policies import StaticSplit
from duetjax.policy.request import FinishReason, NewRequest, StepOutputs
from duetjax.policy.scheduler import Scheduler
from duetjax.sim.clock import RealClock
from duetjax.sim.executor import SimulatedExecutor
from duetjax.sim.script import Script

SAMPLE_EVERY = 10_000
IDLE_EVERY = 50_000
BYTES_PER_REQUEST = 4.0
"""A slope of memory below it is noise: half of a pointer."""
_SLOTS, _PAGES, _PAGE, _VOCABULARY = 256, 256, 16, 1024
_LIVE, _BURST = 512, 64
_ABORTED = 0.1
_PATIENCE_SECONDS = 30.0


def _token(params: SlotParams, position: int) -> int:
    """A `Sampler` as cheap as can be, from which a request's end is known beforehand."""
    assert params.sampling.seed is not None, params
    return (params.sampling.seed + position - params.num_prompt) % _VOCABULARY


def _requests(draw: random.Random) -> Iterator[NewRequest]:
    """Without end. Some prompts are wholly alike, most in their first page or two."""
    systems = [_tokens(draw, size) for size in (16, 24, 32, 48, 64)]
    seeded = [SamplingParams(seed=seed) for seed in range(_VOCABULARY)]
    for number in count():
        prompt = draw.choice(systems) + _tokens(draw, draw.choice((0, 1, 3, 8, 30)))
        seed, length = draw.randrange(_VOCABULARY), draw.choice((1, 2, 2, 3, 4, 6, 9, 40))
        stops = ((seed + draw.randrange(8)) % _VOCABULARY,) if draw.random() < 0.3 else ()
        yield NewRequest(str(number), prompt, length, seeded[seed], stops, draw.randrange(-1, 2))


def _tokens(draw: random.Random, size: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(_VOCABULARY), k=size))


def _length(new: NewRequest) -> int:
    """Of its answer, if nobody aborts it."""
    seed = new.sampling.seed
    assert seed is not None, new
    before = [(stop - seed) % _VOCABULARY for stop in new.stop_ids]
    return min(new.max_tokens, *(index + 1 for index in before), new.max_tokens)


@dataclass(slots=True)
class Ledger:
    """Who still waits for a last output, and what was wrong. `take` is for the engine's thread."""

    lengths: dict[str, int] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, outputs: StepOutputs) -> None:
        """A step's outputs."""
        with self.changed:
            for request_id in outputs.ids:
                self.tokens[request_id] += 1
            for request_id, why in outputs.finished:
                self._finish(request_id, why)
            self.changed.notify()

    def _finish(self, request_id: str, why: FinishReason) -> None:
        expected = self.lengths.pop(request_id, None)
        got = self.tokens.pop(request_id, 0)
        self.ends[why.value] += 1
        if expected is None:
            self.wrong.append(f"{request_id} ended twice, or was never submitted")
        elif why is FinishReason.ERROR or (why is not FinishReason.ABORT and got != expected):
            self.wrong.append(f"{request_id} ended by {why} with {got} tokens, not {expected}")

    def wait_below(self, count: int) -> None:
        """Until fewer requests wait."""
        with self.changed:
            is_over = self.changed.wait_for(lambda: len(self.lengths) < count, _PATIENCE_SECONDS)
            assert is_over, f"{len(self.lengths)} requests get no last output"


@dataclass(frozen=True, slots=True)
class Found:
    """Of a run. bytes_per_request: by which memory grows; wrong: what must not have been."""

    requests: int
    seconds: float
    ends: dict[str, int]
    prefix_hits: int
    preemptions: int
    bytes_per_request: Slope
    rss: int
    wrong: list[str]


def run(requests: int, seed: int) -> Found:
    """Puts so many requests through an engine of its own, in this process."""
    limits = SchedulerLimits(
        num_pages=_PAGES,
        page_size=_PAGE,
        num_slots=_SLOTS,
        max_model_len=256,
        max_num_batched_tokens=2048,
        decode_buckets=decode_buckets(_SLOTS),
        prefill_buckets=prefill_buckets(2048),
    )
    scheduler = Scheduler(limits, StaticSplit(1024, Split(1, 1), k=2))
    executor = SimulatedExecutor(Script(0.0, 0.0), RealClock(), _token)
    client = EngineClient(scheduler, executor, vocab_size=_VOCABULARY)
    ledger = Ledger()
    client.start(ledger.take)
    began = time.perf_counter()
    at, private = _submit(
        requests, random.Random(seed), client, ledger, lambda: _idle(scheduler, client)
    )
    seconds = time.perf_counter() - began
    stats = client.stats()
    if not client.shutdown(_PATIENCE_SECONDS):
        ledger.wrong.append("the engine did not end")
    kept = slice(int(WARM_UP * len(at)), None)
    if sum(ledger.ends.values()) != requests:
        ledger.wrong.append(f"{sum(ledger.ends.values())} last outputs for {requests} requests")
    return Found(
        requests=requests,
        seconds=seconds,
        ends=dict(ledger.ends),
        prefix_hits=stats.prefix_hits,
        preemptions=stats.preemptions,
        bytes_per_request=slope(at[kept], private[kept]),
        rss=use_of(getpid()).rss,
        wrong=ledger.wrong,
    )


def _submit(
    requests: int,
    draw: random.Random,
    client: EngineClient,
    ledger: Ledger,
    check_idle: Callable[[], None],
) -> tuple[list[float], list[float]]:
    """All of them, never more than `_LIVE` at once; private bytes after so many requests."""
    at: list[float] = []
    private: list[float] = []
    doomed: deque[str] = deque()
    news = _requests(draw)
    every = min(SAMPLE_EVERY, max(1, requests // 20))
    for number in tqdm(range(requests), unit=" requests", unit_scale=True, mininterval=1.0):
        if number % _BURST == 0:
            ledger.wait_below(_LIVE)
        new = next(news)
        ledger.lengths[new.id] = _length(new)
        client.submit(new)
        if draw.random() < _ABORTED:
            doomed.append(new.id)
        while len(doomed) > draw.randrange(_LIVE // 4):
            client.abort(doomed.popleft())
        if number % every == 0:
            at.append(number)
            private.append(use_of(getpid()).private)
        if number % IDLE_EVERY == IDLE_EVERY - 1 or number == requests - 1:
            ledger.wait_below(1)
            check_idle()
    return at, private


def _idle(scheduler: Scheduler, client: EngineClient) -> None:
    """Waits for launches in flight, then looks whether pages are all back."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while scheduler.num_in_flight or client.silence:  # a round may not be over
        assert time.monotonic() < deadline, "launches in flight do not end"
        time.sleep(0.001)
    scheduler.check_integrity()
    stats = scheduler.stats()
    assert stats.running == stats.waiting == 0, stats
    assert stats.pages_free + stats.pages_cached == stats.pages_total, stats

"""A scheduler and the fake device in one loop; every launch and output is checked on its way."""

from collections import deque

from fake_executor import FakeExecutor, expected

from duetjax.config import SamplingParams
from duetjax.policy.launch import FinishedStep, Lane, Program
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.request import FinishReason, NewRequest
from duetjax.policy.scheduler import Scheduler


def limits(**changes):
    """Small sizes; one launch at a time unless told otherwise, so that a step is a launch."""
    defaults = {
        "num_pages": 17,
        "page_size": 4,
        "num_slots": 4,
        "max_model_len": 32,
        "max_num_batched_tokens": 8,
        "decode_buckets": (2, 4),
        "prefill_buckets": (4, 8),
        "launches_per_lane": 1,
    }
    return SchedulerLimits(**{**defaults, **changes})


def request(request_id, prompt_len=3, max_tokens=4, *, prompt=None, **fields):
    """Prompts of different ids differ: token ids go up from the id's hundred."""
    first = 100 * (1 + sum(map(ord, request_id)) % 50)
    prompt = tuple(range(first, first + prompt_len)) if prompt is None else tuple(prompt)
    of_request = {"stop_ids", "priority", "cache_salt", "tbt_slo_ms"}
    sampling = {name: value for name, value in fields.items() if name not in of_request}
    params = SamplingParams(**{"temperature": 0.0, "seed": 0, **sampling})
    rest = {name: value for name, value in fields.items() if name in of_request}
    return NewRequest(request_id, prompt, max_tokens, params, **rest)


def answer(new, max_model_len):
    """What a request must generate, however it is scheduled."""
    length = min(new.max_tokens, max_model_len - len(new.prompt))
    tokens = expected(new.prompt, length, new.sampling.temperature, new.sampling.seed)
    for i, token in enumerate(tokens):
        if token in new.stop_ids:
            return tokens[: i + 1], FinishReason.STOP
    return tokens, FinishReason.LENGTH


class Run:
    """What was asked for, what came of it, and what is in flight.

    added: requests by id, in order of arrival. in_flight: per lane, launches as [launch, next
    step]. first_tokens: ids in the order of their first tokens. now: seconds, moved by `turn`.
    """

    def __init__(self, bounds, policy=None, pace=None):
        self.bounds = bounds
        self.scheduler = Scheduler(bounds, policy, pace)
        self.executor = FakeExecutor(bounds.page_size)
        self.added = {}
        self.tokens = {}
        self.finished = {}
        self.aborted = set()
        self.cached = {}
        self.first_tokens = []
        self.in_flight = {lane: deque() for lane in Lane}
        self.now = 0.0
        self.steps = 0

    @property
    def launches(self):
        return self.executor.launches

    @property
    def stats(self):
        return self.scheduler.stats()

    def add(self, *news):
        for new in news:
            self.scheduler.add(new, self.now)
            self.added[new.id] = new
            self.tokens[new.id] = ()
        return self

    def abort(self, request_id):
        was_live = self.scheduler.abort(request_id)
        if was_live:
            self.aborted.add(request_id)
        self.scheduler.check_integrity()
        return was_live

    # One call at a time.

    def plan(self):
        """Plans and submits all that can run now."""
        launches = self.scheduler.plan(self.now)
        self.scheduler.check_integrity()
        for launch in launches:
            self.check_launch(launch)
            self.executor.submit(launch)
            self.in_flight[launch.lane].append([launch, 0])
        return launches

    def finish_step(self, lane=Lane.WHOLE):
        """The next step in flight on a lane finishes."""
        launch, step = flight = self.in_flight[lane][0]
        result = self.executor.result(launch.ticket, step)
        finished = FinishedStep(launch.ticket, step, result)
        outputs = list(self.scheduler.commit(finished, self.now))
        self.scheduler.check_integrity()
        flight[1] += 1
        if flight[1] == launch.k:
            self.in_flight[lane].popleft()
        self.steps += 1
        for output in outputs:
            self.take(output)
        return outputs

    def finish_launch(self, lane=Lane.WHOLE):
        """All steps left of the first launch in flight on a lane finish."""
        launch = self.in_flight[lane][0][0]
        outputs = []
        while self.in_flight[lane] and self.in_flight[lane][0][0] is launch:
            outputs += self.finish_step(lane)
        return outputs

    # Loops.

    def lanes_in_flight(self):
        return [lane for lane in Lane if self.in_flight[lane]]

    def turn(self):
        """Plans, then the launch submitted first finishes; the launches that were planned."""
        launches = self.plan()
        lanes = self.lanes_in_flight()
        if lanes:
            self.finish_launch(min(lanes, key=lambda lane: self.in_flight[lane][0][0].ticket))
        self.now += 1.0
        return launches

    def random_turn(self, draw):
        """Plans, then some steps finish on lanes that a `random.Random` draws."""
        self.plan()
        for _ in range(draw.randint(0, 4)):
            if lanes := self.lanes_in_flight():
                self.finish_step(draw.choice(lanes))
        self.now += 1.0

    def finish(self, draw=None):
        """Turns until nobody waits for anything and nothing is in flight."""
        for _ in range(3_000):
            if not (self.scheduler.has_work or self.lanes_in_flight()):
                break
            if draw is None:
                self.turn()
            else:
                self.random_turn(draw)
        self.check_end()
        return self

    # What must hold.

    def take(self, output):
        assert output.id not in self.finished, f"{output} after the end"
        assert output.id not in self.aborted, f"{output} after its abort"
        if output.token_ids and not self.tokens[output.id]:
            self.first_tokens.append(output.id)
            self.cached[output.id] = output.num_cached_tokens
        else:
            assert output.num_cached_tokens == 0
        self.tokens[output.id] += output.token_ids
        if output.finish is not None:
            self.finished[output.id] = output.finish

    def check_launch(self, launch):
        bounds, prefill = self.bounds, launch.program is Program.PREFILL
        decoding = launch.counts.count(0) if prefill else len(launch.slots)
        size = len(launch.tokens) + decoding
        buckets = bounds.prefill_buckets if prefill else bounds.decode_buckets
        assert launch.bucket == min(b for b in buckets if b >= size)
        assert size <= bounds.max_num_batched_tokens
        assert max(launch.slots) < bounds.num_slots
        if bounds.deterministic and prefill:
            assert len(launch.slots) == 1
            assert decoding == 0

    def check_answers(self):
        for request_id, new in self.added.items():
            tokens, finish = answer(new, self.bounds.max_model_len)
            said = self.tokens[request_id]
            if self.finished.get(request_id, finish) is not finish:
                assert self.finished[request_id] is FinishReason.ERROR
                finish = FinishReason.ERROR
            if request_id in self.aborted or finish is FinishReason.ERROR:
                assert said == tokens[: len(said)]
            else:
                assert (said, self.finished.get(request_id)) == (tokens, finish), request_id

    def check_end(self):
        assert not self.scheduler.has_work
        self.check_answers()
        stats = self.stats
        assert (stats.running, stats.waiting, stats.pages_held, stats.pages_quarantined) == (0,) * 4
        assert stats.pages_free + stats.pages_cached == stats.pages_total
        assert stats.generation_tokens == sum(map(len, self.tokens.values()))
        assert stats.steps == self.steps
        assert self.scheduler.num_in_flight == 0

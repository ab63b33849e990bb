"""Random plans: the real scheduler over an executor, requests that come, stop and are aborted."""

import queue
import random
from collections import Counter
from dataclasses import dataclass
from functools import cache

from lane_programs import BUDGET, LONGEST, NUM_PAGES, PAGE, SLOTS, Text, answer_alone, config

from duetjax.config import SamplingParams
from duetjax.policy.launch import Lane, Program, Split
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.policies import Aggregate, Duet
from duetjax.policy.request import FinishReason, NewRequest
from duetjax.policy.scheduler import Scheduler

PATIENCE = 120.0
MOST_OUTPUT = 28


@dataclass(frozen=True)
class Known:
    """A request whose whole answer is known. answer: `MOST_OUTPUT` tokens that nothing stops."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    answer: tuple[int, ...]


@cache
def catalogue(size=72):
    """Greedy, drawn and penalised ones in equal parts, with prompts that begin alike."""
    dice, vocab = random.Random(5), config().vocab_size
    stems = [dice.choices(range(vocab), k=60) for _ in range(3)]
    drawn = {"temperature": 0.9, "top_p": 0.95}
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.8, "frequency_penalty": 0.5}
    kinds = [{"temperature": 0.0}, drawn, {"temperature": 0.0, **penalties}, {**drawn, **penalties}]
    known = []
    for i in range(size):
        length = dice.randint(1, 60)
        shared = dice.choice((0, length // 2, length - 1))
        prompt = (*dice.choice(stems)[:shared], *dice.choices(range(vocab), k=length - shared))
        sampling = SamplingParams(seed=dice.getrandbits(62), **kinds[i % len(kinds)])
        known.append(Known(prompt, sampling, answer_alone(prompt, sampling, MOST_OUTPUT)))
    return known


class Fickle:
    """Shares the device differently each time it is asked."""

    def __init__(self, dice):
        self._dice = dice
        self._splits = dice.choice((0.5, 0.9))

    def decide(self, load):
        dice = self._dice
        k, budget = (
            dice.randint(1, 16),
            dice.choice((dice.randint(1, 9), dice.randint(1, 9), BUDGET)),
        )
        if load.rows and load.prompt_tokens and dice.random() < self._splits:
            return Duet(Split(1, 1), k, budget)
        decodes = dice.random() < 0.8 or not load.prompt_tokens
        return Aggregate(min(budget + load.rows, BUDGET), decodes=decodes, k=k)


class Deliveries:
    """What an executor delivers, in order."""

    def __init__(self):
        self._queue = queue.SimpleQueue()
        self.put, self.is_empty = self._queue.put, self._queue.empty

    def take(self):
        return self._queue.get(timeout=PATIENCE)

    def next(self):
        """The next step; raises what has failed."""
        finished = self.take()
        if isinstance(finished, BaseException):
            raise finished
        return finished


@dataclass
class Asked:
    """A request of a plan and what came of it."""

    new: NewRequest
    known: Known
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    is_aborted: bool = False

    def wanted(self):
        tokens = self.known.answer[: self.new.max_tokens]
        for i, token in enumerate(tokens):
            if token in self.new.stop_ids:
                return tokens[: i + 1], FinishReason.STOP
        return tokens, FinishReason.LENGTH

    def check(self):
        """Tokens are the known ones; from where rounding could tip a draw, whatever they are."""
        tokens, finish = self.wanted()
        for place, (said, wanted) in enumerate(zip(self.tokens, tokens, strict=False)):
            if said != wanted:
                text = Text(self.new.prompt, tokens[:place])
                draws = text.draws(self.new.sampling)
                assert {said, wanted} <= draws, f"{self}: token {place} is {said}, not {wanted}"
                return False
        if self.is_aborted:
            assert self.tokens == tokens[: len(self.tokens)], self
        else:
            assert (self.tokens, self.finish) == (tokens, finish), self
        return True


class Plan:
    """One scheduler's life over an executor that has been started, drawn from a seed."""

    def __init__(self, seed, executor, deliveries, policy=None):
        self.dice = dice = random.Random(seed)
        self.executor, self.deliveries = executor, deliveries
        self.limits = SchedulerLimits(
            num_pages=1 + dice.randint(LONGEST // PAGE, NUM_PAGES // 2),
            page_size=PAGE,
            num_slots=SLOTS,
            max_model_len=LONGEST,
            max_num_batched_tokens=BUDGET,
            decode_buckets=(SLOTS,),
            prefill_buckets=(BUDGET,),
            launches_per_lane=dice.choice((1, 2, 2)),
        )
        self.scheduler = Scheduler(self.limits, policy or Fickle(dice))
        self.asked, self.launches, self.now = {}, [], 0.0

    def play(self, num_requests=5):
        while len(self.asked) < num_requests or self.scheduler.has_work or self.in_flight:
            self.come_and_go(num_requests)
            for launch in self.scheduler.plan(self.now):
                self.launches.append(launch)
                self.executor.submit(launch)
            if self.in_flight:
                self.commit(self.deliveries.next())
        return self

    @property
    def in_flight(self):
        return self.scheduler.num_in_flight

    def come_and_go(self, num_requests):
        """Whoever comes and goes before the next step is taken in."""
        while len(self.asked) < num_requests and self.dice.random() < 0.5:
            asked = self.request(str(len(self.asked)))
            self.asked[asked.new.id] = asked
            self.scheduler.add(asked.new, self.now)
        if self.asked and self.dice.random() < 0.01:
            asked = self.asked[self.dice.choice([*self.asked])]
            asked.is_aborted |= self.scheduler.abort(asked.new.id)

    def request(self, name):
        known = self.dice.choice(catalogue())
        stop_ids = (known.answer[self.dice.randrange(MOST_OUTPUT)],)
        new = NewRequest(
            name,
            known.prompt,
            self.dice.choice((self.dice.randint(1, MOST_OUTPUT), MOST_OUTPUT)),
            known.sampling,
            stop_ids if self.dice.random() < 0.4 else (),
            priority=self.dice.randint(0, 2),
            cache_salt=self.dice.choice(("", "", "other")),
        )
        return Asked(new, known)

    def commit(self, finished):
        self.now += 1.0
        for output in self.scheduler.commit(finished, self.now):
            asked = self.asked[output.id]
            assert asked.finish is None
            assert not asked.is_aborted
            asked.tokens += output.token_ids
            asked.finish = output.finish

    def happened(self):
        """How often each thing has happened that could go wrong."""
        stats, asked = self.scheduler.stats(), self.asked.values()
        counts = Counter(
            preemptions=stats.preemptions,
            prefix_hits=stats.prefix_hits,
            handovers=sum(len(launch.handovers) for launch in self.launches),
            stops=sum(one.finish is FinishReason.STOP for one in asked),
            aborts=sum(one.is_aborted for one in asked),
        )
        counts.update(f"k={each.k}" for each in self.launches if each.lane is Lane.DECODE)
        counts.update(self.crossings())
        return counts

    def crossings(self):
        """Prompts under penalties that were admitted on one lane and ended on the other.

        "again": with output before it, so that counts are not all 0.
        """
        admitted = {}
        for launch in self.launches:
            for new in launch.admitted:
                admitted[new.slot] = new, launch.lane
            if launch.program is Program.DECODE:
                continue
            ended = [s for s, n, e in zip(launch.slots, launch.counts, launch.samples, strict=True)
                     if n and e]  # fmt: skip
            for slot in ended:
                new, lane = admitted[slot]
                if new.history and lane is not launch.lane:
                    again = " again" if len(new.history) > new.num_prompt else ""
                    yield f"{lane} to {launch.lane}{again}"

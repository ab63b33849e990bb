"""What is timed of an engine: launches drawn at random from all that it may run.

A seed gives the same cases on every machine with the same limits and predictions. Half of each kind
is held out: drawn like the others, but never shown to whoever fits.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random

import numpy as np

from duetjax.policy.durations import Step
from duetjax.policy.launch import Lane, Program, Split
from duetjax.policy.limits import SchedulerLimits

STEPS = 256
"""Most steps that a decoding row takes while a case is timed; it has pages for all of them."""
FEWEST_REPEATS, MOST_REPEATS, REPEATED_MS = 3, 9, 30.0
"""Of a step that is timed: so many, as short ones are the noisier, and cost less."""
_OVERHEAD_MS = 4.0
_LONGEST_MS = 600_000.0  # of a case, whatever time there is
_KEPT = 0.8
_TRIES = 60  # for each case that is wanted
_MOST_PROMPTS = 8
_LOOK_AHEADS = (1, 2, 4, 8)


class Kind(StrEnum):
    """What is timed, and what runs beside it."""

    DECODE = "decode, whole"
    PREFILL = "prefill, whole"
    MIXED = "mixed, whole"
    DECODE_ALONE = "decode, alone on a split"
    PREFILL_ALONE = "prefill, alone on a split"
    DECODE_BESIDE = "decode beside prefill"
    PREFILL_BESIDE = "prefill beside decode"


_WHOLE = (Kind.DECODE, Kind.PREFILL, Kind.MIXED)
_ALONE = (Kind.DECODE_ALONE, Kind.PREFILL_ALONE)


@dataclass(frozen=True, slots=True)
class Shape:
    """A launch: contexts of its decoding rows, (cached, new) tokens of its prompts, k steps."""

    program: Program
    bucket: int
    contexts: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    k: int = 1

    def step(self, lane: Lane, split: Split | None, steps_before: int = 0) -> Step:
        """What a launch of it is foretold by, when its rows have decoded for so many steps."""
        contexts = np.array(self.contexts, np.int64) + steps_before
        if not self.chunks:
            return Step(lane, split, self.program, self.bucket, 1, contexts)
        cached, new = np.array(self.chunks, np.int64).T
        ones = np.ones(len(contexts), np.int64)
        rows = np.concatenate([ones, new]), np.concatenate([contexts, cached])
        return Step(lane, split, self.program, self.bucket, *rows)


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed at once: a shape on the whole device or a part, or one on each lane.

    shapes: the decode lane's first. Kinds are told apart by split and number of shapes.
    """

    split: Split | None
    shapes: tuple[Shape, ...]
    is_held_out: bool = False

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Where each shape runs."""
        if self.split is None:
            return (Lane.WHOLE,)
        if len(self.shapes) == 2:
            return Lane.DECODE, Lane.PREFILL
        return (Lane.PREFILL if self.shapes[0].chunks else Lane.DECODE,)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of each shape."""
        if len(self.shapes) == 2:
            return Kind.DECODE_BESIDE, Kind.PREFILL_BESIDE
        [shape] = self.shapes
        if self.split is not None:
            return (_ALONE[bool(shape.chunks)],)
        return (_WHOLE[bool(shape.chunks) + bool(shape.chunks and shape.contexts)],)


type Foretold = Callable[[Step], float]
"""About how many milliseconds a step takes."""


def repeats(ms: float) -> int:
    """How many steps of about so many milliseconds are timed."""
    return min(max(math.ceil(REPEATED_MS / ms), FEWEST_REPEATS), MOST_REPEATS)


@dataclass(frozen=True, slots=True)
class Grid:
    """Draws cases. splits: of both lanes at once; none: everything runs on the whole device.

    has_parts: a lane alone on a split is held to its part of the device, so that is timed too.
    """

    limits: SchedulerLimits
    splits: Sequence[Split]
    foretold: Foretold
    has_parts: bool
    seed: int

    def cases(self, num_points: int, budget_ms: float) -> list[Case]:
        """So many points, a case of two shapes being two, in an order that means nothing.

        Every kind has its part of them and of `budget_ms`, and of what others have left of that.
        If it does not suffice the longest fifth of a kind's launches is drawn anew; then there are
        as many as there is time for.
        """
        weights = dict.fromkeys(_WHOLE, 4)
        if self.splits:
            weights |= dict.fromkeys(_ALONE, 3) if self.has_parts else {}
            weights[Kind.DECODE_BESIDE] = 8
        found: list[Case] = []
        points, rest = sum(weights.values()) + 8 * (Kind.DECODE_BESIDE in weights), dict(weights)
        for kind, weight in weights.items():
            part = budget_ms * weight / sum(rest.values())
            drawn = self._affordable(kind, math.ceil(num_points * weight / points), part)
            budget_ms -= sum(map(self._cost_ms, drawn))
            del rest[kind]
            found += _held_out(drawn)
        Random(self.seed).shuffle(found)
        return found

    def _affordable(self, kind: Kind, count: int, budget_ms: float) -> list[Case]:
        """So many cases of a kind, or as many as there is time for."""
        most_ms = least_ms = _LONGEST_MS
        while True:
            drawn = self._draw(kind, count, most_ms)
            costs = [self._cost_ms(case) for case in drawn]
            if not drawn or sum(costs) <= budget_ms or most_ms == least_ms < _LONGEST_MS:
                break
            least_ms = min(least_ms, sorted(costs)[int(_KEPT * len(costs))])
            most_ms = max(max(costs) / 1.3, least_ms)
        within = []
        for case, cost in zip(drawn, costs, strict=True):
            if cost <= budget_ms:
                budget_ms -= cost
                within.append(case)
        return within

    def _draw(self, kind: Kind, count: int, most_ms: float) -> list[Case]:
        dice, found = Random(f"{self.seed} {kind}"), dict[Case, None]()
        for _ in range(_TRIES * count):
            case = self._case(kind, dice)
            if case is not None and self._cost_ms(case) <= most_ms:
                found[case] = None
                if len(found) == count:
                    break
        return list(found)

    def _case(self, kind: Kind, dice: Random) -> Case | None:
        """One of a kind; None where what was drawn does not fit."""
        slots, pages = self.limits.num_slots, self.limits.num_pages - 1
        split = None if kind in _WHOLE else dice.choice(self.splits)
        if kind in (Kind.DECODE, Kind.DECODE_ALONE):
            shapes = [self._decode(dice, slots, pages)]
        elif kind in (Kind.PREFILL, Kind.PREFILL_ALONE):
            shapes = [self._prefill(dice, (), slots, pages)]
        else:
            decode = self._decode(dice, slots - 1, max(pages // 2, 1))
            if decode is None:
                return None
            rest = slots - len(decode.contexts), pages - self._pages(decode.contexts)
            beside = decode.contexts if kind is Kind.MIXED else ()
            prefill = self._prefill(dice, beside, *rest)
            shapes = [prefill] if kind is Kind.MIXED else [decode, prefill]
        fitting = tuple(shape for shape in shapes if shape is not None)
        return Case(split, fitting) if len(fitting) == len(shapes) else None

    def _decode(self, dice: Random, slots: int, pages: int) -> Shape | None:
        limits, look_aheads = self.limits, [k for k in _LOOK_AHEADS if k <= self.steps]
        if not (slots and look_aheads):
            return None
        rows = _log_uniform(dice, 1, slots)
        most = min(limits.max_model_len, pages // rows * limits.page_size) - self.steps - 1
        if most < 1:
            return None
        longest = _log_uniform(dice, 1, most)
        contexts = [longest] * rows
        if dice.random() < 0.5:
            contexts = [dice.randint(1 + longest // 4, longest) for _ in contexts]
        bucket = limits.decode_buckets[bisect_left(limits.decode_buckets, rows)]
        return Shape(Program.DECODE, bucket, tuple(contexts), k=dice.choice(look_aheads))

    def _prefill(
        self, dice: Random, contexts: tuple[int, ...], slots: int, pages: int
    ) -> Shape | None:
        """Prompts, and rows that decode beside them in one launch."""
        limits, rows = self.limits, len(contexts)
        room = min(limits.max_num_batched_tokens, limits.prefill_buckets[-1]) - rows
        tokens = _log_uniform(dice, 1, room)
        most_prompts = min(slots, tokens, _MOST_PROMPTS)
        prompts = 1 if dice.random() < 0.5 else dice.randint(1, most_prompts)
        cuts = sorted(dice.sample(range(1, tokens), prompts - 1))
        chunks, page = [], limits.page_size
        for new in np.diff([0, *cuts, tokens]).tolist():
            most = limits.max_model_len - 1 - new
            if most < 0:
                return None
            cached = 0 if dice.random() < 0.5 or most == 0 else _log_uniform(dice, 1, most)
            chunks.append((cached, new))
        if sum(-(-sum(chunk) // page) for chunk in chunks) > pages:
            return None
        bucket = limits.prefill_buckets[bisect_left(limits.prefill_buckets, rows + tokens)]
        return Shape(Program.PREFILL, bucket, contexts, tuple(chunks))

    @property
    def steps(self) -> int:
        """Most steps that a decoding row takes in one case."""
        return min(STEPS, self.limits.max_model_len // 4)

    def _pages(self, contexts: Sequence[int]) -> int:
        return sum(self.limits.num_pages_for(each + self.steps + 1) for each in contexts)

    def _cost_ms(self, case: Case) -> float:
        """Of timing it once; infinite where one lane's steps would not last beside the other's."""
        is_beside = len(case.shapes) == 2
        steps = [
            shape.step(lane, case.split)
            for shape, lane in zip(case.shapes, case.lanes, strict=True)
        ]
        times = [self.foretold(step) for step in steps]
        lasting = [
            (repeats(ms) + 1 + (2 if is_beside else 1) * shape.k) * ms
            for ms, shape in zip(times, case.shapes, strict=True)
        ]
        if is_beside and 1.5 * max(lasting) > times[0] * self.steps:
            return math.inf
        return max(lasting) + _OVERHEAD_MS


def _held_out(cases: Sequence[Case]) -> list[Case]:
    """The same, every other one held out."""
    return [replace(case, is_held_out=place % 2 == 1) for place, case in enumerate(cases)]


def _log_uniform(dice: Random, least: int, most: int) -> int:
    """From least to most, each order of magnitude being as likely as any other."""
    drawn = math.exp(dice.uniform(math.log(least), math.log(most + 1)))
    return min(max(int(drawn), least), most)

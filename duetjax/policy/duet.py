"""The policies that look ahead: aggregated until a launch would break the objective, then a duet.

DuetServe (arXiv 2511.04791), sections on scheduling and on the partition optimiser.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Program, Split
from duetjax.policy.partition import Bounds, Candidates, Choice, Outcome, choose
from duetjax.policy.policies import Aggregate, Decision, Details, Duet, Load

IN_FLIGHT = 2
"""Launches of the decode lane that a row handed over waits for. With the step that brings its
second token they should take no longer than the objective: on a split that allows it a step takes a
third of that, and k, as the lane is planned again and again, need not span a prefill launch."""

HAND_OVER = "hand_over"
"""Why a launch decodes alone: a row handed over would wait too long for a mixed one to end."""

PREFILL_SIZES = 2
"""Sizes of a prefill launch that are weighed: the throughput hardly differs among those it could
take, but the one that ends in time on many cores is too long on few."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the programs and the operator allow.

    budget: tokens of a launch. decode_buckets, prefill_buckets: ascending. max_k: most decode steps
    in a launch. max_prefill_ms: longest prefill launch beside decode; None is 4 x the objective.
    """

    budget: int
    decode_buckets: tuple[int, ...]
    prefill_buckets: tuple[int, ...]
    max_k: int = 16
    max_prefill_ms: float | None = None

    def bucket(self, program: Program, size: int) -> int:
        """The program that takes `size` rows or tokens."""
        decode = program is Program.DECODE
        buckets = self.decode_buckets if decode else self.prefill_buckets
        return buckets[bisect_left(buckets, size)]


class Prospect:
    """What one load is foreseen to take, together and apart."""

    def __init__(self, foresight: Foresight, sizes: Sizes, details: Details) -> None:
        self._foresight = foresight
        self._sizes = sizes
        self._details = details
        self._rows = len(details.contexts)
        self._decoding = foresight.decoding(details.contexts)
        self._prompt_tokens = sum([left for _, left in details.prompts])
        self._prompts = foresight.prompts(details.prompts, sizes.budget)

    def mixed_ms(self, budget: int) -> float:
        """Milliseconds of one launch of all decoding rows and prompt chunks, `budget` tokens."""
        rows = self._prompts.first(budget - self._rows, self._decoding)
        bucket = self._sizes.bucket(Program.PREFILL, int(rows.tokens))
        return self._foresight.whole_ms(Program.PREFILL, bucket, rows)

    def candidates(
        self, longest_ms: float, mixed_ms: float, slo_ms: float | None = None
    ) -> Candidates:
        """Every split, or the episode's, with decode steps and prefill launches beside each other.

        The latter fill a bucket, or are what remains of the prompts: the largest one that would end
        within `longest_ms` at the pace of a mixed launch under the whole budget, which parts of the
        device hardly exceed; the next smaller ones, PREFILL_SIZES in all; and the smallest one, for
        when decode can hardly wait. slo_ms: leaves out those that hardly matter then, the smallest
        one where decode meets the objective on some split, the others where it does on none.
        """
        foresight, split, bucket = self._foresight, self._details.split, self._sizes.bucket
        decode = bucket(Program.DECODE, self._rows), self._decoding
        decode_ms, whole_decode_ms = foresight.decode_ms(decode, split)
        mixed_tokens = min(self._sizes.budget, self._rows + self._prompt_tokens)
        tokens = self._prefill_sizes(longest_ms / mixed_ms * mixed_tokens)
        if slo_ms is not None:
            tokens = tokens[-PREFILL_SIZES:] if _is_met(decode_ms, slo_ms) else tokens[:1]
        launches = [(bucket(Program.PREFILL, size), self._prompts.first(size)) for size in tokens]
        return Candidates(
            self._rows,
            foresight.splits if split is None else (split,),
            decode_ms,
            tokens,
            foresight.prefill_ms(launches, split),
            whole_decode_ms,
        )

    def choose(self, within: Bounds, mixed_ms: float, previous: Split | None) -> Choice:
        """The best of the candidates: of all of them where those that matter are too long."""
        found = self.candidates(within.max_prefill_ms, mixed_ms, within.tbt_slo_ms)
        choice = choose(found, within, previous)
        if choice.outcome is Outcome.SPLIT or not _is_met(found.decode_ms, within.tbt_slo_ms):
            return choice
        return choose(self.candidates(within.max_prefill_ms, mixed_ms), within, previous)

    def _prefill_sizes(self, most_tokens: float) -> tuple[int, ...]:
        buckets, total = self._sizes.prefill_buckets, min(self._prompt_tokens, self._sizes.budget)
        sizes = (*buckets[: bisect_left(buckets, total)], total)
        end = bisect_right(sizes, most_tokens)
        return sizes[:1] + sizes[max(1, end - PREFILL_SIZES) : end]


def _is_met(decode_ms: Sequence[float], slo_ms: float) -> bool:
    return min(decode_ms, default=inf) <= slo_ms


def bounds(sizes: Sizes, details: Details, tbt_slo_ms: float) -> Bounds:
    """What a choice among them must respect."""
    longest = sizes.max_prefill_ms
    return Bounds(
        tbt_slo_ms,
        max(1, min(sizes.max_k, details.max_k)),
        4 * details.tbt_slo_ms if longest is None else longest,
    )


def with_margin(tbt_slo_ms: float, foresight: Foresight) -> float:
    """The objective less what launches overrun: planned to the last, noise breaks it."""
    return tbt_slo_ms / foresight.slack


class AggregatedSlo:
    """Mixed batches under a budget that is foreseen to keep the objective: the best of one lane."""

    def __init__(self, foresight: Foresight, sizes: Sizes) -> None:
        self._foresight = foresight
        self._sizes = sizes

    def decide(self, load: Load) -> Decision:
        """The largest bucket whose launch keeps the objective; the smallest, if none does."""
        foresight, sizes = self._foresight, self._sizes
        if not (load.rows and load.prompt_tokens):
            return Aggregate(sizes.budget)
        details = load.look()
        prospect = Prospect(foresight, sizes, details)
        slo_ms = with_margin(details.tbt_slo_ms, foresight)
        budgets = [min(size, sizes.budget) for size in sizes.prefill_buckets if size > load.rows]
        for budget in reversed(budgets[1:]):
            if prospect.mixed_ms(budget) <= slo_ms:
                return Aggregate(budget)
        return Aggregate(budgets[0])


class DuetPolicy:
    """Mixed batches while they keep the objective, else the best split of the device.

    Where predictions have proved wrong (`Foresight.is_trusted`) it is aggregated with half the
    budget. What it decides is counted by `Outcome`, "aggregated", "distrusted" or "hand_over".
    last_choice: what the optimiser came to last, for those who ask why.
    """

    def __init__(self, foresight: Foresight, sizes: Sizes) -> None:
        self._foresight = foresight
        self._sizes = sizes
        self._previous: Split | None = None
        self._owed = 0  # prompt tokens to run after decode ran alone
        self.last_choice: Choice | None = None

    def decide(self, load: Load) -> Decision:
        """The tightest running objective decides; `partition.choose` says what it may come to."""
        foresight, sizes = self._foresight, self._sizes
        owed, self._owed = self._owed, 0
        if not (load.rows and load.prompt_tokens):
            return Aggregate(sizes.budget)
        if not foresight.is_trusted:
            return self._halved(load, "distrusted")
        details = load.look()
        if not len(details.contexts):  # their last steps are still running
            return Aggregate(sizes.budget)
        prospect = Prospect(foresight, sizes, details)
        slo_ms = with_margin(details.tbt_slo_ms, foresight)
        mixed_ms = prospect.mixed_ms(sizes.budget)
        if mixed_ms <= slo_ms - details.handed_over_ms:
            return Aggregate(sizes.budget)
        if mixed_ms <= slo_ms:
            return Aggregate(load.rows, why=HAND_OVER)
        if owed:
            return Aggregate(owed, decodes=False, why=Outcome.DECODE_ALONE)
        choice = prospect.choose(
            bounds(sizes, details, slo_ms / (IN_FLIGHT + 1)), mixed_ms, self._previous
        )
        if choice.outcome is not Outcome.SPLIT:
            choice = prospect.choose(bounds(sizes, details, slo_ms), mixed_ms, self._previous)
        self.last_choice = choice
        return self._decision(choice, load, details, slo_ms)

    def _decision(self, choice: Choice, load: Load, details: Details, slo_ms: float) -> Decision:
        if choice.split is not None:
            self._previous = choice.split
            k = max(1, min(choice.k, int((slo_ms / choice.decode_ms - 1) / IN_FLIGHT)))
            return Duet(choice.split, k, choice.prefill_tokens, choice.outcome)
        if choice.outcome is Outcome.DECODE_ALONE:
            if details.split is None:  # else decode goes on beside the episode's last prefill
                self._owed = choice.prefill_tokens
            return Aggregate(load.rows, k=choice.k, why=choice.outcome)
        return self._halved(load, choice.outcome)

    def _halved(self, load: Load, why: str) -> Decision:
        return Aggregate(max(self._sizes.budget // 2, load.rows + 1), why=why)


class Disaggregated:
    """Prefill on one whole device and decode on another, always; for simulations of two of them."""

    def __init__(self, budget: int, cores: int, k: int) -> None:
        self._duet = Duet(Split(cores, cores), k, budget)

    def decide(self, load: Load) -> Decision:
        """Each side runs whenever it has something."""
        return self._duet

"""The policies that look ahead: aggregated until a launch would break the objective, then a duet.

DuetServe (arXiv 2511.04791), sections on scheduling and on the partition optimiser.
"""

from bisect import bisect_left
from dataclasses import dataclass

from duetjax.policy.calibration import DISTRUST_ABOVE
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Program, Split
from duetjax.policy.partition import Bounds, Candidates, Choice, Outcome, choose
from duetjax.policy.policies import Aggregate, Decision, Details, Duet, Load
from duetjax.policy.roofline import Rows

IN_FLIGHT = 2
"""Launches of the decode lane that a row handed over waits for: together no longer than one step
may take. The lane is planned again and again while prefill runs, so k need not span all of it."""

PREFILL_SIZES = 3
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


def cut(prompts: tuple[tuple[int, int], ...], tokens: int) -> tuple[list[int], list[int]]:
    """The next `tokens` of prompts, given as (start, left): tokens of each, and before each."""
    new: list[int] = []
    cached: list[int] = []
    for start, left in prompts:
        if tokens <= 0:
            break
        new.append(min(left, tokens))
        cached.append(start)
        tokens -= new[-1]
    return new, cached


def mixed_ms(
    foresight: Foresight, sizes: Sizes, details: Details, decoding: Rows, budget: int
) -> float:
    """Milliseconds of one launch of all decoding rows and prompt chunks, `budget` tokens in all."""
    rows = decoding + Rows(*cut(details.prompts, budget - decoding.count))
    bucket = sizes.bucket(Program.PREFILL, int(rows.tokens))
    return foresight.whole_ms(Program.PREFILL, bucket, rows)


def candidates(
    foresight: Foresight, sizes: Sizes, details: Details, decoding: Rows, bounds: Bounds
) -> Candidates:
    """Every split with its decode step, and prefill launches of a few sizes.

    These are what remains of the prompts, if little, or a bucket, the largest one that ends within
    bounds.max_prefill_ms where prefill has most cores; the buckets below it, PREFILL_SIZES with it;
    and the smallest one, for when decode can hardly wait.
    """
    total = min(sum(left for _, left in details.prompts), sizes.budget)
    tokens = [size for size in sizes.prefill_buckets if size < total] + [total]
    launches = [(sizes.bucket(Program.PREFILL, n), Rows(*cut(details.prompts, n))) for n in tokens]
    while len(launches) > 1 and foresight.fastest_prefill_ms(*launches[-1]) > bounds.max_prefill_ms:
        launches.pop()
    del launches[1:-PREFILL_SIZES]
    decode = sizes.bucket(Program.DECODE, decoding.count)
    return Candidates(
        decoding.count,
        foresight.splits,
        foresight.decode_on_splits(decode, decoding),
        tuple([int(rows.tokens) for _, rows in launches]),
        foresight.prefill_on_splits(launches),
        foresight.whole_ms(Program.DECODE, decode, decoding),
    )


def bounds(sizes: Sizes, details: Details, tbt_slo_ms: float) -> Bounds:
    """What a choice among them must respect."""
    longest = sizes.max_prefill_ms
    return Bounds(
        tbt_slo_ms,
        max(1, min(sizes.max_k, details.max_k)),
        4 * details.tbt_slo_ms if longest is None else longest,
    )


def with_margin(tbt_slo_ms: float, foresight: Foresight) -> float:
    """The objective lowered by as much as predictions err: planned to the last, noise breaks it."""
    return tbt_slo_ms / (1 + min(foresight.median_error, DISTRUST_ABOVE))


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
        decoding, slo_ms = Rows(1, details.contexts), with_margin(details.tbt_slo_ms, foresight)
        budgets = [min(size, sizes.budget) for size in sizes.prefill_buckets if size > load.rows]
        for budget in reversed(budgets[1:]):
            if mixed_ms(foresight, sizes, details, decoding, budget) <= slo_ms:
                return Aggregate(budget)
        return Aggregate(budgets[0])


class DuetPolicy:
    """Mixed batches while they keep the objective, else the best split of the device.

    Where predictions have proved wrong (`Foresight.is_trusted`) it is aggregated with half the
    budget. What it decides is counted by `Outcome`, "aggregated" or "distrusted". last_choice: what
    the optimiser came to last, for those who ask why.
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
        decoding, slo_ms = Rows(1, details.contexts), with_margin(details.tbt_slo_ms, foresight)
        if mixed_ms(foresight, sizes, details, decoding, sizes.budget) <= slo_ms:
            return Aggregate(sizes.budget)
        if owed:
            return Aggregate(owed, decodes=False, why=Outcome.DECODE_ALONE)
        within = bounds(sizes, details, slo_ms)
        found = candidates(foresight, sizes, details, decoding, within)
        if details.split is not None:
            found = only(found, details.split)
        self.last_choice = choose(found, within, self._previous)
        return self._decision(self.last_choice, load, details)

    def _decision(self, choice: Choice, load: Load, details: Details) -> Decision:
        if choice.split is not None:
            self._previous = choice.split
            k = max(1, min(choice.k, int(choice.tbt_slo_ms / (IN_FLIGHT * choice.decode_ms))))
            return Duet(choice.split, k, choice.prefill_tokens, choice.outcome)
        if choice.outcome is Outcome.DECODE_ALONE:
            if details.split is None:  # else decode goes on beside the episode's last prefill
                self._owed = choice.prefill_tokens
            return Aggregate(load.rows, k=choice.k, why=choice.outcome)
        return self._halved(load, choice.outcome)

    def _halved(self, load: Load, why: str) -> Decision:
        return Aggregate(max(self._sizes.budget // 2, load.rows + 1), why=why)


def only(candidates: Candidates, split: Split) -> Candidates:
    """The candidates of one split: an episode's is fixed."""
    at = candidates.splits.index(split)
    return Candidates(
        candidates.rows,
        (split,),
        candidates.decode_ms[at : at + 1],
        candidates.prefill_tokens,
        candidates.prefill_ms[at : at + 1],
        candidates.whole_decode_ms,
    )


class Disaggregated:
    """Prefill on one whole device and decode on another, always; for simulations of two of them."""

    def __init__(self, budget: int, cores: int, k: int) -> None:
        self._duet = Duet(Split(cores, cores), k, budget)

    def decide(self, load: Load) -> Decision:
        """Each side runs whenever it has something."""
        return self._duet

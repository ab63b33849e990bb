"""What the headline experiment's cells come to, and how sure that is: a bootstrap over seeds.

A draw takes as many seeds as there are, with replacement, and of each of them as many blocks of its
window, with replacement; the same ones for all policies and rates, which saw the same arrivals.
Intervals are the middle 95 % of the draws. With one seed they say nothing of other arrivals.
Percentiles are the least value that has the share at or below it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
MIDDLE = (0.025, 0.975)

type Floats = NDArray[np.float64]
type Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A policy at one rate, all seeds together.

    gaps [values] ascending, gap_counts [blocks, values]; ttft [values] ascending, infinite for a
    token that was not seen, ttft_counts [blocks, values]; tokens, seconds [blocks].
    """

    gaps: Floats
    gap_counts: Floats
    ttft: Floats
    ttft_counts: Floats
    tokens: Floats
    seconds: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """Of each draw: milliseconds, and prompt and output tokens/s. NaN where nothing was drawn."""

    p99: Floats
    worst: Floats
    tokens_per_s: Floats
    ttft_p50: Floats
    ttft_p99: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Of each draw, what a policy comes to under an objective, at the highest rate that keeps it.

    Where none does: rate 0, 0 tokens/s, worst gap NaN, infinite TTFT.
    """

    rate: Floats
    tokens_per_s: Floats
    worst: Floats
    ttft_p50: Floats
    ttft_p99: Floats


def measured(documents: Sequence[Document]) -> Measured:
    """Of one cell for each seed, in order of seeds."""
    blocks = [block for document in documents for block in document["blocks"]]
    seconds = [
        document["window_s"] / len(document["blocks"])
        for document in documents
        for _ in document["blocks"]
    ]
    gaps = [{float(gap): float(count) for gap, count in block["gaps"]} for block in blocks]
    ttft: list[dict[float, float]] = []
    for block in blocks:
        values = [np.inf if each is None else float(each) for each in block["ttft_ms"]]
        ttft.append({value: float(values.count(value)) for value in values})
    tokens = [block["prompt_tokens"] + block["output_tokens"] for block in blocks]
    return Measured(*_counted(gaps), *_counted(ttft), np.array(tokens, float), np.array(seconds))


def _counted(blocks: Sequence[Mapping[float, float]]) -> tuple[Floats, Floats]:
    """All values, ascending, and how often each is in each block."""
    values = sorted({value for block in blocks for value in block})
    place = {value: index for index, value in enumerate(values)}
    counts = np.zeros((len(blocks), len(values)))
    for row, block in enumerate(blocks):
        for value, count in block.items():
            counts[row, place[value]] = count
    return np.array(values, float), counts


def draws(seeds: int, blocks: int, count: int = DRAWS, seed: int = 0) -> Floats:
    """How often each draw takes each block, [count, seeds * blocks]."""
    random = np.random.default_rng(seed)
    of = random.integers(0, seeds, (count, seeds))[:, :, None]
    block = random.integers(0, blocks, (count, seeds, blocks))
    taken = np.zeros((count, seeds * blocks))
    np.add.at(taken, (np.arange(count)[:, None, None], of * blocks + block), 1.0)
    return taken


def figures(of: Measured, taken: Floats) -> Figures:
    """Of each draw, [draws]; `taken` as in `draws`, or all ones for what was measured."""
    gaps, ttft = taken @ of.gap_counts, taken @ of.ttft_counts
    return Figures(
        p99=percentile(of.gaps, gaps, 0.99),
        worst=percentile(of.gaps, gaps, 1.0),
        tokens_per_s=(taken @ of.tokens) / (taken @ of.seconds),
        ttft_p50=percentile(of.ttft, ttft, 0.5),
        ttft_p99=percentile(of.ttft, ttft, 0.99),
    )


def percentile(values: Floats, counts: Floats, share: float) -> Floats:
    """Of ascending values [values] that are there so often [draws, values]; NaN where none is."""
    total = counts.sum(axis=1)
    if not len(values):
        return np.full(len(counts), np.nan)
    reached = np.cumsum(counts, axis=1) >= (share * total * (1 - 1e-12))[:, None]
    return np.where(total > 0, values[reached.argmax(axis=1)], np.nan)


def highest_kept(by_rate: Mapping[int, Figures], objective_ms: float) -> Kept:
    """By the figures of each rate; a rate without any gap keeps nothing."""
    size = len(next(iter(by_rate.values())).p99) if by_rate else 1
    rate, tokens = np.zeros(size), np.zeros(size)
    worst, p50, p99 = np.full(size, np.nan), np.full(size, np.inf), np.full(size, np.inf)
    for at, found in sorted(by_rate.items()):
        kept = found.p99 <= objective_ms
        rate = np.where(kept, float(at), rate)
        tokens = np.where(kept, found.tokens_per_s, tokens)
        worst = np.where(kept, found.worst, worst)
        p50 = np.where(kept, found.ttft_p50, p50)
        p99 = np.where(kept, found.ttft_p99, p99)
    return Kept(rate, tokens, worst, p50, p99)


def best_of(kept: Mapping[str, Kept]) -> list[str]:
    """Of each draw, who has the most tokens/s; the first of those that have as many."""
    names = list(kept)
    tokens = np.stack([kept[name].tokens_per_s for name in names])
    return [names[index] for index in tokens.argmax(axis=0).tolist()]


@dataclass(frozen=True, slots=True, eq=False)
class Ratios:
    """Of each draw: ours to the best other's tokens/s and TTFT p50, and who that is.

    Infinite tokens where no other keeps the objective, NaN where nobody does.
    """

    tokens: Floats
    ttft: Floats
    best: Sequence[str]


def ratios(ours: Kept, others: Mapping[str, Kept]) -> Ratios:
    """Each at the highest rate that it keeps."""
    best = best_of(others)
    tokens = np.array([others[name].tokens_per_s[n] for n, name in enumerate(best)])
    ttft = np.array([others[name].ttft_p50[n] for n, name in enumerate(best)])
    with np.errstate(divide="ignore", invalid="ignore"):
        return Ratios(ours.tokens_per_s / tokens, ours.ttft_p50 / ttft, best)


def interval(values: Floats) -> tuple[float, float] | None:
    """The middle 95 % of the draws; None where there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, MIDDLE, method="inverted_cdf").tolist()
    return low, high

"""Which split, prefill size and look-ahead k a duet should run, from predicted times alone.

The optimiser of DuetServe (arXiv 2511.04791). It does not know where the times come from, how
many launches are in flight, or when its caller asks: it is a pure function of its arguments.
"""

import math
import sys
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.launch import Split

type _Floats = NDArray[np.float64]
type _Mask = NDArray[np.bool_]

_TIED = 1.0 - 1e-9  # of the best rate: below it the difference is no longer one of rounding
_LARGEST = sys.float_info.max


class Outcome(StrEnum):
    """What `choose` came to; all but SPLIT break the objective for some steps.

    SPLIT: decode meets the objective on a split.
    DECODE_ALONE: it does on the whole device only. k decode steps there now, then one launch of
        `prefill_tokens`, in turn: prompts are not starved, and one gap in k is too long.
    LARGEST_DECODE_SHARE: it does nowhere. The split nearest to it, with the shortest prefill
        launch: prompts go on, and the next decision comes soon.
    UNPREDICTED: no split has a usable time on both sides. Nothing is chosen (zeros): fall back to
        a policy that needs no prediction.
    """

    SPLIT = "split"
    DECODE_ALONE = "decode_alone"
    LARGEST_DECODE_SHARE = "largest_decode_share"
    UNPREDICTED = "unpredicted"


@dataclass(frozen=True, slots=True)
class Candidates:
    """Columns over what could run: S splits, J prefill sizes; times in ms, as they are predicted.

    rows: decoding, at least one. splits [S]: no two alike. decode_ms [S]: one decode step beside
    prefill. prefill_tokens [J]: ascending, positive. prefill_ms [S, J]: the prefill launch.
    whole_decode_ms: one decode step on the whole device, alone. A time that is not finite and
    positive rules out whatever needs it.
    """

    rows: int
    splits: tuple[Split, ...]
    decode_ms: _Floats
    prefill_tokens: tuple[int, ...]
    prefill_ms: _Floats
    whole_decode_ms: float

    def __post_init__(self) -> None:
        S, J = len(self.splits), len(self.prefill_tokens)
        assert self.rows >= 1, f"nothing decodes: {self.rows} rows"
        assert self.decode_ms.shape == (S,), f"{self.decode_ms.shape} for {S} splits"
        assert self.prefill_ms.shape == (S, J), f"{self.prefill_ms.shape}, not {(S, J)}"
        sizes = self.prefill_tokens
        assert list(sizes) == sorted(sizes), f"not ascending: {sizes}"
        assert min(sizes, default=1) >= 1, f"not positive: {sizes}"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a choice must respect.

    tbt_slo_ms: longest decode step. max_k: steps that KV room and the requests' remaining tokens
    allow. max_prefill_ms: longest prefill launch; the smallest size may run however long it takes.
    hysteresis: relative gain in throughput that a change of split needs.
    """

    tbt_slo_ms: float
    max_k: int
    max_prefill_ms: float = math.inf
    hysteresis: float = 0.05

    def __post_init__(self) -> None:
        assert self.max_k >= 1, self
        assert self.hysteresis >= 0, self


@dataclass(frozen=True, slots=True)
class Choice:
    """What to run, and what was predicted of it.

    split: of SPLIT and LARGEST_DECODE_SHARE. k: decode steps. decode_ms: of one of them.
    prefill_tokens, prefill_ms: the prefill launch beside them; after them where decode is alone,
    its time then on the split that is fastest at it, so rather too long. throughput: tokens/s of
    both together. best_throughput: of the split that would be best if a change cost nothing.
    """

    outcome: Outcome
    split: Split | None
    k: int
    prefill_tokens: int
    decode_ms: float
    prefill_ms: float
    throughput: float
    best_throughput: float
    tbt_slo_ms: float
    whole_decode_ms: float

    @property
    def reason(self) -> str:
        """One sentence with the numbers that decided; built when read."""
        slo, split = f"{self.tbt_slo_ms:.4g} ms", self.split
        if self.outcome is Outcome.UNPREDICTED:
            return "no split has a usable predicted time on both sides"
        plural = "s" if self.k > 1 else ""
        steps = f"{self.k} step{plural} of {self.decode_ms:.4g} ms"
        prefill = f"{self.prefill_tokens} prompt tokens in {self.prefill_ms:.4g} ms"
        rate = f"{self.throughput:.4g} tokens/s"
        if split is None:
            return f"decode meets {slo} on the whole device only: {steps}, then {prefill}, {rate}"
        run = f"{steps} on {split.decode} beside {prefill} on {split.prefill}, {rate}"
        if self.outcome is Outcome.LARGEST_DECODE_SHARE:
            whole = f"{self.whole_decode_ms:.4g} ms on the whole device"
            return f"decode meets {slo} nowhere ({whole}), so the largest share has it: {run}"
        if self.best_throughput * _TIED <= self.throughput:
            return f"decode meets {slo}: {run}"
        best = f"{self.best_throughput:.4g} tokens/s"
        return f"decode meets {slo}: {run}, kept as another split's {best} are too little more"


@dataclass(frozen=True, slots=True)
class _Grid:
    """Every cell worth trying: steps and rate (tokens/ms) [2, S, J], -inf where it may not run."""

    steps: _Floats
    rate: _Floats


def choose(candidates: Candidates, bounds: Bounds, previous: Split | None) -> Choice:
    """The split, prefill size and k of the highest throughput within `bounds`.

    Maximises (k T_d + T_p) / max(k t_d(S_d), t_p(S_p)) subject to t_d(S_d) <= tbt_slo_ms. A split
    other than `previous` must gain more than the hysteresis, if `previous` meets the objective
    itself. Ties go to the previous split, then to more decode cores, the larger prefill, the
    larger k. In an episode, whose split is fixed, give the one split as the only candidate.

    Without a feasible split a smaller prefill is no cure, as t_d does not depend on it. If decode
    meets the objective on the whole device, alternating breaks it for one gap in k, where a split
    would for all. k is then the fewest steps whose slack pays for the prefill launch, so that
    gaps meet the objective on average (unless max_k is less). If not even the whole device does,
    nothing protects decode: it gets the largest share, and prompts the rest, so that they go on.
    """
    longest_ms = min(bounds.tbt_slo_ms, _LARGEST)
    feasible = _runnable(candidates, bounds, longest_ms)
    if feasible.any():
        grid = _grid(candidates, bounds, feasible)
        return _on_split(Outcome.SPLIT, candidates, bounds, grid, previous)
    runnable = _runnable(candidates, bounds, _LARGEST)
    if not runnable.any():
        nothing = Outcome.UNPREDICTED, None, 0, 0, 0.0, 0.0, 0.0, 0.0
        return Choice(*nothing, bounds.tbt_slo_ms, candidates.whole_decode_ms)
    if 0 < candidates.whole_decode_ms <= longest_ms:
        return _alone(candidates, bounds, runnable)
    grid = _grid(candidates, bounds, _largest_share(candidates.splits, runnable))
    return _on_split(Outcome.LARGEST_DECODE_SHARE, candidates, bounds, grid, None)


def _runnable(candidates: Candidates, bounds: Bounds, longest_ms: float) -> _Mask:
    """Cells [S, J] with usable times, decode steps up to `longest_ms`, and prefill as allowed."""
    decode_ms, prefill_ms = candidates.decode_ms, candidates.prefill_ms
    fits = prefill_ms <= min(bounds.max_prefill_ms, _LARGEST)
    fits[:, :1] = prefill_ms[:, :1] <= _LARGEST
    fits &= prefill_ms > 0
    fits &= ((decode_ms > 0) & (decode_ms <= longest_ms))[:, None]
    return fits


def _grid(candidates: Candidates, bounds: Bounds, allowed: _Mask) -> _Grid:
    """Both k worth trying for every split and size, and their rates.

    While k t_d <= t_p the rate (k T_d + T_p) / t_p grows with k; from k t_d >= t_p on it is
    T_d / t_d + T_p / (k t_d) and falls. So the best k is next to t_p / t_d: its floor or one more
    (one more than a floor that is exact falls, so never wins), or the end of [1, max_k] nearer it.
    """
    decode_ms, tokens = candidates.decode_ms[:, None], np.array(candidates.prefill_tokens, float)
    steps = np.empty((2, *allowed.shape))
    with np.errstate(all="ignore"):  # cells that are not allowed may hold anything
        np.floor(candidates.prefill_ms / decode_ms, out=steps[0])
        np.add(steps[0], 1.0, out=steps[1])
        np.minimum(steps, float(bounds.max_k), out=steps)
        np.maximum(steps, 1.0, out=steps)
        rate = steps * float(candidates.rows)
        rate += tokens
        rate /= np.maximum(steps * decode_ms, candidates.prefill_ms)
    return _Grid(steps, np.where(allowed, rate, -math.inf))


def _on_split(
    outcome: Outcome,
    candidates: Candidates,
    bounds: Bounds,
    grid: _Grid,
    previous: Split | None,
) -> Choice:
    """The best cell of a grid that has one, or of the previous split if that is good enough."""
    rate, splits = grid.rate, candidates.splits
    best = enough = float(rate.max())
    if previous is not None and previous in splits:
        kept = splits.index(previous)
        kept_rate = float(rate[:, kept].max())
        if best * _TIED <= kept_rate * (1 + bounds.hysteresis):
            enough = kept_rate
            rate[:, :kept] = rate[:, kept + 1 :] = -math.inf
    cell = _, s, j = _first(np.nonzero(rate >= enough * _TIED), candidates, grid)
    return Choice(
        outcome,
        splits[s],
        int(grid.steps[cell]),
        candidates.prefill_tokens[j],
        float(candidates.decode_ms[s]),
        float(candidates.prefill_ms[s, j]),
        float(rate[cell]) * 1000,
        best * 1000,
        bounds.tbt_slo_ms,
        candidates.whole_decode_ms,
    )


def _first(
    tied: tuple[NDArray[np.intp], ...], candidates: Candidates, grid: _Grid
) -> tuple[int, int, int]:
    """Of equally good cells the one with more decode cores, then larger prefill, then larger k."""
    which, s, j = tied
    last = 0
    if len(s) > 1:
        cores = np.array([candidates.splits[row].decode for row in s])
        tokens = np.array(candidates.prefill_tokens)[j]
        last = int(np.lexsort((grid.steps[tied], tokens, cores))[-1])
    return int(which[last]), int(s[last]), int(j[last])


def _largest_share(splits: tuple[Split, ...], runnable: _Mask) -> _Mask:
    """The one cell of the largest decode share that can run, with its smallest prefill."""
    able = np.flatnonzero(runnable.any(axis=1))
    s = max(able, key=lambda row: splits[row].decode)
    only = np.zeros_like(runnable)
    only[s, runnable[s].argmax()] = True
    return only


def _alone(candidates: Candidates, bounds: Bounds, runnable: _Mask) -> Choice:
    """Decode on the whole device in turn with the smallest prefill that can run."""
    step_ms, slo = float(candidates.whole_decode_ms), float(bounds.tbt_slo_ms)
    fastest = np.where(runnable, candidates.prefill_ms, math.inf).min(axis=0)
    j = int((fastest < math.inf).argmax())
    prefill_ms, tokens = float(fastest[j]), candidates.prefill_tokens[j]
    slack = slo - step_ms
    needed = prefill_ms / slack if slack > 0 else math.inf
    k = max(1, math.ceil(min(needed, bounds.max_k)))
    rate = (k * candidates.rows + tokens) / (k * step_ms + prefill_ms) * 1000
    return Choice(
        Outcome.DECODE_ALONE, None, k, tokens, step_ms, prefill_ms, rate, rate, slo, step_ms
    )

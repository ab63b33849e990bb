"""Which split, prefill size and look-ahead k a duet should run, from predicted times alone.

The optimiser of DuetServe (arXiv 2511.04791). It does not know where the times come from, how
many launches are in flight, or when its caller asks: it is a pure function of its arguments.
"""

import math
import sys
from dataclasses import dataclass
from enum import StrEnum
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.launch import Split

type _Floats = NDArray[np.float64]

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


type _Cell = tuple[float, int, int, int, int, int]
"""What could run: tokens per ms, then decode cores, prompt tokens and k, by which ties are broken,
then the indices of split and prefill size."""


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
    feasible = _cells(candidates, bounds, longest_ms)
    if feasible:
        return _on_split(Outcome.SPLIT, candidates, bounds, feasible, previous)
    runnable = _cells(candidates, bounds, _LARGEST)
    if not runnable:
        nothing = Outcome.UNPREDICTED, None, 0, 0, 0.0, 0.0, 0.0, 0.0
        return Choice(*nothing, bounds.tbt_slo_ms, candidates.whole_decode_ms)
    if 0 < candidates.whole_decode_ms <= longest_ms:
        return _alone(candidates, bounds, runnable)
    share = _largest_share(runnable)
    return _on_split(Outcome.LARGEST_DECODE_SHARE, candidates, bounds, share, None)


def _cells(candidates: Candidates, bounds: Bounds, longest_ms: float) -> list[_Cell]:
    """The best k of every split and size with usable times, decode steps up to `longest_ms`.

    While k t_d <= t_p the rate (k T_d + T_p) / t_p grows with k; from k t_d >= t_p on it is
    T_d / t_d + T_p / (k t_d) and falls. So the best k is next to t_p / t_d: its floor or one more,
    or the end of [1, max_k] nearer it.
    """
    cells: list[_Cell] = []
    rows, max_k = candidates.rows, bounds.max_k
    max_prefill_ms = min(bounds.max_prefill_ms, _LARGEST)
    beside = zip(candidates.decode_ms.tolist(), candidates.prefill_ms.tolist(), strict=True)
    for s, (decode_ms, prefills) in enumerate(beside):  # a loop: there are few, and arrays are slow
        if not 0 < decode_ms <= longest_ms:
            continue
        cores = candidates.splits[s].decode
        for j, prefill_ms in enumerate(prefills):
            if not 0 < prefill_ms <= (max_prefill_ms if j else _LARGEST):
                continue
            tokens = candidates.prefill_tokens[j]
            ratio = prefill_ms / decode_ms
            if ratio < 1:
                k, rate = 1, (rows + tokens) / decode_ms
            elif ratio >= max_k:
                k, rate = max_k, (max_k * rows + tokens) / prefill_ms
            else:
                k = int(ratio)
                rate = (k * rows + tokens) / prefill_ms
                longer = rows / decode_ms + tokens / ((k + 1) * decode_ms)
                if longer >= rate * _TIED:
                    k, rate = k + 1, longer
            cells.append((rate, cores, tokens, k, s, j))
    return cells


def _on_split(
    outcome: Outcome,
    candidates: Candidates,
    bounds: Bounds,
    cells: list[_Cell],
    previous: Split | None,
) -> Choice:
    """The best of some cells, or of those of the previous split if they are good enough."""
    best = enough = max(cells)[0]
    if previous is not None and previous in candidates.splits:
        at = candidates.splits.index(previous)
        kept = [cell for cell in cells if cell[4] == at]
        kept_rate = max(kept)[0] if kept else -math.inf
        if best * _TIED <= kept_rate * (1 + bounds.hysteresis):
            cells, enough = kept, kept_rate
    tied = [cell for cell in cells if cell[0] >= enough * _TIED]
    rate, _, tokens, k, s, j = max(tied, key=itemgetter(1, 2, 3))
    return Choice(
        outcome,
        candidates.splits[s],
        k,
        tokens,
        float(candidates.decode_ms[s]),
        float(candidates.prefill_ms[s, j]),
        rate * 1000,
        best * 1000,
        bounds.tbt_slo_ms,
        candidates.whole_decode_ms,
    )


def _largest_share(cells: list[_Cell]) -> list[_Cell]:
    """Those of the largest decode share with its smallest prefill."""
    _, _, _, _, s, j = max(cells, key=lambda cell: (cell[1], -cell[5]))
    return [cell for cell in cells if cell[4:] == (s, j)]


def _alone(candidates: Candidates, bounds: Bounds, cells: list[_Cell]) -> Choice:
    """Decode on the whole device in turn with the smallest prefill that can run."""
    step_ms, slo = float(candidates.whole_decode_ms), float(bounds.tbt_slo_ms)
    j = min(cell[5] for cell in cells)
    prefill_ms = min(float(candidates.prefill_ms[cell[4], j]) for cell in cells if cell[5] == j)
    tokens = candidates.prefill_tokens[j]
    slack = slo - step_ms
    needed = prefill_ms / slack if slack > 0 else math.inf
    k = max(1, math.ceil(min(needed, bounds.max_k)))
    rate = (k * candidates.rows + tokens) / (k * step_ms + prefill_ms) * 1000
    return Choice(
        Outcome.DECODE_ALONE, None, k, tokens, step_ms, prefill_ms, rate, rate, slo, step_ms
    )

"""Which split, prefill size and look-ahead k a duet should run, from predicted times alone.

The optimiser of DuetServe (arXiv 2511.04791). It does not know where the times come from, how
many launches are in flight, or when its caller asks: it is a pure function of its arguments.
"""

import math
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from operator import itemgetter
from typing import NamedTuple

from duetjax.policy.launch import Split

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


class Candidates(NamedTuple):
    """What could run: S splits, J prefill sizes; times in ms, as they are predicted.

    rows: decoding, at least one. splits [S]: by their decode share, ascending. decode_ms [S]: one
    decode step beside prefill. prefill_tokens [J]: ascending, positive. prefill_ms: of every size,
    on the split of an index; on a later split a launch is never shorter. It is asked of few splits.
    whole_decode_ms: one decode step on the whole device, alone. A time that is not finite and
    positive rules out whatever needs it.
    """

    rows: int
    splits: Sequence[Split]
    decode_ms: Sequence[float]
    prefill_tokens: Sequence[int]
    prefill_ms: Callable[[int], Sequence[float]]
    whole_decode_ms: float


class Bounds(NamedTuple):
    """What a choice must respect.

    tbt_slo_ms: longest decode step. max_k: steps that KV room and the requests' remaining tokens
    allow. max_prefill_ms: longest prefill launch; the smallest size may run however long it takes.
    hysteresis: relative gain in throughput that a change of split needs.
    """

    tbt_slo_ms: float
    max_k: int
    max_prefill_ms: float = math.inf
    hysteresis: float = 0.05


class Choice(NamedTuple):
    """What to run, and what was predicted of it.

    split: of SPLIT and LARGEST_DECODE_SHARE. k: decode steps. decode_ms: of one of them.
    prefill_tokens, prefill_ms: the prefill launch beside them; after them where decode is alone,
    its time then beside the least decode share, so rather too long. throughput: tokens/s of both
    together. best_throughput: of the split that would be best if a change cost nothing.
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


type _Cell = tuple[float, int, int, int, float, float]
"""What could run: tokens per ms, then the index of its split, prompt tokens and k, by which ties
are broken, then the ms of a decode step and of the prefill launch."""


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
    assert candidates.rows >= 1, f"nothing decodes: {candidates.rows} rows"
    assert bounds.max_k >= 1, bounds
    assert bounds.hysteresis >= 0, bounds
    longest_ms = min(bounds.tbt_slo_ms, _LARGEST)
    kept = _index(candidates.splits, previous)
    if cells := _feasible(candidates, bounds, longest_ms, kept):
        return _on_split(Outcome.SPLIT, candidates, bounds, cells, kept)
    is_enough = 0 < candidates.whole_decode_ms <= longest_ms
    by_share = range(len(candidates.splits))
    for s in by_share if is_enough else reversed(by_share):
        if (cell := _smallest(candidates, bounds, s)) is not None:
            break
    else:
        cell = None
    if cell is None:
        nothing = Outcome.UNPREDICTED, None, 0, 0, 0.0, 0.0, 0.0, 0.0
        return Choice(*nothing, bounds.tbt_slo_ms, candidates.whole_decode_ms)
    if is_enough:
        return _alone(candidates, bounds, cell)
    return _on_split(Outcome.LARGEST_DECODE_SHARE, candidates, bounds, [cell], None)


def _index(splits: Sequence[Split], previous: Split | None) -> int | None:
    """Which of them has the decode share of the previous one."""
    if previous is None:
        return None
    shares = [split.decode for split in splits]
    return shares.index(previous.decode) if previous.decode in shares else None


def _feasible(
    candidates: Candidates, bounds: Bounds, longest_ms: float, kept: int | None
) -> list[_Cell]:
    """The best k of splits and sizes with usable times, where decode steps up to `longest_ms`.

    Of those that may be best, or good enough to keep the split `kept`: no side computes more than
    if it ran all the time, and prefill is no faster than on any earlier split.
    """
    cells: list[_Cell] = []
    rows, _, decode_ms_on, tokens_of, prefill_ms_on, _ = candidates
    most_ms, best, fastest = min(bounds.max_prefill_ms, _LARGEST), 0.0, math.inf
    enough, enough_to_keep = 0.0, 0.0
    for s, decode_ms in enumerate(decode_ms_on):
        if not 0 < decode_ms <= longest_ms:
            continue
        decoded, least = rows / decode_ms, enough_to_keep if s == kept else enough
        if decoded + fastest < least:
            continue
        fastest, allowed_ms = 0.0, _LARGEST
        for tokens, prefill_ms in zip(tokens_of, prefill_ms_on(s), strict=True):
            prefilled = tokens / prefill_ms if 0 < prefill_ms <= _LARGEST else math.inf  # unknown
            if prefilled > fastest:
                fastest = prefilled
            if decoded + prefilled >= least and 0 < prefill_ms <= allowed_ms:
                rate, k = _best_k(rows, decode_ms, tokens, prefill_ms, bounds.max_k)
                cells.append((rate, s, tokens, k, decode_ms, prefill_ms))
                if rate > best:
                    best, enough = rate, rate * _TIED
                    enough_to_keep = enough / (1 + bounds.hysteresis)
            allowed_ms = most_ms
    return cells


def _best_k(
    rows: int, decode_ms: float, tokens: int, prefill_ms: float, max_k: int
) -> tuple[float, int]:
    """The most tokens per ms, and the k with which they are reached.

    While k t_d <= t_p the rate (k T_d + T_p) / t_p grows with k; from k t_d >= t_p on it is
    T_d / t_d + T_p / (k t_d) and falls. So the best k is next to t_p / t_d: its floor or one more,
    or the end of [1, max_k] nearer it.
    """
    ratio = prefill_ms / decode_ms
    if ratio < 1:
        return (rows + tokens) / decode_ms, 1
    if ratio >= max_k:
        return (max_k * rows + tokens) / prefill_ms, max_k
    k = int(ratio)
    rate = (k * rows + tokens) / prefill_ms
    longer = rows / decode_ms + tokens / ((k + 1) * decode_ms)
    return (longer, k + 1) if longer >= rate * _TIED else (rate, k)


def _on_split(
    outcome: Outcome,
    candidates: Candidates,
    bounds: Bounds,
    cells: list[_Cell],
    kept: int | None,
) -> Choice:
    """The best of some cells, or of those of the split to be kept if they are good enough."""
    best = enough = max(cells)[0]
    if kept is not None and (own := [cell for cell in cells if cell[1] == kept]):
        own_rate = max(own)[0]
        if best * _TIED <= own_rate * (1 + bounds.hysteresis):
            cells, enough = own, own_rate
    tied = [cell for cell in cells if cell[0] >= enough * _TIED]
    rate, s, tokens, k, decode_ms, prefill_ms = max(tied, key=itemgetter(1, 2, 3))
    return Choice(
        outcome,
        candidates.splits[s],
        k,
        tokens,
        decode_ms,
        prefill_ms,
        rate * 1000,
        best * 1000,
        bounds.tbt_slo_ms,
        candidates.whole_decode_ms,
    )


def _smallest(candidates: Candidates, bounds: Bounds, s: int) -> _Cell | None:
    """The smallest prefill launch that can run on a split."""
    rows, decode_ms = candidates.rows, candidates.decode_ms[s]
    if not 0 < decode_ms <= _LARGEST:
        return None
    most_ms, allowed_ms = min(bounds.max_prefill_ms, _LARGEST), _LARGEST
    for tokens, prefill_ms in zip(candidates.prefill_tokens, candidates.prefill_ms(s), strict=True):
        if 0 < prefill_ms <= allowed_ms:
            rate, k = _best_k(rows, decode_ms, tokens, prefill_ms, bounds.max_k)
            return rate, s, tokens, k, decode_ms, prefill_ms
        allowed_ms = most_ms
    return None


def _alone(candidates: Candidates, bounds: Bounds, cell: _Cell) -> Choice:
    """Decode on the whole device in turn with a prefill launch."""
    _, _, tokens, _, _, prefill_ms = cell
    step_ms, slo_ms = candidates.whole_decode_ms, bounds.tbt_slo_ms
    slack = slo_ms - step_ms
    needed = prefill_ms / slack if slack > 0 else math.inf
    k = max(1, math.ceil(min(needed, bounds.max_k)))
    rate = (k * candidates.rows + tokens) / (k * step_ms + prefill_ms) * 1000
    times = step_ms, prefill_ms, rate, rate, slo_ms, step_ms
    return Choice(Outcome.DECODE_ALONE, None, k, tokens, *times)

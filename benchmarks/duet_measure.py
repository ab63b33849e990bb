"""From what an engine was seen to put out, and its account of launches, to the figures of a cell.

Times are seconds of one clock. Everything is counted in blocks of a window, which the report draws
anew to say how sure a figure is.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from duetjax.policy.completed_launch import CompletedLaunch
from duetjax.policy.request import StepOutputs

type Seen = Sequence[tuple[float, StepOutputs]]
"""What the engine handed on, and when."""


@dataclass(frozen=True, slots=True)
class Window:
    """What is measured: from start to end, in equal blocks. seen_until: when looking ended."""

    start: float
    end: float
    blocks: int
    seen_until: float

    def block(self, at: float) -> int:
        """The block of a time, those beyond the edges being those at the edges."""
        place = int((at - self.start) / (self.end - self.start) * self.blocks)
        return min(max(place, 0), self.blocks - 1)

    def covered(self, began: float, ended: float) -> float:
        """The share of the window that a span covers."""
        common = min(ended, self.end) - max(began, self.start)
        return max(0.0, common) / (self.end - self.start)

    def shares(self, began: float, ended: float) -> Iterable[tuple[int, float]]:
        """Which share of a span lies in which block."""
        size = (self.end - self.start) / self.blocks
        for block in range(self.blocks):
            left = self.start + block * size
            common = min(ended, left + size) - max(began, left)
            if common > 0:
                yield block, common / (ended - began)


@dataclass(slots=True)
class Block:
    """gaps: between a victim's tokens, milliseconds to two places, and how many.

    ttft_ms: of the attackers that came; None for a first token that was not seen.
    """

    gaps: Counter[float] = field(default_factory=Counter)
    ttft_ms: list[float | None] = field(default_factory=list)
    prompt_tokens: float = 0.0
    output_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """In plain values, gaps ascending."""
        return {
            "gaps": [[gap, count] for gap, count in sorted(self.gaps.items())],
            "ttft_ms": [ttft if ttft is None else round(ttft, 2) for ttft in self.ttft_ms],
            "prompt_tokens": round(self.prompt_tokens, 1),
            "output_tokens": self.output_tokens,
        }


@dataclass(slots=True)
class Observed:
    """decoding: victims on average between their first and last tokens.

    pauses_ms: between the last token of a victim and the first of the one in its place.
    answer_gaps_ms: between attackers' tokens.
    """

    blocks: list[Block]
    decoding: float
    pauses_ms: list[float]
    answer_gaps_ms: list[float]


def observe(
    seen: Seen,
    launches: Iterable[CompletedLaunch],
    arrivals: Mapping[str, float],
    window: Window,
) -> Observed:
    """What came in the window.

    Requests named in `arrivals`, with their time, are attackers. Others are victims, "<place>-<n>",
    one after another in each place. A gap counts if any of it lies in the window, wholly, in the
    block where it ended; one that never ended counts with what it had come to.
    """
    blocks = [Block() for _ in range(window.blocks)]
    answer_gaps: list[float] = []
    first, last = _tokens(seen, blocks, arrivals, window, answer_gaps)
    ended = {name for _, outputs in seen for name, _ in outputs.finished}
    for name, at in last.items():
        if name not in arrivals and name not in ended:
            _count_gap(blocks, window, at, window.seen_until)
    for name, at in arrivals.items():
        if window.start <= at < window.end:
            came = first.get(name)
            ttft = None if came is None else 1e3 * (came - at)
            blocks[window.block(at)].ttft_ms.append(ttft)
    for launch in launches:
        for block, share in window.shares(launch.began, launch.ended):
            blocks[block].prompt_tokens += share * launch.prompt_tokens
    victims = [name for name in first if name not in arrivals]
    decoding = sum(
        window.covered(first[name], last[name] if name in ended else window.end) for name in victims
    )
    return Observed(blocks, decoding, _pauses(victims, first, last, window), answer_gaps)


def _tokens(
    seen: Seen,
    blocks: Sequence[Block],
    arrivals: Mapping[str, float],
    window: Window,
    answer_gaps: list[float],
) -> tuple[dict[str, float], dict[str, float]]:
    """Counts tokens and gaps; when each request's first and last token came."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for now, outputs in seen:
        if window.start <= now < window.end:
            blocks[window.block(now)].output_tokens += len(outputs.ids)
        for name in outputs.ids:
            before = last.get(name)
            last[name] = now
            if before is None:
                first[name] = now
            elif name not in arrivals:
                _count_gap(blocks, window, before, now)
            elif window.start <= now < window.end:
                answer_gaps.append(1e3 * (now - before))
    return first, last


def _count_gap(blocks: Sequence[Block], window: Window, began: float, ended: float) -> None:
    if began < window.end and ended > window.start:
        blocks[window.block(ended)].gaps[round(1e3 * (ended - began), 2)] += 1


def _pauses(
    victims: Iterable[str],
    first: Mapping[str, float],
    last: Mapping[str, float],
    window: Window,
) -> list[float]:
    found = []
    for name in victims:
        place, _, generation = name.rpartition("-")
        before = last.get(f"{place}-{int(generation) - 1}")
        if before is not None and window.start <= first[name] < window.end:
            found.append(1e3 * (first[name] - before))
    return found


def account(launches: Iterable[CompletedLaunch], window: Window) -> list[dict[str, Any]]:
    """Launches that ended in the window, by why, lane, split and program: of what, how long."""
    sums: dict[tuple[str, str, str, str], Counter[str]] = {}
    for launch in launches:
        if window.start <= launch.ended < window.end:
            split = launch.split
            parts = "" if split is None else f"{split.decode}/{split.prefill}"
            key = launch.why, launch.lane.value, parts, launch.program.value
            of = sums.setdefault(key, Counter())
            of["launches"] += 1
            of["steps"] += launch.k
            of["decode_rows"] += launch.decode_rows * launch.k
            of["prompt_tokens"] += launch.prompt_tokens
            of["us"] += round(1e3 * launch.measured_ms)
            of["foretold_us"] += round(1e3 * (launch.predicted_ms or 0.0))
    return [
        {
            "why": why,
            "lane": lane,
            "split": split,
            "program": program,
            "launches": of["launches"],
            "k": round(of["steps"] / of["launches"], 2),
            "decode_rows": round(of["decode_rows"] / of["steps"], 1),
            "prompt_tokens": round(of["prompt_tokens"] / of["launches"], 1),
            "step_ms": round(of["us"] / of["steps"] / 1e3, 3),
            "foretold_step_ms": round(of["foretold_us"] / of["steps"] / 1e3, 3),
        }
        for (why, lane, split, program), of in sorted(sums.items())
    ]

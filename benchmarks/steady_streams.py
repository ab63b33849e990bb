"""What a long prompt does to streams that are already running, under several ways to share cores.

Some streams decode; a long prompt arrives among them. Measures the gaps between the victims'
tokens and the newcomer's time to first token, in one run on one machine: with a token budget that
swallows the prompt in one step, with small budgets, by plain JAX calls, and with decode beside
prefill, always or where it is foreseen to be needed. Last line: one JSON document; --plot writes
the gaps as a picture.

    python benchmarks/steady_streams.py [--cases whole chunks duet ...] [--plot docs/steady.svg]
"""

import argparse
import itertools
import json
import os
import platform
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from checkout import commit

from duetjax import LLM, SamplingParams

VICTIMS = 6
WARM_TOKENS = 60
PROMPT_TOKENS = 3500


PROFILE = "cpu-2-cores"
TBT_SLO_MS = 25.0
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("whole prompt in one step", {"max_num_batched_tokens": 4096}),
    "chunks": ("512 tokens a step", {}),
    "small-chunks": ("128 tokens a step", {"max_num_batched_tokens": 128}),
    "jax": ("512 tokens a step, plain JAX calls", {"backend": "jax"}),
    "static-split": (
        "decode beside prefill, always",
        {"policy": "static-split", "split": (1, 1), "look_ahead": 2},
    ),
    "duet": (
        f"duet for {TBT_SLO_MS:g} ms",
        {"policy": "duet", "hardware_profile": PROFILE, "tbt_slo_ms": TBT_SLO_MS},
    ),
}
"""What each case is called in the picture, and the engine's settings."""


@dataclass(frozen=True)
class Outcome:
    """Gaps between victims' tokens as (when it ended, length), seconds since the attack."""

    case: str
    gaps: tuple[tuple[float, float], ...]
    ttft: float

    def percentile(self, q: float) -> float:
        """Percentile of the gaps that ended while the long prompt was prefilling, in ms."""
        return 1e3 * float(np.percentile([gap for end, gap in self.gaps if self.hit(end)], q))

    def hit(self, end: float) -> bool:
        """Whether a gap ended between the prompt's arrival and its first token."""
        return 0 <= end <= self.ttft * 1.02


def attack(case: str) -> Outcome:
    """Runs the victims, sends the long prompt in their midst, and collects the gaps.

    Twice, of which the second counts: what foretells launches has learned by then.
    """
    _, settings = CASES[case]
    with LLM(max_num_seqs=8, **settings) as llm:
        _attack(case, llm, seed=1)
        return _attack(case, llm, seed=0)


def _attack(case: str, llm: LLM, seed: int) -> Outcome:
    params = SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True)
    times: list[list[float]] = [[] for _ in range(VICTIMS)]
    stop = threading.Event()

    def victim(index: int) -> None:
        for _ in llm.stream([7 + index] * 20, params):
            times[index].append(time.perf_counter())
            if stop.is_set():
                return

    threads = [threading.Thread(target=victim, args=(i,)) for i in range(VICTIMS)]
    for thread in threads:
        thread.start()
    while min(map(len, times)) < WARM_TOKENS:
        time.sleep(0.01)
    rng = np.random.default_rng(seed)
    prompt = rng.integers(300, 1500, PROMPT_TOKENS).tolist()
    arrived = time.perf_counter()
    next(llm.stream(prompt, params))
    ttft = time.perf_counter() - arrived
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    gaps = [(b - arrived, b - a) for t in times for a, b in itertools.pairwise(t)]
    return Outcome(case, tuple(sorted(gaps)), ttft)


def plot(outcomes: list[Outcome], path: Path) -> None:
    """A self-contained picture: one panel per case, a dot per gap, log scale."""
    width, panel, left, top = 760, 150, 64, 34
    start, end = -0.4, max(o.ttft for o in outcomes) + 0.4
    low, high = 1.0, 1.3e3 * max(gap for o in outcomes for _, gap in o.gaps)

    def x(seconds: float) -> float:
        return left + (seconds - start) / (end - start) * (width - left - 16)

    def y(milliseconds: float, base: float) -> float:
        return base - np.log(max(milliseconds, low) / low) / np.log(high / low) * (panel - 46)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} '
        f'{top + panel * len(outcomes)}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{left}" y="20" font-size="14" fill="#222">Gaps between tokens of {VICTIMS}'
        f" streams while a prompt of {PROMPT_TOKENS} tokens prefills (CPU, demo model)</text>",
    ]
    for index, outcome in enumerate(outcomes):
        base = top + panel * (index + 1) - 24
        parts.append(
            f'<rect x="{x(0):.1f}" y="{base - panel + 46}" width="{x(outcome.ttft) - x(0):.1f}"'
            f' height="{panel - 46}" fill="#f3e9d8"/>'
            f'<text x="{left}" y="{base - panel + 40}" fill="#222">budget {outcome.budget} tokens'
            f" a step: longest gap {outcome.percentile(100):.0f} ms, long prompt's TTFT"
            f" {1e3 * outcome.ttft:.0f} ms</text>"
        )
        for tick in (1, 10, 100, 1000):
            if tick < high:
                parts.append(
                    f'<line x1="{left}" x2="{width - 16}" y1="{y(tick, base):.1f}"'
                    f' y2="{y(tick, base):.1f}" stroke="#ddd"/><text x="{left - 6}"'
                    f' y="{y(tick, base) + 4:.1f}" text-anchor="end" fill="#555">{tick} ms</text>'
                )
        parts += [
            f'<circle cx="{x(when):.1f}" cy="{y(1e3 * gap, base):.1f}" r="1.8" fill="#b4451f"'
            ' fill-opacity="0.6"/>'
            for when, gap in outcome.gaps
            if start <= when <= end
        ]
    seconds = list(range(int(end) + 1))
    bottom = top + panel * len(outcomes)
    parts += [
        f'<text x="{x(s):.1f}" y="{bottom - 6}" text-anchor="middle" fill="#555">{s} s</text>'
        for s in seconds
    ]
    path.write_text("\n".join([*parts, "</svg>\n"]))


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES), metavar="CASE")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    outcomes = [attack(case) for case in args.cases]
    print(f"{VICTIMS} streams, a prompt of {PROMPT_TOKENS} tokens; gaps while it prefills, ms")
    print(f"{'':36}{'p50':>8}{'p99':>8}{'longest':>9}{'TTFT of the prompt':>20}")
    for o in outcomes:
        gaps = "".join(f"{o.percentile(q):{8 + (q == 100)}.1f}" for q in (50, 99, 100))
        print(f"{CASES[o.case][0]:36}{gaps}{1e3 * o.ttft:20.0f}")
    if args.plot:
        plot(outcomes, args.plot)
    longest = [o.percentile(100) for o in outcomes]
    result = {
        "benchmark": "steady_streams",
        "cases": args.cases,
        "longest_gap_ratio": [round(gap / longest[0], 3) for gap in longest],
        "ttft_ratio": [round(o.ttft / outcomes[0].ttft, 3) for o in outcomes],
        "longest_gap_ms": [round(gap, 1) for gap in longest],
        "p99_gap_ms": [round(o.percentile(99), 1) for o in outcomes],
        "ttft_ms": [round(1e3 * o.ttft) for o in outcomes],
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "commit": commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

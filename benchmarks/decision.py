"""What one decision of the duet costs: whether to split the device, and how.

About 200 decoding rows, one to three prompts, all splits of an H200, budgets of 2,048 and 8,192
tokens; each decision is about another load. Cases: `meets`, a mixed launch keeps the objective;
`split`, `alone` and `nowhere`, it does not, and decode does on a split, on the whole device only,
or nowhere; `episode`, the split is that in progress. Loads no jax. Last line: one JSON document.

    python benchmarks/decision.py [--loads 200] [--repeats 20]

On a machine that others use, --repeats decides about the same loads several times, each counting
with its shortest time: decisions are deterministic, so what differs is the others' doing.
"""

import argparse
import gc
import importlib.resources
import json
import os
import platform
import random
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from checkout import commit

from duetjax.policy.duet import DuetPolicy, Sizes
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Split
from duetjax.policy.policies import Details, Load
from duetjax.policy.profiles import HardwareProfile, ModelProfile

MODEL, HARDWARE = "profiles/llama-3.1-8b.json", "hardware/h200-sxm.json"
BUDGETS = (2048, 8192)
DECODE = (2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
PREFILL = (128, 256, 512, 1024, 2048, 4096, 8192)
CASES = {"meets": 10_000.0, "split": 45.0, "alone": 22.0, "nowhere": 8.0, "episode": 45.0}
"""Objectives in ms under which most of the loads come to this."""
GOAL_MEDIAN_US = 100
CALM = Load(1, 0, lambda: Details(np.array([1]), (), 1.0, 1))


def foresight() -> Foresight:
    """Of a shipped model on a shipped device."""
    presets = Path(str(importlib.resources.files("duetjax.presets")))
    model, hardware = (json.loads((presets / name).read_text()) for name in (MODEL, HARDWARE))
    return Foresight(
        ModelProfile.from_json(model, MODEL), HardwareProfile.from_json(hardware, HARDWARE)
    )


def loads(case: str, count: int, splits: tuple[Split, ...]) -> list[Load]:
    """Different ones, the same on every run."""
    draw, numbers = random.Random(0), np.random.default_rng(0)
    made = []
    for _ in range(count):
        rows = draw.randint(180, 220)
        prompts = tuple(
            [
                (draw.choice((0, 0, 2048)), draw.randint(500, 9000))
                for _ in range(draw.randint(1, 3))
            ]
        )
        details = Details(
            contexts=numbers.integers(100, 3000, rows),
            prompts=prompts,
            tbt_slo_ms=CASES[case],
            max_k=draw.randint(8, 500),
            split=splits[draw.randint(4, 8)] if case == "episode" else None,
        )
        tokens = sum(left for _, left in prompts)
        made.append(Load(rows, tokens, lambda details=details: details))
    return made


def measure(case: str, budget: int, count: int, repeats: int) -> dict[str, Any]:
    """Microseconds of a decision, and what was decided how often."""
    foresees = foresight()
    policy = DuetPolicy(foresees, Sizes(budget, DECODE, PREFILL))
    seconds = np.full(count, np.inf)
    outcomes: Counter[str] = Counter()
    some = loads(case, count, foresees.splits)
    for _ in range(repeats):
        for at, load in enumerate(some):
            began = time.perf_counter()
            decision = policy.decide(load)
            seconds[at] = min(seconds[at], time.perf_counter() - began)
            outcomes[str(decision.why)] += 1
            policy.decide(CALM)  # what prefill it owes is forgotten
    facts = {"min": seconds.min(), "median": np.median(seconds), "p99": np.percentile(seconds, 99)}
    return {name: round(1e6 * float(value)) for name, value in facts.items()} | {
        "outcomes": {why: n // repeats for why, n in outcomes.items()}
    }


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loads", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    load_average = os.getloadavg()[0]
    gc.collect()
    gc.freeze()  # as the server does when it has loaded everything
    found = {
        f"{case}, {budget}": measure(case, budget, args.loads, args.repeats)
        for case, budget in product(CASES, BUDGETS)
    }
    print(f"microseconds per decision, {args.loads} loads; goal: a median of {GOAL_MEDIAN_US}")
    print(f"{'case, budget':16}{'min':>6}{'median':>8}{'p99':>6}  decided")
    for name, facts in found.items():
        print(f"{name:16}{facts['min']:6}{facts['median']:8}{facts['p99']:6}  {facts['outcomes']}")
    result = {
        "benchmark": "decision",
        "cases": found,
        "goal_us": {"median": GOAL_MEDIAN_US},
        "reached": all(facts["median"] <= GOAL_MEDIAN_US for facts in found.values()),
        "loads": args.loads,
        "repeats": args.repeats,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(load_average, 2),
        "python": platform.python_version(),
        "commit": commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

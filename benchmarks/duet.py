"""The headline: how much a GPU serves while victims' tokens keep an objective, by policy.

    python benchmarks/duet.py plan|capacity|tune|cells|report [--backend cuda|host|sim] [--out DIR]
        capacity                                        prompt tokens/s alone, once
        tune [--budgets 256,512,...]                    aggregated's best budget per objective
        cells --objective 25 --rates 25,50,75 --seed 0 [--policies duet,...]
        report                                          table, picture, JSON line

Each call ends before --limit-s, with whole cells; what is there is not done again, so the same call
once more goes on. --seed 0,1,2 measures several in one engine, which saves starts. A cell is a file
in DIR (benchmarks/results/<GPU or backend>/headline).

The protocol, fixed before it was run
- Victims: 32 streams, prompts of 2,048 tokens, answers of 512. Who has had them is replaced at once
  by another with the same prompt, of which the prefix cache has all but the last page: the load
  beside the attackers is decoding alone, whatever the policy's speed, and 32 go on decoding. The
  new one comes first in line (priority), behind the prompts that have been begun; the pause is no
  gap between tokens and is reported, as is how many victims decoded on average. The first answers
  have lengths of 1/32, 2/32, ... of 512, so that victims do not end together.
- Attackers: a Poisson process; prompts log-uniform from 2,048 to 32,768 tokens that share nothing;
  answers of 16. Rates are percent of the measured capacity: prompt tokens/s of aggregated at its
  largest budget with nothing else to do. All policies see the same arrivals and prompts for a seed;
  at another rate they are as long, of other tokens, and closer together.
- An engine runs in a process of its own, in which the load is made, too; no HTTP. It is given some
  seconds of attackers of a seed nobody else has, then for each rate a warm-up and a window.
  Attackers go on coming after it until those that came in it have had first tokens, or the drain
  ends.
- Times are this host's, when the engine hands outputs on. A gap counts, wholly, if any of it lies
  in the window; one that has not ended counts with its length so far. TTFT counts from the moment
  an attacker was due; one without a first token counts as infinitely late. Prompt tokens are those
  of launches, shared out by time; cached ones are none.
- Policies: duet and aggregated-slo plan by the objective; the others by none, so one measurement is
  judged by every objective. aggregated has the budget whose best rate, of those that keep the
  objective on a seed of its own, has the highest tokens/s. All others have the largest budget as
  their limit. static-split gives decode the fewest SMs that reach 95 % of the memory's bytes/s by
  the hardware profile.
- Profiles: launches are foretold by what `duetjax profile` measured on this device, if it left
  that in `profile` beside DIR; else by the shipped profile of the GPU. They are chosen with the
  capacity and kept for all cells; cells of another capacity or profile are refused.
- A policy keeps an objective at a rate if the victims' 99th percentile gap, of all seeds together,
  is within it. Its figures are those of the highest rate that it keeps.
- The goal: at 25 ms duet has 1.15 x the tokens/s of the best other policy, its TTFT p50 at most
  1.5 x that policy's.

Backends: cuda is the experiment, Llama 3.1 8B with dummy weights. sim is simulation: the same
sizes and the same engine in real time on an H200 made of numbers. host proves the path on a
processor with the demo model, by one rule: prompts, budgets and pages a 16th, rows and answers a
quarter, and milliseconds scaled so that a decode step of the victims alone, as measured, stands for
7.5 ms, which is what `sim` has. --brief is for tests: windows by which nothing can be judged.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from duet_cells import (  # noqa: E402
    BACKENDS,
    OBJECTIVES,
    POLICIES,
    RATES,
    SCALE,
    SEEDS,
    Backend,
    Cell,
    Results,
    Timing,
    Variant,
    find,
    seconds_of,
    start_seconds,
    tuning,
    variant,
)
from duet_profiles import Profiles, choose  # noqa: E402
from duet_report import best_budgets, cell_of, write_report  # noqa: E402
from duet_run import Task  # noqa: E402
from gpu.report import LEFT_OVER  # noqa: E402
from results_folder import results_of  # noqa: E402

from duetjax.config import PolicyName  # noqa: E402

_END_S = 15.0
"""For a process to end by itself after its last cell."""


class Call:
    """One call of the command line: where results are, and the time it has left."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.backend: Backend = find(arguments.backend, is_brief=arguments.brief)
        self.timing: Timing = self.backend.timing
        self.results = Results(arguments.out or _usual_folder(arguments))
        self.named: str | None = arguments.hardware_profile
        self.is_brief: bool = arguments.brief
        self.failed: list[str] = []
        self._ends = time.monotonic() + (arguments.limit_s or self.timing.limit)

    @property
    def left(self) -> float:
        """Seconds."""
        return self._ends - time.monotonic()

    @property
    def start(self) -> float:
        """Seconds that an engine takes to start."""
        return start_seconds(self.results.documents(), self.timing)

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those without a file."""
        return [cell for cell in cells if not self.results.has(cell)]

    def measure(self, cells: Sequence[Cell]) -> None:
        """Those that are missing and for which there is time, an engine for each variant."""
        for of in dict.fromkeys(cell.variant for cell in cells):
            wanted = self.missing(cell for cell in cells if cell.variant == of)
            if not wanted:
                continue
            if self.left < seconds_of(wanted[:1], self.timing, self.start) + _END_S:
                print(f"no time for {of.name}", flush=True)
                return
            print(f"{of.name}: {len(wanted)} cells, {self.left:.0f} s left", flush=True)
            self.run(of, tuple((cell.rate, cell.seed) for cell in wanted))

    def run(self, of: Variant, cells: tuple[tuple[int, int], ...]) -> None:
        """A process with an engine; what it does not come to is found missing later."""
        task = Task(
            backend=self.backend.name,
            out=str(self.results.folder),
            variant=of,
            cells=cells,
            capacity=self.capacity() if cells else None,
            profiles=self.profiles(),
            is_brief=self.is_brief,
            seconds=self.left - _END_S,
            command=shlex.join(["python", *sys.argv]),
        )
        script = str(ROOT / "benchmarks" / "duet_run.py")
        platform = {"JAX_PLATFORMS": "cpu"} if self.backend.name == "host" else {}
        try:
            done = subprocess.run(
                [sys.executable, script, json.dumps(asdict(task))],
                env={**os.environ, **platform},
                stdin=subprocess.DEVNULL,
                timeout=max(1.0, self.left),
                check=False,
            )
        except subprocess.TimeoutExpired:
            self.failed.append(f"{of.name}: given up")
        else:
            if done.returncode:
                self.failed.append(f"{of.name}: ended with {done.returncode}")

    def capacity(self) -> dict[str, float]:
        """The figures that rates and objectives are scaled by."""
        found = self.results.capacity()
        if found is None:
            raise SystemExit("duet.py: no capacity yet; run the part `capacity` first")
        Profiles.of(found).check(self.results.folder, self.named)
        self.results.refuse_mixed()
        return {name: found[name] for name in SCALE}

    def profiles(self) -> Profiles:
        """Those that were chosen with the capacity; before it they are chosen."""
        found = self.results.capacity()
        if found is None:
            return choose(self.backend, self.results.folder, self.named)
        return Profiles.of(found)

    def tuned(self) -> dict[int, int]:
        """Aggregated's budgets."""
        found = self.results.tuned()
        if found is None:
            raise SystemExit("duet.py: no budgets yet; run the part `tune` to its end first")
        return found

    def conclude(self, part: str, cells: Sequence[Cell]) -> int:
        """Prints the JSON line; returns the exit code: 1 for a failure, 3 if cells are left."""
        missing = [cell.name for cell in self.missing(cells)]
        for failure in self.failed:
            print(f"FAILED {failure}", flush=True)
        line = {
            "benchmark": "duet",
            "part": part,
            "backend": self.backend.name,
            "simulation": self.backend.is_simulation,
            "cells": len(cells),
            "missing": missing,
            "failed": self.failed,
        }
        print(json.dumps(line))
        if self.failed:
            return 1
        return LEFT_OVER if missing else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("plan", "capacity", "tune", "cells", "report"))
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the cells")
    parser.add_argument("--limit-s", type=float, help="seconds after which no cell is begun")
    parser.add_argument("--hardware-profile", help="name or file, for `capacity` to choose")
    parser.add_argument("--brief", action="store_true", help="short windows, for tests")
    parser.add_argument("--budgets", type=_integers, help="tune: in place of all")
    parser.add_argument("--objective", type=int, choices=OBJECTIVES, default=25)
    parser.add_argument("--rates", type=_integers, default=RATES)
    parser.add_argument("--seed", type=_integers, default=(0,), help="or several: 0,1,2")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=POLICIES)
    arguments = parser.parse_args()
    if unknown := set(arguments.policies) - set(POLICIES):
        parser.error(f"--policies: no {', '.join(sorted(unknown))}; choose {', '.join(POLICIES)}")
    return arguments


def main() -> int:
    """Does a part; returns the exit code."""
    arguments = parse()
    call = Call(arguments)
    if arguments.part == "plan":
        return print_plan(call)
    if arguments.part == "capacity":
        return measure_capacity(call)
    if arguments.part == "tune":
        return tune(call, arguments.budgets)
    if arguments.part == "report":
        print(json.dumps(write_report(call.results, call.backend.load)))
        return 0
    tuned = call.tuned() if PolicyName.AGGREGATED in arguments.policies else {}
    call.capacity()
    load = call.backend.load
    variants = [variant(each, arguments.objective, load, tuned) for each in arguments.policies]
    cells = [
        Cell(each, rate, seed)
        for each in variants
        for seed in arguments.seed
        for rate in arguments.rates
    ]
    call.measure(cells)
    return call.conclude("cells", cells)


def measure_capacity(call: Call) -> int:
    """Once."""
    if call.results.capacity() is None:
        call.run(Variant(PolicyName.AGGREGATED, call.backend.load.budget), ())
    if call.results.capacity() is not None:
        print(", ".join(f"{name} {value}" for name, value in call.capacity().items()))
    return call.conclude("capacity", ())


def tune(call: Call, budgets: Sequence[int] | None) -> int:
    """Compares budgets, and writes down the best when all are there."""
    cells = tuning(call.backend.load, budgets)
    call.capacity()
    call.measure(cells)
    if not call.missing(cells):
        names = {cell.name for cell in cells}
        documents = call.results.documents()
        best = best_budgets([each for each in documents if cell_of(each).name in names])
        tuned = {"budgets": best, "cells": sorted(names), "capacity": call.capacity()}
        call.results.write("tuned", tuned)
        print(", ".join(f"{objective} ms: {budget}" for objective, budget in best.items()))
    return call.conclude("tune", cells)


def print_plan(call: Call) -> int:
    """Every call that the whole experiment takes, and how long it will last."""
    load, timing, start = call.backend.load, call.timing, call.start
    tuned = call.results.tuned() or dict(zip(OBJECTIVES, load.budgets, strict=False))
    measured = "measured" if call.results.documents() else "assumed"
    print(f"{call.backend.name}: an engine starts in {start:.0f} s ({measured}); a cell takes")
    print(f"at most {timing.cell:.1f} s, of which {timing.window:.0f} s are measured; seconds:")
    capacity = start + 2 * timing.settle + timing.window + timing.warm_up
    calls = [("capacity", capacity), ("tune", seconds_of(tuning(load), timing, start))]
    done: set[Cell] = set()
    for objective in OBJECTIVES:
        for seed in SEEDS:
            for rates in (RATES[:3], RATES[3:]):
                cells = {
                    Cell(variant(policy, objective, load, tuned), rate, seed)
                    for policy in POLICIES
                    for rate in rates
                }
                new = sorted(cells - done, key=lambda cell: cell.name)
                done |= cells
                flags = f"--objective {objective} --rates {','.join(map(str, rates))}"
                calls.append((f"cells {flags} --seed {seed}", seconds_of(new, timing, start)))
    for name, seconds in calls:
        parts = -(-seconds // (timing.limit - _END_S))
        print(f"{seconds:6.0f}  {name}" + (f" ({parts:.0f} calls)" if parts > 1 else ""))
    one = [
        Cell(variant(policy, OBJECTIVES[0], load, tuned), rate, seed)
        for policy, rate, seed in product(POLICIES, RATES, SEEDS)
    ]
    at_once = seconds_of(one, timing, start)
    print(f"{at_once:6.0f}  one objective alone, calls with all rates and --seed 0,1,2;")
    print(f"        and {start + timing.settle:.0f} s for each call that goes on with a policy")
    total = sum(seconds for _, seconds in calls)
    print(f"{total:6.0f}  in all, {total / 3600:.1f} h; {len(done)} cells")
    line = {"benchmark": "duet", "part": "plan", "seconds": round(total), "cells": len(done)}
    print(json.dumps(line | {"longest_call_s": round(max(seconds for _, seconds in calls))}))
    return 0


def _usual_folder(arguments: argparse.Namespace) -> Path:
    return results_of(arguments.backend, may_lack=arguments.part == "plan") / "headline"


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    sys.exit(main())

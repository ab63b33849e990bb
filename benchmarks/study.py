"""The study: which policy serves how much under which objective, simulated.

For two models on an H200 and a 600 s window of two traces of Azure's (2023, CC-BY 4.0), the
highest rate at which 90 % of the requests keep 1,000 ms to the first token and 15, 25, 50 or
100 ms between tokens, for

- duet, planning by each objective,
- aggregated-slo, one lane whose budget is foreseen to keep it,
- aggregated with budgets of 512 to 8,192 tokens, which knows no objective, so one simulation
  counts for all four,
- duet without contention between lanes, and at 25 and 50 ms with FLOP/s in proportion to SMs as
  well: what better hardware than is assumed would give.

All of it is simulation. A cell is a file; what is there is not done again, so a run may be
interrupted. Ends with the report, docs/results/study.md, and one JSON line.

    python benchmarks/study.py --traces DIR [--jobs N] [--only TEXT] [--seconds 600] [--report]

DIR holds azure_conv_2023.csv and azure_code_2023.csv. --only: cells whose names hold the text.
--report: write the report alone.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from checkout import commit
from study_report import write_report

from duetjax.config import EngineConfig
from duetjax.profile_files import find_hardware
from duetjax.sim.ledger import Objectives
from duetjax.simulate import Case, Setup, highest_rate
from duetjax.simulate import run as simulate_case

MODELS = ("llama-3.1-8b", "qwen3-14b")
TRACES = {"conversation": "azure_conv_2023.csv", "code": "azure_code_2023.csv"}
OBJECTIVES_MS = (15.0, 25.0, 50.0, 100.0)
IDEAL_OBJECTIVES_MS = (25.0, 50.0)
TTFT_MS = 1000.0
BUDGETS = (512, 1024, 2048, 4096, 8192)
TARGET = 0.9
GPU = "h200-sxm"
BESIDE_BUDGET = {"aggregated-slo": None, "aggregated": 2048}
"""Policies that are simulated at duet's best rate as well, with budgets of tokens."""
RESULTS = Path(__file__).parent / "results" / "study"
IDEAL = Path(__file__).parents[1] / "build" / "study" / "ideal.json"


@dataclass(frozen=True, slots=True)
class Cell:
    """One file. objective_ms: what the policy plans by; None: it plans by none."""

    model: str
    trace: str
    policy: str
    variant: str = ""
    objective_ms: float | None = None
    budget: int = 8192

    @property
    def name(self) -> str:
        """Of the file."""
        parts = [self.model, self.trace, self.policy, self.variant]
        parts.append(f"{self.budget}" if self.objective_ms is None else f"{self.objective_ms:g}ms")
        return "_".join(filter(None, parts))


VARIANTS = {"": None, "no-contention": (1.0, 1.0), "ideal": (1.0, 1.0)}


def cells() -> Iterator[Cell]:
    """All of them, those that take longest first."""
    for model, trace in product(MODELS, TRACES):
        for budget in BUDGETS:
            yield Cell(model, trace, "aggregated", budget=budget)
    for objective_ms, model, trace in product(OBJECTIVES_MS, MODELS, TRACES):
        for variant in VARIANTS:
            if variant != "ideal" or objective_ms in IDEAL_OBJECTIVES_MS:
                yield Cell(model, trace, "duet", variant, objective_ms)
        yield Cell(model, trace, "aggregated-slo", "", objective_ms)


def simulate(cell: Cell, traces: Path, seconds: float) -> dict[str, object]:
    """The cell's document: for each objective that it is judged by, what came of its best rate."""
    began = time.perf_counter()
    setup = Setup(
        model=cell.model,
        gpu=str(IDEAL) if cell.variant == "ideal" else GPU,
        trace=str(traces / TRACES[cell.trace]),
        engine=EngineConfig(max_num_seqs=256, max_num_batched_tokens=cell.budget, look_ahead=16),
        seconds=seconds,
        contention=VARIANTS[cell.variant],
    )
    judged = OBJECTIVES_MS if cell.objective_ms is None else (cell.objective_ms,)
    case = Case(cell.policy, Objectives(judged, TTFT_MS))
    found = [highest_rate(setup, case, TARGET, objective=n) for n in range(len(judged))]
    beside = {}
    if cell.policy == "duet" and not cell.variant and found[0] is not None:
        for policy in ("aggregated-slo", "aggregated"):
            other = replace(case, policy=policy, rate=found[0].rate, budget=BESIDE_BUDGET[policy])
            beside[policy] = asdict(simulate_case(setup, other))
    return {
        "simulation": True,
        "cell": asdict(cell),
        "judged_ms": judged,
        "best": [None if figures is None else asdict(figures) for figures in found],
        "beside": beside,
        "took_s": round(time.perf_counter() - began, 1),
        "commit": commit(),
    }


def main() -> None:
    """Simulates what is missing, then writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", type=Path, help="folder of the two files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="cells whose names hold this")
    parser.add_argument("--seconds", type=float, default=600.0, help="window of the traces")
    parser.add_argument("--report", action="store_true", help="write the report alone")
    arguments = parser.parse_args()
    began = time.perf_counter()
    if not arguments.report:
        if arguments.traces is None or not arguments.traces.is_dir():
            parser.error("--traces: name the folder that holds " + " and ".join(TRACES.values()))
        run(arguments.traces, arguments.jobs, arguments.only, arguments.seconds)
    documents = [json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    report = write_report(documents)
    took = round(time.perf_counter() - began, 1)
    print(f"wrote {report}")
    print(json.dumps({"benchmark": "study", "cells": len(documents), "seconds": took}))


def run(traces: Path, jobs: int, only: str, seconds: float) -> None:
    """Every cell that has no file yet."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_ideal()
    missing = [cell for cell in cells() if only in cell.name and not _file(cell).exists()]
    print(f"{len(missing)} cells to simulate, in {jobs} processes", flush=True)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        running = {pool.submit(simulate, cell, traces, seconds): cell for cell in missing}
        for done, future in enumerate(as_completed(running), 1):
            cell, document = running[future], future.result()
            part = _file(cell).with_suffix(".part")
            part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            part.replace(_file(cell))
            print(f"{done}/{len(missing)} {cell.name}: {document['took_s']} s", flush=True)


def write_ideal() -> None:
    """The hardware profile whose FLOP/s grow with its SMs."""
    hardware = find_hardware(GPU, "--gpu")
    cores, flops_per_s = hardware.cores, hardware.curve[-1].flops_per_s
    curve = [replace(at, flops_per_s=flops_per_s * at.cores / cores) for at in hardware.curve]
    IDEAL.parent.mkdir(parents=True, exist_ok=True)
    ideal = replace(hardware, name=f"{GPU}-ideal", curve=tuple(curve))
    IDEAL.write_text(json.dumps(ideal.to_json()), encoding="utf-8")


def _file(cell: Cell) -> Path:
    return RESULTS / f"{cell.name}.json"


if __name__ == "__main__":
    sys.exit(main())

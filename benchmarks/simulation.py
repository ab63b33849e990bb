"""How long simulations take: an hour and ten minutes of Azure's conversation trace, per policy.

Llama 3.1 8B on an H200 at the trace's own rate, objective 50 ms; processor time of one process, the
reading of the trace included. Without --traces the load is generated with the trace's lengths and
rate. Last line: one JSON document.

    python benchmarks/simulation.py [--traces DIR] [--policies duet,aggregated-slo,aggregated]
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

from checkout import commit

from duetjax.config import EngineConfig
from duetjax.sim.ledger import Objectives
from duetjax.simulate import Case, Setup, run

WINDOWS = {"hour": (3600.0, 60.0), "ten minutes": (600.0, 3.0)}
"""Seconds of the trace, and the goal in seconds."""


def main() -> None:
    """Runs, prints, and says whether the goals are reached."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", type=Path, help="folder of azure_conv_2023.csv")
    parser.add_argument("--policies", default="duet,aggregated-slo,aggregated")
    arguments = parser.parse_args()
    trace = "azure-conversation"
    if arguments.traces is not None:
        trace = str(arguments.traces / "azure_conv_2023.csv")
    engine = EngineConfig(max_num_seqs=256, max_num_batched_tokens=8192)
    rows, is_reached = [], True
    print(f"{'window':12} {'policy':16} {'requests':>9} {'tokens/s':>9} {'s':>7} {'goal':>6}")
    for window, (seconds, goal_s) in WINDOWS.items():
        for policy in arguments.policies.split(","):
            setup = Setup("llama-3.1-8b", "h200-sxm", trace, engine, seconds=seconds)
            began = time.process_time()
            figures = run(setup, Case(policy, Objectives((50.0,), 1000.0)))
            took_s = time.process_time() - began
            assert figures.finished == figures.requests, figures
            tokens = round(figures.output_per_s * figures.seconds / took_s)
            rows.append(
                {
                    "window": window,
                    "policy": policy,
                    "requests": figures.requests,
                    "tokens_per_s": tokens,
                    "seconds": round(took_s, 2),
                }
            )
            is_reached = is_reached and took_s <= goal_s
            row = (
                f"{window:12} {policy:16} {figures.requests:9} {tokens:9} {took_s:7.2f} {goal_s:6g}"
            )
            print(row, flush=True)
    print(
        json.dumps(
            {
                "benchmark": "simulation",
                "trace": Path(trace).name,
                "rows": rows,
                "reached": is_reached,
                "cpu": platform.processor() or platform.machine(),
                "load_average": os.getloadavg()[0],
                "python": platform.python_version(),
                "commit": commit(),
            }
        )
    )


if __name__ == "__main__":
    main()

"""Does a decode step cost what its context costs, or what max_model_len would allow?

Times the decode program at a fixed context under a small and a large max_model_len, alternating
between them in one process, and prints the ratio. Last line: one JSON document.

    python benchmarks/decode_context.py [--context 100] [--lens 512 16384] [--rows 16]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import replace

import jax
import numpy as np

from duetjax.checkpoint.source import resolve_model
from duetjax.config import EngineConfig, ModelConfig
from duetjax.policy.launch import Program
from duetjax.runtime.memory import plan_memory
from duetjax.runtime.programs import Buckets, Programs


class DecodeStep:
    """One decode program of `rows` rows at a fixed context, ready to be timed."""

    def __init__(self, config: ModelConfig, max_model_len: int, rows: int, context: int) -> None:
        engine = EngineConfig(max_model_len=max_model_len, max_num_seqs=rows)
        plan = plan_memory(config, engine, "float32")
        shapes = Buckets((rows,), (), 1, plan.table_width)
        self._programs = Programs(config, "float32", plan.layout, shapes)
        self._key = (Program.DECODE, rows)
        list(self._programs.compile())
        rng = np.random.default_rng(0)
        self._weights = [
            jax.numpy.asarray(rng.normal(scale=0.02, size=shape).astype(np.float32))
            for shape in self._programs.definition.shapes.values()
        ]
        self._kv = plan.layout.allocate()
        table = np.zeros((rows, plan.table_width), np.int32)
        used = -(-context // plan.layout.page_size)
        table[:, :used] = 1 + np.arange(rows * used).reshape(rows, used)
        self._inputs = (
            np.zeros(rows, np.int32),
            np.full(rows, context - 1, np.int32),
            table,
            np.zeros(rows, np.float32),
            np.zeros((rows, 2), np.uint32),
        )

    def seconds(self) -> float:
        """Runs the step once, from call to tokens on the host."""
        started = time.perf_counter()
        self._kv, tokens = self._programs(self._key, self._weights, self._kv, *self._inputs)
        np.asarray(tokens)
        return time.perf_counter() - started


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--lens", type=int, nargs=2, default=[512, 16384])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    config = replace(resolve_model(None).config, max_position_embeddings=max(args.lens))
    steps = {n: DecodeStep(config, n, args.rows, args.context) for n in args.lens}
    times: dict[int, list[float]] = {n: [] for n in args.lens}
    for _ in range(args.steps):
        for n, step in steps.items():
            times[n].append(step.seconds())
    medians = {n: 1e3 * statistics.median(t[args.steps // 10 :]) for n, t in times.items()}
    small, large = args.lens
    print(f"decode step, {args.rows} rows, context {args.context}, demo model, f32")
    for n, median in medians.items():
        print(f"  max_model_len {n:6d}: {median:7.2f} ms (median of {args.steps})")
    result = {
        "benchmark": "decode_context",
        "ratio": round(medians[large] / medians[small], 3),
        "median_ms": {str(n): round(m, 3) for n, m in medians.items()},
        "context": args.context,
        "rows": args.rows,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "commit": commit(),
    }
    print(f"ratio {result['ratio']}")
    print(json.dumps(result))


def commit() -> str | None:
    """The checkout's short commit id; None outside a checkout."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()

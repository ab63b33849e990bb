"""Does a decode step cost what its context costs, or what max_model_len would allow?

Times the decode program at the same contexts under a small and a large max_model_len, alternating
between them in one process, and prints the ratio. Last line: one JSON document.

    python benchmarks/decode_context.py [--context 100] [--lens 512 16384] [--rows 16]
"""

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import replace

import jax
import numpy as np
from checkout import commit

from duetjax.checkpoint.source import resolve_model
from duetjax.config import EngineConfig, ModelConfig, SamplingParams
from duetjax.policy.launch import Launch, Program, SlotParams, pack
from duetjax.runtime.compiler import Compiler
from duetjax.runtime.executor import JaxDevice
from duetjax.runtime.memory import plan_memory
from duetjax.runtime.programs import Buckets, Programs
from duetjax.runtime.slot_state import SlotShapes
from duetjax.runtime.store import ProgramStore
from duetjax.runtime.target import local_target
from pallas_kernels import xla


class DecodeStep:
    """One decode program of `rows` rows, ready to be timed for `steps` steps from `context` on."""

    def __init__(
        self, config: ModelConfig, max_model_len: int, rows: int, context: int, steps: int
    ) -> None:
        engine = EngineConfig(max_model_len=max_model_len, max_num_seqs=rows)
        plan = plan_memory(config, engine, "float32", pool=2**30)
        slots = SlotShapes(rows, plan.table_width, config.vocab_size)
        target = local_target()
        buckets = Buckets((rows,), (context,), 1)
        programs = Programs(config, plan.layout, slots, buckets, target, xla)
        compiled = Compiler(target, ProgramStore(None)).compile(programs.lowered())
        executables = {key: program.executable for key, program in compiled}
        rng = np.random.default_rng(0)
        weights = [
            jax.device_put(rng.normal(scale=0.02, size=shape).astype(np.float32))
            for shape in programs.definition.fusion.leaves.values()
        ]
        self._executor = JaxDevice(programs, executables, weights)
        self._slots = tuple(range(rows))
        pages = -(-(context + steps) // plan.layout.page_size)
        for slot in self._slots:
            prefill = Launch(
                0,
                Program.PREFILL,
                context,
                (slot,),
                starts=(0,),
                counts=(context,),
                packed=pack((1,) * context),
                samples=(True,),
                admitted=(SlotParams(slot, SamplingParams(temperature=0, seed=0)),),
                pages=tuple((slot, i, 1 + slot * pages + i) for i in range(pages)),
                limits=((slot, context + steps),),
            )
            self._run(prefill)

    def _run(self, launch: Launch) -> None:
        self._executor.result(self._executor.submit(launch))

    def seconds(self) -> float:
        """Runs the next step, from call to tokens on the host."""
        launch = Launch(0, Program.DECODE, len(self._slots), self._slots)
        started = time.perf_counter()
        self._run(launch)
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
    steps = {n: DecodeStep(config, n, args.rows, args.context, args.steps) for n in args.lens}
    times: dict[int, list[float]] = {n: [] for n in args.lens}
    for _ in range(args.steps):
        for n, step in steps.items():
            times[n].append(step.seconds())
    medians = {n: 1e3 * statistics.median(t[args.steps // 10 :]) for n, t in times.items()}
    small, large = args.lens
    print(f"decode step, {args.rows} rows, context from {args.context}, demo model, f32")
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


if __name__ == "__main__":
    main()

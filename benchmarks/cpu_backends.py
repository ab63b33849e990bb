"""Decode and prefill of a model of 100M parameters on the processor, beside other engines.

Four engines serve the same random weights, made here: duetjax with plain JAX calls (before) and
with lanes (after), transformers and llama.cpp. Each is a process of its own, bound to the same
cores; they take turns within every case, and of several turns after a first one the fastest
counts: what makes one slower is other programs' doing. Greedy tokens are compared, so that nobody
runs another model. duetjax is measured through `LLM.generate`, scheduler and sampler included; the
others' loops only take the largest logit. Goal: decode at 0.8 of llama.cpp's speed in the same
precision. Last line: one JSON document.

    python benchmarks/cpu_backends.py [--dtypes float32 bfloat16] [--repeats 5] [--steps 32]
        [--streams 1 4 8] [--contexts 128 1024] [--prefill 512 2048]
        [--transformers-python P] [--llama-python P]

The others are no dependencies of duetjax: a Python that has them (torch, transformers; llama_cpp)
can be named, and an engine that cannot be imported is left out. Needs Linux (processor affinity).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from checkout import commit
from cpu_backends_engines import ENGINES, MOST_STREAMS
from cpu_backends_model import MAX_LEN, VOCAB, random_tensors, write_folder, write_gguf

from duetjax.runtime.host_rates import processor

GOAL = 0.8
WORKER = Path(__file__).with_name("cpu_backends_engines.py")


class Case(NamedTuple):
    """What is timed: decode of some streams from a context on, or prefill of one prompt."""

    kind: str
    streams: int
    tokens: int

    def __str__(self) -> str:
        streams = f"{self.streams} x " if self.kind == "decode" else ""
        return f"{self.kind} {streams}{self.tokens}"


class Worker:
    """An engine's process. versions: None where the engine is not installed."""

    def __init__(self, python: str, name: str, dtype: str, files: Path, cores: list[int]) -> None:
        command = [python, str(WORKER), name, dtype, str(files)]
        threads = str(len(cores))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(files / f"{name}.log").open("w"),
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": threads},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self._log = files / f"{name}.log"
        hello = self._answer()
        self.versions: str | None = hello.get("versions")
        self.skipped: str | None = hello.get("skipped")

    def call(self, method: str, argument: object) -> Any:  # noqa: ANN401 - JSON
        """Has the engine do something, and waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, argument]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:  # noqa: ANN401 - JSON
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._log.stem} failed: {self._log.read_text()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


@dataclass(frozen=True)
class Found:
    """Of one case: each engine's tokens/s, and the least share of tokens like the first's."""

    case: Case
    tokens_per_s: dict[str, float]
    alike: dict[str, float]


def measure(case: Case, workers: Mapping[str, Worker], repeats: int, steps: int) -> Found:
    """The fastest of several turns each, after one that does not count."""
    draw = np.random.default_rng(case.tokens * MOST_STREAMS + case.streams)
    times: dict[str, list[float]] = {name: [] for name in workers}
    tokens: dict[str, list[list[int]]] = {}
    if case.kind == "decode":
        prompts = draw.integers(300, VOCAB, (case.streams, case.tokens)).tolist()
        for worker in workers.values():
            worker.call("hold", prompts)
    for _ in range(repeats + 1):
        prompt = draw.integers(300, VOCAB, case.tokens).tolist()
        for name, worker in workers.items():
            if case.kind == "decode":
                seconds, tokens[name] = worker.call("decode", steps)
            else:
                seconds = worker.call("prefill", prompt)
            times[name].append(seconds)
    amount = case.streams * steps if case.kind == "decode" else case.tokens
    reference = next(iter(tokens.values()), [])
    return Found(
        case,
        {name: amount / min(seconds[1:]) for name, seconds in times.items()},
        {name: min(map(shared, reference, taken)) for name, taken in tokens.items()},
    )


def shared(one: Sequence[int], other: Sequence[int]) -> float:
    """The share of tokens before the first that differs."""
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True))
    return sum(1 for _ in equal) / len(one)


def run_all(dtype: str, arguments: argparse.Namespace, files: Path) -> dict[str, object]:
    """Every case in one precision, printed as found."""
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    pythons = {
        "transformers": arguments.transformers_python,
        "llama.cpp": arguments.llama_python,
    }
    workers, skipped = {}, {}
    for name in ENGINES:
        worker = Worker(pythons.get(name, sys.executable), name, dtype, files, cores)
        if worker.skipped:
            skipped[name] = worker.skipped
            print(f"{name}: skipped: {worker.skipped}")
        else:
            workers[name] = worker
    print(f"tokens/s, {dtype}, {len(cores)} threads{'':8}" + "".join(f"{n:>15}" for n in workers))
    found = []
    for case in cases(arguments):
        found.append(measure(case, workers, arguments.repeats, arguments.steps))
        speeds = found[-1].tokens_per_s
        row = "".join(f"{speeds[name]:15.1f}" for name in workers)
        print(f"{case!s:36}{row}   load {os.getloadavg()[0]:.1f}", flush=True)
    versions = {name: worker.versions for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return summary(found) | {"versions": versions, "skipped": skipped}


def cases(arguments: argparse.Namespace) -> list[Case]:
    """What the command line asks for."""
    streams = [(n, count) for n in arguments.contexts for count in arguments.streams]
    decode = [Case("decode", count, n) for n, count in streams]
    return decode + [Case("prefill", 1, n) for n in arguments.prefill]


def summary(found: Sequence[Found]) -> dict[str, object]:
    """The numbers, and lanes' speed as a multiple of everybody else's."""
    lanes = "duetjax lanes"
    ratios = {
        str(one.case): {
            name: round(one.tokens_per_s[lanes] / speed, 3)
            for name, speed in one.tokens_per_s.items()
            if name != lanes
        }
        for one in found
    }
    beside = [ratios[str(f.case)].get("llama.cpp") for f in found if f.case.kind == "decode"]
    known = [ratio for ratio in beside if ratio is not None]
    alike = {
        name: round(min(one.alike[name] for one in found if one.alike), 3)
        for name in found[0].alike
    }
    return {
        "tokens_per_s": {
            str(one.case): {name: round(speed, 1) for name, speed in one.tokens_per_s.items()}
            for one in found
        },
        "lanes_over": ratios,
        "least_decode_over_llama_cpp": min(known, default=None),
        "goal_reached": min(known) >= GOAL if known else None,
        "tokens_alike": alike,
    }


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuses what would fail after minutes."""
    if not 1 <= min(arguments.streams) <= max(arguments.streams) <= MOST_STREAMS:
        parser.error(f"--streams must be from 1 to {MOST_STREAMS}, not {arguments.streams}")
    longest = max(max(arguments.contexts) + arguments.steps, max(arguments.prefill))
    if longest > MAX_LEN - 1 - 2 * MOST_STREAMS:
        parser.error(f"{longest} tokens are more than a stream can have, about {MAX_LEN}")
    available = len(os.sched_getaffinity(0))
    if not 1 <= arguments.threads <= available:
        parser.error(f"--threads must be from 1 to {available}, not {arguments.threads}")
    for name in ("repeats", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(arguments, name)}")


def main() -> None:
    """Prints a table per precision and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048], help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="tokens of a stream in a turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--transformers-python", default=sys.executable)
    parser.add_argument("--llama-python", default=sys.executable)
    arguments = parser.parse_args()
    check(parser, arguments)
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        files, tensors = Path(name), random_tensors()
        count = sum(tensor.size for tensor in tensors.values())
        print(f"Llama shape of {count / 1e6:.1f}M parameters, random weights, {processor()}")
        write_folder(files / "model", tensors)
        for dtype in arguments.dtypes:
            write_gguf(files / f"{dtype}.gguf", tensors, dtype)
        found = {dtype: run_all(dtype, arguments, files) for dtype in arguments.dtypes}
    result = {
        "benchmark": "cpu_backends",
        "goal": GOAL,
        "dtypes": found,
        "parameters": count,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "steps": arguments.steps,
        "load_average": round(load_average, 2),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "commit": commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

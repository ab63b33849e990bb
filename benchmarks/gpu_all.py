"""Everything that a GPU has to tell, part by part, each call at most nine minutes.

    make gpu-all PART=check|kernels|profile|headline [BACKEND=cuda|host] [LIMIT=540]
    python benchmarks/gpu_all.py PART [--backend host] [--limit-s 540] [--out DIR] [--list]

A part is a list of steps, each a command of its own that leaves a result under
DIR/<GPU or backend> (benchmarks/results). A step that has ended well is not done again, so the same
call once more goes on where the last one stopped (--again: from the start); one for which a call
has too little time is left to the next. Those that take long are resumable themselves. With
BACKEND=host everything runs small on the processor, and its figures mean nothing for a GPU; --brief
is for tests. Uses the standard library alone, and what the commands do. Last line: one JSON
document.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

from gpu.report import LEFT_OVER  # noqa: E402
from results_folder import results_of  # noqa: E402

PARTS = ("check", "kernels", "profile", "headline")
LIMIT_S = 540.0
OBJECTIVES, SEEDS, RATES = (25, 50, 15), (0, 1, 2), ("25,50,75", "100,125")
_LAUNCHER = "E0,E2,E3e,J2,J4,J3,E4J5,E5,E6,E7,E8,S1,D1"
_LANES = "L1,L2,L3,L4,L2lists,L2streams,L2mosaic"
_MARGIN_S = 10.0
"""For a step to write what it has, after it was told to end."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command. seconds: what it should take at most; {left}: in a word of it, what is left.

    code: what else than 0 is a good end; 1 where a check has looked at everything and found faults.
    """

    name: str
    command: Sequence[str]
    seconds: float
    code: int = 0

    def words(self, left: float) -> list[str]:
        """The command line."""
        return [word.replace("{left}", f"{left:.0f}") for word in self.command]


def steps(part: str, backend: str, out: Path, *, is_brief: bool) -> Iterator[Step]:
    """What a part consists of, in order; out: the folder of this GPU's results."""
    python, scripts, is_gpu = sys.executable, ROOT / "benchmarks", backend == "cuda"

    def script(name: str, *words: object) -> list[str]:
        return [python, str(scripts / name), *map(str, words)]

    if part == "check":
        for name, items in (("launcher", _LAUNCHER), ("lanes", _LANES)):
            words = ["--backend", backend, "--out", out / name, "--only", items]
            command = script("gpu_check.py", *words, "--total-s", "{left}", "--resume")
            yield Step(name, command, 60, code=1)
    elif part == "kernels":
        for verb, seconds in (("decode", 120), ("prefill", 180), ("slices", 90), ("write", 60)):
            file = out / f"kernels-{verb}.json"
            yield Step(verb, script("kernels.py", verb, "--out", file), seconds)
        if is_gpu:
            yield Step("triton", script("triton_check.py", "--out", out / "triton.json"), 120)
            yield Step("tune", [python, "-m", "pallas_kernels.tune"], 400)
    elif part == "profile":
        model = ["--model", "llama-3.1-8b", "--load-format", "dummy"] if is_gpu else []
        minutes = "5" if is_gpu else "0.5" if is_brief else "3"
        words = ["-m", "duetjax.cli", "profile", *model, "--minutes", minutes]
        yield Step("profile", [python, *words, "--out", str(out / "profile")], 60 * float(minutes))
    else:
        folder = ["--backend", backend, "--out", out / "headline", "--limit-s", "{left}"]
        folder += ["--brief"] if is_brief else []
        yield Step("capacity", script("duet.py", "capacity", *folder), 120)
        yield Step("tune", script("duet.py", "tune", *folder), 60)
        for objective in OBJECTIVES[:1] if is_brief else OBJECTIVES:
            for seed in SEEDS[:1] if is_brief else SEEDS:
                for rates in RATES[:1] if is_brief else RATES:
                    cells = ["--objective", objective, "--rates", rates, "--seed", seed]
                    name = f"{objective} ms, {rates} %, seed {seed}"
                    yield Step(name, script("duet.py", "cells", *cells, *folder), 60)


class Done:
    """Which steps have ended well, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds: dict[str, float] = {}
        with suppress(FileNotFoundError):
            self._seconds = json.loads(file.read_text(encoding="utf-8"))

    def __contains__(self, name: str) -> bool:
        return name in self._seconds

    def add(self, name: str, seconds: float) -> None:
        """Writes it down."""
        self._seconds[name] = round(seconds, 1)
        self._write()

    def forget(self, names: Iterable[str]) -> None:
        """So that they are done again."""
        self._seconds = {name: each for name, each in self._seconds.items() if name not in names}
        self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self._seconds, indent=1) + "\n", encoding="utf-8")


def carry_out(part: str, todo: Sequence[Step], done: Done, limit_s: float) -> int:
    """Runs what is not done and fits; returns the exit code, 1 if a step has failed."""
    ends = time.monotonic() + limit_s
    outcomes: dict[str, str] = {}
    for step in todo:
        name = _full_name(part, step)
        left = ends - time.monotonic() - _MARGIN_S
        if name in done:
            outcomes[step.name] = "done before"
        elif left < step.seconds:
            outcomes[step.name] = "left for the next call"
        else:
            outcomes[step.name] = _run(step, left, name, done)
        print(f"== {name}: {outcomes[step.name]}", flush=True)
    failed = [name for name, outcome in outcomes.items() if outcome.startswith("failed")]
    print(json.dumps({"benchmark": "gpu_all", "part": part, "outcomes": outcomes}))
    return 1 if failed else 0


def _run(step: Step, left: float, name: str, done: Done) -> str:
    words, began = step.words(left), time.monotonic()
    print(f"== {name}: {shlex.join(words[1:])}", flush=True)
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(left)
    except subprocess.TimeoutExpired:
        return f"failed: given up after {left:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = time.monotonic() - began
    if code not in (0, step.code):
        return "goes on in the next call" if code == LEFT_OVER else f"failed: ended with {code}"
    done.add(name, seconds)
    return f"ended with {code} in {seconds:.0f} s"


def _full_name(part: str, step: Step) -> str:
    return f"{part}: {step.name}"


def main() -> int:
    """Does a part, as far as time allows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--backend", choices=("cuda", "host"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of this call")
    parser.add_argument("--again", action="store_true", help="what is done is done once more")
    parser.add_argument("--brief", action="store_true", help="as little as shows the way")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    args = parser.parse_args()
    out = results_of(args.backend, args.out, may_lack=args.list)
    todo = list(steps(args.part, args.backend, out, is_brief=args.brief))
    if args.list:
        for step in todo:
            print(f"{step.seconds:5.0f} s  {step.name:24} {shlex.join(step.command[1:])}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    done = Done(out / "done.json")
    if args.again:
        done.forget({_full_name(args.part, step) for step in todo})
    return carry_out(args.part, todo, done, args.limit_s)


if __name__ == "__main__":
    sys.exit(main())

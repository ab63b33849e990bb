"""Everything that a GPU has to tell, part by part, each call at most nine minutes.

    make gpu-all PART=check|kernels|profile|headline [BACKEND=cuda|host] [LIMIT=540]
    python benchmarks/gpu_all.py PART [--backend host] [--limit-s 540] [--out DIR] [--list]

A part is a list of steps, each a command of its own that leaves a result under
DIR/<GPU or backend> (benchmarks/results). One that has ended well is not done again as long as its
result is there, so the same call once more goes on where the last one stopped; --again removes the
part's results first. One for which a call has too little time is left to the next. Those that take
long are resumable themselves. If each call has a new machine, carry DIR there and back. The kernels
timed are Hopper's; Ampere's and Ada's are checked alone, where jax-triton is.

With BACKEND=host everything runs small on the processor, and its figures mean nothing for a GPU;
--brief is for tests, in a folder of its own. Uses the standard library alone, and what the commands
do. Last line: one JSON document. Exits with 1 if a step has failed, else with 3 if some are left.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu.report import LEFT_OVER  # noqa: E402
from gpu_parts import PARTS, Step  # noqa: E402
from results_folder import results_of  # noqa: E402

LIMIT_S = 540.0
_PLATFORMS = {"cuda": "cuda,cpu", "host": "cpu"}
"""Of JAX: without the GPU that is asked for it fails, and does not measure the processor."""
_END_S, _SPARE_S = 10.0, 5.0
"""For a step to end in after it was told to; how much less than it has it is told to have."""


class Done:
    """Which steps of all parts have ended well, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds: dict[str, float] = {}
        with suppress(FileNotFoundError):
            self._seconds = json.loads(file.read_text(encoding="utf-8"))

    def has(self, part: str, step: Step) -> bool:
        """Whether there is nothing left to do."""
        is_done = _full_name(part, step) in self._seconds
        return is_done and step.result.exists() and not step.is_repeated

    def add(self, part: str, step: Step, seconds: float) -> None:
        """Writes it down."""
        self._seconds[_full_name(part, step)] = round(seconds, 1)
        self._write()

    def forget(self, part: str, todo: Sequence[Step]) -> None:
        """Removes results, so that they are made again."""
        names = {_full_name(part, step) for step in todo}
        self._seconds = {name: each for name, each in self._seconds.items() if name not in names}
        self._write()
        for step in todo:
            if step.result.is_dir():
                shutil.rmtree(step.result)
            step.result.unlink(missing_ok=True)

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self._seconds, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self._file)


class Call:
    """One call of the command line: what becomes of a part's steps in its time."""

    def __init__(
        self, part: str, done: Done, limit_s: float, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.failed: list[str] = []
        self.left: list[str] = []
        self._part, self._done, self._environment = part, done, environment
        self._ends = time.monotonic() + limit_s
        self._waits_for = ""

    def carry_out(self, todo: Sequence[Step]) -> int:
        """Runs what is not done and fits, and says what came of it; returns the exit code."""
        outcomes: dict[str, str] = {}
        for step in todo:
            outcomes[step.name] = outcome = self._outcome(step)
            print(f"== {_full_name(self._part, step)}: {outcome}", flush=True)
            if step.is_needed and step.name in self.failed + self.left:
                self._waits_for = self._waits_for or step.name
        last = {"benchmark": "gpu_all", "part": self._part, "outcomes": outcomes}
        print(json.dumps(last | {"failed": self.failed, "left": self.left}))
        if self.failed:
            return 1
        return LEFT_OVER if self.left else 0

    def _outcome(self, step: Step) -> str:
        """Does a step if need be; in words."""
        if self._done.has(self._part, step):
            return "done before"
        if step.lacks:
            return f"left out, needs {step.lacks}"
        if self._waits_for:
            self.left.append(step.name)
            return f"waits for {self._waits_for}"
        seconds = self._ends - time.monotonic() - _END_S
        if seconds < step.seconds:
            self.left.append(step.name)
            return f"left for the next call, may take {step.seconds:.0f} s"
        began = time.monotonic()
        code = self._run(step, seconds)
        took = time.monotonic() - began
        if code == LEFT_OVER:
            self.left.append(step.name)
            return "goes on in the next call"
        if code in (0, step.code) and step.result.exists():
            self._done.add(self._part, step, took)
            return f"ended with {code} in {took:.0f} s"
        self.failed.append(step.name)
        if code is None:
            return f"failed: given up after {took:.0f} s"
        lacks = f" without {step.result}" if code in (0, step.code) else ""
        return f"failed: ended with {code}{lacks}"

    def _run(self, step: Step, seconds: float) -> int | None:
        """The exit status; None if time was up."""
        words = step.words(seconds - _SPARE_S)
        print(f"== {_full_name(self._part, step)}: {shlex.join(words[1:])}", flush=True)
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that it ends those that it has put apart; then all that is left."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _full_name(part: str, step: Step) -> str:
    return f"{part}: {step.name}"


def main() -> int:
    """Does a part, as far as time allows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--backend", choices=tuple(_PLATFORMS), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of this call")
    parser.add_argument("--again", action="store_true", help="remove the part's results first")
    parser.add_argument("--brief", action="store_true", help="as little as shows the way")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    args = parser.parse_args()
    out = results_of(args.backend, _from_root(args.out), may_lack=args.list)
    if args.brief:
        out = out.with_name(f"{out.name}-brief")
    todo = list(PARTS[args.part](args.backend, out, is_brief=args.brief))
    if args.list:
        for step in todo:
            needs = f"  (needs {step.lacks})" if step.lacks else ""
            print(f"{step.seconds:5.0f} s  {step.name:24} {shlex.join(step.command[1:])}{needs}")
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # steps hear it then, too, even
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # where it came ignored; both end them
    out.mkdir(parents=True, exist_ok=True)
    done = Done(out / "done.json")
    if args.again:
        done.forget(args.part, todo)
    return Call(args.part, done, args.limit_s, _environment(args.backend)).carry_out(todo)


def _from_root(folder: Path) -> Path:
    """The same folder for this process and its steps, which work where the checkout is."""
    folder = folder.resolve()
    os.chdir(ROOT)
    return folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder


def _environment(backend: str) -> dict[str, str]:
    """In which this checkout is found without being installed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "JAX_PLATFORMS": _PLATFORMS[backend], "PYTHONPATH": path}


if __name__ == "__main__":
    sys.exit(main())

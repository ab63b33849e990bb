"""The parts of gpu_all.py, step by step: which commands, how long they take, what they leave.

Commands are run where the checkout is: results keep them, and name no machine's folders.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gpu.report import FAULTS_FOUND

OBJECTIVES, SEEDS, RATES = (25, 50, 15), (0, 1, 2), ("25,50,75", "100,125")
_LAUNCHER = "E0,E2,E3e,J2,J4,J3,E4J5,E5,E6,E7,E8,S1,D1"
_LANES = "L1,L2,L3,L4,L2lists,L2streams,L2mosaic"


@dataclass(frozen=True, slots=True)
class Step:
    """A command. seconds: what it should take at most; {left}: in a word of it, what is left.

    result: a file or folder that it leaves. code: what else than 0 is a good end. is_needed: by
    everything after it. is_repeated: in each call. lacks: what it needs and is not there.
    """

    name: str
    command: Sequence[str]
    seconds: float
    result: Path
    code: int = 0
    is_needed: bool = False
    is_repeated: bool = False
    lacks: str = ""

    def words(self, left: float) -> list[str]:
        """The command line."""
        return [word.replace("{left}", f"{left:.0f}") for word in self.command]


def _script(name: str, *words: object) -> list[str]:
    return [sys.executable, f"benchmarks/{name}", *map(str, words)]


def _check(backend: str, out: Path, *, is_brief: bool) -> Iterator[Step]:
    items = ("E0", "L1") if is_brief else (_LAUNCHER, _LANES)
    for name, only in zip(("launcher", "lanes"), items, strict=True):
        words = ["--backend", backend, "--out", out / name, "--only", only]
        command = _script("gpu_check.py", *words, "--total-s", "{left}", "--resume")
        yield Step(name, command, 60, out / name, code=FAULTS_FOUND)


def _kernels(backend: str, out: Path, *, is_brief: bool) -> Iterator[Step]:
    no_gpu = "" if backend == "cuda" else "a GPU"
    verbs = {"decode": 120, "prefill": 180, "slices": 90, "write": 60}
    for verb in ("write",) if is_brief else verbs:
        file = out / f"kernels-{verb}.json"
        command = _script("kernels.py", verb, "--out", file)
        lacks = no_gpu if verb == "slices" else ""
        yield Step(verb, command, verbs[verb], file, lacks=lacks)
    file = out / "triton.json"
    lacks = no_gpu or ("" if _is_installed("jax_triton") else "jax-triton")
    yield Step("triton", _script("triton_check.py", "--out", file), 120, file, lacks=lacks)
    file = out / "tuning.json"
    command = [sys.executable, "-m", "pallas_kernels.tune", "--out", str(file)]
    yield Step("tune", command, 400, file, lacks=no_gpu)


def _profile(backend: str, out: Path, *, is_brief: bool) -> Iterator[Step]:
    folder = out / "profile"
    command = [sys.executable, "-m", "duetjax.cli", "profile", "--out", str(folder)]
    minutes, rest, model = 3.0, 60.0, "checkpoints/demo"
    if backend == "cuda":
        minutes, rest, model = 5.0, 150.0, "llama-3.1-8b"  # rest: loading and compiling
    command += ["--model", model, "--load-format", "dummy"]
    if is_brief:
        minutes = 0.25
        command += ["--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
        command += ["--max-model-len", "1024", "--points", "84"]  # 12 of a kind or more
    command += ["--minutes", f"{minutes:g}"]
    yield Step("profile", command, 60 * minutes + rest, folder / "points.json")


def _headline(backend: str, out: Path, *, is_brief: bool) -> Iterator[Step]:
    folder = out / "headline"
    objectives, seeds, rates = OBJECTIVES, SEEDS, RATES
    budgets, policies, words = [], [], ["--backend", backend, "--out", folder]
    if is_brief:
        objectives, seeds, rates = OBJECTIVES[:1], SEEDS[:1], ("50",)
        budgets, policies = ["--budgets", 128], ["--policies", "duet,static-split"]
        words += ["--brief"]
    limit, file = ["--limit-s", "{left}"], folder / "capacity.json"
    yield Step(
        "capacity", _script("duet.py", "capacity", *words, *limit), 120, file, is_needed=True
    )
    command, file = _script("duet.py", "tune", *words, *limit, *budgets), folder / "tuned.json"
    yield Step("tune", command, 60, file, is_needed=True)
    for objective in objectives:
        for seed in seeds:
            for some in rates:
                name = f"{objective} ms, {some} %, seed {seed}"
                cells = ["--objective", objective, "--rates", some, "--seed", seed, *policies]
                yield Step(name, _script("duet.py", "cells", *words, *limit, *cells), 60, folder)
    file = folder / "headline.json"
    yield Step("report", _script("duet.py", "report", *words), 30, file, is_repeated=True)


PARTS = {"check": _check, "kernels": _kernels, "profile": _profile, "headline": _headline}
"""What each part consists of, in order, by backend and the folder of results."""


def _is_installed(package: str) -> bool:
    with suppress(ModuleNotFoundError):
        return find_spec(package) is not None
    return False

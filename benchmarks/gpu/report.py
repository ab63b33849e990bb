"""What is printed and what is written: a line for each item, a file for all of them."""

import importlib.metadata
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkout import commit

from gpu.items import Outcome
from gpu.running import Finding

LINES_SHOWN = 12
LEFT_OVER, FAULTS_FOUND = 3, 4
"""How a call ends that left something for the next, and one that tried all and found faults; a
Python that breaks down ends with 1.
"""


class Report:
    """Results of one device, kept in a file that is whole after every item.

    is_whole: no item is left for another call.
    """

    def __init__(self, backend: str, out: Path, gpu: Mapping[str, Any], launcher: str) -> None:
        slug = slug_of(gpu["name"]) if backend == "cuda" else backend
        self._file = out / slug / "launcher.json"
        self._items: dict[str, dict[str, Any]] = {}
        self.is_whole = True
        self._head = {
            "benchmark": "gpu_check",
            "backend": backend,
            "gpu": dict(gpu),
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions() | {"driver": gpu["driver"], "launcher": launcher},
        }
        print(f"{gpu['name']}, driver {gpu['driver']}, launcher {launcher}", flush=True)

    def resume(self) -> None:
        """Takes over what earlier calls have found here, however it came out; says which calls."""
        with suppress(FileNotFoundError):
            found = json.loads(self._file.read_text(encoding="utf-8"))
            self._items = found["items"]
            call = {name: found[name] for name in ("command", "commit", "date")}
            self._head["earlier"] = [*found.get("earlier", ()), call]

    def has(self, name: str) -> bool:
        """Whether it is known already."""
        return name in self._items

    def add(self, name: str, finding: Finding) -> None:
        """Prints an item and writes it down."""
        figures = ", ".join(f"{key} {value}" for key, value in finding.figures.items())
        reason = "; ".join(finding.failures)
        said = " | ".join(part for part in (reason, figures) if part)
        print(f"{finding.outcome:4} {name}: {said} ({finding.seconds} s)", flush=True)
        for line in finding.tail[-LINES_SHOWN:]:
            print(f"     | {line}", flush=True)
        self._items[name] = asdict(finding)
        self._write()

    def conclude(self) -> int:
        """Prints the JSON line; returns the exit code: 3 if items are left, 4 if one failed."""
        outcomes = {name: item["outcome"] for name, item in self._items.items()}
        failed = [name for name, outcome in outcomes.items() if outcome == Outcome.FAIL]
        print(f"written to {self._file}")
        brief = {name: item["figures"] for name, item in self._items.items()}
        print(json.dumps({**self._head, "outcomes": outcomes, "failed": failed, "figures": brief}))
        if not self.is_whole:
            return LEFT_OVER
        return FAULTS_FOUND if failed else 0

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        whole = {**self._head, "items": self._items}
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self._file)


def slug_of(gpu: str) -> str:
    """A folder's name: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-") or "gpu"


def versions() -> dict[str, str | None]:
    """Of Python and of what decides how programs are compiled."""
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy")
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found

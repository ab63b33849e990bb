"""What the headline experiment consists of: its backends, policies and cells, and their time.

A cell is one file; what is there is not done again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from duet_load import Load

from duetjax.config import PolicyName

OBJECTIVES = (15, 25, 50)
"""Milliseconds; on a backend that is scaled, their names."""
RATES = (25, 50, 75, 100, 125)
"""Percent of the prefill capacity."""
SEEDS = (0, 1, 2)
CAPACITY_SEED, TUNING_SEED, SETTLING_SEED = 1000, 1001, 1002
TUNING_RATES = (50, 100)
POLICIES = tuple(
    str(name)
    for name in (
        PolicyName.DUET,
        PolicyName.AGGREGATED_SLO,
        PolicyName.AGGREGATED,
        PolicyName.PREFILL_FIRST,
        PolicyName.STATIC_SPLIT,
    )
)
PLANS_BY_OBJECTIVE = (PolicyName.DUET, PolicyName.AGGREGATED_SLO)
SCALE = ("prefill_tokens_per_s", "decode_step_ms", "objective_scale")
"""Of the capacity, what rates and objectives are scaled by."""
REFERENCE_STEP_MS = 7.5
"""A decode step of the victims alone as `--backend sim` measures it: Llama 3.1 8B, an H200."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. settle: of an engine's first load, warm_up: of each rate's, that nobody looks at.

    window: measured, in blocks. drain: after it, for first tokens of those that came in it. start:
    until an engine's victims decode, as long as none has been measured. limit: of one call.
    """

    settle: float = 5.0
    warm_up: float = 2.0
    window: float = 12.0
    blocks: int = 6
    drain: float = 2.0
    start: float = 45.0
    limit: float = 530.0

    @property
    def cell(self) -> float:
        """What a cell takes at most, with clearing up."""
        return self.warm_up + self.window + self.drain + 0.5


@dataclass(frozen=True, slots=True)
class Backend:
    """What cells run on. is_scaled: objectives stand for numbers of decode steps.

    hardware_profile: where none has been measured; None: by the GPU.
    """

    name: str
    model: str
    load: Load
    timing: Timing
    hardware_profile: str | None = None
    is_scaled: bool = False
    is_simulation: bool = False


_TIMING = Timing()
_BRIEF = Timing(0.3, 0.3, 1.0, 2, 0.5, 12.0)
BACKENDS: Mapping[str, Backend] = {
    each.name: each
    for each in (
        Backend("cuda", "llama-3.1-8b", Load(), _TIMING),
        Backend(
            "sim",
            "llama-3.1-8b",
            Load(),
            replace(_TIMING, start=4.0),
            "h200-sxm",
            is_simulation=True,
        ),
        Backend(
            "host",
            str(Path(__file__).resolve().parents[1] / "checkpoints" / "demo"),
            Load().scaled(lengths=16, rows=4),
            Timing(2.0, 1.0, 6.0, 6, 1.0, 12.0),
            "cpu-2-cores",
            is_scaled=True,
        ),
    )
}


def find(name: str, *, is_brief: bool) -> Backend:
    """A backend by name. is_brief: smaller, with windows by which nothing can be judged."""
    backend = BACKENDS[name]
    if not is_brief:
        return backend
    load = backend.load.scaled(lengths=4, rows=2) if backend.is_scaled else backend.load
    return replace(backend, load=load, timing=_BRIEF)


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine's policy. objective: what it plans by; None: by none, so its cells are everyone's.

    budget: tokens of a launch.
    """

    policy: str
    budget: int
    objective: int | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        by = "" if self.objective is None else f"_{self.objective}ms"
        return f"{self.policy}_{self.budget}{by}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: an engine under one rate of one seed."""

    variant: Variant
    rate: int
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.variant.name}_rate{self.rate}_seed{self.seed}"


class Results:
    """A folder of cells, with what they were scaled by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, cell: Cell) -> bool:
        """Whether it has been measured."""
        return self.file(cell).exists()

    def file(self, cell: Cell) -> Path:
        """Where it is, or will be."""
        return self.folder / f"{cell.name}.json"

    def write(self, name: str, document: object) -> Path:
        """Puts a document in place whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.json"
        part = file.with_suffix(".part")
        part.write_text(json.dumps(document) + "\n", encoding="utf-8")
        part.replace(file)
        return file

    def capacity(self) -> dict[str, Any] | None:
        """What `capacity` found; None before."""
        return self._read("capacity")

    def tuned(self) -> dict[int, int] | None:
        """Aggregated's best budget by objective; None before `tune` came to its end."""
        found = self._read("tuned")
        return None if found is None else {int(ms): n for ms, n in found["budgets"].items()}

    def documents(self) -> list[dict[str, Any]]:
        """All cells, by name."""
        return [json.loads(file.read_text("utf-8")) for file in self._files()]

    def refuse_mixed(self) -> None:
        """SystemExit names what was measured by another capacity or profile than the rest."""
        cells = {
            file.name: _basis(document, document["capacity"])
            for file, document in zip(self._files(), self.documents(), strict=True)
        }
        capacity = self.capacity()
        if capacity is None and not cells:
            return
        wanted = next(iter(cells.values())) if capacity is None else _basis(capacity, capacity)
        mixed = [name for name, basis in cells.items() if basis != wanted]
        tuned = self._read("tuned") or {}
        if "capacity" in tuned and _scale(tuned["capacity"]) != wanted[0]:
            mixed.append("tuned.json")
        if mixed:
            raise SystemExit(
                f"duet.py: measured by another capacity or profile than the rest of {self.folder};"
                f" delete {', '.join(mixed)}"
            )

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*_rate*_seed*.json"))

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None


def _basis(document: Mapping[str, Any], capacity: Mapping[str, float]) -> tuple[Any, ...]:
    """What must be the same for all cells of a folder."""
    names = ("hardware_profile", "model_profile", "profile_digest")
    return _scale(capacity), *(document.get(name) for name in names)


def _scale(capacity: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(capacity[name] for name in SCALE)


def variant(policy: str, objective: int, load: Load, tuned: Mapping[int, int]) -> Variant:
    """A policy as it is tried under an objective."""
    if policy in PLANS_BY_OBJECTIVE:
        return Variant(policy, load.budget, objective)
    budget = tuned[objective] if policy == PolicyName.AGGREGATED else load.budget
    return Variant(policy, budget)


def tuning(load: Load, budgets: Iterable[int] | None = None) -> list[Cell]:
    """The cells by which aggregated's budgets are compared, each budget's together."""
    return [
        Cell(Variant(PolicyName.AGGREGATED, budget), rate, TUNING_SEED)
        for budget in budgets or load.budgets
        for rate in TUNING_RATES
    ]


def start_seconds(documents: Sequence[Mapping[str, Any]], timing: Timing) -> float:
    """What an engine takes to start: the longest that was measured, or what is assumed."""
    return max((document["start_s"] for document in documents), default=timing.start)


def seconds_of(cells: Sequence[Cell], timing: Timing, start: float) -> float:
    """What they take, each variant's in an engine of its own."""
    engines = len({cell.variant for cell in cells})
    return engines * (start + timing.settle) + len(cells) * timing.cell

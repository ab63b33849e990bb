"""What the lanes' items work on: programs, what runs them, and one that runs them in a row.

On a GPU four layers of a model of 8B width; on the double of libcuda the toy of its tests; on a
processor a tiny model. The items are the same for all three.
"""

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from duetjax.policy.launch import Deliver, Lane, Launch, Split, StepResult
from duetjax.runtime.recorder import XlaMemory
from duetjax.runtime.rungs import Rung, _Opening
from gpu.bench import SPLITS, Bench

if TYPE_CHECKING:
    from collections.abc import Iterator

    from duetjax.runtime.cuda_lanes import CudaLanes, Recordings, Replay
    from duetjax.runtime.host_lanes import HostLanes
    from duetjax.runtime.programs import Key, Programs
    from duetjax.runtime.recorder import Memory

type Built = Callable[[int, int], None]

NUMBERS_MEAN_NOTHING = "of the double or of a shared processor: no figure here means anything"


class Executor(Protocol):
    """What launches are given to."""

    def start(self, deliver: Deliver) -> None:
        """See `policy.launch.Executor`."""

    def submit(self, launch: Launch) -> None:
        """See `policy.launch.Executor`."""

    def close(self) -> None:
        """See `policy.launch.Executor`."""


class Serial(Protocol):
    """Runs launches one after another: what lanes must come to."""

    def run(self, launch: Launch) -> Sequence[StepResult]:
        """The result of each step."""


@dataclass(frozen=True)
class Rig:
    """Programs, ready to run, and their sizes.

    temporaries: bytes of each program. serial: makes a fresh one. lanes: opens a rung, where that
    is not done by recording. page_size, num_pages: of KV. is_real: whether times mean something.
    """

    bench: Bench
    programs: "Programs"
    executables: Mapping[Any, Callable[..., Any]]
    weights: Sequence[Any]
    temporaries: Mapping["Key", int]
    splits: tuple[Split, ...]
    serial: Callable[[], Serial]
    page_size: int
    num_pages: int
    libcuda: str | None = None
    memory: "Memory | None" = None
    lanes: "Callable[[], HostLanes] | None" = None
    is_real: bool = False

    @property
    def longest(self) -> int:
        """Positions that a slot's page table has."""
        return self.programs.slots.table_width * self.page_size

    def open(self, rung: Rung, built: Built = lambda *_: None) -> "CudaLanes | HostLanes":
        """The lanes on one rung, whether a higher one would hold or not.

        If they cannot be had on all splits, which is a failure, on fewer: so that the rest is seen.
        """
        if self.lanes is not None:
            return self.lanes()
        if rung is Rung.STREAMS:
            return self._open(rung, (), built)
        for fewer in (self.splits, self.splits[1::2]):
            try:
                return self._open(rung, fewer, built)
            except Exception as error:
                why = f"{rung} on {len(fewer)} splits: {type(error).__name__}: {error}"
                self.bench.expect(False, why)
        return self._open(rung, self.splits[-1:], built)

    def _open(self, rung: Rung, splits: Sequence[Split], built: Built) -> "CudaLanes":
        gc.collect()
        opening = _Opening(
            self.programs,
            self.executables,
            self.weights,
            self.temporaries,
            built,
            self.libcuda,
            self.memory or XlaMemory(),
        )
        return opening.on(rung, splits)

    @contextmanager
    def opened(self, rung: Rung) -> "Iterator[CudaLanes | HostLanes]":
        """The lanes on one rung, closed behind the block."""
        lanes = self.open(rung)
        try:
            yield lanes
        finally:
            lanes.close()
            gc.collect()


def rig_of(bench: Bench) -> Rig:
    """What there is to work on here, made ready."""
    if bench.backend == "fake":
        module = "lane_double"
    else:
        module = "lane_model"
        loud = logging.StreamHandler()  # what the project says of rungs and splits
        logging.getLogger("duetjax").addHandler(loud)
    began = time.perf_counter()
    rig: Rig = import_module(f"gpu.{module}").make(bench)
    gc.freeze()  # recording collects garbage again and again: not that of all imports
    bench.note(ready_s=round(time.perf_counter() - began, 1))
    if not rig.is_real:
        bench.note(figures=NUMBERS_MEAN_NOTHING)
    return rig


def splits_here(bench: Bench) -> tuple[Split, ...]:
    """What the driver makes of the splits that are tried; of two, on the double, which is slow."""
    with bench.open(SPLITS if bench.driver.is_real else (32, 64)) as device:
        made = [Split(decode, prefill) for _, decode, prefill in device.splits[1:]]
    return tuple(sorted(set(made), key=lambda split: split.decode))


def splits_of(rig: Rig, lanes: Executor) -> tuple[Split, ...]:
    """Those that lanes have; where they have none, names for launches to carry."""
    held = getattr(lanes, "_recordings", None)
    return tuple(held.splits) if held is not None and held.splits else rig.splits


def recordings_of(lanes: Executor) -> "Recordings":
    """Everything that lanes replay, to be launched by hand. Not once they have been started."""
    recordings: Recordings = lanes._recordings  # type: ignore[attr-defined]
    return recordings


def replay_of(recordings: "Recordings", lane: Lane, *, prefill: bool) -> "Replay":
    """A lane's largest program of a kind; its inputs are padding until a launch brings others."""
    keys = [key for each, key in recordings.of if each is lane and key[0].name == _name(prefill)]
    return recordings.of[lane, max(keys, key=lambda key: key[1])]


def _name(prefill: bool) -> str:
    return "PREFILL" if prefill else "DECODE"


def reach(bench: Bench, what: str, figure: float, goal: float, unit: str = "us") -> None:
    """Notes a figure beside its goal. Missing one is told, and no failure."""
    is_reached = bool(figure <= goal) if bench.driver.is_real else None
    bench.note(**{what: {unit: round(figure, 2), "goal": goal, "reached": is_reached}})


@dataclass
class Heard(logging.Handler):
    """What the project warns of meanwhile."""

    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a line."""
        self.lines.append(record.getMessage())

    __hash__ = logging.Handler.__hash__

    @contextmanager
    def listening(self) -> "Iterator[None]":
        """To everything under `duetjax`."""
        logger = logging.getLogger("duetjax")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)

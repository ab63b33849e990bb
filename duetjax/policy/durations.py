"""How long a step takes: as a table says, or as anybody else foresees."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.launch import Lane, Program, Split


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step of a launch; new, cached [R]: tokens that each row computes, and has in KV before.

    `new` may be one number for all rows.
    """

    lane: Lane
    split: Split | None
    program: Program
    bucket: int
    new: NDArray[np.int64] | int
    cached: NDArray[np.int64]


class Durations(Protocol):
    """Foretells steps, and may learn from how long launches took.

    median_error: of late, |foretold - measured| / measured. is_trusted: whether that is small.
    """

    @property
    def median_error(self) -> float: ...  # noqa: D102

    @property
    def is_trusted(self) -> bool: ...  # noqa: D102

    def step_ms(self, step: Step) -> float:
        """Milliseconds of a step, finite and positive."""

    def observe(self, step: Step, measured_ms: float) -> None:
        """A step took this long; what is not finite and positive teaches nothing."""


@dataclass(frozen=True, slots=True)
class DurationTable:
    """Milliseconds of one step by (split or None for the whole device, program, bucket)."""

    of: Mapping[tuple[Split | None, Program, int], float]
    median_error: float = 0.0
    is_trusted: bool = True

    def step_ms(self, step: Step) -> float:
        """See `Durations`; KeyError for a program that the table does not know."""
        return self.of[step.split, step.program, step.bucket]

    def observe(self, step: Step, measured_ms: float) -> None:
        """A table does not learn."""

"""How long launches take, as a table: what the scheduler is told until something predicts it."""

from collections.abc import Mapping
from dataclasses import dataclass

from duetjax.policy.launch import Program, Split


@dataclass(frozen=True, slots=True)
class DurationTable:
    """Milliseconds of one step by (split or None for the whole device, program, bucket)."""

    step_ms: Mapping[tuple[Split | None, Program, int], float]

    def of(self, split: Split | None, program: Program, bucket: int) -> float:
        """Milliseconds of one step; KeyError for a program that the table does not know."""
        return self.step_ms[split, program, bucket]

"""Promise (c) of docs/design.md as code: how far two generations may differ, and where they do.

Programs of different shapes sum in different orders, so greedy tokens may part where the
reference's best two logits are nearly equal, and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEAR_TIE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Gap between a reference's top two logits below which either may win."""


@dataclass(frozen=True)
class Difference:
    """First position where a sequence leaves its reference, and the reference's gap there."""

    sequence: int
    position: int
    gap: float


def first_differences(
    got: Sequence[np.ndarray], wanted: Sequence[np.ndarray], gaps: Sequence[np.ndarray]
) -> list[Difference]:
    """Where each token sequence first leaves its reference; those that never do are left out."""
    differences = []
    for index, (mine, theirs, gap) in enumerate(zip(got, wanted, gaps, strict=True)):
        assert len(mine) == len(theirs) == len(gap), f"sequence {index}: lengths differ"
        [places] = np.nonzero(np.asarray(mine) != np.asarray(theirs))
        if places.size:
            differences.append(Difference(index, int(places[0]), float(gap[places[0]])))
    return differences


def assert_same_generations(
    got: Sequence[np.ndarray], wanted: Sequence[np.ndarray], gaps: Sequence[np.ndarray]
) -> None:
    """Float32: sequences part at near-ties only, and at most 2 % of them before their end."""
    differences = first_differences(got, wanted, gaps)
    real = [d for d in differences if d.gap >= NEAR_TIE["float32"]]
    assert not real, f"tokens differ where the reference is sure: {real}"
    assert len(differences) <= 0.02 * len(got), f"too many near-ties fell apart: {differences}"


def assert_same_choices(got: np.ndarray, wanted: np.ndarray, gaps: np.ndarray) -> None:
    """Bfloat16, teacher-forced: at least 99.5 % top-1 agreement where the reference is sure."""
    sure = gaps >= NEAR_TIE["bfloat16"]
    agreement = float(np.mean(got[sure] == wanted[sure]))
    worst = np.flatnonzero(sure & (got != wanted))[:5]
    assert agreement >= 0.995, f"{agreement:.2%} agree; differ at {worst}, gaps {gaps[worst]}"

"""What soak.py measures of a process, and whether it grows: slopes with an interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WARM_UP = 0.25
"""Share of the samples before the series: pools fill, and allocators find their size."""
_DRAWS, _SEED = 2000, 0


@dataclass(frozen=True, slots=True)
class Use:
    """What a process has at one moment. private: bytes that are nobody else's and no file's."""

    rss: int
    private: int
    threads: int
    descriptors: int
    sockets: int


def use_of(pid: int) -> Use:
    """As /proc says, which is Linux's."""
    process = Path("/proc", str(pid))
    rollup = dict(_kilobytes((process / "smaps_rollup").read_text()))
    links = [_target(link) for link in (process / "fd").iterdir()]
    return Use(
        rss=rollup["Rss"],
        private=rollup["Anonymous"],
        threads=len(list((process / "task").iterdir())),
        descriptors=len(links),
        sockets=sum(target.startswith("socket:") for target in links),
    )


def children(pid: int) -> list[int]:
    """Processes that this one has started and that live."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def _kilobytes(text: str) -> list[tuple[str, int]]:
    lines = [line.split() for line in text.splitlines()[1:]]
    return [(name.rstrip(":"), 1024 * int(value)) for name, value, _ in lines]


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # closed meanwhile
        return ""


@dataclass(frozen=True, slots=True)
class Slope:
    """Of a line through a series; low, high: its 95 % interval. All per unit of x."""

    value: float
    low: float
    high: float

    def is_noise(self, bound: float) -> bool:
        """Whether the series may as well not grow, or grows by no more than `bound`."""
        return self.low <= 0 or self.value <= bound


def slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Least squares; the interval is a bootstrap over moving blocks of residuals.

    Blocks, because what a process has now it mostly had a sample ago (Künsch 1989): each has the
    root of the number of samples, at least three of which are needed.
    """
    at, values = np.array(x, np.float64), np.array(y, np.float64)
    assert len(at) == len(values) >= 3, (x, y)
    at -= at.mean()
    value = float(at @ values / (at @ at))
    residuals = values - values.mean() - value * at
    drawn = value + _resampled(residuals) @ at / (at @ at)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Slope(value, float(low), float(high))


def _resampled(residuals: NDArray[np.float64]) -> NDArray[np.float64]:
    """[draws, samples]."""
    count = len(residuals)
    size = round(count**0.5)
    starts = np.random.default_rng(_SEED).integers(
        0, count - size + 1, (_DRAWS, -(-count // size), 1)
    )
    index = (starts + np.arange(size)).reshape(_DRAWS, -1)[:, :count]
    return residuals[index]

"""Axes of charts: where a value is, and which ones have ticks."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from duetjax.chart_svg import text_width


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from the first tick to the last one, as pixels from start to end."""

    ticks: Sequence[float]
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value is."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            low, high, value = log10(low), log10(high), log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def axis_for(values: Sequence[float], start: float, end: float, log: bool) -> Axis:
    """An axis with room for its labels, along x if it ends right of its start, else upwards."""
    low, high = min(values), max(values)
    if high - low <= 1e-8 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    for most in range(10, 1, -1):
        ticks = _log_ticks(low, high, most) if log else _linear_ticks(low, high, most)
        labels = max(text_width(number(tick)) for tick in ticks) + 14 if end > start else 28
        if labels * (len(ticks) - 1) <= abs(end - start):
            break
    return Axis(ticks, start, end, log)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from low or before to high or beyond."""
    power = 10.0 ** floor(log10((high - low) / most))
    step = next(each * power for each in (1, 2, 5, 10) if each * power * most >= high - low)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """1, 2 and 5 times powers of ten, around low and high; powers alone where those are many."""
    first, last = floor(log10(low)), ceil(log10(high))
    fine = [each * 10.0**power for power in range(first - 1, last + 2) for each in (1, 2, 5)]
    fine = fine[bisect_right(fine, low) - 1 : bisect_left(fine, high) + 1]
    if len(fine) <= most + 1:
        return fine
    every = ceil((last - first) / most)
    return [10.0**power for power in range(first, last + every, every)]


def number(value: float) -> str:
    """As a label says it: 0.5, 20, 1,000,000."""
    return f"{value:,.10g}"

"""Time as the simulated device has it: seconds that pass by themselves, or only when told."""

import time
from threading import Condition
from typing import Protocol


class Clock(Protocol):
    """Seconds from an arbitrary beginning, never going back."""

    def now(self) -> float:
        """The time."""

    def wait(self, changed: Condition, until: float) -> None:
        """Lets time pass up to `until`, or less if `changed`, which the caller holds, is told."""


class RealClock:
    """The time that everybody lives in."""

    def now(self) -> float:
        """Seconds, monotonic."""
        return time.monotonic()

    def wait(self, changed: Condition, until: float) -> None:
        """Sleeps, `changed` released meanwhile."""
        changed.wait(max(0.0, until - time.monotonic()))


class VirtualClock:
    """Stands still but for `wait`, which takes no time. For one thread."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Seconds since it was made."""
        return self._now

    def wait(self, changed: Condition, until: float) -> None:
        """It is `until` now; the past stays where it is."""
        self._now = max(self._now, until)

    def move_to(self, until: float) -> None:
        """Lets time pass in which nothing happens on the device, up to a request's arrival, say."""
        assert until >= self._now, f"{until} s is before {self._now} s"
        self._now = until

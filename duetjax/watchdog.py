"""What an engine waits for and since when, and the rule by which it has waited too long.

Knows neither threads nor requests, and asks no clock: times are given, in seconds.
"""

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from duetjax.config import DuetJAXError, flag
from duetjax.policy.launch import FinishedStep, Lane, Launch

_STEPS = 20  # a step may take so many times what was foretold
_WILDEST = 10  # times the watchdog's own seconds, beyond which nobody is believed
_THREAD = "the engine's own thread"
_PLAN = "a launch for the requests that wait"
_PERMIT = "what an answer under a grammar may go on with"


class EngineStalled(DuetJAXError):
    """Something that the engine waits for does not come: a device or a thread hangs."""


@dataclass(frozen=True, slots=True)
class Wait:
    """What must come next from somewhere. foretold: seconds that it should take; 0 if unknown."""

    what: str
    since: float
    foretold: float = 0.0


class Waits:
    """Everything an engine waits for; written by its thread alone.

    current: by name; may be read by any thread, as it is replaced and never changed.
    """

    def __init__(self) -> None:
        self.current: Mapping[str, Wait] = {}
        self._launches: dict[Lane, deque[Launch]] = {lane: deque() for lane in Lane}

    def round_began(self, now: float) -> None:
        """The engine's thread is at work."""
        self._put(Wait(_THREAD, now))

    def round_ended(self, now: float, *, has_requests: bool, permits: float | None = None) -> None:
        """It sleeps until something happens; with requests, that must be a step.

        permits: since when it waits for what an answer may go on with, which is as good.
        """
        over = (_THREAD, _PLAN, _PERMIT)
        waits = {what: wait for what, wait in self.current.items() if what not in over}
        if permits is not None:
            waits[_PERMIT] = Wait(_PERMIT, permits)
        elif has_requests and not any(self._launches.values()):
            waits[_PLAN] = self.current.get(_PLAN) or Wait(_PLAN, now)
        self.current = waits

    def begun(self, launch: Launch, now: float) -> None:
        """A launch is being submitted; it is waited for once it is the first of its lane."""
        launches = self._launches[launch.lane]
        launches.append(launch)
        if len(launches) == 1:
            self._put(_next_step(launch, now))

    def finished(self, step: FinishedStep, now: float) -> None:
        """A step has come; it is of the first launch of its lane."""
        for lane, launches in self._launches.items():
            if launches and launches[0].ticket == step.ticket:
                if step.step + 1 == launches[0].k:
                    launches.popleft()
                if launches:
                    self._put(_next_step(launches[0], now))
                else:
                    gone = _lane(lane)
                    self.current = {k: wait for k, wait in self.current.items() if k != gone}

    def _put(self, wait: Wait) -> None:
        self.current = {**self.current, wait.what: wait}


class Watch:
    """Looks at waits time and again, and says which one is overdue.

    seconds: how long one may take, beside what was foretold of it. interval: seconds between looks.
    """

    def __init__(self, seconds: float) -> None:
        self.interval = min(1.0, seconds / 8)
        self._seconds = seconds
        self._woke = -math.inf
        self._looked: float | None = None

    def overdue(self, waits: Collection[Wait], now: float) -> Wait | None:
        """The oldest wait, if it has taken too long.

        20 times what was foretold of any of them is not too long for all, if that is at most 10
        times `seconds`. After a gap between looks of half of `seconds` all begin anew: the process
        was stopped, and what it waits for perhaps too.
        """
        if self._looked is not None and now - self._looked > self._seconds / 2:
            self._woke = now
        self._looked = now
        foretold = _STEPS * max((wait.foretold for wait in waits), default=0.0)
        allowed = max(self._seconds, min(foretold, _WILDEST * self._seconds))
        # The oldest: whoever hangs keeps others waiting, and they began to wait later.
        oldest = min(waits, key=lambda wait: wait.since, default=None)
        if oldest is None or now - max(oldest.since, self._woke) <= allowed:
            return None
        return oldest


def stalled(wait: Wait, now: float) -> EngineStalled:
    """The failure of an engine whose wait is overdue."""
    return EngineStalled(
        f"nothing has come from {wait.what} for {now - wait.since:.3g} s, so it hangs: start anew,"
        f" with a larger {flag('watchdog_s')} if it may take that long"
    )


def _next_step(launch: Launch, now: float) -> Wait:
    foretold = (launch.predicted_ms or 0.0) / 1e3 / launch.k
    return Wait(_lane(launch.lane), now, foretold)


def _lane(lane: Lane) -> str:
    return f"the device (lane {lane.value})"

"""What a model's programs cost on the device at hand: each is run a few times without a request."""

import logging
import time
from dataclasses import replace
from itertools import count
from typing import Protocol

from duetjax.policy.launch import Launch, Program, StepResult
from duetjax.policy.profiles import Cost, HardwareProfile, ModelProfile

_log = logging.getLogger(__name__)

SOURCE = "measured at start"
"""Stands for the GPU that other profiles were compiled for."""
_REPEATS = 3
_MOST_SECONDS = 10.0
_LEAST_REST = 0.05
"""Of what was measured, for the program, however long a launch is said to take."""


class Device(Protocol):
    """What programs are timed on: an executor that serves nobody yet."""

    def run(self, launch: Launch) -> StepResult:
        """Runs a launch of one step and waits for it."""


def measured_profile(
    shapes: ModelProfile, device: Device, hardware: HardwareProfile
) -> ModelProfile:
    """The profile by which the roofline takes as long for each program as the device did.

    Without rows attention has nothing to do, and is no part of a profile; all else is computed. A
    program has as many times the FLOPs and bytes of its shapes as it takes longer, less a launch,
    than they would on all of `hardware`'s cores: so on fewer of them what binds it there does.
    Programs that are left after some seconds are taken to be slower than the one before as they are
    larger.
    """
    costs: dict[tuple[Program, int], Cost] = {}
    _log.info("timing %d programs, as there is no profile of %s", len(shapes.costs), shapes.model)
    tickets, began = count(-1, -1), time.perf_counter()
    for program in (Program.DECODE, Program.PREFILL):
        before = 0, 0.0
        for size in sorted(bucket for kind, bucket in shapes.costs if kind is program):
            late = before[0] and time.perf_counter() - began > _MOST_SECONDS
            seconds = before[1] * size / before[0] if late else 0.0
            seconds = seconds or _fastest(device, Launch(next(tickets), program, size, slots=()))
            before = size, seconds
            costs[program, size] = _cost(shapes.costs[program, size], seconds, hardware)
            _log.debug("%s %d: %.2f ms%s", program, size, 1e3 * seconds, " (guessed)" * bool(late))
    return replace(shapes, compiled_for=SOURCE, costs=costs)


def _fastest(device: Device, launch: Launch) -> float:
    """Seconds; what makes other runs slower is somebody else's doing."""
    seconds = []
    for _ in range(1 + _REPEATS):  # the first one is slow
        began = time.perf_counter()
        device.run(launch)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _cost(shape: Cost, seconds: float, hardware: HardwareProfile) -> Cost:
    rates = hardware.curve[-1]
    rest = max(seconds - hardware.launch_us / 1e6, _LEAST_REST * seconds)
    times = rest / max(shape.flops / rates.flops_per_s, shape.bytes / rates.bytes_per_s)
    return Cost(times * shape.flops, times * shape.bytes)

"""Programs timed at start: the roofline then says of each what the device took."""

from dataclasses import replace

import pytest
from test_planning import H200, SHAPES

from duetjax.policy.launch import Program, StepResult
from duetjax.policy.roofline import Roofline
from duetjax.runtime import measured_profile as module
from duetjax.runtime.measured_profile import SOURCE, measured_profile

EMPTY = StepResult([], [], [])


class Clock:
    """Seconds that only the device lets pass."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


class Device:
    """Takes as long as a table says, its first run of a program ten times as long."""

    def __init__(self, clock, ms_of):
        self._clock = clock
        self._ms_of = ms_of
        self.launches = []

    def run(self, launch):
        first = (launch.program, launch.bucket) not in [
            (each.program, each.bucket) for each in self.launches
        ]
        self.launches.append(launch)
        self._clock.now += self._ms_of(launch.program, launch.bucket) * (10 if first else 1) / 1e3
        return EMPTY


def ms_of(program, size):
    return 3.0 + size / 100 if program is Program.DECODE else 5.0 + size / 200


def test_the_roofline_says_what_each_program_took(monkeypatch):
    device = Device(Clock(monkeypatch), ms_of)
    profile = measured_profile(SHAPES, device, H200)
    assert (profile.compiled_for, profile.num_layers) == (SOURCE, SHAPES.num_layers)
    assert profile.costs.keys() == SHAPES.costs.keys()
    roofline = Roofline(profile, H200)
    for program, size in SHAPES.costs:
        [ms] = roofline.step_ms(program, size, [], [], [H200.cores])
        assert ms == pytest.approx(ms_of(program, size)), (program, size)


def test_a_program_that_takes_less_than_a_launch_still_costs_something(monkeypatch):
    device = Device(Clock(monkeypatch), lambda program, size: 1e-3)
    profile = measured_profile(SHAPES, device, replace(H200, launch_us=20.0))
    assert all(cost.flops > 0 and cost.bytes > 0 for cost in profile.costs.values())


def test_programs_run_without_rows_and_with_tickets_that_no_engine_gives(monkeypatch):
    device = Device(Clock(monkeypatch), ms_of)
    measured_profile(SHAPES, device, H200)
    assert {launch.slots for launch in device.launches} == {()}
    assert max(launch.ticket for launch in device.launches) < 0


def test_flops_and_bytes_of_a_program_grow_alike_to_what_it_took(monkeypatch):
    profile = measured_profile(SHAPES, Device(Clock(monkeypatch), ms_of), H200)
    for key, cost in profile.costs.items():
        shape = SHAPES.costs[key]
        assert cost.flops / shape.flops == pytest.approx(cost.bytes / shape.bytes)
        assert cost.flops > shape.flops


def test_a_slow_device_is_not_asked_for_all_of_them(monkeypatch):
    clock = Clock(monkeypatch)
    device = Device(clock, lambda program, size: 40.0 * size)
    profile = measured_profile(SHAPES, device, H200)
    assert clock.now - 1000 < 300
    asked = {(launch.program, launch.bucket) for launch in device.launches}
    assert len(asked) < len(SHAPES.costs)
    roofline = Roofline(profile, H200)
    for program, size in SHAPES.costs:
        [ms] = roofline.step_ms(program, size, [], [], [H200.cores])
        assert ms == pytest.approx(40.0 * size, rel=0.01), (program, size)

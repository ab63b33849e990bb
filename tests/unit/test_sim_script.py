"""Durations that somebody has written down."""

from statistics import median

import numpy as np
import pytest

from duetjax.policy.durations import Step
from duetjax.policy.launch import Lane, Program, Split
from duetjax.sim.script import Script

DECODE = Step(Lane.WHOLE, None, Program.DECODE, 8, 1, np.full(8, 100))
LARGER = Step(Lane.DECODE, Split(1, 1), Program.DECODE, 64, 1, np.full(64, 9000))
PREFILL = Step(Lane.PREFILL, Split(1, 1), Program.PREFILL, 64, np.full(1, 60), np.zeros(1))


def test_steps_take_what_is_written_whatever_is_in_them():
    script = Script(10.0, 40.0)
    assert [script.step_ms(step) for step in (DECODE, LARGER, PREFILL)] == [10.0, 10.0, 40.0]
    script.observe(DECODE, 1e6)
    assert (script.step_ms(DECODE), script.median_error, script.is_trusted) == (10.0, 0.0, True)


def test_noise_is_drawn_by_the_seed_around_what_is_written():
    drawn = [Script(10.0, 40.0, noise=0.2, seed=seed) for seed in (1, 1, 2)]
    first, again, other = ([script.step_ms(DECODE) for _ in range(2000)] for script in drawn)
    assert first == again
    assert first != other
    assert median(first) == pytest.approx(10.0, rel=0.02)
    assert np.std(np.log(first)) == pytest.approx(0.2, rel=0.05)

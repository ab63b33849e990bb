"""How long simulated launches really take: as foreseen by profiles, with or without noise."""

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.durations import Step
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Lane


class Truth:
    """Implements `durations.Durations`: what one who had measured nothing yet would foretell.

    noise: standard deviation of the logarithm of what each step is multiplied by, whose median is
    1; drawn by `seed` in the order in which launches are submitted.
    """

    median_error, is_trusted = 0.0, True

    def __init__(self, foresight: Foresight, *, noise: float = 0.0, seed: int = 0) -> None:
        self._foresight = foresight
        self._noise = noise
        self._draw = np.random.default_rng(seed)

    @property
    def is_foretold(self) -> bool:
        """Whether `foresight` is right about every step."""
        return self._noise == 0.0

    def step_ms(self, step: Step) -> float:
        """See `Durations`; with noise another time whenever it is asked."""
        ms = self._foresight.step_ms(step)
        if self._noise:
            ms *= float(np.exp(self._noise * self._draw.standard_normal()))
        return ms

    def steps_ms(self, step: Step, count: int) -> NDArray[np.float64]:
        """Milliseconds of so many decode steps, where they are foretold; see `Foresight`."""
        assert self.is_foretold, "noise is drawn step by step"
        return self._foresight.steps_ms(step, count)

    def observe(self, step: Step, measured_ms: float) -> None:
        """It knows."""


class Transfer(Truth):
    """Where prefill and decode have a device each: what a prompt's tokens leave is sent.

    A prefill launch ends when its keys and values have crossed the interconnect, which begins when
    they have been computed.
    """

    def step_ms(self, step: Step) -> float:
        """See `Durations`."""
        ms = super().step_ms(step)
        if step.lane is Lane.PREFILL:
            ms += float(np.sum(step.new)) * self._foresight.transfer_ms
        return ms

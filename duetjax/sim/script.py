"""Durations that somebody has written down instead of a profile's."""

from random import Random

from duetjax.policy.durations import Step
from duetjax.policy.launch import Program


class Script:
    """Implements `durations.Durations`: milliseconds of any decode step, and any prefill launch.

    noise, seed: as in `truth.Truth`.
    """

    median_error, is_trusted = 0.0, True

    def __init__(
        self, decode_ms: float, prefill_ms: float, *, noise: float = 0.0, seed: int = 0
    ) -> None:
        self._ms = {Program.DECODE: decode_ms, Program.PREFILL: prefill_ms}
        self._noise = noise
        self._draw = Random(seed)

    def step_ms(self, step: Step) -> float:
        """See `Durations`; with noise another time whenever it is asked."""
        return self._ms[step.program] * self._draw.lognormvariate(0.0, self._noise)

    def observe(self, step: Step, measured_ms: float) -> None:
        """It is written already."""

"""What steps will take on this device: the roofline, corrected by what launches have taught."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.calibration import Calibration
from duetjax.policy.durations import Step
from duetjax.policy.launch import Lane, Program, Split
from duetjax.policy.profiles import HardwareProfile, ModelProfile
from duetjax.policy.roofline import Attention, Prompts, Roofline, Rows

type Launched = tuple[int, Rows]
"""A bucket and the rows in it."""


class Foresight:
    """Implements `durations.Durations` for one model on one device.

    splits: those of the hardware's that can be used; None: all of them.
    """

    def __init__(
        self,
        model: ModelProfile,
        hardware: HardwareProfile,
        calibration: Calibration | None = None,
        *,
        attention: Attention = Attention.FUSED,
        splits: tuple[Split, ...] | None = None,
    ) -> None:
        self.hardware = hardware
        self.calibration = calibration or Calibration(model.model, hardware.name)
        known = hardware.splits()
        self.splits = known if splits is None else tuple(one for one in known if one in splits)
        self._roofline = Roofline(model, hardware, attention=attention)
        per_unit = self._roofline.per_unit
        self._whole = per_unit(hardware.cores)
        decode = [per_unit(split.decode, Lane.DECODE) for split in self.splits]
        prefill = [per_unit(split.prefill, Lane.PREFILL) for split in self.splits]
        self._units = decode, prefill
        self._beside = {split: ([decode[s]], [prefill[s]]) for s, split in enumerate(self.splits)}

    @property
    def transfer_ms(self) -> float:
        """Milliseconds that a token's keys and values take to another device; see `Roofline`."""
        return self._roofline.transfer_ms

    @property
    def is_trusted(self) -> bool:
        """Whether predictions have been near enough to what came; see `Calibration`."""
        return self.calibration.is_trusted

    @property
    def median_error(self) -> float:
        """Of the last launches; see `Calibration`."""
        return self.calibration.median_error

    @property
    def slack(self) -> float:
        """How many times as long as foreseen a launch may well take; see `Calibration`."""
        return self.calibration.slack

    def step_ms(self, step: Step) -> float:
        """See `Durations`."""
        return self._raw_ms(step) * self.calibration.factor(step.lane, step.program)

    def steps_ms(self, step: Step, count: int) -> NDArray[np.float64]:
        """Milliseconds of `count` decode steps on the whole device, from `step` on [count].

        Every row feeds one token more each time.
        """
        steps = self._roofline.decode_steps_ms(step.bucket, step.cached, count, self._whole)
        return steps * self.calibration.factor(step.lane, step.program)

    def observe(self, step: Step, measured_ms: float) -> None:
        """See `Durations`."""
        self.calibration.observe(step.lane, step.program, self._raw_ms(step), measured_ms)

    def decoding(self, contexts: NDArray[np.int64]) -> Rows:
        """See `Roofline`."""
        return self._roofline.decoding(contexts)

    def prompts(self, prompts: Sequence[tuple[int, int]], most: int) -> Prompts:
        """See `Roofline`."""
        return self._roofline.prompts(prompts, most)

    def whole_ms(self, program: Program, bucket: int, rows: Rows) -> float:
        """Milliseconds of a step on the whole device."""
        parts = self._roofline.parts(program, bucket, rows)
        return self._roofline.ms(parts, self._whole) * self.calibration.factor(Lane.WHOLE, program)

    def decode_ms(self, decode: Launched, split: Split | None = None) -> tuple[list[float], float]:
        """Milliseconds of a decode step on each of `splits`, or on one, and on the whole device."""
        units, _ = self._units if split is None else self._beside[split]
        roofline, factor = self._roofline, self.calibration.factor
        parts = roofline.parts(Program.DECODE, *decode)
        beside = roofline.each_ms(parts, units, factor(Lane.DECODE, Program.DECODE))
        return beside, roofline.ms(parts, self._whole) * factor(Lane.WHOLE, Program.DECODE)

    def prefill_ms(
        self, prefills: Sequence[Launched], split: Split | None = None
    ) -> Callable[[int], list[float]]:
        """Milliseconds of prefill launches beside decode, when asked for by a split's index."""
        _, units = self._units if split is None else self._beside[split]
        parts, steps_ms = self._roofline.parts, self._roofline.steps_ms
        launches = [parts(Program.PREFILL, *prefill) for prefill in prefills]
        factor = self.calibration.factor(Lane.PREFILL, Program.PREFILL)
        return lambda s: steps_ms(launches, units[s], factor)

    def _raw_ms(self, step: Step) -> float:
        if step.program is Program.DECODE:
            rows = self._roofline.decoding(step.cached)
        else:
            rows = self._roofline.rows(step.new, step.cached)
        parts = self._roofline.parts(step.program, step.bucket, rows)
        if step.split is None or step.lane is Lane.WHOLE:
            return self._roofline.ms(parts, self._whole)
        cores = step.split.decode if step.lane is Lane.DECODE else step.split.prefill
        return self._roofline.ms(parts, self._roofline.per_unit(cores, step.lane))

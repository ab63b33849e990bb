"""What steps will take on this device: the roofline, corrected by what launches have taught."""

from collections.abc import Sequence

import numpy as np

from duetjax.policy.calibration import Calibration
from duetjax.policy.durations import Step
from duetjax.policy.launch import Lane, Program
from duetjax.policy.profiles import HardwareProfile, ModelProfile
from duetjax.policy.roofline import Attention, Floats, Roofline, Rows


class Foresight:
    """Implements `durations.Durations` for one model on one device."""

    def __init__(
        self,
        model: ModelProfile,
        hardware: HardwareProfile,
        calibration: Calibration | None = None,
        *,
        attention: Attention = Attention.FUSED,
    ) -> None:
        self.hardware = hardware
        self.calibration = calibration or Calibration(model.model, hardware.name)
        self.splits = hardware.splits()
        self._roofline = Roofline(model, hardware, attention=attention)
        self._cores = {
            Lane.DECODE: np.array([split.decode for split in self.splits], np.int64),
            Lane.PREFILL: np.array([split.prefill for split in self.splits], np.int64),
        }
        self._most_prefill_cores = int(self._cores[Lane.PREFILL].max(initial=1))

    @property
    def is_trusted(self) -> bool:
        """Whether predictions have been near enough to what came; see `Calibration`."""
        return self.calibration.is_trusted

    @property
    def median_error(self) -> float:
        """Of the last launches; see `Calibration`."""
        return self.calibration.median_error

    def step_ms(self, step: Step) -> float:
        """See `Durations`."""
        return self._raw_ms(step) * self.calibration.factor(step.lane, step.program)

    def observe(self, step: Step, measured_ms: float) -> None:
        """See `Durations`."""
        self.calibration.observe(step.lane, step.program, self._raw_ms(step), measured_ms)

    def whole_ms(self, program: Program, bucket: int, rows: Rows) -> float:
        """Milliseconds of a step on the whole device."""
        ms = self._roofline.ms_on(self._roofline.parts(program, bucket, rows), self.hardware.cores)
        return ms * self.calibration.factor(Lane.WHOLE, program)

    def decode_on_splits(self, bucket: int, rows: Rows) -> Floats:
        """Milliseconds [S] of a decode step beside prefill, on each of `splits`."""
        work = np.array(self._roofline.parts(Program.DECODE, bucket, rows))
        ms = self._roofline.ms(work, self._cores[Lane.DECODE], Lane.DECODE)
        return ms * self.calibration.factor(Lane.DECODE, Program.DECODE)

    def fastest_prefill_ms(self, bucket: int, rows: Rows) -> float:
        """Milliseconds of a prefill launch beside decode where it has most cores."""
        parts = self._roofline.parts(Program.PREFILL, bucket, rows)
        ms = self._roofline.ms_on(parts, self._most_prefill_cores, Lane.PREFILL)
        return ms * self.calibration.factor(Lane.PREFILL, Program.PREFILL)

    def prefill_on_splits(self, launches: Sequence[tuple[int, Rows]]) -> Floats:
        """Milliseconds [S, J] of prefill launches beside decode: bucket and rows of each."""
        roofline, cores = self._roofline, self._cores[Lane.PREFILL]
        works = [roofline.parts(Program.PREFILL, *launch) for launch in launches]
        if len({len(flops) for flops, _ in works}) == 1:
            ms = roofline.ms(np.array(works), cores, Lane.PREFILL)
        else:
            each = [roofline.ms(np.array(work), cores, Lane.PREFILL) for work in works]
            ms = np.stack(each, axis=1)
        return ms * self.calibration.factor(Lane.PREFILL, Program.PREFILL)

    def _raw_ms(self, step: Step) -> float:
        rows = Rows(step.new, step.cached)
        parts = self._roofline.parts(step.program, step.bucket, rows)
        if step.split is None or step.lane is Lane.WHOLE:
            return self._roofline.ms_on(parts, self.hardware.cores)
        side = step.split.decode if step.lane is Lane.DECODE else step.split.prefill
        return self._roofline.ms_on(parts, side, step.lane)

"""What steps will take on this device: the roofline, corrected by what launches have taught."""

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.calibration import Calibration
from duetjax.policy.durations import Step
from duetjax.policy.launch import Lane, Program
from duetjax.policy.profiles import HardwareProfile, ModelProfile
from duetjax.policy.roofline import Attention, Floats, Roofline

type Counts = NDArray[np.int64] | int


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
        self._whole = np.array([hardware.cores])
        self._cores = {
            Lane.DECODE: np.array([split.decode for split in self.splits], np.int64),
            Lane.PREFILL: np.array([split.prefill for split in self.splits], np.int64),
        }

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

    def on_splits(
        self, lane: Lane, program: Program, bucket: int, new: Counts, cached: NDArray[np.int64]
    ) -> Floats:
        """Milliseconds of a step on one side of each of `splits`, beside the other lane."""
        work = self._roofline.work(program, bucket, new, cached)
        ms = self._roofline.ms(work, self._cores[lane], lane)
        return ms * self.calibration.factor(lane, program)

    def _raw_ms(self, step: Step) -> float:
        work = self._roofline.work(step.program, step.bucket, step.new, step.cached)
        cores, lane = self._whole, None
        if step.split is not None and step.lane is not Lane.WHOLE:
            lane = step.lane
            side = step.split.decode if lane is Lane.DECODE else step.split.prefill
            cores = np.array([side])
        return float(self._roofline.ms(work, cores, lane)[0])

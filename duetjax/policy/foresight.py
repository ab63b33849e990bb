"""What steps will take on this device: the roofline, corrected by what launches have taught."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.calibration import Calibration
from duetjax.policy.durations import Step
from duetjax.policy.launch import Lane, Program
from duetjax.policy.profiles import HardwareProfile, ModelProfile
from duetjax.policy.roofline import Attention, Floats, Roofline

type Counts = NDArray[np.int64]


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

    def decode_on_splits(self, bucket: int, cached: Counts) -> Floats:
        """Milliseconds [S] of a decode step beside prefill, on each of `splits`."""
        work = self._roofline.work(Program.DECODE, bucket, 1, cached)
        ms = self._roofline.ms(work, self._cores[Lane.DECODE], Lane.DECODE)
        return ms * self.calibration.factor(Lane.DECODE, Program.DECODE)

    def prefill_on_splits(self, launches: Sequence[tuple[int, list[int], list[int]]]) -> Floats:
        """Milliseconds [S, J] of prefill launches beside decode: (bucket, new, cached) of each."""
        roofline, cores = self._roofline, self._cores[Lane.PREFILL]
        works = [roofline.work(Program.PREFILL, *launch) for launch in launches]
        if len({work.shape for work in works}) == 1:
            ms = roofline.ms(np.array(works), cores, Lane.PREFILL)
        else:
            ms = np.stack([roofline.ms(work, cores, Lane.PREFILL) for work in works], axis=1)
        return ms * self.calibration.factor(Lane.PREFILL, Program.PREFILL)

    def _raw_ms(self, step: Step) -> float:
        work = self._roofline.work(step.program, step.bucket, step.new, step.cached)
        cores, lane = self._whole, None
        if step.split is not None and step.lane is not Lane.WHOLE:
            lane = step.lane
            side = step.split.decode if lane is Lane.DECODE else step.split.prefill
            cores = np.array([side])
        return float(self._roofline.ms(work, cores, lane)[0])

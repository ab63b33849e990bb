"""What measurements teach about predictions: a factor per lane and program, and whether to trust.

Factors are medians, so outliers move nothing, and bounded, so nothing runs away. Deterministic: the
same measurements in the same order give the same factors; no clock.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import product
from math import isfinite
from reprlib import repr as short
from typing import Self

from duetjax.policy.launch import Lane, Program
from duetjax.policy.profiles import Document

FIRST_FACTOR, LEAST_FACTOR, MOST_FACTOR = 1.3, 0.5, 3.0
FACTOR_WINDOW = 64
"""Measurements that a factor is the median of: a lasting change shows after half of them."""
SEEDS = 8
"""How many measurements the first factor counts for, lest the first real one decides alone."""
ERROR_WINDOW = 200
FEWEST_ERRORS = 20
"""Fewer measurements say nothing about trust."""
DISTRUST_ABOVE, TRUST_BELOW = 0.30, 0.20
SLACK_QUANTILE, MOST_SLACK = 0.9, 2.0
MOST_ERROR = 1e6
"""Errors are cut here: a measurement of nearly nothing must not make one that JSON cannot hold."""

type Key = tuple[Lane, Program]


class Calibration:
    """Learns how much longer launches take than the roofline says, on one device with one model.

    A step takes about factor(...) times what the roofline predicts.
    """

    KIND = "calibration"
    VERSION = 1

    def __init__(self, model: str, hardware: str) -> None:
        self.model = model
        self.hardware = hardware
        self.is_trusted = True
        self._ratios = {
            key: _Window(FACTOR_WINDOW, [FIRST_FACTOR] * SEEDS) for key in product(Lane, Program)
        }
        self._errors = _Window(ERROR_WINDOW)
        self._overruns = _Window(ERROR_WINDOW)
        self._unmeasured = 0  # in a row

    def factor(self, lane: Lane, program: Program) -> float:
        """What to multiply the roofline's prediction by; 1.3 until there are measurements."""
        return self._ratios[lane, program].median

    @property
    def median_error(self) -> float:
        """Of the last 200 launches: |predicted - measured| / measured; 0 before the first."""
        return self._errors.median if len(self._errors) else 0.0

    @property
    def slack(self) -> float:
        """How many times as long as predicted all but a tenth of the last 200 launches took.

        From 1.0, and so it is before there are 20, to 2.0.
        """
        if len(self._overruns) < FEWEST_ERRORS:
            return 1.0
        return min(max(self._overruns.quantile(SLACK_QUANTILE), 1.0), MOST_SLACK)

    def observe(
        self, lane: Lane, program: Program, predicted_ms: float, measured_ms: float
    ) -> None:
        """Learns from one launch; predicted_ms is the roofline's, without the factor.

        A measurement that is not finite or not positive teaches nothing, but 20 of them in a row
        end `is_trusted`: nobody knows how wrong it is by now. So does a median error above 30 %;
        it returns when that is below 20 %.
        """
        if not (isfinite(predicted_ms) and predicted_ms > 0):
            raise ValueError(f"a prediction must be finite and positive, not {predicted_ms}")
        if not (isfinite(measured_ms) and measured_ms > 0):
            self._unmeasured += 1
            self.is_trusted = self.is_trusted and self._unmeasured < FEWEST_ERRORS
            return
        self._unmeasured = 0
        ratios = self._ratios[lane, program]
        self._errors.add(min(abs(ratios.median * (predicted_ms / measured_ms) - 1), MOST_ERROR))
        self._overruns.add(min(measured_ms / (ratios.median * predicted_ms), MOST_SLACK))
        ratios.add(min(max(measured_ms / predicted_ms, LEAST_FACTOR), MOST_FACTOR))
        if len(self._errors) >= FEWEST_ERRORS:
            error = self._errors.median
            self.is_trusted = error <= DISTRUST_ABOVE if self.is_trusted else error < TRUST_BELOW

    def to_json(self) -> dict[str, object]:
        """The document that `from_json` reads: everything that has been learned."""
        return {
            "kind": self.KIND,
            "version": self.VERSION,
            "model": self.model,
            "hardware": self.hardware,
            "is_trusted": self.is_trusted,
            "ratios": {_name(key): list(window) for key, window in self._ratios.items()},
            "errors": list(self._errors),
            "overruns": list(self._overruns),
        }

    @classmethod
    def from_json(cls, value: object, file: str, *, model: str, hardware: str) -> Self:
        """Reads parsed JSON, which must be about this model and hardware.

        `ConfigError` names `file` and the key at fault.
        """
        document = Document.open(value, file, cls.KIND, cls.VERSION)
        head = ("kind", "version", "model", "hardware", "is_trusted")
        document.only(*head, "ratios", "errors", "overruns")
        for key, ours in (("model", model), ("hardware", hardware)):
            if (theirs := document.text(key)) != ours:
                raise document.wrong(key, f"is {theirs!r}, but this is {ours!r}; remove the file")
        calibration = cls(model, hardware)
        if type(trusted := document.get("is_trusted")) is not bool:
            raise document.wrong("is_trusted", f"must be true or false, not {short(trusted)}")
        calibration.is_trusted = trusted
        calibration._errors = _Window(ERROR_WINDOW, document.numbers("errors"))
        calibration._overruns = _Window(ERROR_WINDOW, document.numbers("overruns"))
        ratios = document.part("ratios").only(*map(_name, calibration._ratios))
        for measured in calibration._ratios:
            kept = ratios.numbers(name := _name(measured), LEAST_FACTOR)
            if not kept or max(kept) > MOST_FACTOR:
                raise ratios.wrong(name, f"must hold numbers up to {MOST_FACTOR:g}")
            calibration._ratios[measured] = _Window(FACTOR_WINDOW, kept)
        return calibration


class _Window:
    """The last `size` values, oldest first, and their median without sorting them anew.

    median: between the two in the middle, where there are two; NaN of nothing.
    """

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self._values = deque(values, maxlen=size)
        self._sorted = sorted(self._values)
        self._find_median()

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[float]:
        return iter(self._values)

    def add(self, value: float) -> None:
        """The oldest value makes room."""
        if len(self._values) == self._values.maxlen:
            del self._sorted[bisect_left(self._sorted, self._values[0])]
        self._values.append(value)
        insort(self._sorted, value)
        self._find_median()

    def quantile(self, share: float) -> float:
        """The least value that so large a share of them does not exceed."""
        return self._sorted[math.ceil(share * len(self._sorted)) - 1]

    def _find_median(self) -> None:
        ordered, middle = self._sorted, len(self._sorted) // 2
        self.median = (ordered[middle] + ordered[~middle]) / 2 if ordered else math.nan


def _name(key: Key) -> str:
    lane, program = key
    return f"{lane} {program}"

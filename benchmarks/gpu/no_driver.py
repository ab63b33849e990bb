"""A processor in the driver's place, for the items whose lanes are threads."""

import os
import platform
from typing import Any

from gpu.driver import Driver, DriverError, Facts


class NoDriver(Driver):
    """There is none: it knows what the machine is, and refuses everything else."""

    is_real = False

    def __init__(self) -> None:
        """Loads nothing."""

    def call(self, symbol: str, *arguments: Any) -> None:
        """Refuses."""
        raise DriverError(f"{symbol}: a processor has no driver")

    def facts(self) -> Facts:
        """The processor's cores in place of SMs."""
        name = platform.processor() or platform.machine()
        return Facts(name, "none", os.cpu_count() or 1, "none", False, 0.0)

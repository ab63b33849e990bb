"""`duetjax profile` on an executor that does at once what it is asked, until something goes wrong.

As a program: the device hangs, so does whoever closes it, and so does what ends the process.
"""

import atexit
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from profiled_setup import LIMITS, MODEL

from duetjax import profile_command
from duetjax.cli import main
from duetjax.policy.launch import FinishedStep, RowFlag, StepResult
from duetjax.runtime import case_timer
from duetjax.runtime.rungs import Rung

FAILURE = RuntimeError("the bus has left")


class Scripted:
    """What happens at a launch: "hang", "fail" or "stop"; None: nothing ever."""

    def __init__(self, what=None, at=0):
        self._what, self._at = what, at
        self._num_launches = 0
        self._ended = threading.Event()
        self.was_closed = False

    def run(self, launch):
        return StepResult([], [], [])

    def start(self, deliver):
        self._deliver = deliver

    def submit(self, launch):
        self._num_launches += 1
        is_wrong = self._what is not None and self._num_launches >= self._at
        if is_wrong and self._what == "stop":
            raise KeyboardInterrupt
        if is_wrong and self._what == "fail":
            self._deliver(FAILURE)
        elif not is_wrong:
            rows = len(launch.slots)
            result = StepResult([0] * rows, [RowFlag.SAMPLED] * rows, [0.0] * rows)
            for step in range(launch.k):
                self._deliver(FinishedStep(launch.ticket, step, result))

    def close(self):
        if self._what == "hang":
            self._ended.wait()
        self.was_closed = True


def profile(executor, folder, *flags, is_out_named=True):
    """The exit status of the command line."""
    ready = SimpleNamespace(
        device=SimpleNamespace(splits=None, is_host=True, rung=Rung.JAX),
        limits=LIMITS,
        shapes=MODEL,
        profiles=None,
        executor=executor,
        calibrations=folder / "calibrations",
    )
    profile_command.prepare = lambda *_, **__: ready
    out = ("--out", str(folder / "out")) if is_out_named else ()
    return main(["profile", "--hardware-profile", "cpu-2-cores", *out, *flags])


if __name__ == "__main__":
    case_timer.PATIENCE_S = 0.2
    atexit.register(threading.Event().wait)  # stands for jax, which waits for its devices
    sys.exit(profile(Scripted("hang", int(sys.argv[2])), Path(sys.argv[1]), "--points", "120"))

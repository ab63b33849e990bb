"""Makes an executor of a device that runs launches one after another and is asked for results."""

import queue
import threading
from typing import Protocol

from duetjax.policy.launch import Deliver, FinishedStep, Launch, StepResult, Ticket


class Device(Protocol):
    """Runs launches in the order of submission, whatever their lanes."""

    def submit(self, launch: Launch) -> Ticket:
        """Starts a launch without waiting for it; its deltas apply before its first step."""

    def result(self, ticket: Ticket, step: int = 0) -> StepResult:
        """Waits for a step of a launch, step < k; each is asked for once, in order.

        Raises what the device raised.
        """


class InOrder:
    """Implements `policy.launch.Executor`: a thread of its own waits for the device's results."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._submitted: queue.SimpleQueue[Launch | None] = queue.SimpleQueue()

    def run(self, launch: Launch) -> StepResult:
        """Runs a launch of one step and waits for it; only before `start`."""
        return self._device.result(self._device.submit(launch))

    def start(self, deliver: Deliver) -> None:
        """See `Executor`."""
        self._thread = threading.Thread(
            target=self._wait_for_results, args=(deliver,), name="duetjax-results", daemon=True
        )
        self._thread.start()

    def submit(self, launch: Launch) -> None:
        """See `Executor`."""
        self._device.submit(launch)
        self._submitted.put(launch)

    def close(self) -> None:
        """See `Executor`."""
        self._submitted.put(None)
        self._thread.join()
        del self._device

    def _wait_for_results(self, deliver: Deliver) -> None:
        try:
            while (launch := self._submitted.get()) is not None:
                for step in range(launch.k):
                    result = self._device.result(launch.ticket, step)
                    deliver(FinishedStep(launch.ticket, step, result))
        except BaseException as failure:  # the engine decides what it means
            deliver(failure)

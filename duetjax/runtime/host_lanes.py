"""Runs the lanes side by side on the processor: threads for each, and KV pages that both reach.

Each lane is a chain of executions of its own. They share the weights, the slots' tables as they
were when a launch was submitted, and the pages, which lie in the launcher's memory. What a finished
prompt leaves of its slot is handed over: the decode lane alone goes on with it.
"""

import queue
import threading
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from duetjax.policy.launch import Deliver, FinishedStep, Lane, Launch, StepResult
from duetjax.runtime.executor import Chain, Executables, Intake, Prepared, step_result
from duetjax.runtime.programs import Leaves, Programs, ResultBlock

if TYPE_CHECKING:
    from duetjax._launcher import KVPool

type _Counts = tuple[int, np.ndarray]
"""A slot, and how often its new owner has put out each token id."""


class HostLanes:
    """Implements `policy.launch.Executor`, the whole device being the decode lane's.

    `submit` waits for nothing. A lane's failure is the last that it delivers; the other lane may go
    on until the executor is closed.
    """

    def __init__(
        self,
        programs: Programs,
        executables: Executables,
        weights: Leaves,
        pool: "KVPool",
    ) -> None:
        self._intake = Intake(programs)
        self._pool = pool  # outlives whatever runs on its pages
        handed = _Handed()
        self._decode = _LaneThreads("decode", Chain(executables, weights, pool), handed)
        self._prefill = _LaneThreads("prefill", Chain(executables, weights, pool), handed)

    def run(self, launch: Launch) -> StepResult:
        """Runs one step at once, on the calling thread; only before `start`."""
        return self._decode.run(self._intake.prepare(launch))

    def start(self, deliver: Deliver) -> None:
        """See `Executor`."""
        self._decode.start(deliver)
        self._prefill.start(deliver)

    def submit(self, launch: Launch) -> None:
        """See `Executor`."""
        prepared = self._intake.prepare(launch)
        own, other = self._decode, self._prefill
        if launch.lane is Lane.PREFILL:
            own, other = other, own
        for counts in prepared.counts:  # whichever lane ends the prompt samples by them
            other.put(counts)
        own.put(prepared)

    def close(self) -> None:
        """See `Executor`."""
        self._prefill.close()
        self._decode.close()
        del self._pool


class _Handed:
    """What prompts that ended on the prefill lane left of their slots.

    A slot's row is put here before the step is delivered that ends its prompt, and taken by a
    launch that was planned after that; until then the slot has no other owner. So nobody waits.
    """

    def __init__(self) -> None:
        self._rows: dict[int, np.ndarray] = {}

    def put(self, launch: Launch, progress: jax.Array) -> None:
        """The rows of the prompts that a prefill launch has ended."""
        after = np.asarray(progress)
        for slot, ends in zip(launch.slots, launch.samples, strict=True):
            if ends:
                self._rows[slot] = after[slot].copy()

    def take(self, launch: Launch) -> dict[int, np.ndarray]:
        """The rows that a launch is the first to go on with."""
        return {slot: self._rows.pop(slot) for slot, _ in launch.handovers}


class _Begun(NamedTuple):
    """A step on its way. progress: of all slots after it, where it may be handed over."""

    launch: Launch
    step: int
    block: ResultBlock
    progress: jax.Array | None


class _LaneThreads:
    """A lane: one thread begins steps, in the order of their launches, another waits for them."""

    def __init__(self, name: str, chain: Chain, handed: _Handed) -> None:
        self._chain = chain
        self._handed = handed
        self._coming: queue.SimpleQueue[Prepared | _Counts | None] = queue.SimpleQueue()
        self._begun: queue.SimpleQueue[_Begun | BaseException | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=each, name=f"duetjax-{name}-{what}", daemon=True)
            for what, each in (("begin", self._begin_all), ("wait", self._wait_for_all))
        ]

    def run(self, prepared: Prepared) -> StepResult:
        """One step, before `start`."""
        [block] = self._chain.dispatch(prepared)
        return step_result(prepared.launch, block)

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        for thread in self._threads:
            thread.start()

    def put(self, item: Prepared | _Counts) -> None:
        self._coming.put(item)

    def close(self) -> None:
        """Waits for what has been put."""
        self._coming.put(None)
        for thread in filter(threading.Thread.is_alive, self._threads):
            thread.join()
        del self._chain

    def _begin_all(self) -> None:
        try:
            while (item := self._coming.get()) is not None:
                if isinstance(item, Prepared):
                    self._begin(item)
                else:
                    self._chain.set_counts(*item)
            self._begun.put(None)
        except BaseException as failure:  # it is delivered behind the steps begun before
            self._begun.put(failure)

    def _begin(self, prepared: Prepared) -> None:
        launch, chain = prepared.launch, self._chain
        for slot, counts in prepared.counts:
            chain.set_counts(slot, counts)
        if launch.handovers:
            chain.set_progress(self._handed.take(launch))
        for step, block in enumerate(chain.dispatch(prepared)):
            progress = chain.progress if launch.lane is Lane.PREFILL else None
            self._begun.put(_Begun(launch, step, block, progress))

    def _wait_for_all(self) -> None:
        try:
            while (begun := self._begun.get()) is not None:
                if isinstance(begun, BaseException):
                    raise begun
                self._wait_for(begun)
        except BaseException as failure:  # the engine decides what it means
            self._deliver(failure)

    def _wait_for(self, begun: _Begun) -> None:
        launch, step, block, progress = begun
        result = step_result(launch, block)
        if progress is not None:
            self._handed.put(launch, progress)
        self._deliver(FinishedStep(launch.ticket, step, result))

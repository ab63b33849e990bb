"""Runs launches as JAX calls; `JaxDevice` one after another, `host_lanes` two at a time."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from duetjax.policy.launch import Launch, Program, StepResult, Ticket
from duetjax.runtime.programs import (
    DeviceState,
    Key,
    Leaves,
    Programs,
    ResultBlock,
    RowKind,
    Upkeep,
)
from duetjax.runtime.slot_state import HostTables, SlotTables

if TYPE_CHECKING:
    from duetjax._launcher import KVPool

type Executables = Mapping[Key | Upkeep, Callable[..., Any]]


class Prepared(NamedTuple):
    """A launch as its program takes it. counts: (slot, token counts [V]) of slots new to it."""

    launch: Launch
    tables: SlotTables
    inputs: tuple[np.ndarray, ...]
    counts: tuple[tuple[int, np.ndarray], ...]


class Inputs:
    """What a launch brings its program beside the tables: arrays of the program's shapes."""

    def __init__(self, programs: Programs) -> None:
        self._dummy_slot = programs.slots.num_slots
        self._buckets = programs.buckets

    def of(self, launch: Launch) -> tuple[np.ndarray, ...]:
        """The arrays, in the program's order."""
        decode = launch.program is Program.DECODE
        return self._decode(launch) if decode else self._prefill(launch)

    def padding(self, key: Key) -> tuple[np.ndarray, ...]:
        """Those of no rows at all: the program runs and changes nothing."""
        program, bucket = key
        return self.of(Launch(0, program, bucket, ()))

    def _decode(self, launch: Launch) -> tuple[np.ndarray, ...]:
        return (_padded(launch.slots, launch.bucket, self._dummy_slot),)

    def _prefill(self, launch: Launch) -> tuple[np.ndarray, ...]:
        rows = self._buckets.rows_of(launch.bucket)
        tokens = np.zeros(launch.bucket, np.int32)
        offsets, fed = [0], 0
        chunks = np.frombuffer(launch.packed, np.int32)
        for count in launch.counts:
            tokens[offsets[-1] : offsets[-1] + count] = chunks[fed : fed + count]
            fed += count
            offsets.append(offsets[-1] + max(count, 1))
        kinds = [
            RowKind.DECODING if count == 0 else RowKind.LAST_CHUNK if samples else RowKind.CHUNK
            for count, samples in zip(launch.counts, launch.samples, strict=True)
        ]
        return (
            tokens,
            _padded(offsets, rows + 1, offsets[-1]),
            _padded(launch.starts, rows, 0),
            _padded(launch.slots, rows, self._dummy_slot),
            _padded(kinds, rows, RowKind.CHUNK),
        )


class Intake:
    """Turns launches into what programs take, in their order of submission."""

    def __init__(self, programs: Programs) -> None:
        self._tables = HostTables(programs.slots)
        self._inputs = Inputs(programs)

    def prepare(self, launch: Launch) -> Prepared:
        """Applies the launch's deltas. The tables are never written again."""
        self._tables.apply(launch)
        counts = [(new.slot, self._tables.counts(new)) for new in launch.admitted if new.history]
        inputs = self._inputs.of(launch)
        return Prepared(launch, self._tables.tables(), inputs, tuple(counts))


class Chain:
    """Executions that feed each other: what one leaves of slots and pages is the next one's input.

    pool: where the pages are, if they are outside XLA.
    """

    def __init__(
        self,
        executables: Executables,
        weights: Leaves,
        pool: "KVPool | None" = None,
    ) -> None:
        self._executables = executables
        self._weights = weights
        state: DeviceState = executables[Upkeep.ALLOCATE]()
        if pool is not None:
            handles = [np.array([pool.number, i], np.int32) for i in range(len(state.kv))]
            state = state._replace(kv=[jax.device_put(handle) for handle in handles])
        self._state = state

    def dispatch(self, prepared: Prepared) -> Iterator[ResultBlock]:
        """Begins the k steps of a launch, one whenever asked, without waiting for the device."""
        launch, tables, inputs, _ = prepared
        executable = self._executables[launch.program, launch.bucket]
        for _ in range(launch.k):
            self._state, block = executable(self._weights, *self._state, tables, *inputs)
            yield block

    def set_counts(self, slot: int, counts: np.ndarray) -> None:
        """How often each id occurs in the output of the slot's owner so far, int16 [V]."""
        executable = self._executables[Upkeep.SET_COUNTS]
        changed = executable(self._state.counts, np.int32(slot), counts)
        self._state = self._state._replace(counts=changed)

    @property
    def progress(self) -> jax.Array:
        """Every slot's row after the steps begun so far, [num_slots + 1, 4] int32."""
        return self._state.progress

    def set_progress(self, rows: Mapping[int, np.ndarray]) -> None:
        """Rows of slots that others have brought so far; waits for the steps begun so far."""
        progress = np.array(self._state.progress)
        for slot, row in rows.items():
            progress[slot] = row
        self._state = self._state._replace(progress=jax.device_put(progress))


class JaxDevice:
    """Implements `in_order.Device`: lanes are served one after another.

    Nothing here waits for the device but `result`: slot state stays there, and a launch's k steps
    are k calls that feed each other. With one order for everything, hand-overs need nothing.
    """

    def __init__(self, programs: Programs, executables: Executables, weights: Leaves) -> None:
        self._intake = Intake(programs)
        self._chain = Chain(executables, weights)
        self._in_flight: dict[Ticket, tuple[Launch, list[ResultBlock]]] = {}

    def submit(self, launch: Launch) -> Ticket:
        """Dispatches a launch; returns before the device has finished."""
        prepared = self._intake.prepare(launch)
        for slot, counts in prepared.counts:
            self._chain.set_counts(slot, counts)
        self._in_flight[launch.ticket] = launch, list(self._chain.dispatch(prepared))
        return launch.ticket

    def result(self, ticket: Ticket, step: int = 0) -> StepResult:
        """Waits for a step; see `in_order.Device`. May be called from another thread."""
        launch, blocks = self._in_flight[ticket]
        if step == launch.k - 1:
            del self._in_flight[ticket]
        return step_result(launch, blocks[step])


def step_result(launch: Launch, block: ResultBlock) -> StepResult:
    """Waits for a step."""
    top = np.asarray(block.top) if launch.wants_top else None
    return read_step(launch, np.asarray(block.rows), top)


def read_step(launch: Launch, rows: np.ndarray, top: np.ndarray | None) -> StepResult:
    """A step from its `ResultBlock` on the host; top where the launch wants it."""
    num_rows = len(launch.slots)
    rows = rows[:num_rows]
    return StepResult(
        tokens=rows[:, 0],
        flags=rows[:, 1],
        logprobs=_floats(rows[:, 2]),
        top=() if top is None else tuple(_pairs(row) for row in top[:num_rows]),
    )


def _padded(values: tuple[int, ...] | list[Any], size: int, filler: int) -> np.ndarray:
    out = np.full(size, filler, np.int32)
    out[: len(values)] = values
    return out


def _floats(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float32)


def _pairs(top: np.ndarray) -> tuple[tuple[int, float], ...]:
    """Ids and logprobs of one row's most likely tokens, [N, 2] int32."""
    return tuple(zip(top[:, 0].tolist(), _floats(top[:, 1]).tolist(), strict=True))

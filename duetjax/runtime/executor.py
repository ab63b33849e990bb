"""Runs launches as plain JAX calls on one device, in the order of submission."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from duetjax.policy.launch import Launch, Program, SlotParams, StepResult, Ticket
from duetjax.runtime.programs import (
    DeviceState,
    Key,
    Leaves,
    Programs,
    ResultBlock,
    RowKind,
    Upkeep,
)
from duetjax.runtime.slot_state import HostTables

type Executables = Mapping[Key | Upkeep, Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class _InFlight:
    launch: Launch
    blocks: list[ResultBlock]


class JaxDevice:
    """Implements `in_order.Device`: lanes are served one after another.

    Nothing here waits for the device but `result`: slot state stays there, and a launch's k steps
    are k calls that feed each other. With one order for everything, hand-overs need nothing.
    """

    def __init__(self, programs: Programs, executables: Executables, weights: Leaves) -> None:
        self._executables = executables
        self._weights = weights
        self._state: DeviceState = executables[Upkeep.ALLOCATE]()
        self._tables = HostTables(programs.slots)
        self._dummy_slot = programs.slots.num_slots
        self._buckets = programs.buckets
        self._in_flight: dict[Ticket, _InFlight] = {}

    def submit(self, launch: Launch) -> Ticket:
        """Dispatches a launch; returns before the device has finished."""
        self._tables.apply(launch)
        for new in launch.admitted:
            if new.history:
                self._set_counts(new)
        executable = self._executables[launch.program, launch.bucket]
        decode = launch.program is Program.DECODE
        inputs = self._decode_inputs(launch) if decode else self._prefill_inputs(launch)
        tables = self._tables.tables()
        blocks = []
        for _ in range(launch.k):
            self._state, block = executable(self._weights, *self._state, tables, *inputs)
            blocks.append(block)
        self._in_flight[launch.ticket] = _InFlight(launch, blocks)
        return launch.ticket

    def result(self, ticket: Ticket, step: int = 0) -> StepResult:
        """Waits for a step; see `in_order.Device`. May be called from another thread."""
        launch, blocks = self._in_flight[ticket].launch, self._in_flight[ticket].blocks
        if step == launch.k - 1:
            del self._in_flight[ticket]
        num_rows = len(launch.slots)
        rows = np.asarray(blocks[step].rows)[:num_rows]
        top = np.asarray(blocks[step].top)[:num_rows] if launch.wants_top else None
        return StepResult(
            tokens=rows[:, 0],
            flags=rows[:, 1],
            logprobs=_floats(rows[:, 2]),
            top=() if top is None else tuple(_pairs(row) for row in top),
        )

    def _set_counts(self, new: SlotParams) -> None:
        counts = self._executables[Upkeep.SET_COUNTS](
            self._state.counts, np.int32(new.slot), self._tables.counts(new)
        )
        self._state = self._state._replace(counts=counts)

    def _decode_inputs(self, launch: Launch) -> tuple[np.ndarray, ...]:
        return (_padded(launch.slots, launch.bucket, self._dummy_slot),)

    def _prefill_inputs(self, launch: Launch) -> tuple[np.ndarray, ...]:
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


def _padded(values: tuple[int, ...] | list[Any], size: int, filler: int) -> np.ndarray:
    out = np.full(size, filler, np.int32)
    out[: len(values)] = values
    return out


def _floats(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float32)


def _pairs(top: np.ndarray) -> tuple[tuple[int, float], ...]:
    """Ids and logprobs of one row's most likely tokens, [N, 2] int32."""
    return tuple(zip(top[:, 0].tolist(), _floats(top[:, 1]).tolist(), strict=True))

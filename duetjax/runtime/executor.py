"""Runs launches as plain JAX calls on the default device, in the order of submission."""

from dataclasses import dataclass

import jax
import numpy as np

from duetjax.policy.launch import Launch, Program, Ticket
from duetjax.runtime.programs import Leaves, Programs


class SlotState:
    """What a slot's next launch needs; one writer, the executor.

    token, position: the last sampled token, whose KV is not written yet, and where it stands.
    """

    def __init__(self, num_slots: int, table_width: int) -> None:
        self.token = np.zeros(num_slots, np.int32)
        self.position = np.zeros(num_slots, np.int32)
        self.temperature = np.zeros(num_slots, np.float32)
        self.seed = np.zeros((num_slots, 2), np.uint32)
        self.page_table = np.zeros((num_slots, table_width), np.int32)

    def apply(self, launch: Launch) -> None:
        """Takes over the launch's deltas."""
        for new in launch.admitted:
            self.temperature[new.slot] = new.temperature
            self.seed[new.slot] = (new.seed >> 32) & 0xFFFFFFFF, new.seed & 0xFFFFFFFF
            self.page_table[new.slot] = 0
        for slot, index, page in launch.pages:
            self.page_table[slot, index] = page


@dataclass(frozen=True, slots=True)
class _InFlight:
    launch: Launch
    sampled: jax.Array


class JaxExecutor:
    """Implements `policy.launch.Executor` on one JAX device.

    A slot has at most one launch in flight: its token returns to the host between two steps.
    """

    def __init__(self, programs: Programs, weights: Leaves, num_slots: int) -> None:
        self._programs = programs
        self._weights = weights
        self._kv = programs.layout.allocate()
        self._slots = SlotState(num_slots, programs.buckets.table_width)
        self._in_flight: dict[Ticket, _InFlight] = {}
        self._next_ticket = 0

    def submit(self, launch: Launch) -> Ticket:
        """Dispatches a launch; returns before the device has finished."""
        self._slots.apply(launch)
        decode = launch.program is Program.DECODE
        inputs = self._decode_inputs(launch) if decode else self._prefill_inputs(launch)
        key = (launch.program, launch.bucket)
        self._kv, sampled = self._programs(key, self._weights, self._kv, *inputs)
        ticket = self._next_ticket
        self._next_ticket += 1
        self._in_flight[ticket] = _InFlight(launch, sampled)
        return ticket

    def result(self, ticket: Ticket) -> tuple[int, ...]:
        """Waits for the launch and moves its slots on; see `policy.launch.Executor`."""
        done = self._in_flight.pop(ticket)
        launch, rows = done.launch, len(done.launch.slots)
        sampled = np.asarray(done.sampled)[:rows]
        slots = np.array(launch.slots)
        if launch.program is Program.DECODE:
            self._slots.token[slots] = sampled
            self._slots.position[slots] += 1
        else:
            ended = np.array(launch.samples)
            self._slots.token[slots[ended]] = sampled[ended]
            ends = np.array(launch.starts) + np.array(launch.counts)
            self._slots.position[slots[ended]] = ends[ended]
        return tuple(sampled.tolist())

    def _decode_inputs(self, launch: Launch) -> tuple[np.ndarray, ...]:
        state, slots = self._slots, np.array(launch.slots)
        tokens = _padded(state.token[slots], launch.bucket)
        positions = _padded(state.position[slots], launch.bucket)
        return (tokens, positions, *self._row_inputs(slots, launch.bucket))

    def _prefill_inputs(self, launch: Launch) -> tuple[np.ndarray, ...]:
        rows = self._programs.buckets.prefill_rows
        tokens = _padded(np.array(launch.tokens, np.int32), launch.bucket)
        offsets = np.full(rows + 1, len(launch.tokens), np.int32)
        offsets[: len(launch.counts) + 1] = np.cumsum((0, *launch.counts))
        starts = _padded(np.array(launch.starts, np.int32), rows)
        return (tokens, offsets, starts, *self._row_inputs(np.array(launch.slots), rows))

    def _row_inputs(self, slots: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
        state = self._slots
        columns = (state.page_table, state.temperature, state.seed)
        return tuple(_padded(column[slots], rows) for column in columns)


def _padded(values: np.ndarray, rows: int) -> np.ndarray:
    """Zero rows appended: token 0 at position 0 of the dummy page, greedy."""
    out = np.zeros((rows, *values.shape[1:]), values.dtype)
    out[: len(values)] = values
    return out

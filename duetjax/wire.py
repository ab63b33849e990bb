"""What the server's process and the engine's tell each other: plain values, framed by their length.

Both ends are the same program on one socket pair, so values travel as Python's own `marshal` has
them: numbers, strings, bytes and tuples, which is also all that it can hold. Nothing else is sent,
and nothing that comes is ever run.
"""

import marshal
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

from duetjax.config import SamplingParams
from duetjax.policy.completed_launch import CompletedLaunch
from duetjax.policy.launch import Lane, Program, Split
from duetjax.policy.launch_counts import KindCounts, LaunchCounts
from duetjax.policy.request import (
    Constraint,
    FinishReason,
    NewRequest,
    Reasoning,
    StepOutputs,
    TokenLogprob,
)

type Plain = bool | int | float | str | bytes | tuple[Plain, ...] | None

_LENGTH_BYTES = 8
_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})


class Channel:
    """One end of a socket pair. `send` is for any thread and never waits; `receive` for one."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.Lock()
        self._backlog = deque[memoryview]()  # what the other end has had no room for
        self._has_backlog = threading.Event()
        self._writer: threading.Thread | None = None

    def send(self, *message: Plain) -> None:
        """Sends a message, or keeps it until there is room; of no effect if the other end left."""
        data = marshal.dumps(message)
        frame = memoryview(len(data).to_bytes(_LENGTH_BYTES) + data)
        with self._lock:
            if not self._backlog:
                frame = frame[self._write(frame) :]
            if frame:
                self._backlog.append(frame)
                self._has_backlog.set()
                if self._writer is None:
                    self._writer = threading.Thread(target=self._write_backlog, daemon=True)
                    self._writer.start()

    def receive(self) -> Iterator[tuple[Any, ...]]:
        """Messages as they come, until the other end has left."""
        while True:
            head = self._read(_LENGTH_BYTES)
            data = None if head is None else self._read(int.from_bytes(head))
            if data is None:
                return
            yield marshal.loads(data)

    def close(self) -> None:
        """Ends both directions; whoever receives, here or there, ends."""
        with suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytes | None:
        """So many bytes; None where the other end, or this one, has left before them."""
        data = b""
        while len(data) < size:
            try:
                more = self._socket.recv(size - len(data), socket.MSG_WAITALL)
            except OSError:
                return None
            if not more:
                return None
            data = data + more if data else more
        return data

    def _write(self, frame: memoryview) -> int:
        """Bytes written at once; all of them where nobody reads any more."""
        try:
            return self._socket.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return len(frame)

    def _write_backlog(self) -> None:
        while self._has_backlog.wait():
            frame = self._backlog[0]
            try:
                self._socket.sendall(frame)
            except OSError:
                return
            with self._lock:
                self._backlog.popleft()
                if not self._backlog:
                    self._has_backlog.clear()


def plain(value: object) -> Any:  # noqa: ANN401
    """A dataclass as the tuple of its fields, an enum's member as its value, all the way down.

    Numbers of other kinds than Python's own, as numpy has them, become those.
    """
    if type(value) in _PLAIN:
        return value
    if is_dataclass(value):
        return tuple([plain(getattr(value, field.name)) for field in fields(value)])
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return tuple([plain(item) for item in value])
    if isinstance(value, float):
        return float(value)
    return value


def new_request(values: tuple[Any, ...]) -> NewRequest:
    """The inverse of `plain`."""
    request_id, prompt, max_tokens, sampling, *others, constraint = values
    if constraint is not None:
        grammar, reasoning = constraint
        reasoning = None if reasoning is None else Reasoning(*reasoning)
        constraint = Constraint(grammar, reasoning)
    new = NewRequest(request_id, prompt, max_tokens, SamplingParams(*sampling), *others)
    return replace(new, constraint=constraint)


def plain_outputs(outputs: StepOutputs) -> Plain:
    """`plain` for what is sent every step."""
    finished = tuple([(request_id, why.value) for request_id, why in outputs.finished])
    logprobs = tuple([(row, score.logprob, score.top) for row, score in outputs.logprobs])
    others = outputs.cached, outputs.queued, outputs.launches
    return outputs.ids, outputs.tokens, finished, logprobs, *others


def step_outputs(values: tuple[Any, ...]) -> StepOutputs:
    """The inverse of `plain_outputs`."""
    ids, tokens, finished, logprobs, *others = values
    return StepOutputs(
        ids,
        tokens,
        tuple([(request_id, FinishReason(why)) for request_id, why in finished]),
        tuple([(row, TokenLogprob(logprob, top)) for row, logprob, top in logprobs]),
        *others,
    )


def plain_counts(counts: LaunchCounts) -> Plain:
    """`plain` for what is sent while nobody waits, but the engine's thread wants to run."""
    kinds = [(k.lane, k.program, k.steps, k.predicted, k.measured, k.errors) for k in counts.kinds]
    return counts.launches, tuple(kinds), counts.tokens, counts.begun, counts.ended


def launch_counts(values: tuple[Any, ...]) -> LaunchCounts:
    """The inverse of `plain_counts`."""
    launches, kinds, *others = values
    return LaunchCounts(launches, tuple([KindCounts(*kind) for kind in kinds]), *others)


def completed_launch(values: tuple[Any, ...]) -> CompletedLaunch:
    """The inverse of `plain`."""
    ticket, lane, split, program, *others = values
    split = None if split is None else Split(*split)
    return CompletedLaunch(ticket, Lane(lane), split, Program(program), *others)

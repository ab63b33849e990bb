"""The launcher's kernels with a gate in front of attention, at which a test can hold executables.

A gate is a call of XLA's like any other: whoever is at one is inside an executable.
"""

import ctypes
import threading
from collections.abc import Callable
from contextlib import contextmanager

import jax

from duetjax.runtime import host_kernels, placeholders

_NAME = "duetjax_test_gate"


class Gate:
    """pass_: called by every executable in each of its layers, on whatever thread that runs."""

    def __init__(self) -> None:
        self.pass_: Callable[[], None] = _go_on

    @contextmanager
    def kept_by(self, keeper):
        self.pass_ = keeper
        try:
            yield keeper
        finally:
            self.pass_ = _go_on


def _go_on() -> None:
    pass


GATE = Gate()


class Meeting:
    """Lets executables pass in pairs. outcomes: whether each has met another in time."""

    def __init__(self, seconds: float) -> None:
        self.outcomes: list[bool] = []
        self._barrier = threading.Barrier(2, timeout=seconds)

    def __call__(self) -> None:
        try:
            self._barrier.wait()
            self.outcomes.append(True)
        except threading.BrokenBarrierError:
            self.outcomes.append(False)


class Hold:
    """Keeps the first who comes until it may go on; lets all others pass."""

    def __init__(self) -> None:
        self.is_there, self.may_go_on = threading.Event(), threading.Event()
        self._first = threading.Semaphore(1)

    def __call__(self) -> None:
        if self._first.acquire(blocking=False):
            self.is_there.set()
            self.may_go_on.wait()


def _called(address):
    extension = placeholders._CallFrame.from_address(address).extension
    if extension and extension.contents.type == placeholders._METADATA_EXTENSION:
        return placeholders._answer(address)
    GATE.pass_()
    return None


_handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(_called)


def register():
    capsule = jax.ffi.pycapsule(ctypes.cast(_handler, ctypes.c_void_p))
    jax.ffi.register_ffi_target(_NAME, capsule, platform="cpu")
    host_kernels.register()


write_kv = host_kernels.write_kv


def decode_attention(q, pages, page_table, lengths, /):
    return host_kernels.decode_attention(q, _gated(pages), page_table, lengths)


def prefill_attention(q, pages, page_table, row_offsets, cached_lengths, /):
    return host_kernels.prefill_attention(q, _gated(pages), page_table, row_offsets, cached_lengths)


def _gated(pages):
    like = jax.ShapeDtypeStruct(pages.shape, pages.dtype)
    return jax.ffi.ffi_call(_NAME, like, input_output_aliases={0: 0})(pages)

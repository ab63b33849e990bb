"""Counts XLA's compilations in this process: the proof that serving compiles nothing.

Counted are programs and the small ones behind single operations (`jnp.zeros`), also those that
JAX's own compilation cache answers. Loading a program from the store is not counted.
"""

import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class _Counter:
    """Written by whichever thread compiles, hence the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._installed = False
        self.count = 0

    def install(self) -> None:
        with self._lock:
            if not self._installed:
                jax.monitoring.register_event_duration_secs_listener(self._listen)
                self._installed = True

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _EVENT:
            with self._lock:
                self.count += 1


# The one exception to "no mutable module state": JAX's listeners are the process's, and live as
# long as it does; a second counter would count the same events again.
_counter = _Counter()


def install() -> None:
    """Starts counting; calls after the first change nothing."""
    _counter.install()


def count() -> int:
    """Compilations since `install`, by any thread of the process."""
    return _counter.count

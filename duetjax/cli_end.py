"""How a command ends: with its engine, with a device that hangs, without a reader of its output."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from duetjax.config import DuetJAXError

if TYPE_CHECKING:
    from duetjax.engine import Engine


@contextmanager
def shutting_down(engine: "Engine") -> Iterator[None]:
    """Ends an engine when it is left; raises `EngineDead` if it has failed."""
    from duetjax.engine import EngineDead

    try:
        yield
    finally:
        if not engine.shutdown(timeout=30):
            atexit.register(exit_at_once, 1)
    failure = engine.failure
    if failure is not None:
        cause = failure if isinstance(failure, DuetJAXError) else repr(failure)
        raise EngineDead(f"the engine failed: {cause}")


def exit_at_once(code: int) -> None:
    """Ends the process where its own end would wait for a device that hangs.

    Registered last, so run before whatever else asks for the exit: jax waits for its devices.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def discard_output() -> None:
    """From now on; what has not left yet included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

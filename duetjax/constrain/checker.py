"""Compiles grammars of requests in a process that can be killed, before an engine hears of them."""

import json
import logging
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from itertools import chain
from queue import Empty, SimpleQueue
from typing import Final

from duetjax.config import DuetJAXError
from duetjax.constrain.verdicts import Verdicts

_log = logging.getLogger(__name__)

_SECONDS: Final = 0.4  # twice and a new child between: an answer within a second
_PLACES: Final = 8  # different grammars that may be here at a time
_START_SECONDS: Final = 10.0
_MEMORY_BYTES: Final = 1 << 30
_REMEMBERED: Final = 256
_PROGRAM: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from duetjax.constrain.checker import answer_all
answer_all()
"""


class CheckerBusy(DuetJAXError):
    """Too many other grammars are being compiled; the same one may be sent again."""


class GrammarChecker:
    """Says whether a grammar can be used; `look` may be called from several threads.

    One child process compiles, one grammar at a time, and few others may wait for it; whoever
    brings an equal one shares the look. A grammar that takes longer than half a second, or ends the
    child, twice, is refused; another child takes over.
    """

    def __init__(self, seconds: float = _SECONDS, places: int = _PLACES) -> None:
        self._seconds = seconds
        self._places = places
        self._verdicts = Verdicts(_REMEMBERED)
        self._asked: SimpleQueue[str | None] = SimpleQueue()
        self._lock = threading.Lock()  # of what follows, for moments
        self._looks: dict[str, Future[str]] = {}  # asked for and not over, by grammar
        self._thread: threading.Thread | None = None
        self._child: _Child | None = None
        self._is_closed = False

    def look(self, grammar: str) -> Future[str]:
        """What is wrong with a grammar, once that is known; "" for one that can be used.

        Nobody who waits for it can cancel it; it comes to `CheckerBusy` where `close` ends it.
        Raises that, too.
        """
        with self._lock:
            if (look := self._looks.get(grammar)) is not None:
                return look
            look = Future()
            look.set_running_or_notify_cancel()  # from here on `cancel` does nothing
            if (fault := self._verdicts.known(grammar)) is not None:
                look.set_result(fault)
                return look
            if len(self._looks) >= self._places:
                raise CheckerBusy("too many schemas are being compiled; send it again later")
            if self._thread is None:
                thread = threading.Thread(target=self._look_all, name="duetjax-looks", daemon=True)
                thread.start()
                self._thread = thread
            self._looks[grammar] = look
            self._asked.put(grammar)
            return look

    def close(self) -> None:
        """Ends the child, and whatever looks there are."""
        with self._lock:
            self._is_closed = True
            self._drop()
        self._asked.put(None)

    def _look_all(self) -> None:
        """On a thread of its own."""
        while (grammar := self._asked.get()) is not None:
            try:
                fault = self._ask(grammar)
            except BaseException as error:  # whoever waits would for ever
                self._over(grammar).set_exception(error)
            else:
                self._over(grammar).set_result(fault)

    def _over(self, grammar: str) -> Future[str]:
        with self._lock:
            return self._looks.pop(grammar)

    def _ask(self, grammar: str) -> str:
        for _ in range(2):  # whatever else the machine was at may have made it slow
            answer = self._verdicts.found(grammar, self._ask_child)
            if answer is not None:
                return answer
        _log.warning("a grammar of %d bytes was too much to compile", len(grammar))
        return "it takes too long to compile; make it simpler"

    def _ask_child(self, grammar: str) -> str | None:
        with self._lock:
            if self._is_closed:
                raise CheckerBusy("no schemas are compiled any more; the server is shutting down")
            child = self._child = self._child or _Child()
        answer = child.ask(grammar, self._seconds)
        if answer is None:
            with self._lock:
                self._drop()
        return answer

    def _drop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


class _Child:
    """The process, and a thread that reads what it says."""

    def __init__(self) -> None:
        path = json.dumps([each or "." for each in sys.path])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for the server
        )
        self._said: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._is_ready = False

    def ask(self, grammar: str, seconds: float) -> str | None:
        """The fault of a grammar, or ""; None where the process did not say in time."""
        try:
            if not self._is_ready:
                self._is_ready = bool(self._said.get(timeout=_START_SECONDS))
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(grammar).encode() + b"\n")
            self._process.stdin.flush()
            said = self._said.get(timeout=seconds)
        except (Empty, OSError, ValueError):  # the last: `kill` has closed its pipe
            return None
        return str(json.loads(said)) if said else None

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError, OSError):  # closed by `kill`
            for line in self._process.stdout:
                self._said.put(line.decode())
        self._said.put("")  # whoever waits need not


def answer_all() -> None:
    """In the child: says "ready", then of each grammar that comes what is wrong with it."""
    import resource

    from duetjax.constrain.grammars import fault

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for answer in chain(["ready"], (fault(json.loads(line)) for line in sys.stdin.buffer)):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

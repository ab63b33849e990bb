"""Somebody who follows a document: a folder, an environment that lasts, a server at work."""

import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

COMMAND_SECONDS, START_SECONDS, END_SECONDS = 400, 300, 60
MESSAGES = [{"role": "user", "content": "What is TTFT?"}]
_DIRECT = build_opener(ProxyHandler({}))


class Failed(Exception):
    """A command did not do what its document promises."""


class Reader:
    """One reader of one document; closes with the server ended, well or not."""

    def __init__(self, folder: Path, port: int) -> None:
        """folder: where the reader begins. port: what servers listen on."""
        self._folder, self._port = folder, port
        self._state = folder.with_name(f"{folder.name}.state")
        self._state.write_text(f"cd {shlex.quote(str(folder))}\n")
        self._server: subprocess.Popen[bytes] | None = None
        self._log = folder.with_name(f"{folder.name}.server")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            _end(self._server)

    def write(self, name: str, text: str) -> None:
        """Puts a file where the reader is."""
        where = self.run("pwd").strip()
        Path(where, name).write_text(text, encoding="utf-8")

    def run(self, command: str) -> str:
        """What it prints; `Failed` where it ends with another status than 0, or too late."""
        text = (
            f". {shlex.quote(str(self._state))}\n{command}\ncode=$?\n"
            f"{{ export -p; printf 'cd %q\\n' \"$PWD\"; }} > {shlex.quote(str(self._state))}\n"
            "exit $code\n"
        )
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = _started(text, output.fileno())
            try:
                code: int | str = process.wait(COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                code = f"nothing after {COMMAND_SECONDS} s"
            finally:
                _end(process)
            output.seek(0)
            printed = output.read()
        if code:
            raise Failed(f"ended with {code}\n{_tail(printed)}")
        if '"stream": true' in command and "data: [DONE]" not in printed:
            raise Failed(f"no streamed answer\n{_tail(printed)}")
        return printed

    def serve(self, command: str) -> None:
        """Starts it in place of the server before, and asks it something."""
        self.end_server()
        with self._log.open("wb") as log:
            text = f". {shlex.quote(str(self._state))}\nexec {command}\n"
            self._server = _started(text, log.fileno())
        self._wait(f"http://127.0.0.1:{self._port}")

    def _wait(self, url: str) -> None:
        assert self._server is not None
        late = time.monotonic() + START_SECONDS
        while not _is_ready(url):
            if self._server.poll() is not None or time.monotonic() > late:
                raise Failed(f"not ready: {self._server.poll()}\n{_tail(self._log.read_text())}")
            time.sleep(0.2)
        try:
            printed = _answer(url)
        except URLError as error:
            said = error.read().decode() if isinstance(error, HTTPError) else ""
            raise Failed(f"the question: {error} {said}\n{_tail(self._log.read_text())}") from error
        if "data: [DONE]" not in printed:
            raise Failed(f"no streamed answer\n{_tail(printed)}")

    @property
    def has_server(self) -> bool:
        """Whether one is there to be asked."""
        return self._server is not None

    def end_server(self) -> None:
        """Asks it to end; `Failed` where it does not do so well."""
        server, self._server = self._server, None
        if server is None:
            return
        server.send_signal(signal.SIGTERM)
        try:
            code = server.wait(END_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"the server did not end\n{_tail(self._log.read_text())}") from error
        finally:
            _end(server)
        if code:
            raise Failed(f"the server ended with {code}\n{_tail(self._log.read_text())}")


def _started(script: str, output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends it and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_ready(url: str) -> bool:
    try:
        with _DIRECT.open(f"{url}/readyz", timeout=5):
            return True
    except (URLError, OSError):
        return False


def _answer(url: str) -> str:
    """What a server streams to a question."""
    with _DIRECT.open(f"{url}/v1/models", timeout=COMMAND_SECONDS) as served:
        name = json.load(served)["data"][0]["id"]
    question = {"model": name, "messages": MESSAGES, "max_tokens": 8, "stream": True}
    headers = {"Content-Type": "application/json"}
    asked = Request(f"{url}/v1/chat/completions", json.dumps(question).encode(), headers)
    with _DIRECT.open(asked, timeout=COMMAND_SECONDS) as answer:
        return str(answer.read().decode())


def _tail(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()[-15:])

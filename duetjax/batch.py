"""The files of `duetjax generate --input --output`: requests out of one, results into the other.

A .jsonl file is OpenAI's batch format, a request a line: custom_id, method, url, body. Any other
file is plain text, a prompt a line, whose custom_ids are line-1, line-2 and so on. Blank lines are
skipped. Results are OpenAI's, a line each in the order of the input: id, custom_id, response
(status_code, request_id, body) and error, which is null for a success and otherwise says code,
message, param and line. A line that is no request at all has no response.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO, Self

import orjson

from duetjax.config import ConfigError, InvalidRequest

_log = logging.getLogger(__name__)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"  # the urls of requests
_KEYS = ("custom_id", "method", "url", "body")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of the input, checked as far as its envelope goes."""

    line: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request; custom_id: where it has one."""

    line: int
    custom_id: str | None
    error: InvalidRequest


@dataclass(frozen=True, slots=True)
class PlainText:
    """How a line of plain text becomes a request: its url, and the body but for the prompt."""

    url: str
    parameters: Mapping[str, Any]

    def request(self, number: int, line: bytes) -> BatchRequest | BadLine:
        """The request that asks for the answer to a line."""
        custom_id = f"line-{number}"
        try:
            prompt = line.decode()
        except UnicodeDecodeError as error:
            return BadLine(number, custom_id, InvalidRequest(f"is not UTF-8: {error.reason}"))
        asked = {"messages": [{"role": "user", "content": prompt}]}
        body = asked if self.url == CHAT else {"prompt": prompt}
        return BatchRequest(number, custom_id, self.url, {**self.parameters, **body})


def is_batch_format(path: Path) -> bool:
    """Whether a file is read as OpenAI's batch format, not as plain text."""
    return path.suffix == ".jsonl"


def count_requests(path: Path) -> int:
    """Lines that are not blank. Raises `ConfigError` for a file that cannot be read, twice."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"--input {path} is not a regular file; write the requests to one")
    try:
        return sum(1 for _ in _lines(path))
    except OSError as error:
        raise ConfigError(f"--input {path}: {error.strerror}") from None


def read_requests(path: Path, plain: PlainText | None) -> Iterator[BatchRequest | BadLine]:
    """The requests of a file, one at a time; plain: None for OpenAI's batch format."""
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        if plain is not None:
            yield plain.request(number, line)
            continue
        request = _parse(number, line)
        if isinstance(request, BatchRequest):
            first = seen.setdefault(request.custom_id, number)
            if first != number:
                fault = InvalidRequest(
                    f"custom_id {short(request.custom_id)} is line {first}'s already",
                    param="custom_id",
                    code="duplicate_custom_id",
                )
                request = BadLine(number, request.custom_id, fault)
        yield request


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.removeprefix(_BYTE_ORDER_MARK).rstrip(b"\r\n")


def _parse(number: int, line: bytes) -> BatchRequest | BadLine:
    custom_id = None
    try:
        given = orjson.loads(line)
        if not isinstance(given, dict):
            raise InvalidRequest("is not a JSON object")
        if isinstance(given.get("custom_id"), str):
            custom_id = given["custom_id"]
        _check_envelope(given)
    except orjson.JSONDecodeError as error:
        return BadLine(number, None, InvalidRequest(f"is not JSON: {error}"))
    except InvalidRequest as error:
        return BadLine(number, custom_id, error)
    return BatchRequest(number, given["custom_id"], given["url"], given["body"])


def _check_envelope(given: dict[str, Any]) -> None:
    if missing := [key for key in _KEYS if key not in given]:
        raise InvalidRequest(f"has no {', '.join(missing)}", param=missing[0])
    if unknown := [key for key in given if key not in _KEYS]:
        raise InvalidRequest(f"has unknown keys: {short(unknown)}", param=unknown[0])
    custom_id, method, url, body = (given[key] for key in _KEYS)
    if not isinstance(custom_id, str) or not custom_id:
        raise InvalidRequest("custom_id must be a non-empty string", param="custom_id")
    if method != "POST":
        raise InvalidRequest(f"method must be POST, not {short(method)}", param="method")
    if not isinstance(url, str) or url not in (COMPLETIONS, CHAT):
        wanted = f"{COMPLETIONS} or {CHAT}"
        raise InvalidRequest(f"url must be {wanted}, not {short(url)}", param="url")
    if not isinstance(body, dict):
        raise InvalidRequest("body must be a JSON object", param="body")


class ResultFile:
    """Collects results in FILE.partial as they come; `finish` writes FILE, in order of the input.

    What has come is kept if the batch ends early. Raises `ConfigError` if FILE cannot be written,
    or if another batch has left a FILE.partial, which is not overwritten.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.partial = path.parent / f"{path.name}.partial"
        self._spans: dict[int, tuple[int, int]] = {}  # by line of the input: where, how long
        if path.exists() and not path.is_file():  # a directory; or /dev/null, to be replaced
            raise ConfigError(f"--output {path} is not a regular file; name another")
        if self.partial.exists():
            raise ConfigError(
                f"{self.partial} holds the results of a batch that ended early (or still runs);"
                " move it away or choose another --output"
            )
        with self._faults_named():
            self._file: BinaryIO = self.partial.open("x+b")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file.closed:
            return
        self._file.close()
        if self._spans:
            _log.warning("%d results so far are in %s", len(self._spans), self.partial)
        else:
            self.partial.unlink()

    def add(self, line: int, result: Mapping[str, Any]) -> None:
        """Keeps the result of a line of the input."""
        data = orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE)
        self._spans[line] = (self._file.tell(), len(data))
        with self._faults_named():
            self._file.write(data)
            self._file.flush()

    def finish(self) -> None:
        """Puts FILE, all results in order, in place of FILE.partial."""
        ordered = self._path.parent / f"{self._path.name}.ordered"
        with self._faults_named():
            with ordered.open("wb") as file:
                for _, (start, length) in sorted(self._spans.items()):
                    self._file.seek(start)
                    file.write(self._file.read(length))
            os.replace(ordered, self._path)
        self._file.close()
        self.partial.unlink()

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"--output {self._path}: {error.strerror}") from None

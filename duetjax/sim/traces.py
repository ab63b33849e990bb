"""Recorded workloads: the files that providers publish, and one format for everybody else's."""

import csv
import json
import math
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import chain
from pathlib import Path
from reprlib import repr as short

from duetjax.config import ConfigError
from duetjax.policy.profiles import Document
from duetjax.sim.workload import (
    BLOCK_TOKENS,
    KINDS,
    Arrival,
    Spec,
    at_rate,
    generate,
    is_generated,
    within,
)


class TraceKind(StrEnum):
    """Formats of trace files."""

    AZURE = "azure"
    """Azure LLM inference, 2023 and 2024: CSV with TIMESTAMP, ContextTokens, GeneratedTokens."""
    MOONCAKE = "mooncake"
    """JSONL with timestamp (ms), input_length, output_length, hash_ids (see `Arrival.blocks`)."""
    BURSTGPT = "burstgpt"
    """CSV with Timestamp (s), Request tokens, Response tokens, which are 0 where it failed."""
    JSONL = "jsonl"
    """at (s), prompt_tokens, output_tokens, and blocks where prompts begin alike: `Arrival`'s."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace's requests, the first at 0. dropped: how many without prompt or output it had."""

    arrivals: list[Arrival]
    kind: TraceKind
    dropped: int


def read_trace(file: Path, kind: TraceKind | None = None) -> Trace:
    """The requests of a file, sorted by time, equal times in the file's order.

    kind: None to tell by the first line. Columns and keys may come in any order, others beside
    them; blank lines are skipped. Raises `ConfigError` with file and line for what is no trace.
    """
    try:
        with file.open("rb") as opened:
            return _read(str(file), enumerate(opened, 1), kind)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; name a trace's file") from error


def load(
    named: str,
    *,
    rate: float | None,
    seconds: float | None,
    start: float,
    seed: int,
    cv: float | None,
) -> list[Arrival]:
    """The workload that a command line names: generated (see `KINDS`), or read from a file.

    Generated: see `Spec`; `start` is 0. A file: what comes in `seconds` (None: to the end) from
    `start` on, at the rate that it then has or at `rate`; `cv` is None and `seed` unused.
    Raises `ConfigError`.
    """
    if is_generated(named):
        if start != 0.0:
            raise ConfigError(f"{named} has no start; give one with a trace's file only")
        return generate(Spec(named, rate, 600.0 if seconds is None else seconds, seed, cv))
    if not os.path.exists(named):
        raise ConfigError(f"{named} is no file; name one, or choose {', '.join(KINDS)}")
    if cv is not None:
        raise ConfigError(f"{named} has gaps of its own; give a cv with {', '.join(KINDS)} only")
    whole = read_trace(Path(named)).arrivals
    arrivals = within(whole, math.inf if seconds is None else seconds, start)
    if not arrivals:
        last = whole[-1].at
        raise ConfigError(f"{named} has no request in the window; its last comes at {last:g} s")
    return arrivals if rate is None else at_rate(arrivals, rate)


@dataclass(frozen=True, slots=True)
class _Format:
    """The names that a kind gives to an `Arrival`'s fields; blocks: None where it has none."""

    at: str
    prompt: str
    output: str
    blocks: str | None = None
    is_json: bool = False

    @property
    def needed(self) -> tuple[str, str, str]:
        """The names that tell the kind."""
        return self.at, self.prompt, self.output


_FORMATS = {
    TraceKind.AZURE: _Format("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    TraceKind.MOONCAKE: _Format("timestamp", "input_length", "output_length", "hash_ids", True),
    TraceKind.BURSTGPT: _Format("Timestamp", "Request tokens", "Response tokens"),
    TraceKind.JSONL: _Format("at", "prompt_tokens", "output_tokens", "blocks", True),
}
_MOST_TOKENS = 2**31 - 1
_LARGEST_BLOCK = 2**53 - 1  # what every JSON writer can write

type _Lines = Iterator[tuple[int, str]]
"""Numbers, from 1, and texts."""


def _read(file: str, raw: Iterator[tuple[int, bytes]], kind: TraceKind | None) -> Trace:
    decoded = _decoded(file, raw)
    first = next(decoded, None)
    if first is None:
        raise ConfigError(f"{file}:1: is empty; name a trace's file")
    kind = kind or _kind_of(first[1], f"{file}:{first[0]}")
    of_kind = _FORMATS[kind]
    lines = chain([first], decoded)
    rows = _objects(file, lines) if of_kind.is_json else _rows(file, lines, of_kind.needed)
    all_requests = [_arrival(row, kind, of_kind) for row in rows]
    requests = [each for each in all_requests if each.prompt_tokens and each.output_tokens]
    if not requests:
        raise ConfigError(f"{file}:{first[0]}: no request from here on; name a trace's file")
    requests.sort(key=lambda each: each.at)
    dropped = len(all_requests) - len(requests)
    return Trace(within(requests, math.inf, requests[0].at), kind, dropped)


def _decoded(file: str, raw: Iterator[tuple[int, bytes]]) -> _Lines:
    """The lines that are not blank, without what surrounds them."""
    for number, line in raw:
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise ConfigError(f"{file}:{number}: not UTF-8; convert or unpack the file") from None
        if text:
            yield number, text


def _kind_of(text: str, where: str) -> TraceKind:
    """The kind whose names a first line has."""
    is_json = text.startswith("{")
    names: Container[str] = _object(text, where).values if is_json else _fields(text, where)
    for kind, of_kind in _FORMATS.items():
        if of_kind.is_json == is_json and all(name in names for name in of_kind.needed):
            return kind
    known = " or ".join(
        f"{'JSON' if of_kind.is_json else 'CSV'} with {', '.join(of_kind.needed)}"
        for of_kind in _FORMATS.values()
    )
    raise ConfigError(f"{where}: no trace begins so; it must be {known}")


def _object(text: str, where: str) -> Document:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: not JSON; write an object a line") from None
    return Document(value, where)


def _fields(text: str, where: str) -> tuple[str, ...]:
    try:
        [fields] = csv.reader([text], strict=True)
    except csv.Error as error:
        raise ConfigError(f"{where}: not CSV: {error}; write a request a line") from None
    return tuple([field.strip() for field in fields])


def _objects(file: str, lines: _Lines) -> Iterator[Document]:
    for number, text in lines:
        yield _object(text, f"{file}:{number}")


def _rows(file: str, lines: _Lines, needed: tuple[str, ...]) -> Iterator[Document]:
    """What follows a CSV file's header, the first of the lines."""
    number, text = next(lines)
    header = _fields(text, f"{file}:{number}")
    for name in needed:
        if name not in header:
            raise ConfigError(f"{file}:{number}: has no column {name}; write a header that has it")
    for number, text in lines:
        where = f"{file}:{number}"
        fields = _fields(text, where)
        if len(fields) != len(header):
            counts = f"{len(fields)} fields where the header has {len(header)}"
            raise ConfigError(f"{where}: has {counts}; write one for each")
        yield Document(dict(zip(header, map(_number_or_text, fields), strict=True)), where)


def _number_or_text(field: str) -> float | str:
    try:
        return float(field)
    except ValueError:
        return field


def _arrival(row: Document, kind: TraceKind, of_kind: _Format) -> Arrival:
    """The request of a line; its `at` counts from wherever the file's times do."""
    if kind is TraceKind.AZURE:
        at = _date(row, of_kind.at)
    else:
        at = row.number(of_kind.at) / (1e3 if kind is TraceKind.MOONCAKE else 1.0)
    prompt_tokens = _whole(row, of_kind.prompt)
    blocks: tuple[int, ...] = ()
    if of_kind.blocks and (kind is TraceKind.MOONCAKE or of_kind.blocks in row.values):
        blocks = _blocks(row, of_kind.blocks, prompt_tokens)
    return Arrival(at, prompt_tokens, _whole(row, of_kind.output), blocks)


def _date(row: Document, key: str) -> float:
    """Seconds since 1970, to the microsecond; a time without a zone is UTC."""
    text = row.get(key)
    try:
        date = datetime.fromisoformat(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise row.wrong(key, f"must be as 2023-11-16 18:17:03.98, not {short(text)}") from None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _whole(row: Document, key: str) -> int:
    value = row.number(key)
    if value > _MOST_TOKENS or not value.is_integer():
        raise row.wrong(key, f"must be a whole number of tokens, not {value:g}")
    return int(value)


def _blocks(row: Document, key: str, prompt_tokens: int) -> tuple[int, ...]:
    ids = row.get(key)
    if not isinstance(ids, list) or not all(
        type(each) is int and 0 <= each <= _LARGEST_BLOCK for each in ids
    ):
        raise row.wrong(key, f"must be a list of numbers from 0 to 2**53 - 1, not {short(ids)}")
    if len(ids) > -(-prompt_tokens // BLOCK_TOKENS):
        have = f"{len(ids)} ids for {prompt_tokens} tokens"
        raise row.wrong(key, f"must have an id for every {BLOCK_TOKENS} tokens, not {have}")
    return tuple(ids)

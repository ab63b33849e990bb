"""An HTTP client for load: requests leave at their moment, and what comes is stamped as it comes.

h11 on asyncio's transports. Each request has a connection of its own, so none waits for another or
meets a connection that the server is closing; nothing is repeated. Whatever is ready to be read is
read and stamped before any of it is parsed: at 256 streams parsing takes milliseconds.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import nan
from typing import Any
from urllib.parse import urlsplit

import h11
import orjson

from duetjax.config import ConfigError

_MALFORMED = (h11.RemoteProtocolError, AttributeError, LookupError, TypeError, ValueError)
"""What reading raises of bytes that are not HTTP, events or objects as they must be."""

_TEXTS = ("content", "reasoning", "reasoning_content")
"""Of a chat's delta."""

type Sink = Callable[[float, bytes], None]
"""Takes a piece of a response's body and when it came."""


@dataclass(frozen=True)
class Address:
    """Where requests go, and what headers they have. base_url: http or https, perhaps a path.

    Raises `ConfigError` for what is no such address or header.
    """

    base_url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            split = urlsplit(self.base_url)
            fits = split.scheme in ("http", "https") and split.hostname and split.port != 0
        except ValueError:
            fits = False
        if not fits:
            raise ConfigError(f"--base-url {self.base_url}: write it like http://127.0.0.1:8000")
        self.request("GET", "/", b"")

    @cached_property
    def host(self) -> str:
        """A name or number."""
        return urlsplit(self.base_url).hostname or ""

    @cached_property
    def port(self) -> int:
        """The usual one where none is given."""
        return urlsplit(self.base_url).port or (443 if self.is_tls else 80)

    @cached_property
    def is_tls(self) -> bool:
        """Whether it is https."""
        return self.base_url.startswith("https:")

    def request(self, method: str, path: str, body: bytes) -> h11.Request:
        """The head of a request; path: beginning with a slash."""
        split = urlsplit(self.base_url)
        own = {"host": split.netloc.rpartition("@")[2], "content-length": str(len(body))}
        own |= {"connection": "close", "content-type": "application/json"}
        named = {name.lower(): value for name, value in self.headers.items()}
        try:
            return h11.Request(
                method=method,
                target=split.path.rstrip("/") + path,
                headers=list((own | named).items()),
            )
        except (h11.LocalProtocolError, UnicodeEncodeError) as error:
            raise ConfigError(f"this cannot be a request's head: {error}; see --header") from error


class Client:
    """Opens connections to one address; belongs to one event loop."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._tls = ssl.create_default_context() if address.is_tls else None
        self._where: str | None = None
        self._reads: list[tuple[Connection, float, bytes]] = []

    async def connect(self) -> "Connection":
        """A connection for one request. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        if self._where is None:  # a name is looked up once
            found = await loop.getaddrinfo(self.address.host, self.address.port)
            self._where = str(found[0][4][0])
        _, connection = await loop.create_connection(
            lambda: Connection(self),
            self._where,
            self.address.port,
            ssl=self._tls,
            server_hostname=self.address.host if self._tls else None,
        )
        return connection

    def take(self, connection: "Connection", data: bytes) -> None:
        """What has been read, to be parsed when nothing else is to be read."""
        if not self._reads:
            asyncio.get_running_loop().call_soon(self._parse)
        self._reads.append((connection, time.monotonic(), data))

    def _parse(self) -> None:
        reads, self._reads = self._reads, []
        for connection, at, data in reads:
            connection.parse(at, data)


class Connection(asyncio.Protocol):
    """One request and its response. status: 0 until there is one; headers: names in lower case."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport
        self._sink: Sink
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.headers: Mapping[str, str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready to send."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, method: str, path: str, body: bytes, sink: Sink) -> float:
        """Writes a request and returns when; `sink` gets the body of the response."""
        self._sink = sink
        request = self._client.address.request(method, path, body)
        events = (request, h11.Data(data=body), h11.EndOfMessage())
        data = b"".join([self._http.send(event) or b"" for event in events])
        at = time.monotonic()
        self._transport.write(data)
        return at

    async def end(self) -> None:
        """Until the response is whole. Raises `ConnectionError` if it cannot be any more."""
        await self._ended

    def close(self) -> None:
        """Leaves, whatever is still to come."""
        self._transport.abort()
        if self._ended.done() and not self._ended.cancelled():
            self._ended.exception()  # it was heard, or nobody wants to hear it

    def data_received(self, data: bytes) -> None:
        """Some bytes of the response."""
        self._client.take(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has gone."""
        self._fail(exc if isinstance(exc, OSError) else ConnectionError("cut"))

    def parse(self, at: float, data: bytes) -> None:
        """Bytes that came then."""
        if self._ended.done():
            return
        try:
            self._http.receive_data(data)
            while (event := self._http.next_event()) is not h11.NEED_DATA:
                match event:
                    case h11.Data():
                        self._sink(at, bytes(event.data))
                    case h11.Response():
                        self.status = event.status_code
                        self.headers = {
                            name.decode("latin-1"): value.decode("latin-1")
                            for name, value in event.headers
                        }
                    case h11.EndOfMessage():
                        self._ended.set_result(None)
                        return
        except _MALFORMED:
            self._fail(ConnectionError("malformed"))

    def _fail(self, error: OSError) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)


@dataclass(slots=True)
class Record:
    """What became of a request; times are of time.monotonic.

    due: when it had to come; began: when the client was ready to send it, as far as it was not to
    wait for others; sent: when it left, or without HTTP when it was due or had its turn. events:
    when each event with output came; tokens: of the output, as the server counted them; without a
    count, the events. error: None where all went well. is_over: whether it has ended, one way or
    the other.
    """

    due: float
    began: float = nan
    sent: float = nan
    events: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None
    is_over: bool = False


class Stream:
    """Reads server-sent events of either route into a record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._rest = b""
        self._is_done = False
        self._has_usage = False
        self._error: str | None = None

    def feed(self, at: float, data: bytes) -> None:
        """A piece of the body."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(at, line[5:].strip())

    def close(self) -> None:
        """The body has ended."""
        record = self._record
        if not self._has_usage:
            record.tokens = len(record.events)
        if self._error is not None:
            record.error = self._error
        elif not self._is_done:
            record.error = "incomplete"
        elif not record.events:
            record.error = "no output"

    def _take(self, at: float, event: bytes) -> None:
        if event == b"[DONE]":
            self._is_done = True
            return
        chunk: dict[str, Any] = orjson.loads(event)
        if chunk.get("error"):
            self._error = f"stream {_code(chunk)}"
            return
        if (choices := chunk.get("choices")) and self._is_output(choices[0]):
            self._record.events.append(at)
        if usage := chunk.get("usage"):
            self._has_usage = True
            self._record.prompt_tokens = usage["prompt_tokens"]
            self._record.tokens = usage["completion_tokens"]

    def _is_output(self, choice: dict[str, Any]) -> bool:
        """Whether a choice brings text, or ends without having brought any: not a role alone."""
        delta = choice.get("delta") or {}
        if choice.get("text") or any(delta.get(name) for name in _TEXTS):
            return True
        return choice.get("finish_reason") is not None and not self._record.events


def _code(body: object) -> str:
    """What an error's body calls itself; empty where it does not."""
    error = body.get("error", body) if isinstance(body, dict) else None
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


async def stream(connection: Connection, path: str, body: bytes, record: Record) -> None:
    """Sends a request on a new connection and reads its stream into the record."""
    reader, whole = Stream(record), bytearray()

    def sink(at: float, data: bytes) -> None:
        if connection.status == 200:
            reader.feed(at, data)
        else:
            whole.extend(data)

    record.sent = connection.send("POST", path, body, sink)
    await connection.end()
    if connection.status == 200:
        reader.close()
        return
    record.error = Answer(connection.status, connection.headers, bytes(whole)).refusal


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that came whole. headers: names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def refusal(self) -> str:
        """What a status other than 200 is counted as: itself, and the code that came with it."""
        try:
            code = _code(orjson.loads(self.body))
        except orjson.JSONDecodeError:
            code = ""
        return f"{self.status} {code}".strip()


async def ask(client: Client, method: str, path: str, body: bytes = b"") -> Answer:
    """The response to a request on a new connection. Raises `OSError`."""
    connection, whole = await client.connect(), bytearray()
    try:
        connection.send(method, path, body, lambda _, data: whole.extend(data))
        await connection.end()
        return Answer(connection.status, connection.headers, bytes(whole))
    finally:
        connection.close()

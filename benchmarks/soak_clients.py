"""Clients that treat a server as people do: they read, dawdle, send nonsense, and leave."""

import asyncio
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass

from soak_requests import Ask, Requests, message

CLIENTS = 64
BURST = 120
PATIENCE_SECONDS = 90.0  # for one request, after which it is lost
_SMALL_BUFFER = 4096
_BEHAVIOURS = {
    "read": 60,
    "read slowly": 5,
    "bad": 7,
    "oversized": 2,
    "left in the head": 3,
    "left in the body": 3,
    "left at once": 5,
    "left while computed": 5,
    "left in the stream": 8,
    "closed one half": 3,
}


class Lost(Exception):
    """An answer that did not come as it must; says how."""


@dataclass(slots=True)
class Answer:
    """The head of a response; `pieces` reads the rest."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes; `IncompleteReadError` if the server leaves before its end."""
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            yield await self.reader.readexactly(int(self.headers["content-length"]))
            return
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([piece async for piece in self.pieces()])


class Connection:
    """A socket and its streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, *, is_slow: bool = False) -> "Connection":
        """To the server on this machine; slow: with the smallest buffers."""
        end = socket.socket()
        end.setblocking(False)
        if is_slow:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
        try:
            await asyncio.get_running_loop().sock_connect(end, ("127.0.0.1", port))
            streams = await asyncio.open_connection(
                sock=end, limit=_SMALL_BUFFER if is_slow else 2**16
            )
        except BaseException:
            end.close()
            raise
        return cls(*streams)

    async def send(self, data: bytes) -> None:
        """Writes all of it."""
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> Answer:
        """The head of the next response."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = [line.partition(": ") for line in head[1:] if line]
        headers = {name.lower(): value for name, _, value in fields}
        return Answer(int(head[0].split()[1]), headers, self.reader)

    def close(self, *, resets: bool = False) -> None:
        """Leaves, with a reset instead of a farewell if wished."""
        if resets:
            end = self.writer.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def get(port: int, path: str) -> bytes:
    """The body of a 200, on a connection of its own."""
    connection = await Connection.open(port)
    try:
        await connection.send(message(path, b"", ["connection: close"], "GET"))
        answer = await connection.answer()
        body = await answer.body()
        if answer.status != 200:
            raise Lost(f"GET {path}: {answer.status}")
        return body
    finally:
        connection.close()


def stream_ending(body: bytes, choices: int) -> str:
    """How a whole stream ended, "finish" or "error"; raises `Lost` unless it did as it must."""
    *events, done, rest = body.split(b"\n\n")
    if done != b"data: [DONE]" or rest:
        raise Lost(f"a stream without its last event: ...{body[-80:]!r}")
    chunks = [json.loads(event[6:]) for event in events if event.startswith(b"data: ")]
    if "error" in chunks[-1]:
        return "error"
    ended = Counter(
        choice["index"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"] is not None
    )
    if ended != Counter(range(choices)):
        raise Lost(f"{choices} choices, of which these finished so often: {dict(ended)}")
    return "finish"


def whole_ending(body: bytes, choices: int) -> str:
    """As `stream_ending`, of an answer that does not stream."""
    reasons = [choice["finish_reason"] for choice in json.loads(body)["choices"]]
    if len(reasons) != choices or None in reasons:
        raise Lost(f"{choices} choices finished as {reasons}")
    return "finish"


class Clients:
    """A crowd around one server.

    outcomes: how often what became of a request, by behaviour and result. lost: accepted requests
    that came to no proper end; unexpected: answers with a status that they must not have.
    """

    def __init__(self, port: int, seed: int, max_model_len: int) -> None:
        self._port = port
        self._draw = random.Random(seed)
        self._requests = Requests(seed, max_model_len)
        self.count = 0
        self.outcomes: Counter[str] = Counter()
        self.lost: list[str] = []
        self.unexpected: list[str] = []

    async def crowd(self, seconds: float) -> None:
        """Clients that come for so long, and a burst of them; returns when the last has gone."""
        until = asyncio.get_running_loop().time() + seconds
        burst = self._burst(self._draw.uniform(0, seconds))
        await asyncio.gather(burst, *(self._client(until) for _ in range(CLIENTS)))

    async def _burst(self, delay: float) -> None:
        await asyncio.sleep(delay)
        asks = (self._requests.good(short=True) for _ in range(BURST))
        await asyncio.gather(*(self._guarded("burst", self._read("burst", ask)) for ask in asks))

    async def _client(self, until: float) -> None:
        """One thing after the other."""
        names, weights = list(_BEHAVIOURS), list(_BEHAVIOURS.values())
        while asyncio.get_running_loop().time() < until:
            [behaviour] = self._draw.choices(names, weights)
            await self._guarded(behaviour, self._behave(behaviour))

    async def _behave(self, behaviour: str) -> None:
        requests = self._requests
        match behaviour:
            case "read":
                asks = [requests.good() for _ in range(self._draw.choice((1, 1, 2, 4)))]
                await self._read(behaviour, *asks)
            case "read slowly":
                await self._read(behaviour, requests.many_bytes(), is_slow=True)
            case "bad":
                await self._read(behaviour, requests.bad())
            case "oversized":
                await self._read(behaviour, requests.oversized())
            case _:
                await self._leave(behaviour, requests.good(stream=True))

    async def _guarded(self, behaviour: str, work: Coroutine[None, None, None]) -> None:
        """Notes what went wrong, so that the others go on."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await work
        except (Lost, TimeoutError, OSError, EOFError, ValueError, LookupError) as error:
            self.lost.append(f"{behaviour}: {error!r}")

    async def _read(self, behaviour: str, *asks: Ask, is_slow: bool = False) -> None:
        """Reads answers on one connection, one after the other, unless the server wants to end it.

        Slowly: through small buffers, and with pauses.
        """
        connection = await Connection.open(self._port, is_slow=is_slow)
        try:
            for ask in asks:
                self.count += 1
                await connection.send(ask.message)
                answer = await connection.answer()
                pieces = []
                async for piece in answer.pieces():
                    pieces.append(piece)
                    if is_slow:
                        await asyncio.sleep(self._draw.choice((0, 0, 0, 0.02, 0.3)))
                self._judge(behaviour, ask, answer, b"".join(pieces))
                if answer.headers.get("connection") == "close":
                    return
                if answer.status == 429:
                    await asyncio.sleep(self._draw.uniform(0.05, 0.5))
        finally:
            connection.close()

    def _judge(self, behaviour: str, ask: Ask, answer: Answer, body: bytes) -> None:
        outcome = str(answer.status)
        if answer.status not in ask.expected:
            self.unexpected.append(f"{answer.status} for {ask.message[:300]!r}: {body[:300]!r}")
        elif answer.status == 200:
            ending = stream_ending if ask.streams else whole_ending
            outcome += f" {ending(body, ask.choices)}"
        self.outcomes[f"{behaviour}: {outcome}"] += 1

    async def _leave(self, behaviour: str, ask: Ask) -> None:
        """Goes away at a moment that is the behaviour's; what the server says is nobody's."""
        draw = self._draw
        self.count += 1
        self.outcomes[behaviour] += 1
        head = ask.message.index(b"\r\n\r\n") + 4
        connection = await Connection.open(self._port)
        try:
            match behaviour:
                case "left in the head":
                    await connection.send(ask.message[: draw.randrange(head)])
                case "left in the body":
                    await connection.send(ask.message[: draw.randrange(head, len(ask.message))])
                case "left at once" | "left while computed":
                    await connection.send(ask.message)
                case "left in the stream":
                    await connection.send(ask.message)
                    left = draw.randint(1, 30)
                    async for _ in (await connection.answer()).pieces():
                        left -= 1
                        if not left:
                            break
                case _:
                    await connection.send(ask.message)
                    connection.writer.write_eof()
                    await connection.reader.read()
            if behaviour != "left at once":
                await asyncio.sleep(draw.choice((0.0, 0.01, 0.1, 1.0)))
        except (ConnectionError, asyncio.IncompleteReadError):
            self.outcomes["reset while leaving"] += 1
        finally:
            connection.close(resets=draw.random() < 0.5)

"""What a streamed token costs the HTTP endpoint, and what 256 streams do to the engine beside it.

The server is the real one, over the real engine on a device that costs nothing; beside it a bare
Starlette application that sends the same bytes at the same pace, with the same uvicorn settings.
Each runs in a process of its own; this one is the client and only counts. Cases: `paced`, steps
that both servers keep up with; `full`, steps too fast for either; `refill`, prompts on the prefill
lane beside the streams: how late the device's thread learns of a step's end (`wake`), and how long
the lane then waits for its next launch, without HTTP, with it in the same process, and with it in
another. Loads no jax. Takes a minute. Last line: one JSON document.

    python benchmarks/server.py [--seconds 4] [--step-ms 60] [--refill-step-ms 30]
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson
from checkout import commit
from server_under_load import LONGEST, PATHS, STREAMS, TEXT, Case, serve

PROMPTS = {
    "completions": {"prompt": "Once"},
    "chat": {"messages": [{"role": "user", "content": "Once"}]},
}
FULL_STEP_MS = 4.0
LOOK_SECONDS = 0.005
PATIENCE_SECONDS = 20.0
GOAL_RATIO, GOAL_REFILL_MS = 0.5, 1.0


class Clients:
    """Streams that are read and counted, nothing more.

    Nobody sleeps on their sockets: each wake-up would be counted as the server's time.
    """

    def __init__(self, port: int, route: str, count: int) -> None:
        asked = {"model": "demo", "stream": True, "max_tokens": LONGEST // 2, "temperature": 0}
        body = orjson.dumps(asked | PROMPTS[route])
        head = f"POST {PATHS[route]} HTTP/1.1\r\nhost: localhost\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        self.read: dict[socket.socket, bytes] = {}  # what each stream brought last
        for _ in range(count):
            stream = socket.create_connection(("127.0.0.1", port))
            stream.sendall(request)
            stream.setblocking(False)
            self.read[stream] = b""

    @property
    def all_stream(self) -> bool:
        """Whether each has had a token."""
        return all(TEXT.encode() in data for data in self.read.values())

    def count(self, seconds: float) -> int:
        """Tokens that come in so many seconds."""
        tokens, ends = 0, time.perf_counter() + seconds
        while time.perf_counter() < ends:
            time.sleep(LOOK_SECONDS)
            for stream in self.read:
                with suppress(BlockingIOError):
                    data = stream.recv(2**20)
                    assert data, f"a stream ended: {self.read[stream]!r}"
                    self.read[stream] = data
                    tokens += data.count(TEXT.encode())
        return tokens

    def close(self) -> None:
        """Hangs up."""
        for stream in self.read:
            stream.close()


@dataclass(frozen=True, slots=True)
class Found:
    """Of one case. Times in microseconds per token, or (p50, p99, longest) in milliseconds.

    wake_ms: from the end of a step until the device's thread runs; refill_ms: from then to the next
    launch on its lane.
    """

    case: str
    server: str
    route: str
    tokens_per_s: int
    tokens_per_cpu_s: int
    us_per_token: dict[str, float]
    lag_ms: list[float]
    wake_ms: list[float]
    refill_ms: dict[str, list[float]]


@contextmanager
def running(case: Case) -> Iterator[tuple[Clients, Callable[[], dict[str, Any]]]]:
    """A server that streams: its clients, and what takes its notes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(case, theirs), daemon=True)
    process.start()
    theirs.close()

    def notes() -> dict[str, Any]:
        ours.send("notes")
        return ours.recv()

    try:
        clients = Clients(ours.recv(), case.route, 0 if case.server == "engine" else STREAMS)
        ends = time.perf_counter() + PATIENCE_SECONDS
        while not clients.all_stream:
            assert time.perf_counter() < ends, f"{case}: a stream has no token"
            clients.count(0.1)
        if case.prompts:
            ours.send("prompts")
        clients.count(0.5)
        yield clients, notes
    finally:
        process.kill()
        process.join()
    clients.close()


def measure(case: Case, seconds: float) -> Found:
    """Runs a server, and its clients here."""
    print(f"{case.name}: {case.server} {case.route}", file=sys.stderr)
    with running(case) as (clients, notes):
        before, began = notes(), time.perf_counter()
        tokens = clients.count(seconds)
        after, took = notes(), time.perf_counter() - began
    if case.server == "engine":
        tokens = STREAMS * len(after["late"]["decode"])
    return _found(case, tokens, took, before, after)


def _found(
    case: Case, tokens: int, took: float, before: dict[str, Any], after: dict[str, Any]
) -> Found:
    late = {what: _spread(found) for what, found in after["late"].items()}
    used = after["cpu_s"] - before["cpu_s"]
    threads = {name: s - before["threads"].get(name, 0.0) for name, s in after["threads"].items()}
    return Found(
        case.name,
        case.server,
        case.route,
        tokens_per_s=round(tokens / took),
        tokens_per_cpu_s=round(tokens / used),
        us_per_token={"all": round(1e6 * used / tokens, 1)}
        | {name: round(1e6 * s / tokens, 1) for name, s in threads.items() if s > 0.01 * used},
        lag_ms=late["lag"],
        wake_ms=late["wake"],
        refill_ms={lane: late[lane] for lane in ("decode", "prefill") if late[lane]},
    )


def _spread(ms: np.ndarray) -> list[float]:
    return [round(float(np.percentile(ms, q)), 2) for q in (50, 99, 100)] if len(ms) else []


def sample(route: str) -> bytes:
    """The bytes of one token's event in our own stream."""
    with running(Case("", "duetjax", route, 50.0)) as (clients, _):
        events = next(iter(clients.read.values())).partition(b"data: ")
    event = b"".join(events[1:]).partition(b"\n\n")[0] + b"\n\n"
    assert event.count(TEXT.encode()) == 1, event
    return event


def cases(step_ms: float, refill_step_ms: float) -> Iterator[Case]:
    """In the order in which they run."""
    for route in PATHS:
        chunk = sample(route)
        for name, step in (("paced", step_ms), ("full", FULL_STEP_MS)):
            yield Case(name, "duetjax", route, step)
            yield Case(name, "bare", route, step, chunk=chunk)
    for server in ("engine", "together", "duetjax"):
        yield Case("refill", server, "completions", refill_step_ms, prompts=True)


def _print_table(found: list[Found]) -> None:
    print(f"{STREAMS} streams; us: of processor time per token; ms: p50, p99, longest")
    print(
        f"{'case':7}{'server':9}{'route':12}{'tokens/s':>9}{'us':>6}"
        f"  {'lag':24}{'wake':17}{'refill decode':17}{'refill prefill':17}"
    )
    for one in found:
        lag, *late = (
            "/".join(f"{ms:g}" for ms in spread)
            for spread in (
                *(one.lag_ms, one.wake_ms),
                *(one.refill_ms.get(lane, []) for lane in ("decode", "prefill")),
            )
        )
        print(
            f"{one.case:7}{one.server:9}{one.route:12}{one.tokens_per_s:9}"
            f"{one.us_per_token['all']:6}  {lag:24}" + "".join(f"{text:17}" for text in late)
        )


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each case; default: 4")
    parser.add_argument("--step-ms", type=float, default=60.0, help="paced; default: 60")
    parser.add_argument("--refill-step-ms", type=float, default=30.0, help="default: 30")
    args = parser.parse_args()
    load_average = os.getloadavg()[0]
    found = [measure(case, args.seconds) for case in cases(args.step_ms, args.refill_step_ms)]
    _print_table(found)
    ratios = {
        f"{case}, {route}": round(ours.tokens_per_cpu_s / bare.tokens_per_cpu_s, 2)
        for case in ("paced", "full")
        for route in PATHS
        for ours, bare in [[one for one in found if (one.case, one.route) == (case, route)]]
    }
    refill_p99_ms = max(
        p99
        for one in found
        for _, p99, _ in one.refill_ms.values()
        if one.case == "refill" and one.server == "duetjax"
    )
    print(f"tokens per processor-second, ours to bare: {ratios}; goal: {GOAL_RATIO}")
    print(f"refill p99 with streams: {refill_p99_ms} ms; goal: {GOAL_REFILL_MS}")
    result = {
        "benchmark": "server",
        "streams": STREAMS,
        "cases": [asdict(one) for one in found],
        "ratios": ratios,
        "refill_p99_ms": refill_p99_ms,
        "goals": {"ratio": GOAL_RATIO, "refill_p99_ms": GOAL_REFILL_MS},
        "reached": min(ratios.values()) >= GOAL_RATIO and refill_p99_ms <= GOAL_REFILL_MS,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(load_average, 2),
        "python": platform.python_version(),
        "commit": commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

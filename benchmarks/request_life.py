"""The life of one request, drawn: a long prompt that comes among running streams.

Starts `duetjax serve` on a simulated GPU (HTTP, tokenizer, scheduler and engine are real, only the
launches' times are made of numbers), lets streams run, sends one long prompt as text, and follows
it by the server's own trace and by `x-duetjax-timings`. Last line: one JSON document.

    python benchmarks/request_life.py [--plot docs/request-life.svg]
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

from checkout import ROOT, commit
from request_life_picture import Life, Stage, draw

from duetjax.timeline import Timeline, read

MODEL, GPU, OBJECTIVE_MS = "llama-3.1-8b", "h200-sxm", 50
FLAGS = (
    *("--device", "sim", "--model", MODEL, "--hardware-profile", GPU, "--policy", "duet"),
    *("--tokenizer", str(ROOT / "checkpoints" / "demo"), "--max-num-batched-tokens", "8192"),
    *("--tbt-slo-ms", str(OBJECTIVE_MS)),
)
STREAMS, STREAM_TOKENS = 6, 600
WORDS, TOKENS = 2500, 32
"""Of the prompt, and of its answer."""
WINDOW_S, HEAD_START_S = 10.0, 1.0


@dataclass(frozen=True)
class Told:
    """What a client saw of its answer. sent, first, ended: seconds since the epoch."""

    sent: float
    first: float
    ended: float
    timings: dict[str, Any]


@contextmanager
def serving() -> Iterator[str]:
    """A server on a free port, by its address; drained in the end."""
    command = [sys.executable, "-m", "duetjax.cli", "serve", "--port", "0", *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, f"the server did not start: {line!r}"
            yield found[0]
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()


def ask(url: str, prompt: str | list[int], tokens: int) -> Told:
    """Streams one answer to its end."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    asked = HttpRequest(f"{url}/v1/completions", json.dumps(body | {"stream": True}).encode())
    asked.add_header("content-type", "application/json")
    asked.add_header("x-duetjax-timings", "1")
    sent = time.time()
    times, timings = [], {}
    with urlopen(asked) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                times.append(time.time())
                timings = json.loads(line[6:]).get("duetjax_timings", timings)
        ended = time.time()
    return Told(sent, times[0], ended, timings[0])


def run(folder: Path) -> Life:
    """Streams, a trace, and in their midst the request."""
    trace: list[bytes] = []
    with serving() as url:
        streams = [
            threading.Thread(target=ask, args=(url, [5, 6, n], STREAM_TOKENS))
            for n in range(STREAMS)
        ]
        route = f"{url}/debug/trace?seconds={WINDOW_S:g}"
        watcher = threading.Thread(target=lambda: trace.append(urlopen(route).read()))
        for thread in (watcher, *streams):
            thread.start()
            time.sleep(HEAD_START_S if thread is watcher else 0.02)
        time.sleep(HEAD_START_S)
        prompt = " ".join(f"word {n}" for n in range(WORDS))
        told = ask(url, prompt, TOKENS)
        for thread in (watcher, *streams):
            thread.join()
    file = folder / "trace.json"
    file.write_bytes(trace[0])
    return followed(read(file), told, json.loads(trace[0])["otherData"]["begin_unix_s"])


def followed(trace: Timeline, told: Told, began: float) -> Life:
    """Finds the request, which has the longest prompt, and divides its time."""
    own = max(trace.requests, key=lambda each: each.args["prompt_tokens"])
    sent, seen, ended = (at - began for at in (told.sent, told.first, told.ended))
    parts = {name: told.timings[f"{name}_ms"] / 1e3 for name in ("queue", "prefill", "decode")}
    first = own.begin + told.timings["ttft_ms"] / 1e3
    launched = first - parts["prefill"]
    submitted, last = launched - parts["queue"], first + parts["decode"]
    chunks = [
        each
        for each in trace.launches
        if each.args["prompt_chunks"] and submitted < each.end <= first + 1e-3
    ]
    return Life(
        sent=sent,
        seen=seen,
        ended=ended,
        stages=(
            Stage("to tokens", "serve/, text/", sent, submitted),
            Stage("in the queue", "policy/queue.py", submitted, launched),
            Stage(f"prefill in {len(chunks)} launches", "policy/, runtime/", launched, first),
            Stage(f"decode of {TOKENS - 1} tokens", "engine.py, runtime/", first, last),
            Stage("the end told", "serve/streaming.py", last, ended),
        ),
        launches=trace.launches,
        chunks=tuple(chunks),
        own=own,
        others=tuple([each for each in trace.requests if each is not own]),
    )


def main() -> None:
    """Runs, prints, draws."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "request-life.svg")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        life = run(Path(folder))
    where = f"{MODEL} on a simulated {GPU}, duet for {OBJECTIVE_MS} ms between tokens"
    arguments.plot.write_text(draw(life, where), encoding="utf-8")
    for stage in life.stages:
        print(f"{stage.name:24} {1e3 * (stage.end - stage.begin):9.1f} ms  {stage.where}")
    document = {
        "benchmark": "request_life",
        "commit": commit(),
        "command": "python benchmarks/request_life.py",
        "prompt_tokens": life.own.args["prompt_tokens"],
        "stages_ms": {each.name: round(1e3 * (each.end - each.begin), 3) for each in life.stages},
        "chunks": [each.args["prompt_tokens"] for each in life.chunks],
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()

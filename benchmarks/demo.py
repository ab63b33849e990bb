"""`make demo`: starts the real server with the demo checkpoint and talks to it over HTTP.

Streams the answers to the terminal, then prints what a client saw. Exits 0 only if every request
completed and the KV pages came back.
"""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

QUESTIONS = ("What is TTFT?", "Why is decode limited by memory bandwidth?")
BATCH = 8
STORY = "Tell me a story about a fox."
START_SECONDS = 150


@dataclass(frozen=True)
class Seen:
    """One streamed answer as its client saw it: arrival of each content chunk, in seconds."""

    question: str
    text: str
    times: tuple[float, ...]
    num_tokens: int
    finished: bool

    @property
    def ttft(self) -> float:
        """Seconds from request to first text."""
        return self.times[0]

    @property
    def tbt(self) -> float:
        """Mean seconds between tokens after the first."""
        return (self.times[-1] - self.times[0]) / max(1, self.num_tokens - 1)


def main() -> int:
    """Runs the demo; returns the exit code."""
    server = subprocess.Popen(
        [sys.executable, "-m", "duetjax.cli", "serve", "--port", "0", "--max-num-seqs", "8"],
        stdout=subprocess.PIPE,
    )
    try:
        port = wait_for_port(server)
        model = get_json(port, "/v1/models")["data"][0]["id"]
        print(f"\nModel {model}, 2.4 million weights, answering over HTTP on this machine:\n")
        answers = [ask(port, model, question, show=True) for question in QUESTIONS]
        print(f"Now {BATCH} streams at once, one of them shown:\n")
        together = ask_together(port, model)
        if len(together) < BATCH or not all(s.finished for s in (*answers, *together)):
            raise SystemExit("a stream did not complete; the reason is above")
        print(table(answers, together))
        counts = settled_pages(port)
        total, given_back = sum(counts.values()), counts["free"] + counts["cached"]
        print(f"KV pages given back: {given_back} of {total}, {counts['cached']} of them cached")
        return 0 if given_back == total else 1
    finally:
        stop(server)


def wait_for_port(server: subprocess.Popen[bytes]) -> int:
    """Reads the server's announcement; its progress goes to this terminal's stderr."""
    alarm = threading.Timer(START_SECONDS, server.kill)
    alarm.start()
    assert server.stdout is not None
    line = server.stdout.readline().decode()
    alarm.cancel()
    found = re.search(r"http://[^:]+:(\d+)", line)
    if found is None:
        raise SystemExit(f"the server did not start within {START_SECONDS} s; its log is above")
    print(line.strip())
    return int(found[1])


def stop(server: subprocess.Popen[bytes]) -> None:
    """Asks the server to drain and leave, and ends it if it does not."""
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(timeout=60)
    except subprocess.TimeoutExpired:
        server.kill()


def ask(port: int, model: str, question: str, *, show: bool) -> Seen:
    """Streams one chat answer, printing it as it arrives if asked to."""
    if show:
        print(f"> {question}\n  ", end="", flush=True)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, times, text, num_tokens, finished = time.perf_counter(), [], [], 0, False
    for event in post_stream(port, "/v1/chat/completions", body):
        for choice in event["choices"]:
            finished |= choice["finish_reason"] is not None
            if piece := choice["delta"].get("content"):
                times.append(time.perf_counter() - started)
                text.append(piece)
                if show:
                    print(piece, end="", flush=True)
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
    if show:
        print("\n")
    return Seen(question, "".join(text), tuple(times), num_tokens, finished and bool(times))


def ask_together(port: int, model: str) -> list[Seen]:
    """Several streams at once: stories and questions, the first one printed."""
    prompts = [STORY, *(QUESTIONS * BATCH)][:BATCH]
    seen: list[Seen] = []
    threads = [
        threading.Thread(target=lambda i=i, p=prompt: seen.append(ask(port, model, p, show=i == 0)))
        for i, prompt in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def table(alone: list[Seen], together: list[Seen]) -> str:
    """What clients saw, alone and in company."""
    lines = [f"{'':22}{'TTFT ms':>10}{'TBT ms':>10}{'tokens':>10}{'tokens/s':>10}"]
    for name, group in (("one stream", alone), (f"{len(together)} streams at once", together)):
        tokens = sum(s.num_tokens for s in group)
        at_once = name != "one stream"
        seconds = (max if at_once else sum)(s.times[-1] for s in group)
        ttft = 1e3 * sum(s.ttft for s in group) / len(group)
        tbt = 1e3 * sum(s.tbt for s in group) / len(group)
        lines.append(f"{name:22}{ttft:10.1f}{tbt:10.1f}{tokens:10d}{tokens / seconds:10.0f}")
    return "\n".join(lines)


def post_stream(port: int, path: str, body: object) -> Iterator[dict]:
    """Posts JSON and yields the server-sent events."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"HTTP {response.status}: {response.read().decode()}")
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            break
        if data.startswith("{"):
            event = json.loads(data)
            if "error" in event:
                raise SystemExit(f"the stream failed: {event['error']}")
            yield event
    connection.close()


def get_json(port: int, path: str) -> dict:
    """Body of a GET request."""
    return json.loads(get(port, path))


def get(port: int, path: str) -> str:
    """Body of a GET request, as text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    body = connection.getresponse().read().decode()
    connection.close()
    return body


def settled_pages(port: int) -> dict[str, int]:
    """KV pages by state, once the launches planned ahead have ended; after 5 s as they are."""
    deadline = time.monotonic() + 5
    while (counts := pages(port))["held"] or counts["quarantined"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return counts


def pages(port: int) -> dict[str, int]:
    """KV pages by state, by the server's metrics."""
    found = dict(
        re.findall(r'duetjax_pages\{.*?state="(\w+)".*?\} ([\d.]+)', get(port, "/metrics"))
    )
    return {state: int(float(count)) for state, count in found.items()}


if __name__ == "__main__":
    sys.exit(main())

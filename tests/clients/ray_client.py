"""deploy/ray_serve.py at work: two replicas on this machine's processor, beside a plain server.

`python ray_client.py demo=URL`, as tests/clients/run.py does; `make check-ray` tells Ray to stay on
this machine. What a client sees must be what the plain server shows it; an engine that dies must be
replaced; and nothing may be left at the end.
"""

import http.client
import json
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import ray
from ray import serve
from ray_serve import Arguments, app

MODEL = "duetjax-demo"
QUESTIONS = (
    "What is TTFT?",
    "What does TBT mean?",
    "What is the KV cache?",
    "How do you define TTFT?",
)
NUM_STREAMS, AT_ONCE = 24, 8
REPLICA = "x-duetjax-replica"
SECONDS = 120  # that anything here may take
SETTINGS = {"max_num_seqs": 16, "max_num_batched_tokens": 128}


class Answer:
    """An answer as it comes; `with` closes its connection."""

    def __init__(self, address, path, body=None, method="POST"):
        self._connection = http.client.HTTPConnection(address, timeout=SECONDS)
        text = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        self._connection.request(method, path, text, {"content-type": "application/json"})
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.replica = self._response.headers.get(REPLICA)
        self.content_type = self._response.headers["content-type"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._connection.close()

    def read(self):
        return self._response.read()

    def events(self) -> Iterator[str]:
        while line := self._response.readline():
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ").decode().strip()


def chat(question, **parameters):
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "stream": True} | parameters


def stream(address, question):
    """(what it says, how many events, who said it)"""
    with Answer(address, "/v1/chat/completions", chat(question)) as answer:
        assert answer.status == 200, answer.read()
        *events, last = answer.events()
        assert last == "[DONE]", last
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        return (
            "".join(each["delta"].get("content") or "" for each in choices),
            len(events),
            answer.replica,
        )


def aborts(address, replica):
    """Generations of one replica whose client has left; whoever is asked first."""

    def ask():
        with Answer(address, "/metrics", method="GET") as answer:
            lines = answer.read().decode().splitlines()
            return answer.replica == replica and lines

    lines = wait_until(ask, f"{replica} shows its metrics")
    found = [x for x in lines if x.startswith("duetjax_aborts_total") and '"client_gone"' in x]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def wait_until(call, what):
    """The first result that is true."""
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        if found := call():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited in vain until {what}")


def check_streams(address, plain):
    """Many at once say what the plain server says, and both replicas are among them."""
    expected = {question: stream(plain, question) for question in QUESTIONS}
    asked = QUESTIONS * (NUM_STREAMS // len(QUESTIONS))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda question: stream(address, question), asked))
    for question, (text, events, _) in zip(asked, answers, strict=True):
        assert (text, events) == expected[question][:2], (text, events, expected[question])
    replicas = sorted({replica for *_, replica in answers})
    assert len(replicas) == 2, replicas
    shares = [sum(replica == each for *_, replica in answers) for each in replicas]
    print(f"{len(answers)} streams, {shares} of each replica, as the plain server's", flush=True)
    return replicas


def check_pieces(address):
    """The first piece comes while the rest is generated; who leaves then ends the generation."""
    body = chat(QUESTIONS[0], max_tokens=3000, ignore_eos=True)
    with Answer(address, "/v1/chat/completions", body) as answer:
        events = answer.events()
        begun = [json.loads(next(events)) for _ in range(3)]
        assert all(each["choices"][0]["finish_reason"] is None for each in begun), begun
    wait_until(lambda: aborts(address, answer.replica) == 1, "a generation ends with its client")
    print("a stream comes piece by piece, and ends when its client leaves", flush=True)


def check_errors(address, plain):
    """What is wrong is told alike: status, type and body."""
    path = "/v1/chat/completions"
    asked = [
        (path, chat("x", temperature=9)),
        (path, chat("x", model="other")),
        (path, chat("x", max_tokens="many", stream=False)),
        (path, b"{"),
        ("/v1/nothing", {}),
        ("/v1/models", {}),
    ]
    for where, body in asked:
        answers = []
        for each in (address, plain):
            with Answer(each, where, body) as answer:
                answers.append((answer.status, answer.content_type, answer.read()))
        assert answers[0] == answers[1], answers
        assert answers[0][0] >= 400, answers
    print(f"{len(asked)} errors are told as the plain server tells them", flush=True)


def engines():
    """The engines' processes: children of replicas."""
    replicas = [each for each in below() if "ServeReplica" in " ".join(each.cmdline())]
    return {replica.pid: replica.children() for replica in replicas}


def below():
    """Every process that this one has started, directly or not."""
    return psutil.Process().children(recursive=True)


def check_replacement(address, replicas):
    """Another replica comes in the place of one whose engine has died; the other one goes on."""
    [engine], _ = engines().values()
    engine.kill()
    names, failures = set(), 0

    def replaced():
        nonlocal failures
        with Answer(address, "/v1/chat/completions", chat("x", max_tokens=1)) as answer:
            text = answer.read()
            if answer.status == 200:
                names.add(answer.replica)
            else:
                assert json.loads(text)["error"]["code"] == "engine_dead", text
                failures += 1
        return len(names - set(replicas)) == 1

    wait_until(replaced, "a dead replica is replaced")
    assert names & set(replicas), names
    print(
        f"an engine was killed: {failures} requests failed, then another took its place", flush=True
    )


@contextmanager
def replicas():
    """Two of them behind Ray Serve on a loopback address; ends whatever was started."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        address = {node["NodeManagerAddress"] for node in ray.nodes()}
        assert address == {"127.0.0.1"}, address
        serve.run(app(Arguments(num_gpus=0, engine=SETTINGS)), route_prefix="/")
        yield f"127.0.0.1:{port}"
        started = below()
        serve.shutdown()
    finally:
        ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=SECONDS)
    assert not left, [each.cmdline() for each in left]


def main(plain):
    began = time.monotonic()
    with replicas() as address:
        print(f"two replicas after {time.monotonic() - began:.0f} s", flush=True)
        names = check_streams(address, plain)
        check_pieces(address)
        check_errors(address, plain)
        check_replacement(address, names)
    print("nothing that was started is left", flush=True)


if __name__ == "__main__":
    [(_, url)] = [each.split("=", 1) for each in sys.argv[1:]]
    main(url.removeprefix("http://"))

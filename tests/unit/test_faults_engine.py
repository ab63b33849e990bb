"""What befalls the engine: too much at once, too little memory, a device that fails some."""

import asyncio
import math
from collections import Counter

from fake_engine import continuation, wait_until
from faults import Faults
from faulty import code, harm, lifted, server, setting
from serve_setup import MODEL, Served, post_bytes

from duetjax.policy import results, roster
from duetjax.policy.durations import Durations
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.roster import Roster
from duetjax.serve.limits import Limits
from duetjax.serve.queue_bound import QueueBound

FAULTS = Faults("The engine", server, harm)
MANY, QUEUED = 5000, 32


async def crowd(served: Served, count: int) -> Counter[str]:
    """The statuses of so many requests at once, each on a connection of its own."""
    host, port = served.url.removeprefix("http://").split(":")
    body = {"model": MODEL, "prompt": "a", "max_tokens": 2}
    request = post_bytes("/v1/completions", body, Connection="close")

    async def one() -> str:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer[9:12].decode()

    return Counter(await asyncio.gather(*(one() for _ in range(count))))


@FAULTS.attack(
    f"{MANY} requests at once",
    expected="all answered with 200 or 429, no more live than may be",
    guard="--max-num-queued-reqs",
    off=lifted("max_num_queued_reqs"),
    settings={"limits": Limits(max_num_queued_reqs=QUEUED)},
)
def many_at_once(served: Served) -> str:
    most, submit = 0, served.engine.submit

    def counting(new: object) -> None:
        nonlocal most
        submit(new)
        most = max(most, served.engine.num_live)

    served.engine.submit = counting
    statuses = asyncio.run(crowd(served, MANY))
    assert statuses.total() == MANY
    if statuses.keys() <= {"200", "429"} and most <= served.engine.num_slots + QUEUED:
        return "all answered with 200 or 429, no more live than may be"
    return f"answered with {', '.join(sorted(statuses))}, hundreds live"


def without_preemption(self: Roster, k: int, *, may_preempt: bool) -> None:
    RESERVE(self, k, may_preempt=False)


RESERVE = Roster.reserve


@FAULTS.attack(
    "KV pages run out while all decode",
    expected="every answer whole",
    guard="the youngest gives up its pages, and is computed anew",
    off=setting(Roster, "reserve", without_preemption),
    settings={"engine": {"num_slots": 8, "num_pages": 17}},
)
def no_pages(served: Served) -> str:
    body = {"prompt": ["a" * 20] * 8, "max_tokens": 100, "ignore_eos": True, "model": MODEL}
    with served.http() as http:
        answer = http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return code(answer)
        texts = {choice["text"] for choice in answer.json()["choices"]}
        alone = http.post("/v1/completions", json=body | {"prompt": "a" * 20}).json()["choices"]
    assert served.engine.stats().preemptions > 0
    return "every answer whole" if texts == {alone[0]["text"]} else "other answers"


@FAULTS.attack(
    "a request that can never have its pages",
    expected="400 invalid_value",
    guard="its pages are counted before it is taken",
    off=setting(SchedulerLimits, "check", lambda *_: None),
    settings={"engine": {"num_slots": 2, "num_pages": 5}},
)
def never_fits(served: Served) -> str:
    body = {"prompt": "a" * 20, "max_tokens": 200, "ignore_eos": True, "model": MODEL}
    with served.http() as http:
        return code(http.post("/v1/completions", json=body))


def poisoned(prompt: str) -> object:
    def attack(served: Served) -> str:
        served.engine.executor.poison(ord("i"))
        with served.http() as http:
            body = {"model": MODEL, "max_tokens": 12, "n": 1}
            bad = http.post("/v1/completions", json=body | {"prompt": prompt})
            good = http.post("/v1/completions", json=body | {"prompt": "m"})
        text = good.json()["choices"][0]["text"]
        neighbour = "as ever" if text == continuation("m", 12) else "changed"
        return f"{code(bad)}, its neighbour {neighbour}"

    return attack


for name, prompt in (("prefill", "i"), ("decode", "f")):
    FAULTS.add(
        f"a {name} step that gives NaN for one request",
        poisoned(prompt),
        expected="500 non_finite_logits, its neighbour as ever",
        guard="each row tells whether its logits are finite",
        off=setting(results, "_BAD", 0),
    )


@FAULTS.attack(
    "a prompt that is in the prefix cache to its last token",
    expected="the same text",
    guard="the last token is always computed",
    off=setting(roster, "_most_shared", lambda num_tokens, size: num_tokens // size),
)
def wholly_cached(served: Served) -> str:
    body = {"model": MODEL, "prompt": "a" * 64, "max_tokens": 5}
    with served.http() as http:
        first, second = (http.post("/v1/completions", json=body) for _ in range(2))
        if second.status_code != 200:
            return code(second)
        same = first.json()["choices"] == second.json()["choices"]
    return "the same text" if same else "another text"


class Foretelling(Durations):
    """Says the same of every step."""

    median_error, is_trusted = 0.0, True

    def __init__(self, ms: float) -> None:
        self._ms = ms

    def step_ms(self, step: object) -> float:
        return self._ms

    def observe(self, step: object, measured_ms: float) -> None:
        pass


def unclamped(self: QueueBound) -> int:
    return math.ceil(self._client.stats().predicted_ttft_ms / 1e3)


for ms, seconds in ((math.nan, 1), (1e9, 60)):

    def full_and_foretold(served: Served) -> str:
        with served.http() as http:
            http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1})
            served.engine.executor.hold()
            with served.connect() as waiting:
                waiting.sendall(post_bytes("/v1/completions", {"model": MODEL, "prompt": "a"}))
                wait_until(lambda: served.engine.num_live == 1, "submission")
                answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "b"})
        return f"{code(answer)}, Retry-After {answer.headers.get('retry-after', 'none')}"

    FAULTS.add(
        f"a predictor that says {ms:g} ms of every step, and a full queue",
        full_and_foretold,
        expected=f"429 queue_full, Retry-After {seconds}",
        guard="Retry-After is at least 1 s and at most 60 s",
        off=setting(QueueBound, "seconds", unclamped),
        settings={
            "engine": {"num_slots": 1, "durations": Foretelling(ms)},
            "limits": Limits(max_num_queued_reqs=0),
        },
    )


test_guarded, test_unguarded = FAULTS.tests()

"""A stream's bytes: what every chunk spelled whole would give, in as few writes as it can be."""

import asyncio
import itertools
import random

import orjson
import pytest
from fake_engine import wait_until
from serve_setup import MODEL, post_bytes, serving

from duetjax.policy.request import StepOutputs, TokenLogprob
from duetjax.serve.call import Call, Delta, ScoredToken
from duetjax.serve.chat import ChatReply
from duetjax.serve.completions import CompletionReply
from duetjax.serve.errors import HttpError
from duetjax.serve.streaming import send_stream

HOSTILE = [
    *("", " ", '"', "\\", "\\u0000", '"\\u0000"', "\0", "\0\0", '"\0"', "\x7f", "\n\n", "\r\n"),
    *(
        "data: [DONE]\n\n",
        "\u2028",
        "\ufffd",
        "é",
        "日本",
        "👍🏽",
        "%s{}",
        '","text":"',
        "</script>",
    ),
]
HEAD = {"id": "x", "created": 1, "model": '"\0"'}  # as hostile as a model's name can be
N = 3
FAILURE = HttpError(503, "shutting_down", "bye")


class Names:
    """Stands for a tokenizer that names tokens."""

    def token_bytes(self, token_id):
        return bytes([token_id])


def completion(*, echo, ids, logprobs):
    echoes, prompts = ("\0echo",) * N if echo else None, ((1, 2),) * N if ids else None
    return CompletionReply(HEAD, echoes, prompts, Names() if logprobs else None)


def chat(*, echo, ids, logprobs):
    return ChatReply(HEAD, (1, 2) if ids else None, Names() if logprobs else None)


class Script:
    """Stands for a generation whose mail comes in batches."""

    num_tokens, cached = 7, {}

    def __init__(self, batches):
        self._batches = [list(batch) for batch in batches]
        self.has_more = False

    @property
    def is_finished(self):
        return not self._batches

    def told_timings(self):
        return {}

    def usage(self, call):
        return call.usage(self.num_tokens, self.cached)

    async def next(self):
        batch = self._batches[0]
        piece = batch.pop(0)
        self.has_more = bool(batch)
        if not batch:
            del self._batches[0]
        if isinstance(piece, Exception):
            raise piece
        return piece


def call_of(reply, *, include_usage):
    return Call((), reply, N, 5, stream=True, include_usage=include_usage, headers={})


def bodies(call, batches):
    """What is written, write by write, the head left out."""
    messages = []

    async def send(message):
        messages.append(message)

    asyncio.run(send_stream(call, Script(batches), send, lambda _: None))
    _, *rest = messages
    assert [m["more_body"] for m in rest] == [True] * (len(rest) - 1) + [False]
    return [m["body"] for m in rest]


def spelled_whole(call, deltas):
    tail, begun, events = {"usage": None} if call.include_usage else {}, set(), []
    for delta in deltas:
        chunks = call.reply.chunk(delta, is_first=delta.index not in begun)
        if chunks:
            begun.add(delta.index)
        events += [chunk | tail for chunk in chunks]
    if call.include_usage:
        events.append(call.reply.last() | {"usage": call.usage(7, {})})
    spelled = [b"data: " + orjson.dumps(event) + b"\n\n" for event in events]
    return b"".join([*spelled, b"data: [DONE]\n\n"])


def random_deltas(dice, *, logprobs):
    for at in range(40):
        text = "".join(dice.choices(HOSTILE, k=dice.choice((0, 1, 1, 2))))
        score = ScoredToken(dice.randrange(256), at, TokenLogprob(-1.0))
        yield Delta(
            dice.randrange(N),
            text,
            (dice.randrange(256),),
            dice.choice((None,) * 9 + ("stop",)),
            (score,) if logprobs and dice.random() < 0.7 else (),
        )


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("asked", ["text", "echo", "ids", "logprobs"])
@pytest.mark.parametrize("reply_of", [completion, chat])
def test_a_stream_is_what_its_chunks_spelled_whole_are(reply_of, asked, include_usage):
    dice = random.Random(5)
    options = {name: name == asked for name in ("echo", "ids", "logprobs")}
    call = call_of(reply_of(**options), include_usage=include_usage)
    for _ in range(20):
        deltas = list(random_deltas(dice, logprobs=options["logprobs"]))
        cuts = [0, *sorted(dice.sample(range(1, 40), 12)), 40]
        batches = [deltas[a:b] for a, b in itertools.pairwise(cuts)]
        written = bodies(call, batches)
        assert b"".join(written) == spelled_whole(call, deltas)
        assert all(written)
        assert len(written) <= len(batches)


@pytest.mark.parametrize("reply_of", [completion, chat])
def test_each_hostile_text_is_spelled_as_in_its_whole_chunk(reply_of):
    call = call_of(reply_of(echo=False, ids=False, logprobs=False), include_usage=True)
    deltas = [Delta(0, text, (1,)) for text in ["first", *HOSTILE]]
    assert b"".join(bodies(call, [[delta] for delta in deltas])) == spelled_whole(call, deltas)


def test_what_came_before_a_failure_goes_out_before_its_event():
    call = call_of(completion(echo=False, ids=False, logprobs=False), include_usage=False)
    [written] = bodies(call, [[Delta(0, "a", (1,)), Delta(0, "b", (1,)), FAILURE]])
    a, b, error, done, end = written.split(b"\n\n")
    assert (b'"text":"a"' in a, b'"text":"b"' in b) == (True, True)
    assert orjson.loads(error.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
    assert (done, end) == (b"data: [DONE]", b"")


def test_a_ping_is_written_when_it_is_due():
    call = call_of(completion(echo=False, ids=False, logprobs=False), include_usage=False)
    ping, last = bodies(call, [[None], [Delta(0, "a", (1,), "stop")]])
    assert ping.startswith(b": ")
    assert last.endswith(b"data: [DONE]\n\n")


def test_text_does_not_wait_behind_outputs_of_a_choice_that_has_ended(folder):
    body = {"model": MODEL, "prompt": "a", "n": 2, "stop": "x", "stream": True}
    with serving(folder, ping_seconds=60.0) as served, served.connect() as connection:
        served.engine.executor.hold()
        connection.sendall(post_bytes("/v1/completions", body))
        wait_until(lambda: len(served.engine.submitted) == 2, "both choices")
        first, second = served.engine.submitted
        deliver = served.context.dispatcher.on_outputs
        deliver(StepOutputs((first,), (ord("x"),)))
        deliver(StepOutputs((second, first), (ord("y"), ord("z"))))
        connection.settimeout(20)
        received = b""
        while b'"text":"y"' not in received:
            received += connection.recv(65536)
        assert b'"text":"z"' not in received
        served.engine.executor.release()

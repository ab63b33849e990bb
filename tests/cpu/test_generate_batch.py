"""`duetjax generate --input --output`: on the alphabet engine, and once on the demo checkpoint."""

import json
from pathlib import Path

import pytest
from alphabet_model import MAX_LEN, alphabet_model
from fake_engine import PATIENCE, FakeEngine, continuation
from hypothesis import given, settings
from hypothesis import strategies as st

import duetjax.build
from duetjax.batch import BadLine, BatchRequest, count_requests, read_requests
from duetjax.cli import main
from duetjax.config import ModelFolderError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture
def engine():
    engine = FakeEngine()
    yield engine
    assert engine.shutdown(PATIENCE)


@pytest.fixture
def folder(engine, tmp_path, monkeypatch):
    """Where the files are; the model is the alphabet, whatever is asked for."""
    model = alphabet_model(engine)
    monkeypatch.setattr(duetjax.build, "load", lambda *_, **__: model)
    return tmp_path


def request(custom_id, url=COMPLETIONS, **body):
    if url == CHAT:
        body = {"messages": [{"role": "user", "content": body.pop("prompt", "a")}], **body}
    else:
        body = {"prompt": "a", **body}
    body = {"temperature": 0, "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def as_bytes(line):
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode()


def nested(depth):
    return [nested(depth - 1)] if depth else []


def answer(folder, lines, *flags, name="in.jsonl", code=0):
    """Runs a batch of lines (values, texts or bytes); its results."""
    (folder / name).write_bytes(b"".join(as_bytes(line) + b"\n" for line in lines))
    out = folder / "out.jsonl"
    assert main(["generate", "-i", str(folder / name), "-o", str(out), *flags]) == code
    return read(out) if code == 0 else None


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def text(result):
    assert result["error"] is None, result
    assert result["response"]["status_code"] == 200
    [choice] = result["response"]["body"]["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_results_are_in_the_order_of_the_input_whoever_ends_first(folder):
    lengths = [40, 1, 20, 2, 10] * 10
    lines = [request(f"r{i}", max_tokens=n, ignore_eos=True) for i, n in enumerate(lengths)]
    results = answer(folder, lines, "--max-num-seqs", "4")
    assert [r["custom_id"] for r in results] == [f"r{i}" for i in range(50)]
    tokens = [r["response"]["body"]["usage"]["completion_tokens"] for r in results]
    assert tokens == lengths
    assert len({r["id"] for r in results}) == 50


def test_both_endpoints_answer_as_they_do_over_http(folder):
    completion, chat = answer(folder, [request("a"), request("b", CHAT)])
    assert text(completion) == "bcde"
    assert text(chat) == "abcd"  # after the template's ">"
    assert completion["response"]["body"]["object"] == "text_completion"
    assert chat["response"]["body"]["object"] == "chat.completion"
    assert chat["response"]["body"]["usage"]["completion_tokens"] == 4
    assert completion["response"]["request_id"] != chat["response"]["request_id"]


BAD = {
    "not JSON": ("{", "not JSON"),
    "not UTF-8": (b'{"custom_id": "\xff"}', "not JSON"),
    "not an object": ([1], "not a JSON object"),
    "no url": ({"custom_id": "x", "method": "POST", "body": {}}, "has no url"),
    "unknown key": (request("x") | {"priority": 1}, "unknown keys: ['priority']"),
    "no id": (request(""), "custom_id"),
    "method": (request("x") | {"method": "GET"}, "POST, not 'GET'"),
    "url": (request("x") | {"url": "/v1/embeddings"}, "/v1/chat/completions, not '/v1/embed"),
    "body": (request("x") | {"body": []}, "body must be a JSON object"),
    "id of another": (request("first"), "'first' is line 1's already"),
    "unknown field": (request("x", maxtokens=4), "unknown fields: ['maxtokens']"),
    "nested field": (
        request("x", CHAT, messages=[{"role": "user", "content": "", "to": 1}]),
        "].to",
    ),
    "nesting": (request("x", logit_bias={"1": nested(300)}), "cannot be passed on"),
    "stream": (request("x", stream=True), "does not stream"),
    "range": (request("x", temperature=3), "from 0 to 2"),
    "type": (request("x", max_tokens="4"), "max_tokens"),
    "too long": (request("x", prompt="a" * MAX_LEN), "max_model_len"),
    "model": (request("x", model="gpt-4"), "served: alphabet"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_line_gets_an_error_with_its_number_and_the_others_are_answered(fault, folder):
    bad, named = BAD[fault]
    first, error, last = answer(folder, [request("first"), "", bad, request("last")])
    assert text(first) == text(last) == continuation("a", 4)
    assert error["error"]["line"] == 3
    assert error["error"]["message"].startswith("line 3: ")
    assert named in error["error"]["message"]
    assert (error["response"] or {"status_code": 400})["status_code"] in (400, 404)


def test_a_request_that_fails_alone_is_an_error_among_answers(folder, engine):
    engine.executor.poison(ord("c"))
    sick, well = answer(folder, [request("sick"), request("well", prompt="j")])
    assert sick["error"]["code"] == "non_finite_logits"
    assert sick["response"]["status_code"] == 500
    assert text(well) == continuation("j", 4)


def test_a_model_named_on_the_command_line_may_be_named_in_bodies(folder):
    [result] = answer(folder, [request("x", model="org/name")], "--model", "org/name")
    assert result["response"]["body"]["model"] == "org/name"


def test_plain_text_is_a_prompt_a_line(folder):
    lines = [b"\xef\xbb\xbfgive me a", "", "b\r", b"\xff", "  c"]
    results = answer(folder, lines, "--max-tokens", "3", "--temperature", "0", name="in.txt")
    assert [r["custom_id"] for r in results] == ["line-1", "line-3", "line-4", "line-5"]
    assert [text(r) for r in results if r["error"] is None] == ["abc"] * 3  # after the template
    assert results[2]["error"]["message"].startswith("line 4: is not UTF-8")


def test_raw_continues_the_text_itself_until_the_context_is_full(folder):
    [result] = answer(folder, ["a"], "--raw", "--temperature", "0", name="in.txt")
    assert result["response"]["body"]["usage"]["completion_tokens"] == MAX_LEN - 1


def test_stop_strings_on_the_command_line_end_each_answer(folder):
    flags = ["--raw", "--temperature", "0", "--stop", "e", "--stop", "m"]
    results = answer(folder, ["a", "k"], *flags, name="in.txt")
    assert [text(result) for result in results] == ["bcd", "l"]


def test_an_empty_file_has_no_results(folder):
    assert answer(folder, []) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--input", "in.jsonl"], "--output"),
        (["--output", "out.jsonl"], "--input"),
        (["-i", "in.jsonl", "-o", "in.jsonl"], "overwrite"),
        (["x", "-i", "in.jsonl", "-o", "out.jsonl"], "not both"),
        (["-i", "nowhere.jsonl", "-o", "out.jsonl"], "nowhere.jsonl: No such file"),
        (["-i", "in.jsonl", "-o", "nowhere/out.jsonl"], "nowhere/out.jsonl: No such file"),
        (["-i", "in.jsonl", "-o", "."], "not a regular file"),
        (["-i", "in.jsonl", "-o", "/dev/null"], "not a regular file"),
        (["-i", "/dev/stdin", "-o", "out.jsonl"], "not a regular file"),
        (["-i", "in.jsonl", "-o", "o", "--max-tokens", "3", "--raw"], "--max-tokens, --raw"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together_are_refused_in_one_line(
    arguments, named, folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    Path("in.jsonl").write_text(json.dumps(request("x")))
    before = sorted(folder.iterdir())
    assert main(["generate", *arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert named in line
    assert sorted(folder.iterdir()) == before


def test_what_came_before_a_crash_is_kept_and_not_overwritten(folder, engine, capsys):
    lines = [request("long", max_tokens=100, ignore_eos=True), request("short", max_tokens=2)]
    start = engine.start

    def start_watched(on_outputs):
        def watch(outputs):
            on_outputs(outputs)
            if outputs.finished:
                engine.executor.break_down()

        start(watch)

    engine.start = start_watched
    answer(folder, lines, code=1)
    assert not (folder / "out.jsonl").exists()
    partial = folder / "out.jsonl.partial"
    [kept] = read(partial)
    assert (kept["custom_id"], text(kept)) == ("short", "bc")
    errors = capsys.readouterr().err
    assert "broke down" in errors
    assert f"1 results so far are in {partial}" in errors
    answer(folder, lines, code=1)
    assert "move it away" in capsys.readouterr().err
    assert read(partial) == [kept]


def test_a_model_that_cannot_be_loaded_leaves_no_file(folder, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ModelFolderError("no such model")

    monkeypatch.setattr(duetjax.build, "load", refuse)
    answer(folder, [request("x")], code=1)
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
ENVELOPES = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.sampled_from(["a", "b", "", 7]),
        "method": st.sampled_from(["POST", "GET", None]),
        "url": st.sampled_from([COMPLETIONS, CHAT, "/", {}]),
        "body": st.dictionaries(st.text(max_size=3), JSON) | JSON,
    },
)
LINES = st.one_of(
    st.binary(max_size=9).filter(lambda line: not set(line) & set(b"\r\n")),
    (ENVELOPES | JSON).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=50)
@given(lines=st.lists(LINES, max_size=6))
def test_every_line_that_is_not_blank_is_a_request_or_a_bad_line(lines, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "property.jsonl"
    path.write_bytes(b"\n".join(lines))
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    found = list(read_requests(path, None))
    assert [r.line for r in found] == numbers
    assert count_requests(path) == len(numbers)
    ids = [r.custom_id for r in found if isinstance(r, BatchRequest)]
    assert len(ids) == len(set(ids))
    assert all(isinstance(r, BatchRequest | BadLine) for r in found)


def test_the_demo_answers_a_batch(tmp_path, capsys):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [request("chat", CHAT, prompt="What is TTFT?", max_tokens=96), request("bad", n=0)]
    path.write_text("\n".join(map(json.dumps, lines)))
    # The sizes of test_llm: its programs are in the store.
    sizes = ["--max-num-seqs", "16", "--max-num-batched-tokens", "128"]
    assert main(["generate", "--input", str(path), "--output", str(out), *sizes]) == 0
    good, bad = read(out)
    assert "first token" in text(good)
    assert bad["error"]["param"] == "n"
    assert "2 results, 1 of them errors" in capsys.readouterr().err

"""What grammars are made of, hostile ones included, and the process that tries them first."""

import json
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from duetjax import LLM
from duetjax.config import InvalidRequest, SamplingParams, StructuredOutputsParams
from duetjax.constrain import checker, grammars
from duetjax.constrain.checker import CheckerBusy, GrammarChecker
from duetjax.constrain.grammars import check_together, fault, grammar_of, json_grammar
from duetjax.constrain.verdicts import Verdicts

MIB = 1 << 20
PATIENCE = 60.0  # seconds until a hang is called one


def grammar(schema, *, max_bytes=4 * MIB, max_depth=1_100):
    return json_grammar(schema, max_bytes=max_bytes, max_depth=max_depth, param="schema")


def nested(depth):
    """A schema of `depth` objects in each other, itself included."""
    schema = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def refused(schema, **bounds):
    with pytest.raises(InvalidRequest) as refusal:
        grammar(schema, **bounds)
    assert refusal.value.param == "schema"
    return refusal.value


# Bounds.


def test_a_schema_of_as_many_bytes_as_may_be_is_taken_and_of_one_more_is_not():
    schema = {"type": "string", "description": "x" * 100}
    size = len(json.dumps(schema))
    assert fault(grammar(schema, max_bytes=size)) == ""
    refusal = refused(schema, max_bytes=size - 1)
    assert refusal.reason == "max_schema_bytes"
    assert f"{size} bytes; at most {size - 1}" in str(refusal)


@pytest.mark.parametrize("depth", [1, 2, 7, 100])
def test_a_schema_as_deep_as_may_be_is_taken_and_one_deeper_is_not(depth):
    assert fault(grammar(nested(depth + 1), max_depth=depth)) == ""
    assert refused(nested(depth + 2), max_depth=depth).reason == "max_schema_depth"


def test_lists_count_as_depth():
    schema = {"anyOf": [{"type": "null"}]}
    grammar(schema, max_depth=3)
    assert refused(schema, max_depth=2).reason == "max_schema_depth"


@pytest.mark.parametrize("depth", [1_000, 100_000])
def test_a_schema_far_too_deep_is_refused_for_its_depth(depth):
    assert refused(nested(depth), max_depth=100).reason == "max_schema_depth"


def test_a_schema_that_contains_itself_is_refused():
    schema = {}
    schema["items"] = schema
    refused(schema, max_depth=100)


@pytest.mark.parametrize(
    "schema", [{"const": {1}}, {"const": b"x"}, {(1, 2): {}}, {"const": 10**5_000}]
)
def test_what_is_no_json_is_refused(schema):
    assert "not JSON" in str(refused(schema))


# What a grammar lets through is looked at in test_constrain_follower; here, what is refused.

REFUSED = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {}},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 3}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "oneOf that overlaps": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "look-ahead": {"type": "string", "pattern": "(?=a)b"},
    "back-reference": {"type": "string", "pattern": r"(a)\1"},
    "not a regex": {"type": "string", "pattern": "((("},
    "no such reference": {"$ref": "#/$defs/no"},
    "another site": {"$ref": "https://example.com/schema.json"},
    "nothing but itself": {"$ref": "#"},
    "two of each other": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "least above most": {"type": "integer", "minimum": 2, "maximum": 1},
    "an empty enum": {"enum": []},
    "an empty anyOf": {"anyOf": []},
    "a type that is a number": {"type": 7},
    "no such type": {"type": "text"},
    "properties in a list": {"type": "object", "properties": []},
    "required in a word": {"type": "object", "required": "a"},
    "an enum that is a word": {"enum": "abc"},
    "negative length": {"type": "string", "minLength": -5},
    "a multiple of 0": {"type": "integer", "multipleOf": 0},
    "false": {"type": "object", "properties": {"a": False}, "required": ["a"]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_kept_to_has_a_fault_in_one_line(name):
    said = fault(grammar(REFUSED[name]))
    assert said
    assert len(said.splitlines()) == 1
    assert len(said) <= 300


def test_a_schema_cannot_ask_for_its_unknown_keywords_to_be_passed_over():
    schema = {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}
    assert "uniqueItems" in fault(grammar(schema))


def test_notes_are_no_constraints():
    assert fault(grammar({"title": "x", "description": "y", "default": 1, "examples": [2]})) == ""


# Hostile ones: whatever they are, they get an answer, and never another exception.


def chains_of(keyword, length=30):
    """Each definition names the next one twice."""
    definitions = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "integer"}}}


def crossed(count, width=10):
    """All of `count` choices among objects with different keys."""
    return {
        "allOf": [
            {"anyOf": [{"type": "object", "required": [f"{i} {j}"]} for j in range(width)]}
            for i in range(count)
        ]
    }


HOSTILE = {
    "1 MB of enum": {"enum": [f"{i:09}" for i in range(80_000)]},
    "1 MB of one word": {"const": "x" * MIB},
    "1 MB of keys": {"type": "object", "properties": {f"p{i}": {} for i in range(80_000)}},
    "a tree": {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"type": "object", "properties": {"l": {"$ref": "#/$defs/n"}}}},
    },
    "an endless tree": {
        "$ref": "#/$defs/n",
        "$defs": {
            "n": {"type": "object", "properties": {"l": {"$ref": "#/$defs/n"}}, "required": ["l"]}
        },
    },
    "allOf in a ring": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": {"allOf": [{"$ref": "#/$defs/b"}, {"type": "integer"}]},
            "b": {"allOf": [{"$ref": "#/$defs/a"}]},
        },
    },
    "1,000 deep": nested(1_000),
    "(a+)+b": {"type": "string", "pattern": "(a+)+b"},
    "many automata": {"type": "string", "pattern": "(a|b)*a(a|b){60}"},
    "repeated repeats": {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}b"},
    "minItems": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "maxItems": {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
    "minLength": {"type": "string", "minLength": 10**9},
    "maxLength": {"type": "string", "maxLength": 10**12},
    "a number beyond 64 bits": {"type": "string", "maxLength": 10**30},
    "multipleOf a prime": {"type": "integer", "multipleOf": 982_451_653},
    "multipleOf next to nothing": {"type": "number", "multipleOf": 1e-300},
    "allOf of 3 anyOf": crossed(3),
    "allOf of 20 anyOf": crossed(20),
    "prefixItems twice and twice": chains_of("prefixItems"),
    "allOf twice and twice": chains_of("allOf"),
    "anyOf twice and twice": chains_of("anyOf"),
    "not a number": {"const": float("nan")},
    "infinity": {"type": "number", "maximum": float("inf")},
    "half a character": {"const": "\ud800"},
    "half a character in a key": {"type": "object", "properties": {"\udfff": {}}},
    "options that are wrong": {"x-guidance": {"lenient": 7}, "type": "object"},
    "options that are no regex": {"x-guidance": {"whitespace_pattern": "((("}, "type": "object"},
    "true": True,
    "false": False,
    "nothing": None,
    "a list": [1],
    "a word": "object",
    "a number": 7,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_gets_an_answer(name):
    try:
        said = fault(grammar(HOSTILE[name]))
    except InvalidRequest as refusal:
        said = str(refusal)
    assert len(said.splitlines()) <= 1
    assert len(said) < 1_000


@pytest.mark.parametrize("schema", [True, False, None, [1], "object", 7])
def test_true_is_a_schema_and_all_else_but_objects_lets_nothing_through(schema):
    try:
        said = fault(grammar(schema))
    except InvalidRequest as refusal:
        said = str(refusal)
    assert bool(said) is (schema is not True)


# What programs ask for.


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": {"type": "string", "pattern": "((("}},
        {"json": "{"},
        {"json": "[" * 100_000},
        {"json": "[1]"},
        {"json": '{"const": "\\ud800"}'},
        {"json": nested(202)},
        {"json": {"const": "x" * MIB}},
        {"regex": "((("},
        {"regex": "(?=a)b"},
        {"regex": "\ud800"},
        {"choice": ["\ud800"]},
        {"grammar": "start: nothing"},
        {"grammar": "start: \ud800"},
        {"grammar": "no grammar at all"},
        {"grammar": ""},
    ],
    ids=lambda wanted: repr(wanted)[:30],
)
def test_what_a_program_asks_for_in_vain_is_an_invalid_request(wanted):
    with pytest.raises(InvalidRequest) as refusal:
        grammar_of(StructuredOutputsParams(**wanted))
    assert refusal.value.param == "structured_outputs"
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": {"type": "integer"}},
        {"json": '{"type": "integer"}'},
        {"json": nested(100)},
        {"json_object": True},
        {"regex": "(a+)+b"},
        {"choice": ["yes", 'with "quotes"', "back\\slash", "new\nline", "été", "/a+/", "\u2028"]},
        {"grammar": 'start: "a" | "b" start'},
    ],
    ids=lambda wanted: repr(wanted)[:30],
)
def test_what_a_program_asks_for_has_a_grammar(wanted):
    assert fault(grammar_of(StructuredOutputsParams(**wanted))) == ""


@pytest.fixture
def looks(monkeypatch):
    """How often each grammar has been compiled to be looked at."""
    counted = Counter()

    def counting(text):
        counted[text] += 1
        return fault(text)

    grammars._verdicts.cache_clear()
    monkeypatch.setattr(grammars, "fault", counting)
    yield counted
    grammars._verdicts.cache_clear()


def test_prompts_that_share_a_schema_have_it_compiled_once(looks):
    schema = {"type": "object", "properties": {"shared": {"type": "integer"}}}
    each = [StructuredOutputsParams(json=json.loads(json.dumps(schema))) for _ in range(10)]
    with LLM(device="sim", sim_step_ms=(1.0, 1.0)) as llm:
        one = SamplingParams(max_tokens=1, structured_outputs=each[0])
        own = [SamplingParams(max_tokens=1, structured_outputs=wanted) for wanted in each]
        assert len(llm.generate([[i] for i in range(10)], one, use_tqdm=False)) == 10
        assert len(llm.generate([[i] for i in range(10)], own, use_tqdm=False)) == 10
    assert list(looks.values()) == [1]


def test_what_is_wrong_with_a_grammar_is_said_each_time(looks):
    for _ in range(3):
        with pytest.raises(InvalidRequest, match="structured_outputs cannot be used"):
            grammar_of(StructuredOutputsParams(regex="((("))
    assert list(looks.values()) == [1]


@pytest.mark.parametrize("changes", [{"min_tokens": 1}, {"ignore_eos": True}])
def test_what_forbids_the_end_of_an_answer_is_refused(changes):
    check_together(SamplingParams())
    [name] = changes
    with pytest.raises(InvalidRequest, match=name) as refusal:
        check_together(SamplingParams(**changes))
    assert refusal.value.param == name


# What is remembered of them.


def test_what_fails_to_be_found_is_asked_again():
    verdicts, said = Verdicts(4), iter([None, MemoryError(), "no", "never asked"])

    def find(_):
        answer = next(said)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert verdicts.found("x", find) is None
    with pytest.raises(MemoryError):
        verdicts.found("x", find)
    assert verdicts.known("x") is None
    assert verdicts.found("x", find) == verdicts.found("x", find) == verdicts.known("x") == "no"


def test_whoever_was_asked_about_last_is_remembered():
    verdicts = Verdicts(2)
    for text in ("a", "b", "a", "\ud800"):
        verdicts.found(text, lambda text: f"of {text!r}")
    assert [verdicts.known(text) for text in "ab\ud800"] == ["of 'a'", None, "of '\\ud800'"]


def test_large_grammars_are_not_kept():
    verdicts = Verdicts(256)
    tracemalloc.start()
    try:
        for i in range(256):
            verdicts.found(f"{i}" + "x" * MIB, lambda _: "")
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert verdicts.known("255" + "x" * MIB) == ""
    assert kept < MIB


def test_threads_that_ask_about_the_same_grammars_find_each_once():
    verdicts, found, all_there = Verdicts(300), [], threading.Barrier(8)

    def find(text):
        found.append(text)
        return "yes"

    def ask(_):
        all_there.wait(PATIENCE)
        return [verdicts.found(str(i), find) for i in range(300)]

    with ThreadPoolExecutor(8) as pool:
        for said in pool.map(ask, range(8), timeout=PATIENCE):
            assert said == ["yes"] * 300
    assert len(found) == len(set(found)) == 300


def test_a_grammar_that_is_being_looked_at_is_not_looked_at_beside():
    verdicts, found, begun, goes_on = Verdicts(4), [], threading.Event(), threading.Event()

    def find(text):
        found.append(text)
        begun.set()
        assert goes_on.wait(PATIENCE)
        return "yes"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(verdicts.found, "x", find)
        assert begun.wait(PATIENCE)
        second = pool.submit(verdicts.found, "x", find)
        goes_on.set()
        assert first.result(PATIENCE) == second.result(PATIENCE) == "yes"
    assert found == ["x"]


# The process that tries grammars first.

GOOD = 'start: "a"'
OTHER = 'start: "b"'
BAD = "start: ((("
ENDLESS = {
    "allOf": [{"type": "string", "pattern": f".*a.{{{n}}}"} for n in range(10, 40)],
}
_CHILD = """
import json, os, sys, time
sys.path[:] = json.loads(sys.argv[1])
from duetjax.constrain import checker, grammars
def fault(grammar):
    if "hang" in grammar: time.sleep(1000)
    if "die" in grammar: os._exit(1)
    if "raise" in grammar: raise MemoryError
    return f"pid {os.getpid()}"
grammars.fault = fault
checker.answer_all()
"""


def is_running(process_id):
    """Whether a process is there and has not ended, whoever is still to be told so."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def said_of(checking, text):
    """What a checker says is wrong with a grammar; "" if nothing is."""
    return checking.look(text).result(PATIENCE)


@pytest.fixture
def checking(request):
    made = GrammarChecker(getattr(request, "param", PATIENCE), places=100)
    yield made
    made.close()


@pytest.fixture
def scripted(monkeypatch):
    """Children do what a grammar says: hang, die, raise; else their fault is who they are."""
    monkeypatch.setattr(checker, "_PROGRAM", _CHILD)


def test_the_child_says_what_fault_says(checking):
    assert said_of(checking, GOOD) == ""
    assert said_of(checking, BAD) == fault(BAD) != ""
    assert said_of(checking, OTHER) == ""


@pytest.mark.parametrize("name", ["1 MB of enum", "1,000 deep", "(a+)+b", "an endless tree"])
def test_a_hostile_schema_gets_an_answer_of_the_child_too(checking, name):
    with suppress(InvalidRequest):  # some are refused before they come there
        said_of(checking, grammar(HOSTILE[name]))
    assert said_of(checking, GOOD) == ""


@pytest.mark.parametrize("checking", [0.5], indirect=True)
def test_a_schema_that_takes_too_long_is_refused_and_the_next_is_not(checking):
    assert "too long" in said_of(checking, grammar(ENDLESS))
    said_of(checking, GOOD)


@pytest.mark.parametrize("how", ["hang", "die", "raise"])
def test_a_child_that_fails_is_gone_and_another_serves(scripted, monkeypatch, how):
    checking = GrammarChecker(5.0 if how != "hang" else 0.5)
    first = said_of(checking, "one")
    pid = int(first.split()[-1])
    assert said_of(checking, f"{how} now")
    after = said_of(checking, "two")
    assert after.startswith("pid ")
    if how != "raise":
        assert after != first
        assert not is_running(pid)
    checking.close()
    assert not is_running(int(after.split()[-1]))


def test_one_child_serves_one_grammar_after_another(scripted, checking):
    assert len({said_of(checking, str(i)) for i in range(20)}) == 1


def test_what_a_grammar_was_found_to_be_is_not_asked_again(scripted, checking):
    first = said_of(checking, "one")
    assert said_of(checking, "die")
    assert said_of(checking, "one") == first
    assert said_of(checking, "two") != first


def test_old_grammars_are_forgotten(scripted, monkeypatch):
    monkeypatch.setattr(checker, "_REMEMBERED", 2)
    checking = GrammarChecker(PATIENCE)
    first = said_of(checking, "one")
    said_of(checking, "die")
    said_of(checking, "two")
    said_of(checking, "three")
    assert said_of(checking, "one") != first
    checking.close()


def test_any_number_of_requests_with_one_grammar_share_a_look(child):
    checking = GrammarChecker(PATIENCE, places=1)
    looks = [checking.look("".join(GOOD)) for _ in range(200)]
    child.may_answer.set()
    assert [look.result(PATIENCE) for look in looks] == [""] * 200
    assert child.asked == [GOOD]


def test_a_look_that_one_cancels_is_there_for_the_others(child):
    checking = GrammarChecker(PATIENCE)
    assert not checking.look(GOOD).cancel()
    other = checking.look(GOOD)
    child.may_answer.set()
    assert other.result(PATIENCE) == ""
    assert not other.cancelled()


def test_beyond_its_places_other_grammars_are_turned_away(child):
    checking = GrammarChecker(PATIENCE, places=2)
    looks = [checking.look(text) for text in (GOOD, OTHER)]
    for _ in range(3):
        with pytest.raises(CheckerBusy, match="send it again later"):
            checking.look(BAD)
        looks += [checking.look(GOOD), checking.look(OTHER)]
    child.may_answer.set()
    assert [look.result(PATIENCE) for look in looks] == [""] * 8
    assert said_of(checking, BAD) == ""
    assert sorted(child.asked) == sorted([GOOD, OTHER, BAD])


def test_close_ends_the_looks_under_way_and_begins_no_other(scripted):
    checking = GrammarChecker(PATIENCE, places=3)
    pid = int(said_of(checking, "one").split()[-1])
    looks = [checking.look(text) for text in ("hang", "two", "three")]
    checking.close()
    for look in looks:
        with pytest.raises(CheckerBusy, match="shutting down"):
            look.result(PATIENCE)
    assert checking._child is None
    assert not is_running(pid)


@pytest.mark.parametrize("how", ["hang", "die"])
def test_who_shares_a_look_that_fails_is_told_so_too(scripted, how):
    checking = GrammarChecker(0.5, places=1)
    said = [look.result(PATIENCE) for look in [checking.look(how) for _ in range(20)]]
    assert said == ["it takes too long to compile; make it simpler"] * 20
    assert "pid" in said_of(checking, "the next")
    checking.close()


def test_a_child_that_cannot_be_made_fails_its_looks_and_takes_no_place(monkeypatch, child):
    checking = GrammarChecker(PATIENCE, places=1)
    made, may_fail = checker._Child, threading.Event()

    def failing():
        assert may_fail.wait(PATIENCE)
        raise OSError("no more processes")

    monkeypatch.setattr(checker, "_Child", failing)
    looks = [checking.look(GOOD) for _ in range(5)]
    may_fail.set()
    assert all(isinstance(look.exception(PATIENCE), OSError) for look in looks)
    monkeypatch.setattr(checker, "_Child", made)
    child.may_answer.set()
    assert said_of(checking, OTHER) == said_of(checking, GOOD) == ""


@pytest.mark.parametrize("checking", [0.5], indirect=True)
def test_a_grammar_that_took_too_long_is_tried_again(scripted, monkeypatch, checking):
    assert "too long" in said_of(checking, "hang")
    monkeypatch.setattr(checker, "_PROGRAM", _CHILD.replace("hang", "nothing"))
    assert "pid" in said_of(checking, "hang")


@pytest.mark.parametrize("checking", [2.0], indirect=True)
def test_threads_get_each_their_own_answer_whatever_becomes_of_the_others(scripted, checking):
    texts = [f"grammar {i}" for i in range(60)]
    texts[30:30] = "hang", "die"
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda text: said_of(checking, text), texts, timeout=PATIENCE))
    bad = {text for text, each in zip(texts, said, strict=True) if "pid" not in each}
    assert bad == {"hang", "die"}


def test_answers_are_not_mixed_up_between_threads(checking):
    texts = [GOOD, BAD, *(f'start: "{i}"' for i in range(20)), *("(" * i for i in range(1, 20))]
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda text: said_of(checking, text), texts, timeout=PATIENCE))
    wanted = [fault(text) for text in texts]
    assert [bool(each) for each in said] == [bool(each) for each in wanted]
    assert all(want in each for want, each in zip(wanted, said, strict=True) if each)


@pytest.mark.parametrize("checking", [2.0], indirect=True)
def test_a_child_that_cannot_start_is_no_reason_to_wait_for_ever(monkeypatch, checking):
    monkeypatch.setattr(checker, "_PROGRAM", "raise SystemExit(3)")
    assert said_of(checking, GOOD)


def test_close_leaves_no_process_and_may_come_twice_or_first(scripted):
    GrammarChecker().close()
    checking = GrammarChecker(PATIENCE)
    pid = int(said_of(checking, "one").split()[-1])
    assert is_running(pid)
    checking.close()
    assert not is_running(pid)
    checking.close()


def test_close_leaves_no_thread(checking):
    before = set(threading.enumerate())
    said_of(checking, GOOD)
    begun = set(threading.enumerate()) - before
    checking.close()
    for thread in begun:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_the_child_ends_when_whoever_asked_it_is_killed():
    script = (
        "import os, signal\n"
        "from duetjax.constrain.checker import GrammarChecker\n"
        "checking = GrammarChecker(60.0)\n"
        f"checking.look({GOOD!r}).result()\n"
        "print(checking._child._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=PATIENCE)
    pid = int(killed.stdout)
    gone = threading.Event()
    for _ in range(600):
        if not is_running(pid):
            break
        gone.wait(0.1)
    assert not is_running(pid)

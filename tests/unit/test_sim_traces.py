"""Trace files of every format, good and bad, and what a command line's name makes of them."""

import json
import random
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from duetjax.config import ConfigError
from duetjax.sim.traces import Trace, TraceKind, load, read_trace
from duetjax.sim.workload import Arrival, Spec, generate, mean_rate

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
MOONCAKE = '{"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [0, 7]}\n'
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
)
JSONL = '{"at": 0.5, "prompt_tokens": 600, "output_tokens": 2, "blocks": [4]}\n'
SAMPLES = {
    TraceKind.AZURE: (AZURE, Arrival(0.0, 4808, 10)),
    TraceKind.MOONCAKE: (MOONCAKE, Arrival(0.0, 513, 5, (0, 7))),
    TraceKind.BURSTGPT: (BURSTGPT, Arrival(0.0, 472, 18)),
    TraceKind.JSONL: (JSONL, Arrival(0.0, 600, 2, (4,))),
}
CSV = (AZURE, BURSTGPT)
JSON_LINES = (MOONCAKE, JSONL)


@pytest.fixture
def write(tmp_path):
    """Puts a trace in a file and returns its path."""

    def written(text):
        file = tmp_path / "trace"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    return written


def request(**values):
    """A line of our own format; None leaves a key out."""
    fields = {"at": 0, "prompt_tokens": 1, "output_tokens": 1, **values}
    return json.dumps({key: value for key, value in fields.items() if value is not None})


# What is read.


@pytest.mark.parametrize("kind", TraceKind)
@pytest.mark.parametrize("is_told", [True, False])
def test_a_trace_is_recognised_by_its_first_line_or_read_as_told(kind, is_told, write):
    text, arrival = SAMPLES[kind]
    trace = read_trace(write(text), kind if is_told else None)
    assert trace == Trace([arrival], kind, dropped=0)


@pytest.mark.parametrize("text", [text for text, _ in SAMPLES.values()])
def test_line_ends_of_windows_blank_lines_and_a_byte_order_mark_do_no_harm(text, write):
    plain = read_trace(write(text))
    surrounded = "\ufeff\n" + text.replace("\n", "\r\n\r\n") + "  \n"
    assert read_trace(write(surrounded)) == plain
    assert read_trace(write("\ufeff" + text.removesuffix("\n"))) == plain


def test_an_azure_trace_of_many_lines_comes_back_as_it_was_written(write):
    draw = random.Random(4)
    began = datetime(2023, 11, 16, 23, 59, 0)
    seconds = [0.0, *sorted(draw.uniform(0.0, 300.0) for _ in range(199))]
    rows = [(at, draw.randint(1, 8000), draw.randint(1, 900)) for at in seconds]
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for at, prompt, output in rows:
        when = f"{began + timedelta(seconds=at):%Y-%m-%d %H:%M:%S.%f}{draw.randrange(10)}"
        lines.append(f"{when},{prompt},{output}")
    trace = read_trace(write("\n".join(lines)))
    assert [each.at for each in trace.arrivals] == pytest.approx(seconds, abs=2e-6)
    assert [(each.prompt_tokens, each.output_tokens) for each in trace.arrivals] == [
        row[1:] for row in rows
    ]


@pytest.mark.parametrize("zone", ["", "+00:00", "Z"])
@pytest.mark.parametrize(
    ("fraction", "at"), [("", 1.0), (".5", 1.5), (".009930", 1.00993), (".0099309", 1.00993)]
)
def test_azure_times_have_any_number_of_digits_and_a_zone_or_none(zone, fraction, at, write):
    lines = f"2024-05-10 00:00:00{zone},1,1\n2024-05-10 00:00:01{fraction}{zone},2,2\n"
    trace = read_trace(write("TIMESTAMP,ContextTokens,GeneratedTokens\n" + lines))
    assert trace.arrivals[1].at == pytest.approx(at, abs=1e-6)


def test_zones_of_one_file_are_respected(write):
    lines = "2024-05-10 02:00:03+02:00,1,1\n2024-05-10 00:00:04,2,2\n"
    trace = read_trace(write("TIMESTAMP,ContextTokens,GeneratedTokens\n" + lines))
    assert trace.arrivals[1].at == pytest.approx(1.0, abs=1e-6)


def test_mooncake_times_are_milliseconds_and_its_blocks_shared(write):
    later = MOONCAKE.replace(": 0,", ": 3052,").replace("[0, 7]", "[0, 8]")
    trace = read_trace(write(MOONCAKE + later))
    assert trace.arrivals[1] == Arrival(3.052, 513, 5, (0, 8))


def test_columns_are_found_by_name_in_any_order_and_quoted(write):
    text = '"Log Type",Response tokens ,Timestamp,Request tokens\n"a, b",18.0,4,5\nx,1,5.5,2\n'
    trace = read_trace(write(text))
    assert trace == Trace([Arrival(0.0, 5, 18), Arrival(1.5, 2, 1)], TraceKind.BURSTGPT, 0)


def test_failures_are_dropped_and_counted_and_the_rest_begins_at_0(write):
    text = BURSTGPT.replace("5,ChatGPT,472,18", "1,GPT-4,9,0").replace("490", "9")
    more = "3,GPT-4,10,4,14,API log\n2,GPT-4,0,4,4,API log\n4,GPT-4,11,5,16,API log\n"
    trace = read_trace(write(text + more))
    assert trace == Trace([Arrival(0.0, 10, 4), Arrival(1.0, 11, 5)], TraceKind.BURSTGPT, 2)


def test_unsorted_files_are_sorted_and_equal_times_keep_their_order(write):
    lines = [request(at=at, prompt_tokens=1 + i) for i, at in enumerate((7, 3, 7, 3, 5))]
    trace = read_trace(write("\n".join(lines)))
    assert [(each.at, each.prompt_tokens) for each in trace.arrivals] == [
        (0.0, 2),
        (0.0, 4),
        (2.0, 5),
        (4.0, 1),
        (4.0, 3),
    ]


def test_a_generated_workload_comes_back_from_our_own_format_as_it_was(write):
    made = generate(Spec("mooncake-conversation", seconds=60.0))
    lines = [json.dumps({name: getattr(each, name) for name in Arrival.__slots__}) for each in made]
    assert read_trace(write("\n".join(lines))).arrivals == made


def test_blocks_and_other_keys_may_be_there_or_not(write):
    trace = read_trace(write(request(user="x") + "\n" + request(at=1, blocks=[3])))
    assert [each.blocks for each in trace.arrivals] == [(), (3,)]


# What is refused.


def refused(file, kind=None):
    """The one line that says what is wrong with a file."""
    with pytest.raises(ConfigError) as caught:
        read_trace(file, kind)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(str(file))


BAD_NUMBERS = ["", "many", "-1", "nan", "inf", "1e400", "0x10", "true", "1.5", "3000000000"]


@pytest.mark.parametrize("bad", BAD_NUMBERS)
@pytest.mark.parametrize("text", CSV)
@pytest.mark.parametrize("column", [1, 2])
def test_a_bad_count_in_a_csv_file_is_refused_with_its_line(bad, text, column, write):
    header, line = text.splitlines()
    index = column if text is AZURE else 1 + column
    fields = line.split(",")
    fields[index] = bad
    wrong = refused(write("\n".join([header, line, ",".join(fields), line])))
    assert wrong.startswith(f":3: {header.split(',')[index]} must be a")


@pytest.mark.parametrize("bad", [None, "1", -1, True, 1.5, [], {}, 2**31, 10**400, float("nan")])
@pytest.mark.parametrize("text", JSON_LINES)
@pytest.mark.parametrize("key", ["prompt_tokens", "output_tokens"])
def test_a_bad_count_in_a_json_file_is_refused_with_its_line(bad, text, key, write):
    mooncake = {"prompt_tokens": "input_length", "output_tokens": "output_length"}
    name = key if text is JSONL else mooncake[key]
    wrong = refused(write(text + json.dumps(json.loads(text) | {name: bad})))
    assert wrong.startswith(f":2: {name} must be a")


@pytest.mark.parametrize("bad", ["nan", "-0.1", "inf", "soon", ""])
def test_a_bad_time_in_a_csv_file_is_refused_with_its_line(bad, write):
    assert refused(write(BURSTGPT.replace("\n5,", f"\n{bad},"))).startswith(":2: Timestamp must be")


@pytest.mark.parametrize("bad", ["", "5", "nan", "2023-13-01 00:00:00", "yesterday", "-1"])
def test_what_is_no_date_is_refused_with_its_line(bad, write):
    text = AZURE.replace("2023-11-16 18:17:03.9799600", bad)
    assert refused(write(text)).startswith(":2: TIMESTAMP must be as 2023-11-16")


@pytest.mark.parametrize("bad", [None, "0", -1, True, float("nan"), float("inf"), [0]])
@pytest.mark.parametrize(("text", "key"), [(MOONCAKE, "timestamp"), (JSONL, "at")])
def test_a_bad_time_in_a_json_file_is_refused_with_its_line(bad, text, key, write):
    wrong = refused(write(text + json.dumps(json.loads(text) | {key: bad})))
    assert wrong.startswith(f":2: {key} must be a number")


@pytest.mark.parametrize("bad", [None, 1, "12", [1.0], [-1], [True], [2**53], [[]], {"1": 2}])
@pytest.mark.parametrize(("text", "key"), [(MOONCAKE, "hash_ids"), (JSONL, "blocks")])
def test_bad_blocks_are_refused_with_their_line(bad, text, key, write):
    wrong = refused(write(text + json.dumps(json.loads(text) | {key: bad})))
    assert wrong.startswith(f":2: {key} must be a list")


def test_blocks_of_another_size_are_refused(write):
    assert "3 ids for 513 tokens" in refused(write(MOONCAKE.replace("[0, 7]", "[0, 7, 8]")))


@pytest.mark.parametrize("key", ["at", "prompt_tokens", "output_tokens"])
def test_a_missing_key_is_named_with_its_line(key, write):
    assert refused(write(JSONL + request(**{key: None}))) == f":2: {key} is missing"


def test_a_mooncake_request_must_have_its_blocks(write):
    without = MOONCAKE.replace(', "hash_ids": [0, 7]', "")
    assert refused(write(MOONCAKE + without)) == ":2: hash_ids is missing"


@pytest.mark.parametrize("name", ["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
def test_a_missing_column_is_named(name, write):
    text = AZURE.replace(name, "Other")
    assert refused(write(text), TraceKind.AZURE).startswith(f":1: has no column {name}")


@pytest.mark.parametrize("line", ["2023-11-16 18:17:03", "2023-11-16 18:17:03,1,2,3", ",,,"])
def test_a_row_must_have_as_many_fields_as_the_header(line, write):
    assert refused(write(AZURE + "\n" + line)).startswith(":4: has ")


def test_a_quote_that_does_not_end_is_refused_with_its_line(write):
    assert refused(write(BURSTGPT + '6,"Chat,1,1,2,x\n')).startswith(":3: not CSV")


@pytest.mark.parametrize("line", ["{", "nothing", '{"at": 1,}', "[" * 100_000, "1" * 5000])
def test_a_line_that_is_no_json_is_refused_with_its_number(line, write):
    assert refused(write(JSONL + line)).startswith(":2: not JSON")


@pytest.mark.parametrize("line", ["[]", "null", "3", '"at"'])
def test_a_line_that_is_no_object_is_refused_with_its_number(line, write):
    assert refused(write(JSONL + line)).startswith(":2: must be an object")


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_an_empty_file_is_refused(text, write):
    assert refused(write(text)).startswith(":1: is empty")


@pytest.mark.parametrize(
    "text",
    [
        AZURE.splitlines()[0],
        BURSTGPT.splitlines()[0],
        request(output_tokens=0),
        request(prompt_tokens=0),
    ],
)
def test_a_file_without_requests_is_refused(text, write):
    assert refused(write(text)).startswith(":1: no request")


@pytest.mark.parametrize(
    "text", ["a,b,c\n1,2,3", '{"at": 1}', "{}", "at,prompt_tokens,output_tokens\n1,1,1", "\0"]
)
def test_a_first_line_of_no_known_trace_is_answered_with_those_of_all(text, write):
    wrong = refused(write(text))
    assert wrong.startswith(":1: no trace begins so")
    names = ("ContextTokens", "input_length", "Request tokens", "prompt_tokens")
    assert all(name in wrong for name in names)


def test_text_that_is_not_utf_8_is_refused_with_its_line(write):
    assert refused(write(AZURE.encode() + b"2023-11-16 18:17:04\xff,1,1\n")).startswith(":3: not U")


@pytest.mark.parametrize("data", [AZURE.encode("utf-16"), b"\x1f\x8b\x08\x00\xff"])
def test_other_encodings_and_compressed_files_are_refused(data, write):
    assert refused(write(data)).startswith(":1: not UTF-8")


@pytest.mark.parametrize("name", ["", "nowhere.csv", "x" * 300])
def test_a_folder_and_a_missing_file_are_refused(name, tmp_path):
    assert "name a trace's file" in refused(tmp_path / name)


@pytest.mark.parametrize("seed", range(300))
def test_a_damaged_file_is_read_or_refused_in_one_line(seed, write):
    draw = random.Random(seed)
    text = draw.choice([text for text, _ in SAMPLES.values()]) * 2
    data = bytearray(text.encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        data[at : at + draw.randrange(3)] = draw.choice(
            [b"", b"\x00", b"\xff", b"\n", b"\r", b'"', b",", b"-", b"9", b"{", b"e9", b"]"]
        )
    file = write(bytes(data))
    try:
        outcome = f"{file}:{read_trace(file).arrivals[0].at}"
    except ConfigError as error:
        outcome = str(error)
    assert outcome.startswith(f"{file}:")
    assert "\n" not in outcome


# What a command line names.


def loaded(named, **changes):
    defaults = {"rate": None, "seconds": None, "start": 0.0, "seed": 0, "cv": None}
    return load(str(named), **{**defaults, **changes})


TEN = "\n".join(request(at=100 + at, prompt_tokens=1 + at) for at in range(10))


def test_a_file_is_read_whole_unless_told_otherwise(write):
    assert loaded(write(TEN)) == [Arrival(float(at), 1 + at, 1) for at in range(10)]


def test_a_window_of_a_file_counts_from_its_first_request(write):
    window = loaded(write(TEN), start=2.0, seconds=3.0)
    assert window == [Arrival(float(at), 3 + at, 1) for at in range(3)]


def test_a_window_of_a_file_is_cut_before_it_is_brought_to_a_rate(write):
    file = write(TEN)
    window = loaded(file, start=2.0, seconds=3.0, rate=30.0)
    assert mean_rate(window) == pytest.approx(30.0, rel=1e-12)
    scale = window[-1].at / 2.0
    assert window == [
        replace(each, at=each.at * scale) for each in loaded(file, start=2.0, seconds=3.0)
    ]


def test_a_name_is_generated():
    made = loaded("azure-code", rate=3.0, seconds=20.0, seed=4, cv=2.0)
    assert made == generate(Spec("azure-code", 3.0, 20.0, 4, 2.0))


def test_a_name_alone_is_ten_minutes_of_its_trace():
    assert loaded("azure-conversation") == generate(Spec("azure-conversation"))
    assert len(loaded("azure-conversation")) == pytest.approx(5.53 * 600, abs=1)


def test_fixed_lengths_need_a_rate():
    assert len(loaded("fixed:1024x128", rate=2.0, seconds=10.0)) == 20
    with pytest.raises(ConfigError, match="give requests per second"):
        loaded("fixed:1024x128")


@pytest.mark.parametrize("name", ["azure", "mooncake", "no.csv", "x" * 300, ""])
def test_an_unknown_name_is_answered_with_all_that_are_known(name):
    known = "azure-code, azure-conversation, mooncake-conversation, fixed:PROMPTxOUTPUT"
    with pytest.raises(ConfigError, match=known):
        loaded(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cv": 1.0}, "gaps of its own"),
        ({"start": 9.5}, "its last comes at 9 s"),
        ({"start": -1.0}, "start must be at least 0"),
        ({"seconds": 0.0}, "more than 0 s"),
        ({"rate": 0.0}, "rate must be a number above 0"),
        ({"rate": 1.0, "seconds": 0.5}, "no two of 1 requests"),
    ],
)
def test_what_a_file_cannot_give_is_refused(changes, words, write):
    with pytest.raises(ConfigError, match=words):
        loaded(write(TEN), **changes)


def test_a_generated_workload_has_no_start():
    with pytest.raises(ConfigError, match="no start"):
        loaded("azure-code", start=1.0)

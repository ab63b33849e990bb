"""What `duetjax bench` makes of requests whose times a person can write down."""

import json
from math import inf

import numpy as np
import pytest

from duetjax.bench_client import Record, Stream
from duetjax.bench_load import LoadRequest, Prompts, arrivals_of
from duetjax.bench_report import Measured, Objectives, Outcome, lines
from duetjax.sim.workload import Arrival, mean_rate

DONE = b"data: [DONE]\n\n"


def answered(sent, *events, **facts):
    """A request that was due, ready and sent at the same time."""
    times = {"due": sent, "began": sent, "sent": sent} | facts
    tokens = times.pop("tokens", len(events))
    return Record(**times, events=list(events), tokens=tokens, prompt_tokens=10, is_over=True)


def outcome_of(*records, cpu_share=0.0, was_stopped=False):
    return Outcome(records, 0.0, 10.0, cpu_share, was_stopped)


def document_of(*records, goodput=None, ttft=1000.0, tbt=50.0, percentiles=(50, 100), **facts):
    measured = Measured(outcome_of(*records, **facts))
    objectives = Objectives(ttft, tbt, goodput or {})
    names = ("ttft", "tpot", "itl", "e2el", "worst_tbt", "client_queue_time")
    return measured.document(names, percentiles, objectives)


ONE = answered(1.0, 1.1, 1.12, 1.18)  # TTFT 100, gaps 20 and 60, TPOT 40
TWO = answered(2.0, 2.3, 2.31)  # TTFT 300, gap 10
ALONE = answered(3.0, 3.4)  # one token
REFUSED = Record(4.0, 4.0, 4.0, error="429 queue_full", is_over=True)


def test_times_are_those_between_sending_and_events():
    found = document_of(ONE, TWO)
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["p100_ttft_ms"] == pytest.approx(300)
    assert found["std_ttft_ms"] == pytest.approx(100)
    assert found["mean_tpot_ms"] == pytest.approx((40 + 10) / 2)
    assert found["mean_itl_ms"] == pytest.approx((20 + 60 + 10) / 3)
    assert found["median_itl_ms"] == pytest.approx(20)
    assert found["mean_e2el_ms"] == pytest.approx((180 + 310) / 2)
    assert found["mean_worst_tbt_ms"] == pytest.approx((60 + 10) / 2)


def test_throughput_is_over_the_whole_run():
    found = document_of(ONE, TWO, ALONE)
    assert found["request_throughput"] == pytest.approx(0.3)
    assert found["output_throughput"] == pytest.approx(0.6)
    assert found["total_token_throughput"] == pytest.approx(3.6)


def test_a_request_of_one_token_has_no_tpot_and_keeps_any_objective_for_it():
    found = document_of(ALONE, goodput={"tpot": 0.0})
    assert found["mean_tpot_ms"] == 0.0
    assert found["request_goodput"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("goodput", "kept"),
    [
        ({"ttft": 100.01}, 1),
        ({"ttft": 300.01}, 2),
        ({"tpot": 39.0}, 2),
        ({"ttft": 300.01, "tpot": 39.0}, 1),
        ({"e2el": 400.01}, 3),
        ({"e2el": 1.0}, 0),
    ],
)
def test_goodput_counts_requests_that_keep_all_objectives(goodput, kept):
    found = document_of(ONE, TWO, ALONE, REFUSED, goodput=goodput)
    assert found["request_goodput"] == pytest.approx(kept / 10)


def test_without_objectives_there_is_no_goodput():
    assert document_of(ONE)["request_goodput"] is None


def test_attainment_is_of_all_requests_failed_ones_too():
    found = document_of(ONE, TWO, ALONE, REFUSED, ttft=350.0, tbt=50.0)
    assert found["ttft_attainment"] == 2 / 4
    assert found["tbt_attainment"] == 2 / 4
    assert found["attainment"] == 1 / 4
    assert (found["completed"], found["failed"]) == (3, 1)
    assert found["errors_by_code"] == {"429 queue_full": 1}


def test_one_of_a_hundred_gaps_may_be_late():
    gaps = np.full(100, 0.01)
    gaps[50] = 0.5
    steady = answered(0.0, *np.cumsum([0.1, *gaps]))
    assert document_of(steady)["tbt_attainment"] == 1.0
    gaps[51] = 0.5
    uneven = answered(0.0, *np.cumsum([0.1, *gaps]))
    assert document_of(uneven)["tbt_attainment"] == 0.0


def test_tokens_are_the_servers_count_and_events_are_told():
    found = document_of(answered(0.0, 0.1, 0.3, tokens=5))
    assert found["total_output_tokens"] == 5
    assert found["total_output_events"] == 2
    assert found["mean_tpot_ms"] == pytest.approx(200 / 4)
    assert found["warnings"] == ["5 tokens came in 2 events: ITL is between events"]


def test_peaks_are_of_seconds_from_the_first_request_on_and_of_open_requests():
    found = document_of(answered(1.5, 1.6, 2.4, 2.6), answered(2.4, 2.45, 3.0))
    assert found["max_output_tokens_per_s"] == 3.0
    assert found["max_concurrent_requests"] == 2
    assert document_of(answered(0.0, 1.0), answered(1.0, 2.0))["max_concurrent_requests"] == 1


def test_a_client_that_sends_late_says_so():
    late = answered(1.0, 1.2, due=0.99)
    found = document_of(*[ONE] * 99, late)
    assert found["client_lateness_ms"]["p50"] == 0.0
    assert found["client_lateness_ms"]["max"] == pytest.approx(10)
    assert found["warnings"] == []
    [warning] = document_of(ONE, late)["warnings"]
    assert warning.startswith("1 % of the requests left 9.9 ms late")


def test_waiting_for_others_is_not_lateness():
    found = document_of(answered(3.0, 3.2, due=1.0, began=1.0))
    assert found["client_lateness_ms"]["max"] == 0.0
    assert found["mean_client_queue_time_ms"] == pytest.approx(2000)
    assert found["mean_ttft_ms"] == pytest.approx(200)


def test_a_busy_client_says_so():
    [warning] = document_of(ONE, cpu_share=0.9)["warnings"]
    assert warning.startswith("the client took 90% of a core")


def test_requests_that_are_not_over_are_only_counted():
    open_one = Record(2.0, 2.0, 2.0, events=[2.5])
    waiting = Record(3.0)
    found = document_of(ONE, open_one, waiting, was_stopped=True)
    assert (found["completed"], found["failed"], found["unfinished"]) == (1, 0, 2)
    assert found["attainment"] == document_of(ONE)["attainment"]
    assert found["warnings"] == ["stopped before its end"]


def test_nothing_at_all_is_told_too():
    found = document_of(was_stopped=True)
    assert (found["completed"], found["mean_ttft_ms"]) == (0, 0.0)
    table = list(lines(found | {"max_concurrency": None, "request_rate": "inf"}, ["ttft"]))
    assert table[1].split() == ["Successful", "requests:", "0"]


# Streams.


def read(*pieces):
    """The record of a stream whose n-th piece came at n seconds."""
    record = Record(0.0)
    stream = Stream(record)
    for at, piece in enumerate(pieces):
        stream.feed(float(at), piece)
    stream.close()
    return record


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(content):
    return event(choices=[{"index": 0, "text": content, "finish_reason": None}])


USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})


def test_events_of_one_read_come_at_one_time():
    record = read(text("a") + text("b"), text("c"), USAGE + DONE)
    assert record.events == [0.0, 0.0, 1.0]
    assert (record.tokens, record.prompt_tokens, record.error) == (3, 7, None)


def test_an_event_may_come_in_pieces_and_counts_when_it_is_whole():
    first = text("a").replace(b"\n", b"\r\n")
    for cut in range(1, len(first)):
        record = read(first[:cut], first[cut:] + DONE)
        assert record.error is None
        assert record.events == [1.0 if b"\n" in first[cut:-2] else 0.0]


def test_what_brings_no_text_is_no_output():
    role = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    said = event(choices=[{"index": 0, "delta": {"content": "a"}}])
    end = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    assert read(role, b": ping\n\n", said, end, DONE).events == [2.0]
    assert read(role, end, DONE).events == [1.0]


def test_without_a_count_events_are_the_tokens():
    assert read(text("a"), text("b"), DONE).tokens == 2


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([text("a")], "incomplete"),
        ([DONE], "no output"),
        ([text("a"), event(error={"code": "engine_dead"}), DONE], "stream engine_dead"),
    ],
)
def test_a_stream_that_does_not_end_as_it_must_has_failed(pieces, error):
    assert read(*pieces).error == error


# Loads.


def test_requests_come_all_at_once_unless_there_is_a_rate():
    arrivals = arrivals_of(LoadRequest(num_prompts=50, random_input_len=9, random_output_len=3))
    assert set(arrivals) == {Arrival(0.0, 9, 3)}
    assert len(arrivals) == 50
    assert len(arrivals_of(LoadRequest())) == 1000
    paced = arrivals_of(LoadRequest(num_prompts=50, request_rate=4.0))
    assert len({each.at for each in paced}) == len(paced) == 50
    assert mean_rate(paced) == pytest.approx(4.0, rel=0.2)


def test_burstiness_is_the_shape_of_the_gaps():
    def deviation(burstiness):
        load = LoadRequest(num_prompts=5000, request_rate=1.0, burstiness=burstiness)
        gaps = np.diff([each.at for each in arrivals_of(load)])
        return gaps.std() / gaps.mean()

    assert deviation(1.0) == pytest.approx(1.0, rel=0.1)
    assert deviation(None) == deviation(1.0)
    assert deviation(0.25) == pytest.approx(2.0, rel=0.1)
    assert deviation(inf) == pytest.approx(0.0, abs=1e-6)


def test_a_trace_keeps_its_times_unless_there_is_a_rate(tmp_path):
    file = tmp_path / "trace.jsonl"
    rows = [{"at": n * 2.0, "prompt_tokens": 5, "output_tokens": 1} for n in range(5)]
    file.write_text("\n".join(map(json.dumps, rows)))

    def times(**flags):
        return [each.at for each in arrivals_of(LoadRequest(trace=str(file), **flags))]

    assert times() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert times(num_prompts=2) == [0.0, 2.0]
    assert times(start=3.0, duration=4.0) == [1.0, 3.0]
    assert times(request_rate=inf) == [0.0] * 5
    assert times(request_rate=2.5)[-1] == pytest.approx(2.0)


def test_prompts_follow_from_seed_and_number_and_their_blocks():
    def prompt(seed, number, *blocks, tokens=1100):
        return Prompts(300, seed).of(Arrival(0.0, tokens, 1, blocks), number).tolist()

    assert prompt(0, 1, 7, 8) == prompt(0, 1, 7, 8) != prompt(1, 1, 7, 8)
    assert prompt(0, 1, 7, 8)[:1024] == prompt(0, 2, 7, 8)[:1024]
    assert prompt(0, 1, 7, 8)[1024:] != prompt(0, 2, 7, 8)[1024:]
    assert prompt(0, 1, 7, 8)[512:1024] != prompt(0, 1, 7, 9)[512:1024]
    assert prompt(0, 1, 7, tokens=100) == prompt(0, 2, 7, 8)[:100]
    assert len(prompt(0, 1)) == 1100

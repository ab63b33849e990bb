"""`duetjax bench` against the endpoint over the alphabet engine."""

import json
import math
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import END, PATIENCE, FakeEngine, wait_until
from serve_setup import MODEL, serving

from duetjax.bench import BenchRequest, bench, lines
from duetjax.config import ConfigError
from duetjax.serve.limits import Limits

SMALL = {
    "random_input_len": 5,
    "random_output_len": 8,
    "num_prompts": 6,
    "request_timeout_s": PATIENCE,
}
OF_VLLM = """
    date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness
    max_concurrency duration completed failed total_input_tokens total_output_tokens
    request_throughput request_goodput output_throughput total_token_throughput
    max_output_tokens_per_s max_concurrent_requests
""".split()  # noqa: SIM905


def measured(served, **flags):
    return bench(BenchRequest(**{"base_url": served.url} | SMALL | flags)).document


@pytest.fixture
def idle(served):
    """A server, and only what this test asks of it in its engine's memory."""
    served.engine.wait_idle()
    served.engine.requests.clear()
    return served


def test_requests_are_answered_and_counted(idle):
    found = measured(idle)
    assert (found["completed"], found["failed"], found["unfinished"]) == (6, 0, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 48)
    assert (found["model_id"], found["backend"]) == (MODEL, "openai")
    assert (found["request_rate"], found["burstiness"]) == ("inf", 1.0)
    assert found["output_throughput"] == pytest.approx(48 / found["duration"])
    assert found["errors_by_code"] == {}


def test_fields_are_those_of_vllm_and_json(idle):
    found = measured(idle, metric_percentiles="90,99.9")
    statistics = [
        f"{statistic}_{metric}_ms"
        for metric in ("ttft", "tpot", "itl", "e2el")
        for statistic in ("mean", "median", "std", "p90", "p99.9")
    ]
    assert [name for name in OF_VLLM + statistics if name not in found] == []
    assert json.dumps(found, allow_nan=False)


def test_prompts_have_the_length_asked_for_and_ids_of_the_vocabulary(idle):
    measured(idle, random_input_len=100)
    prompts = [new.prompt for new in idle.engine.requests]
    assert [len(prompt) for prompt in prompts] == [100] * 6
    assert len(set(prompts)) == 6
    assert max(map(max, prompts)) <= END
    assert max(map(max, prompts)) > END // 2


def test_requests_of_a_trace_begin_alike_where_it_says_so(idle, tmp_path):
    trace = tmp_path / "trace.jsonl"
    rows = [{"at": 0.0, "prompt_tokens": 40, "output_tokens": n, "blocks": [3]} for n in (1, 2)]
    trace.write_text("".join(f"{json.dumps(row | {'blocks': [7]})}\n" for row in [rows[0]]))
    with trace.open("a") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    found = measured(idle, trace=str(trace), num_prompts=None)
    other, one, two = (new.prompt for new in sorted_by_block(idle.engine.requests))
    assert one == two != other
    assert (found["num_prompts"], found["total_output_tokens"]) == (3, 4)


def sorted_by_block(requests):
    """The prompt that appears once, then the others."""
    prompts = [new.prompt for new in requests]
    return sorted(requests, key=lambda new: prompts.count(new.prompt))


def test_chats_are_asked_in_words(idle):
    found = measured(idle, endpoint="/v1/chat/completions")
    assert (found["completed"], found["backend"]) == (6, "openai-chat")
    assert found["total_output_tokens"] == 48
    assert found["total_input_tokens"] > 6 * 5
    [text] = {bytes(new.prompt).decode().partition(" ")[0][:6] for new in idle.engine.requests}
    assert text == "[user]"


def test_not_more_requests_run_at_a_time_than_asked_for(folder):
    with serving(folder) as served, ThreadPoolExecutor() as pool:
        served.engine.executor.hold()
        running = pool.submit(measured, served, max_concurrency=2)
        wait_until(lambda: len(served.engine.submitted) == 2, "two requests")
        served.engine.executor.release()
        found = running.result(PATIENCE)
    assert found["completed"] == 6
    assert found["max_concurrent_requests"] <= 2
    assert found["median_client_queue_time_ms"] > 0


def test_a_server_that_answers_nobody_gets_all_requests_nevertheless(folder):
    with serving(folder) as served, ThreadPoolExecutor() as pool:
        served.engine.executor.hold()
        running = pool.submit(measured, served, request_rate=100.0)
        wait_until(lambda: len(served.engine.submitted) == 6, "all requests")
        served.engine.executor.release()
        found = running.result(PATIENCE)
    assert (found["completed"], found["max_concurrent_requests"]) == (6, 6)
    assert found["request_rate"] == 100.0
    assert 0 <= found["client_lateness_ms"]["p50"] <= found["client_lateness_ms"]["max"]


def test_who_is_refused_is_counted_by_its_code_and_not_sent_again(folder):
    engine = FakeEngine(num_slots=2)
    limits = Limits(max_num_queued_reqs=0)
    with serving(folder, engine, limits=limits) as served, ThreadPoolExecutor() as pool:
        engine.executor.hold()
        running = pool.submit(measured, served)
        with served.http() as http:
            refused = 'duetjax_refused_requests_total{reason="queue_full"} 4.0'
            wait_until(lambda: refused in http.get("/metrics").text, "four refusals")
        engine.executor.release()
        found = running.result(PATIENCE)
    assert (found["completed"], found["failed"]) == (2, 4)
    assert found["errors_by_code"] == {"429 queue_full": 4}
    assert found["attainment"] <= 2 / 6


def test_what_cannot_fit_fails_and_leaves_no_times(idle):
    report = bench(BenchRequest(base_url=idle.url, num_prompts=2, random_input_len=300))
    assert report.document["errors_by_code"] == {"400 context_length_exceeded": 2}
    assert report.document["mean_ttft_ms"] == 0.0
    assert not report.has_answers
    assert "failed: 2 x 400 context_length_exceeded" in list(lines(report))


def test_a_request_without_an_answer_is_given_up_after_its_time(folder):
    with serving(folder) as served:
        served.engine.executor.hold()
        found = measured(served, num_prompts=1, request_timeout_s=0.2)
        assert found["errors_by_code"] == {"timeout": 1}
        wait_until(lambda: served.engine.aborted == served.engine.submitted, "an abort")


def test_a_stream_that_ends_with_an_error_has_failed(folder):
    with serving(folder) as served, ThreadPoolExecutor() as pool:
        served.engine.executor.hold()
        running = pool.submit(measured, served, num_prompts=1)
        wait_until(lambda: served.engine.executor.num_waiting == 1, "a launch")
        served.engine.executor.break_down()
        found = running.result(PATIENCE)
    assert list(found["errors_by_code"]) in (["stream engine_dead"], ["500 engine_dead"])


def test_warm_ups_are_sent_and_not_told(idle):
    found = measured(idle, num_warmups=2)
    assert len(idle.engine.requests) == 8
    assert len({new.prompt for new in idle.engine.requests}) == 8
    assert found["completed"] == 6


def test_parameters_reach_the_server(idle):
    measured(idle, num_prompts=1, temperature=0.5, extra_body='{"min_p": 0.25}', ignore_eos=False)
    [new] = idle.engine.requests
    assert (new.sampling.temperature, new.sampling.min_p) == (0.5, 0.25)
    assert END in new.stop_ids
    measured(idle, num_prompts=1)
    assert END not in idle.engine.requests[-1].stop_ids


def test_a_key_is_needed_where_the_server_has_one_and_is_told_nobody(folder, monkeypatch):
    with serving(folder, api_key="secret") as served:
        with pytest.raises(ConfigError, match="401; give --api-key"):
            measured(served)
        assert "secret" not in json.dumps(measured(served, api_key="secret"))
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert measured(served)["completed"] == 6


def test_results_are_written_and_in_detail_if_asked_for(idle, tmp_path):
    file = tmp_path / "result.json"
    found = measured(idle, result_filename=file)
    assert file.read_text() == json.dumps(found)
    measured(idle, result_filename=file, save_detailed=True)
    detailed = json.loads(file.read_text())
    assert detailed["output_lens"] == [8] * 6
    assert [len(detailed[name]) for name in ("ttfts", "itls", "start_times")] == [6] * 3


def test_a_result_has_a_name_of_its_own(idle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = measured(idle, save_result=True, max_concurrency=3)
    [file] = tmp_path.iterdir()
    assert file.name == f"openai-infqps-concurrency3-{MODEL}-{found['date']}.json"


# Whoever runs the tests in the background may have told their processes to ignore it.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from duetjax.cli import main
sys.exit(main())
"""


def test_ctrl_c_tells_what_was_seen_until_then(folder):
    command = [sys.executable, "-c", INTERRUPTIBLE, "bench", "--num-prompts", "7"]
    command += ["--random-input-len", "5", "--max-concurrency", "3", "--base-url"]
    with serving(folder) as served:
        served.engine.executor.hold()
        process = subprocess.Popen([*command, served.url], stdout=subprocess.PIPE, text=True)
        with process:
            wait_until(lambda: len(served.engine.submitted) == 3, "requests under way")
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=PATIENCE)
    *table, last = out.splitlines()
    found = json.loads(last)
    assert process.returncode == 130
    assert (found["completed"], found["failed"], found["unfinished"]) == (0, 0, 7)
    assert "warning: stopped before its end" in table


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"base_url": "localhost:8000"}, "--base-url localhost:8000"),
        ({"base_url": "http://127.0.0.1:1"}, "start `duetjax serve`"),
        ({"base_url": "http://a:b"}, "--base-url http://a:b"),
        ({"endpoint": "/v1/embeddings"}, "--endpoint /v1/embeddings"),
        ({"header": ("x-name",)}, "--header x-name"),
        ({"header": ("x name=1",)}, "see --header"),
        ({"num_prompts": 0}, "--num-prompts 0"),
        ({"num_prompts": 10**6, "random_input_len": 1000}, "--num-prompts or --duration"),
        ({"request_rate": 0.0}, "--request-rate 0"),
        ({"request_rate": math.nan}, "--request-rate nan"),
        ({"burstiness": -1.0}, "--burstiness -1"),
        ({"random_output_len": 0}, "--random-output-len 0"),
        ({"max_concurrency": 0}, "--max-concurrency 0"),
        ({"num_warmups": -1}, "--num-warmups -1"),
        ({"duration": 5.0}, "--trace"),
        ({"trace": "nowhere.jsonl"}, "nowhere.jsonl is no file"),
        ({"dataset_name": "sharegpt"}, "--dataset-name sharegpt"),
        ({"dataset_name": "random", "trace": "azure-code"}, "--dataset-name random"),
        ({"extra_body": "[]"}, r"--extra-body \[\]"),
        ({"goodput": ("itl:5",)}, "--goodput itl:5"),
        ({"goodput": ("ttft",)}, "--goodput ttft"),
        ({"percentile_metrics": "ttft,speed"}, "--percentile-metrics speed"),
        ({"metric_percentiles": "50,101"}, "--metric-percentiles 50,101"),
        ({"ttft_slo_ms": 0.0}, "--ttft-slo-ms 0"),
        ({"request_timeout_s": math.nan}, "--request-timeout-s nan"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(served, flags, named):
    with pytest.raises(ConfigError, match=named) as refused:
        measured(served, **flags)
    assert "\n" not in str(refused.value)

"""GET /metrics: parses, has vLLM's names, and counts what was sent."""

import pytest
from fake_engine import wait_until
from prometheus_client.parser import text_string_to_metric_families
from serve_setup import MODEL, post_bytes, serving, write_tokenizer


@pytest.fixture
def served(tmp_path):
    write_tokenizer(tmp_path)
    with serving(tmp_path) as served:
        yield served


@pytest.fixture
def http(served):
    with served.http() as http:
        yield http


def scrape(http):
    """Every sample as {(name, labels without the model): value}; the model label is checked."""
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("vllm:"):
                assert labels.pop("model_name") == MODEL
            samples[sample.name, *labels.values()] = sample.value
    return samples


def complete(http, **body):
    given = {"model": MODEL, "prompt": "abc", "max_tokens": 4} | body
    assert http.post("/v1/completions", json=given).status_code == 200


def test_the_counts_agree_with_what_was_sent(http):
    complete(http)
    complete(http, stream=True)
    complete(http, prompt="yy", n=2)
    complete(http, prompt=["a"], stop="d", max_tokens=9)
    http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "n": 0})
    samples = scrape(http)
    assert samples["vllm:prompt_tokens_total",] == 3 + 3 + 2 * 2 + 1
    assert samples["vllm:request_success_total", "length"] == 2
    assert samples["vllm:request_success_total", "stop"] == 3
    assert samples["vllm:request_success_total", "abort"] == 0
    assert samples["vllm:request_success_total", "error"] == 0
    assert samples["vllm:time_to_first_token_seconds_count",] == 5
    assert samples["vllm:e2e_request_latency_seconds_count",] == 5
    assert samples["vllm:request_time_per_output_token_seconds_count",] == 5
    gaps = 3 + 3 + 2 * 1 + 2  # "bcd", then the stop string was complete
    assert samples["vllm:inter_token_latency_seconds_count",] == gaps
    assert samples["vllm:generation_tokens_total",] >= 4 + 4 + 2 * 2 + 3
    assert samples["vllm:num_preemptions_total",] == 0


def test_gauges_show_what_is_held_and_come_back(served, http):
    executor = served.engine.executor
    executor.hold()
    with served.connect() as connection:
        connection.sendall(post_bytes("/v1/completions", {"model": MODEL, "prompt": "a" * 33}))
        executor.step(2)
        wait_until(lambda: served.engine.stats().steps == 2, "two steps")
        samples = scrape(http)
        assert samples["vllm:num_requests_running",] == 1
        assert samples["vllm:num_requests_waiting",] == 0
        assert samples["duetjax_pages", "held"] == 3
        assert samples["duetjax_pages", "quarantined"] == 0
        assert samples["duetjax_pages", "free"] + samples["duetjax_pages", "cached"] == 512 - 3
        assert samples["vllm:kv_cache_usage_perc",] == 3 / 512
        executor.release()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    served.engine.wait_idle()
    samples = scrape(http)
    assert samples["vllm:num_requests_running",] == 0
    assert samples["vllm:kv_cache_usage_perc",] == 0
    assert samples["duetjax_pages", "free"] + samples["duetjax_pages", "cached"] == 512


def test_a_client_that_left_is_counted_as_aborted(served, http):
    served.engine.executor.hold()
    with served.connect() as connection:
        body = {"model": MODEL, "prompt": "a", "n": 2}
        connection.sendall(post_bytes("/v1/completions", body))
        wait_until(lambda: len(served.engine.submitted) == 2, "submission")
    wait_until(lambda: len(served.engine.aborted) == 2, "aborts")
    served.engine.executor.release()
    served.engine.wait_idle()
    samples = scrape(http)
    assert samples["vllm:request_success_total", "abort"] == 2
    assert samples["vllm:request_success_total", "stop"] == 0


def test_a_request_that_the_engine_lost_is_counted_as_an_error(served, http):
    served.engine.executor.break_down()
    body = {"model": MODEL, "prompt": "a", "stream": True}
    http.post("/v1/completions", json=body)
    assert scrape(http)["vllm:request_success_total", "error"] == 1


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("time_to_first_token_seconds", ["0.001", "0.02", "0.25", "80.0", "2560.0", "+Inf"]),
        ("inter_token_latency_seconds", ["0.01", "0.025", "0.15", "0.75", "80.0", "+Inf"]),
        ("request_time_per_output_token_seconds", ["0.01", "0.025", "0.15", "80.0", "+Inf"]),
        ("e2e_request_latency_seconds", ["0.3", "0.8", "1.5", "240.0", "7680.0", "+Inf"]),
    ],
)
def test_histograms_have_the_buckets_that_dashboards_for_vllm_expect(http, name, bounds):
    samples = scrape(http)
    assert [(f"vllm:{name}_bucket", b) in samples for b in bounds] == [True] * len(bounds)
    assert samples[f"vllm:{name}_count",] == 0


def test_two_servers_in_a_process_count_for_themselves(served, http, tmp_path):
    with serving(tmp_path) as other, other.http() as other_http:
        complete(other_http)
        assert scrape(other_http)["vllm:request_success_total", "length"] == 1
        assert scrape(http)["vllm:request_success_total", "length"] == 0

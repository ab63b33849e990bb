"""`duetjax bench` against a server, or an engine alone, whose timings are written down."""

import json
import subprocess
import sys

import pytest
from server_process import metric, serving

DECODE_MS, PREFILL_MS, TOKENS = 20.0, 60.0, 16
ONE_AT_A_TIME = ("--num-prompts", "8", "--max-concurrency", "1")
TTFT = "vllm:time_to_first_token_seconds"


def benched(*flags):
    """The JSON line of a run of the command."""
    command = [sys.executable, "-m", "duetjax.cli", "bench", *flags]
    lengths = ["--random-input-len", "20", "--random-output-len", str(TOKENS)]
    done = subprocess.run(
        [*command, *lengths], capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def url():
    script = f"{DECODE_MS:g}/{PREFILL_MS:g}"
    with serving("--device", "sim", "--sim-step-ms", script) as (_, url):
        benched("--base-url", url, "--num-prompts", "1")
        yield url


def test_one_request_at_a_time_takes_no_less_than_the_script_says(url):
    before = metric(url, f"{TTFT}_sum"), metric(url, f"{TTFT}_count")
    found = benched("--base-url", url, *ONE_AT_A_TIME, "--seed", "1")
    seconds, count = (
        metric(url, f"{TTFT}_sum") - before[0],
        metric(url, f"{TTFT}_count") - before[1],
    )
    assert (found["completed"], count, found["total_output_tokens"]) == (8, 8, 8 * TOKENS)
    assert found["mean_tpot_ms"] > 0.95 * DECODE_MS
    assert PREFILL_MS - 0.1 < 1e3 * seconds / count < found["mean_ttft_ms"]


def test_requests_come_at_their_rate(url):
    flags = ("--num-prompts", "12", "--rate", "6", "--burstiness", "inf", "--seed", "2")
    found = benched("--base-url", url, *flags, "--goodput", "ttft:60000", "tpot:60000")
    assert found["completed"] == 12
    assert found["duration"] > 11 / 6 + (PREFILL_MS + (TOKENS - 1) * DECODE_MS - 0.1) / 1e3
    assert found["request_goodput"] == found["request_throughput"]


def test_without_http_it_takes_no_less_than_the_script_says():
    script = ("--device", "sim", "--sim-step-ms", f"{DECODE_MS:g}/{PREFILL_MS:g}")
    found = benched("--in-process", *script, *ONE_AT_A_TIME)
    assert (found["completed"], found["total_output_events"]) == (8, 8 * TOKENS)
    assert found["mean_ttft_ms"] > PREFILL_MS - 0.1
    assert found["mean_tpot_ms"] > 0.95 * DECODE_MS
    assert found["mean_e2el_ms"] > PREFILL_MS + (TOKENS - 1) * DECODE_MS - 0.1

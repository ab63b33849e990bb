"""NVIDIA's load tool against running servers: what it measures, and that its counts are theirs.

`python aiperf_client.py demo=URL h200=URL`, as tests/clients/run.py does. It reads the tokenizer
of the demo checkpoint from its folder, and no hub.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from urllib.request import urlopen

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
NUM_REQUESTS = 64
COUNTED = {
    "vllm:prompt_tokens_total": "total_usage_prompt_tokens",
    "vllm:generation_tokens_total": "total_usage_completion_tokens",
}
LATENCIES = "time_to_first_token", "inter_token_latency", "request_latency"


def profile(url, folder, *flags):
    """What aiperf exports of one load: a summary, each request, and the server's own series."""
    out = Path(folder) / "out"
    command = [
        *(sys.executable, "-m", "aiperf", "profile", "--url", url, "--tokenizer", str(DEMO)),
        *("--streaming", "--concurrency", "8", "--request-count", str(NUM_REQUESTS)),
        *("--random-seed", "1", "--no-gpu-telemetry", "--ui", "none", "--output-artifact-dir"),
        *(str(out), *flags),
    ]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": folder, "TMPDIR": folder}
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | nowhere, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((out / "profile_export_aiperf.json").read_text())
    lines = (out / "profile_export.jsonl").read_text().splitlines()
    server = json.loads((out / "server_metrics_export.json").read_text())
    return summary, [json.loads(line)["metrics"] for line in lines], server


def counters(url):
    with urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(x.split()[-1]) for name in COUNTED for x in lines if re.match(name, x)}


def check_load(url, *flags):
    """All requests succeed, all figures are there, and both sides have counted the same tokens."""
    before = counters(url)
    with tempfile.TemporaryDirectory() as folder:
        summary, records, server = profile(url, folder, *flags)
    assert summary["request_count"]["avg"] == len(records) == NUM_REQUESTS
    assert (summary["is_complete"], summary["was_cancelled"]) == (True, False)
    assert (summary["error_summary"], summary["request_error_rate"]["avg"]) == ([], 0)
    for name in LATENCIES:
        assert 0 < summary[name]["p50"] <= summary[name]["p99"], (name, summary[name])
        assert all(record[name]["value"] >= 0 for record in records), name
    for name, counted in COUNTED.items():
        grown = counters(url)[name] - before[name]
        assert grown == summary[counted]["avg"] > 0, (name, grown, summary[counted])
    assert "vllm:time_to_first_token_seconds" in server["metrics"], list(server["metrics"])
    figures = [f"{name} {summary[name]['p50']:.2f} ms" for name in LATENCIES]
    tokens = [f"{name} {summary[name]['avg']:.0f}" for name in COUNTED.values()]
    print(" ", ", ".join((*figures, *tokens)), flush=True)
    return summary, records


def check_chat(url):
    """The demo model; usage is what the server says."""
    summary, records = check_load(
        url,
        *("-m", "duetjax-demo", "--endpoint-type", "chat", "--use-server-token-count"),
        *("--isl", "200", "--isl-stddev", "50", "--osl", "32", "--osl-stddev", "0"),
        *("--extra-inputs", '{"ignore_eos": true}'),
    )
    assert {record["output_sequence_length"]["value"] for record in records} == {32}
    assert summary["total_osl"]["avg"] == 32 * NUM_REQUESTS


def check_completions(url):
    """A simulated H200; prompts are also counted by aiperf, which leaves out the first token."""
    extra = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    objective = "x-slo-tbt-ms:025"  # aiperf 0.13 takes 25 for an integer, and then refuses it
    summary, records = check_load(
        url,
        *("-m", "llama-3.1-8b", "--endpoint-type", "completions"),
        *("--isl", "2000", "--isl-stddev", "800", "--osl", "64", "--osl-stddev", "0"),
        *("--extra-inputs", json.dumps(extra), "--header", objective),
        *("--goodput", "time_to_first_token:60000 inter_token_latency:60000"),
    )
    for record in records:
        assert record["usage_completion_tokens"]["value"] == 64, record
        prompt = record["usage_prompt_tokens"]["value"]
        assert prompt == record["input_sequence_length"]["value"] + 1, record
    assert summary["good_request_count"]["avg"] == NUM_REQUESTS, summary["good_request_count"]


def main():
    urls = dict(argument.split("=", 1) for argument in sys.argv[1:])
    print(f"aiperf {version('aiperf')}", flush=True)
    for check, url in ((check_chat, urls["demo"]), (check_completions, urls["h200"])):
        check(url)
        print(f"ok {check.__name__}", flush=True)


if __name__ == "__main__":
    main()

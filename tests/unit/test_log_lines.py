"""The log on standard error: lines for people, or an object a line whoever writes it."""

import json
import logging
import threading
import warnings
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from fake_engine import PATIENCE, wait_until
from prometheus_client.parser import text_string_to_metric_families
from serve_setup import MODEL, serving, write_tokenizer
from server_process import serving as serving_apart
from server_process import starting

from duetjax.log_lines import LogFormat, current_request_id, log_to_stderr

LOG = logging.getLogger("duetjax.some.part")


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_text_is_the_message_of_the_package_s_own_lines(capsys):
    with log_to_stderr():
        LOG.info("loaded %d", 5)
    LOG.info("nobody listens any more")
    assert capsys.readouterr().err == "duetjax: loaded 5\n"


def test_json_has_time_level_logger_and_message(capsys):
    with log_to_stderr(LogFormat.JSON):
        LOG.info("loaded %s", 'a "quoted"\nname')
    LOG.warning("nobody listens any more")
    [line] = lines(capsys)
    at = datetime.fromisoformat(line.pop("time"))
    assert abs(datetime.now(UTC) - at) < timedelta(minutes=1)
    message = 'loaded a "quoted"\nname'
    assert line == {"level": "info", "logger": "duetjax.some.part", "message": message}


def test_others_lines_are_objects_too(capsys):
    with log_to_stderr(LogFormat.JSON):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
        logging.getLogger("uvicorn.error").info("not said")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    first, second = lines(capsys)
    assert (first["level"], first["logger"]) == ("warning", "uvicorn.error")
    assert second["logger"] == "py.warnings"
    assert "old" in second["message"]


def test_an_exception_and_the_request_are_named(capsys):
    with log_to_stderr(LogFormat.JSON):
        token = current_request_id.set("mine-7")
        try:
            int("x")
        except ValueError:
            LOG.exception("it failed")
        current_request_id.reset(token)
        LOG.error("another")
    first, second = lines(capsys)
    assert (first["request_id"], first["level"]) == ("mine-7", "error")
    assert first["exception"].splitlines()[-1].startswith("ValueError: invalid literal")
    assert not {"request_id", "exception"} & second.keys()


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server_is_logged_with_the_request_it_befell(tmp_path, monkeypatch, stream):
    write_tokenizer(tmp_path)
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append((current_request_id.get(), record.getMessage()))

    def broken(*_):
        raise RuntimeError("as the test asked")

    handler = Keep()
    logging.getLogger("duetjax").addHandler(handler)
    try:
        with serving(tmp_path) as served, served.http() as http:
            monkeypatch.setattr("duetjax.serve.generation.Generation._advance", broken)
            body = {"model": MODEL, "prompt": "a", "stream": stream}
            headers = {"x-request-id": "mine-8"}
            assert "internal" in http.post("/v1/completions", json=body, headers=headers).text
    finally:
        logging.getLogger("duetjax").removeHandler(handler)
    assert [request_id for request_id, message in records if "failed" in message] == ["mine-8"]


# A server in a process of its own, and its engine in another.


def test_a_server_that_cannot_start_says_so_in_an_object():
    with starting("--log-format", "json", "--model", "no/such/folder/at/all") as process:
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
    *_, last = [json.loads(line) for line in err.splitlines()]
    assert last["level"] == "error"
    assert "no/such/folder/at/all" in last["message"]


def test_a_server_s_log_is_json_in_both_processes_and_its_metrics_tell_of_a_duet():
    flags = ("--device", "sim", "--policy", "static-split", "--split", "40/92")
    flags += ("--hardware-profile", "h200-sxm", "--log-format", "json", "--max-num-seqs", "8")
    with serving_apart(*flags) as (process, url):
        errors = []

        def load():
            body = {"model": "demo", "prompt": [7] * 700, "max_tokens": 60, "ignore_eos": True}
            with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as http:
                body["model"] = http.get("/v1/models").json()["data"][0]["id"]
                for _ in range(3):
                    response = http.post("/v1/completions", json=body | {"n": 2})
                    if response.status_code != 200:
                        errors.append(response.text)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            scrape(url)
        assert errors == []
        wait_until(lambda: scrape(url).get("duetjax_launch_steps_count", 0) > 50, "a tick")
        wait_until(lambda: scrape(url)["duetjax_split_cores"] == 0, "the end of an episode")
        samples = scrape(url)
        process.terminate()
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert samples["duetjax_activations_total"] > 0
    assert samples["vllm:request_queue_time_seconds_count"] == 24
    assert samples["duetjax_launch_predicted_seconds_count"] > 0
    told = [json.loads(line) for line in err.splitlines()]
    assert {line["level"] for line in told} <= {"info", "warning"}
    assert any(line["logger"].startswith("duetjax") for line in told)


def scrape(url):
    """Sums of all samples of a name."""
    found = {}
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=PATIENCE).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found

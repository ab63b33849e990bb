"""`duetjax bench --in-process` over the alphabet engine, and as a command over a simulated one."""

import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from fake_engine import END, PATIENCE, VOCAB_SIZE, FakeEngine, wait_until

from duetjax.bench import BenchRequest, InProcess, bench
from duetjax.build import LoadedModel, ModelRequest
from duetjax.checkpoint.generation import GenerationDefaults
from duetjax.config import DuetJAXError, EngineConfig, SamplingParams

SMALL = {
    "random_input_len": 5,
    "random_output_len": 8,
    "num_prompts": 6,
    "request_timeout_s": PATIENCE,
}


class Alphabet:
    """The alphabet engine as a model to load. num_loads: how often it was."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.num_loads = 0

    @contextmanager
    def loaded(self):
        """As the command line has it: ended when it is left."""
        self.num_loads += 1
        no_config: Any = None
        sampling = SamplingParams(temperature=0.0, max_tokens=None)
        try:
            yield LoadedModel(
                name="alphabet",
                config=no_config,
                tokenizer=None,
                generation=GenerationDefaults(sampling, (END,)),
                max_model_len=256,
                engine=self.engine,
                _seeds=random.Random(0),
            )
        finally:
            assert self.engine.shutdown(PATIENCE)

    def bench(self, **flags):
        """What a small benchmark of it says."""
        in_process = InProcess(ModelRequest(), EngineConfig(), self.loaded)
        return bench(BenchRequest(**SMALL | flags), in_process).document


@pytest.fixture
def alphabet():
    return Alphabet()


def test_requests_are_answered_and_counted(alphabet):
    found = alphabet.bench()
    assert (found["completed"], found["failed"], found["unfinished"]) == (6, 0, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 48)
    assert found["total_output_events"] == 48
    assert (found["model_id"], found["backend"]) == ("alphabet", "duetjax in-process")
    assert 0 < found["median_ttft_ms"] < found["median_e2el_ms"]
    assert alphabet.engine.stats().pages_held == 0


def test_the_report_has_the_fields_of_an_endpoints(alphabet, served):
    ours = alphabet.bench()
    theirs = bench(BenchRequest(base_url=served.url, **SMALL)).document
    assert ours.keys() == theirs.keys()
    assert ours["arguments"]["max_num_seqs"] == EngineConfig().max_num_seqs
    assert "base_url" not in ours["arguments"]
    assert json.dumps(ours, allow_nan=False)


def test_prompts_and_parameters_are_those_that_an_endpoint_gets(alphabet, served):
    served.engine.wait_idle()
    served.engine.requests.clear()
    flags = {"random_input_len": 100, "temperature": 0.5, "seed": 3}
    bench(BenchRequest(base_url=served.url, **SMALL | flags))
    alphabet.bench(**flags)

    def asked(engine):
        requests = sorted(engine.requests, key=lambda new: new.prompt)
        return [(n.prompt, n.max_tokens, n.sampling.temperature, n.stop_ids) for n in requests]

    ours, theirs = asked(alphabet.engine), asked(served.engine)
    assert [each[1:] for each in ours] == [each[1:] for each in theirs] == [(8, 0.5, ())] * 6
    assert [len(each[0]) for each in ours] == [100] * 6
    assert max(max(each[0]) for each in ours) < VOCAB_SIZE


def test_an_end_of_sequence_ends_a_request_if_it_may(alphabet):
    alphabet.bench(ignore_eos=False)
    assert {new.stop_ids for new in alphabet.engine.requests} == {(END,)}


def test_not_more_requests_run_at_a_time_than_asked_for(alphabet):
    alphabet.engine.executor.hold()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(alphabet.bench, max_concurrency=2)
        wait_until(lambda: len(alphabet.engine.submitted) == 2, "two requests")
        alphabet.engine.executor.release()
        found = running.result(PATIENCE)
    assert (found["completed"], found["max_concurrent_requests"]) == (6, 2)
    assert found["median_client_queue_time_ms"] > 0


def test_times_count_from_when_a_request_was_due(alphabet, tmp_path):
    file = tmp_path / "result.json"
    alphabet.bench(
        request_rate=50.0, burstiness=float("inf"), save_detailed=True, result_filename=file
    )
    starts = json.loads(file.read_text())["start_times"]
    assert sorted(starts) == pytest.approx([number / 50 for number in range(6)], abs=1e-9)


def test_what_cannot_fit_fails_alone(alphabet):
    found = alphabet.bench(num_prompts=2, random_input_len=300)
    assert found["errors_by_code"] == {"context_length_exceeded": 2}


def test_a_request_without_an_answer_is_given_up_after_its_time(alphabet):
    alphabet.engine.executor.hold()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(alphabet.bench, num_prompts=1, request_timeout_s=0.2)
        wait_until(lambda: alphabet.engine.aborted, "an abort")
        alphabet.engine.executor.release()
        found = running.result(PATIENCE)
    assert found["errors_by_code"] == {"timeout": 1}
    assert len(alphabet.engine.aborted) == 1
    assert alphabet.engine.submitted in ([], alphabet.engine.aborted)  # []: the time was up before


def test_an_engine_that_dies_fails_what_it_had(alphabet):
    alphabet.engine.executor.hold()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(alphabet.bench, max_concurrency=1)
        wait_until(lambda: alphabet.engine.executor.num_waiting == 1, "a launch")
        alphabet.engine.executor.break_down()
        found = running.result(PATIENCE)
    assert found["errors_by_code"] == {"engine_dead": 6}


def test_ctrl_c_tells_what_was_seen_until_then(alphabet):
    def interrupt():
        wait_until(lambda: len(alphabet.engine.submitted) >= 3, "requests under way")
        os.kill(os.getpid(), signal.SIGINT)
        alphabet.engine.executor.step(1)  # wakes the event loop, should it have missed the signal
        wait_until(lambda: len(alphabet.engine.aborted) >= 3, "aborts")
        alphabet.engine.executor.release()

    alphabet.engine.executor.hold()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with ThreadPoolExecutor() as pool:
        interrupted = pool.submit(interrupt)
        found = alphabet.bench(max_concurrency=3)
        interrupted.result(PATIENCE)
    signal.signal(signal.SIGINT, before)
    assert (found["completed"], found["failed"], found["unfinished"]) == (0, 0, 6)
    assert "stopped before its end" in found["warnings"]


def test_warm_ups_are_sent_and_not_told(alphabet):
    found = alphabet.bench(num_warmups=2)
    assert len({new.prompt for new in alphabet.engine.requests}) == 8
    assert found["completed"] == 6


def test_a_result_has_a_name_of_its_own(alphabet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = alphabet.bench(save_result=True)
    [file] = tmp_path.iterdir()
    assert file.name == f"duetjax-in-process-infqps-alphabet-{found['date']}.json"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"base_url": "http://127.0.0.1:1"}, "--base-url is for an endpoint"),
        ({"endpoint": "/v1/chat/completions"}, "--endpoint is"),
        ({"api_key": "secret"}, "--api-key is"),
        ({"header": ("x-name=1",)}, "--header is"),
        ({"extra_body": "{}"}, "--extra-body is"),
        ({"temperature": -1.0}, "temperature"),
        ({"num_prompts": 0}, "--num-prompts 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_loaded(alphabet, flags, named):
    with pytest.raises(DuetJAXError, match=named) as refused:
        alphabet.bench(**flags)
    assert "\n" not in str(refused.value)
    assert alphabet.num_loads == 0


# The command.

COMMAND = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name in ("starlette", "uvicorn", "jax"):
            raise ImportError(f"{name} is not wanted here")
sys.meta_path.insert(0, Absent())
from duetjax.cli import main
sys.exit(main())
"""
ALONE = ("--in-process", "--device", "sim", "--random-input-len", "5")


def started(*flags):
    """`duetjax bench`, with neither a server's packages nor jax."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "bench", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_needs_no_server():
    with started(*ALONE, "--sim-step-ms", "1/2", "--num-prompts", "3") as process:
        out, log = process.communicate(timeout=PATIENCE)
    found = json.loads(out.splitlines()[-1])
    assert (process.returncode, found["completed"], log.count("Traceback")) == (0, 3, 0)
    assert found["arguments"]["sim_step_ms"] == [1.0, 2.0]


@pytest.mark.parametrize("flags", [("--device", "sim"), ("--tokenizer", "x"), ("--dtype", "y")])
def test_flags_of_an_engine_need_an_engine_here(flags):
    with started(*flags) as process:
        _, log = process.communicate(timeout=PATIENCE)
    assert (process.returncode, log) == (
        1,
        f"duetjax: error: {flags[0]} needs --in-process; give that too\n",
    )

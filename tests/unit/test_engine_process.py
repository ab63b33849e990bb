"""An engine in a process of its own does what one in this process does, and its end is survived."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace

import pytest
from fake_engine import PATIENCE, wait_until

from duetjax.build import ModelRequest, load
from duetjax.config import ConfigError, DuetJAXError, EngineConfig, InvalidRequest, SamplingParams
from duetjax.engine import Engine, EngineClient, EngineDead
from duetjax.engine_process import EngineDied, EngineProcess
from duetjax.policy.request import FinishReason, NewRequest
from duetjax.watchdog import EngineStalled

SETTINGS = {"device": "sim", "max_num_seqs": 4, "max_num_batched_tokens": 128}


class Told:
    """Collects what an engine says, as whoever serves would."""

    def __init__(self):
        self.tokens = {}
        self.finished = {}
        self.batches = 0
        self.lock = threading.Lock()

    def __call__(self, outputs):
        with self.lock:
            self.batches += 1
            for output in outputs:
                self.tokens.setdefault(output.id, []).extend(output.token_ids)
                if output.finish is not None:
                    assert output.id not in self.finished, "ended twice"
                    self.finished[output.id] = output.finish

    def wait(self, *ids):
        wait_until(lambda: self.finished.keys() >= set(ids), f"the end of {ids}")


def loaded(own_process=True, step_ms=(1.0, 1.0), **settings):
    config = EngineConfig(**SETTINGS | {"sim_step_ms": step_ms} | settings)
    return load(ModelRequest(), config, own_process=own_process).engine


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def engine(told):
    engine = loaded()
    engine.start(told)
    yield engine
    engine.shutdown(PATIENCE)


@pytest.fixture
def slow(told):
    """Of which each step takes a second."""
    engine = loaded(step_ms=(1000.0, 1000.0))
    engine.start(told)
    yield engine
    engine.kill()


def new(request_id, max_tokens=5, **changes):
    sampling = SamplingParams(seed=1, temperature=0.0)
    return replace(NewRequest(request_id, (5, 6, 7), max_tokens, sampling), **changes)


def test_it_says_of_itself_what_one_in_this_process_says(engine):
    here = loaded(own_process=False)
    assert isinstance(here, EngineClient)
    assert isinstance(engine, EngineProcess)
    for name in ("limits", "vocab_size", "rung", "num_slots", "num_live", "failure"):
        assert getattr(engine, name) == getattr(here, name), name
    assert engine.stats() == here.stats()
    assert engine.is_healthy


def test_every_member_that_serving_needs_is_there(engine):
    names = {name for name in vars(Engine) if not name.startswith("_")}
    assert names <= {*dir(EngineProcess), "limits", "vocab_size", "constrains", "rung"}
    assert names <= {*dir(loaded(own_process=False))}


def test_requests_have_the_tokens_they_have_in_this_process(engine, told):
    requests = [
        new("greedy", 20),
        new("seeded", 20, sampling=SamplingParams(seed=7, logit_bias={5: 100})),
        new("scored", 8, sampling=SamplingParams(seed=3, logprobs=2)),
        new("long", 3, prompt=tuple(range(10, 400)), cache_salt="x", priority=2, tbt_slo_ms=12.0),
    ]
    here, heard = loaded(own_process=False), Told()
    here.start(heard)
    for request in requests:
        engine.submit(request)
        here.submit(request)
    told.wait(*(r.id for r in requests))
    heard.wait(*(r.id for r in requests))
    here.shutdown(PATIENCE)
    assert told.tokens == heard.tokens
    assert told.finished == heard.finished
    assert all(type(token) is int for tokens in told.tokens.values() for token in tokens)
    assert engine.stats().generation_tokens == here.stats().generation_tokens


def test_stats_are_never_older_than_the_outputs(told):
    engine = loaded()
    seen = []

    def on_outputs(outputs):
        told(outputs)
        seen.append((engine.stats().generation_tokens, sum(map(len, told.tokens.values()))))

    engine.start(on_outputs)
    for number in range(4):
        engine.submit(new(str(number), 30))
    told.wait(*"0123")
    assert engine.shutdown(PATIENCE)
    assert all(counted >= handed_on for counted, handed_on in seen)
    assert seen[-1] == (120, 120)


def test_an_abort_ends_a_request_and_only_that(engine, told):
    engine.submit(new("a", 4000))
    engine.submit(new("b", 50))
    wait_until(lambda: told.tokens.get("a"), "a token")
    engine.abort("nobody")
    engine.abort("a", unless_begun=True)
    told.wait("b")
    assert "a" not in told.finished
    engine.abort("a")
    told.wait("a")
    assert told.finished == {"a": FinishReason.ABORT, "b": FinishReason.LENGTH}
    wait_until(lambda: engine.stats().pages_held == 0, "free pages")
    assert engine.num_live == 0


def test_who_waits_for_a_slot_can_be_ended_unless_begun(slow, told):
    for number in range(6):
        slow.submit(new(str(number)))
        slow.abort(str(number), unless_begun=number >= 4)
    told.wait(*"012345")
    assert set(told.finished.values()) == {FinishReason.ABORT}


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"prompt": (10**9,)}, "prompt"), ({"id": "taken"}, "in use"), ({"max_tokens": 0}, "max")],
)
def test_what_can_never_run_is_refused_here(slow, changes, match):
    slow.submit(new("taken"))
    with pytest.raises(InvalidRequest, match=match):
        slow.submit(new("other", **changes))
    assert slow.num_live == 1


def test_launches_can_be_watched_and_a_watcher_may_raise(engine, told):
    seen, calls = [], []

    def bad(launches):
        calls.append(launches)
        raise RuntimeError("as the test asked")

    engine.watch_launches(bad)
    stop = engine.watch_launches(seen.extend)
    engine.submit(new("a", 6))
    told.wait("a")
    wait_until(lambda: sum(launch.decode_rows for launch in seen) >= 5, "launches")
    assert len(calls) == 1
    assert {launch.lane.name for launch in seen} == {"WHOLE"}
    assert [launch.prompt_tokens for launch in seen if launch.prompt_chunks] == [3]
    assert {launch.ids for launch in seen} == {("a",)}
    assert sum(launch.generated for launch in seen) == 6
    assert [launch.step_ends[-1] for launch in seen] == [launch.ended for launch in seen]
    stop()
    engine.submit(new("b", 6))
    told.wait("b")
    count = len(seen)
    engine.submit(new("c", 6))
    told.wait("c")
    assert len(seen) == count


def test_shutdown_ends_live_requests_and_the_process(slow, told):
    slow.submit(new("a", 100))
    wait_until(lambda: slow.stats().running == 1, "a launch")
    assert slow.shutdown(PATIENCE)
    assert told.finished == {"a": FinishReason.ABORT}
    assert slow._process.returncode is not None
    assert not slow.is_healthy
    assert slow.failure is None
    assert slow.shutdown(PATIENCE), "twice is once"
    with pytest.raises(EngineDead, match="shut down"):
        slow.submit(new("b"))


def test_an_engine_that_was_never_started_ends_too():
    engine = loaded()
    assert engine.shutdown(1)
    assert engine._process.returncode is not None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_end_of_the_process_ends_every_request_once(slow, told, number):
    for request_id in "abcdef":
        slow.submit(new(request_id, 100))
    os.kill(slow._process.pid, number)
    told.wait(*"abcdef")
    assert set(told.finished.values()) == {FinishReason.ERROR}
    assert isinstance(slow.failure, EngineDied)
    assert f"signal {int(number)}" in str(slow.failure)
    assert not slow.is_healthy
    assert slow.num_live == 0
    with pytest.raises(EngineDead, match="has failed"):
        slow.submit(new("g"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_end_are_for_the_server_alone(engine, told, number):
    os.kill(engine._process.pid, number)
    engine.submit(new("a"))
    told.wait("a")
    assert told.finished["a"] is FinishReason.LENGTH


def test_a_process_that_hangs_is_noticed(told):
    engine = loaded()
    engine.start(told)
    engine.watch(0.5)  # the least is five seconds
    engine.submit(new("a", 4000))
    wait_until(lambda: told.tokens, "a token")
    os.kill(engine._process.pid, signal.SIGSTOP)
    told.wait("a")
    assert isinstance(engine.failure, EngineStalled)
    assert engine.silence > 4
    engine.kill()


def test_a_step_that_hangs_is_noticed_by_the_engine_s_own_watchdog(told):
    engine = loaded(step_ms=(50_000.0, 50_000.0))
    engine.start(told)
    engine.watch(0.3)
    engine.submit(new("a"))
    told.wait("a")
    assert told.finished == {"a": FinishReason.ERROR}
    wait_until(lambda: engine.failure is not None, "the failure")
    assert "nothing has come from the device" in str(engine.failure)
    assert isinstance(engine.failure, DuetJAXError)
    engine.shutdown(0.1)
    assert engine._process.returncode is not None


def test_outputs_that_nobody_takes_end_the_engine():
    engine = loaded()

    def on_outputs(outputs):
        raise RuntimeError("as the test asked")

    engine.start(on_outputs)
    engine.submit(new("a", 4000))
    wait_until(lambda: not engine.is_healthy, "the end")
    assert repr(engine.failure) == repr(RuntimeError("as the test asked"))
    engine.shutdown(PATIENCE)


ABANDONING = """
import os, signal
from duetjax.build import ModelRequest, load
from duetjax.config import EngineConfig
config = EngineConfig(device="sim", sim_step_ms=(1.0, 1.0))
print(load(ModelRequest(), config, own_process=True).engine._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_ends_with_that_of_the_server():
    done = subprocess.run([sys.executable, "-c", ABANDONING], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_until(lambda: not is_running(int(done.stdout)), "its end")


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_is_wrong_with_a_model_is_said_in_one_line():
    config = EngineConfig(**SETTINGS, sim_step_ms=(1.0, 1.0))
    with pytest.raises(ConfigError, match="no tokenizer"):
        load(ModelRequest("llama-3.1-8b"), config, own_process=True, needs_tokenizer=True)
    with pytest.raises(DuetJAXError, match="--max-num-seqs"):
        loaded(max_num_seqs=10**6, max_num_batched_tokens=10**7)


def test_a_backlog_keeps_its_order(told):
    """A reader that stands still while megabytes are written."""
    engine = loaded(step_ms=(0.001, 0.001))
    go = threading.Event()

    def on_outputs(outputs):
        go.wait()
        told(outputs)

    engine.start(on_outputs)
    names = [f"{number}{'x' * 10_000}" for number in range(40)]
    for name in names:
        engine.submit(new(name, 60))
    wait_until(lambda: engine._process.poll() is None, "a process")
    go.set()
    told.wait(*names)
    assert {len(tokens) for tokens in told.tokens.values()} == {60}
    engine.shutdown(PATIENCE)


def test_settings_arrive_as_they_were():
    """All kinds of fields: those that are texts or numbers are, and what is None stays so."""
    from duetjax.engine_process import _texts
    from duetjax.engine_worker import _engine_config
    from duetjax.wire import plain

    config = EngineConfig(**SETTINGS, sim_step_ms=(1.5, 2.0), seed=5, max_model_len=64)
    arrived = _engine_config(_texts(plain(config)))
    for field in fields(EngineConfig):
        assert getattr(arrived, field.name) == getattr(config, field.name), field.name

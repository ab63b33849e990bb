"""`duetjax serve` over a device that never answers: its clients are told, and the process ends."""

import json
from pathlib import Path

import httpx
import pytest
from server_process import metric, serving

HERE = Path(__file__).parent
PATIENCE = 60  # seconds
SIZES = ("--max-num-seqs", "1", "--max-num-batched-tokens", "64")  # few programs
DEMO_BODY = {
    "model": "duetjax-demo",
    "prompt": "Once",
    "stream": True,
    "max_tokens": 200,
    "ignore_eos": True,
}
BODY = {"model": "alphabet", "prompt": "a", "stream": True, "max_tokens": 40}

# Python's own end would wait for ever, as in a library that waits for its device.
PROGRAM = f"""
import atexit, sys, time
atexit.register(time.sleep, 1e6)
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent / "unit")!r}]
import duetjax.build, duetjax.cli
from alphabet_model import alphabet_model
from fake_engine import FakeEngine

engine = FakeEngine()
engine.executor.hold()
engine.executor.step(3)
duetjax.build.load = lambda *_, **__: alphabet_model(engine)
sys.exit(duetjax.cli.main())
"""


# The demo model on this processor; `hanging` never returns, from its tenth call on.
REAL = """
import atexit, itertools, sys, threading, time
atexit.register(time.sleep, 1e6)
import duetjax.cli
from duetjax.runtime import executor, host_lanes

def hanging(real):
    calls = itertools.count(1)
    def call(*arguments):
        if next(calls) >= 10:
            threading.Event().wait()
        return real(*arguments)
    return call

{}
sys.exit(duetjax.cli.main())
"""
STALLED_POLLER = "host_lanes.step_result = hanging(host_lanes.step_result)"
STUCK_LANE = "executor.Chain.dispatch = hanging(executor.Chain.dispatch)"


@pytest.mark.parametrize(
    ("program", "seconds", "body"),
    [
        pytest.param(PROGRAM, "0.5", BODY, id="a device that answers no more"),
        pytest.param(REAL.format(STALLED_POLLER), "3", DEMO_BODY, id="a stalled poller"),
        pytest.param(REAL.format(STUCK_LANE), "3", DEMO_BODY, id="a lane that never returns"),
    ],
)
def test_what_never_comes_back_ends_the_stream_the_health_and_the_process(program, seconds, body):
    flags = ("--watchdog-s", seconds, *SIZES)
    with serving(*flags, program=("-c", program)) as (process, url):
        with httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as client:
            assert client.get("/health").status_code == 200
            stream = client.post("/v1/completions", json=body).text
            health = client.get("/health")
        assert metric(url, "duetjax_engine_healthy") == 0
        *_, error, done = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
        assert json.loads(error)["error"]["code"] == "engine_dead"
        assert done == "[DONE]"
        assert health.status_code == 503
        assert "nothing has come from the device" in health.json()["error"]["message"]
        _, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert "duetjax: error: the engine failed: nothing has come from the device" in log

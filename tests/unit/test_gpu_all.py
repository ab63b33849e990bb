"""benchmarks/gpu_all.py with steps that are scripted: what is run, left, kept and ended."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_all
from gpu_all import Call, Done
from gpu_parts import PARTS, Step

GOES_ON = 3
FAULTS = 4


@pytest.fixture
def ran(tmp_path):
    """Names of the steps that have run, in order."""
    log = tmp_path / "log"
    return lambda: log.read_text().split() if log.exists() else []


@pytest.fixture
def step(tmp_path):
    def make(name, end="", seconds=1.0, **fields):
        result = tmp_path / f"{name}.json"
        program = f"""
import pathlib, sys, time
with open({str(tmp_path / "log")!r}, "a") as log: print({name!r}, file=log)
pathlib.Path({str(result)!r}).write_text("{{}}")
{end}
"""
        return Step(name, [sys.executable, "-c", program], seconds, result, **fields)

    return make


@pytest.fixture
def call(tmp_path, capsys):
    """Carries steps out in a new call; the exit code and the last line."""
    # As main does: below nohup it comes ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(*steps, limit=60.0, part="part"):
        code = Call(part, Done(tmp_path / "done.json"), limit).carry_out(steps)
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    yield run
    signal.signal(signal.SIGINT, before)


def test_steps_run_in_order_and_not_again(call, step, ran):
    steps = [step("one"), step("two")]
    code, last = call(*steps)
    assert code == 0
    assert ran() == ["one", "two"]
    assert all(outcome.startswith("ended with 0") for outcome in last["outcomes"].values())
    assert call(*steps)[0] == 0
    assert ran() == ["one", "two"]


def test_steps_of_other_parts_may_have_the_same_name(call, step, ran):
    call(step("tune"), part="kernels")
    call(step("tune"), part="headline")
    assert ran() == ["tune", "tune"]


def test_a_step_whose_result_is_gone_is_done_again(call, step, ran):
    one = step("one")
    call(one)
    one.result.unlink()
    call(one)
    assert ran() == ["one", "one"]


def test_a_repeated_step_runs_in_every_call(call, step, ran):
    report = step("report", is_repeated=True)
    call(report)
    call(report)
    assert ran() == ["report", "report"]


def test_what_takes_too_long_for_this_call_is_left_and_shorter_steps_still_run(call, step, ran):
    steps = [step("long", seconds=1000.0), step("short")]
    code, last = call(*steps)
    assert (code, last["left"], last["failed"]) == (GOES_ON, ["long"], [])
    assert ran() == ["short"]
    assert call(*steps, limit=2000.0)[0] == 0
    assert ran() == ["short", "long"]


def test_a_step_that_goes_on_in_the_next_call_is_not_done(call, step, ran):
    cells = step("cells", f"sys.exit({GOES_ON})")
    assert call(cells)[0] == GOES_ON
    code, last = call(cells)
    assert (code, last["left"]) == (GOES_ON, ["cells"])
    assert ran() == ["cells", "cells"]


@pytest.mark.parametrize("end", ["sys.exit(1)", "raise ValueError", "sys.exit(2)"])
def test_a_step_that_fails_is_not_done_and_the_others_still_run(call, step, ran, end):
    steps = [step("bad", end, code=FAULTS), step("good")]
    code, last = call(*steps)
    assert (code, last["failed"]) == (1, ["bad"])
    assert call(*steps)[0] == 1
    assert ran() == ["bad", "good", "bad"]


def test_a_good_end_without_its_result_is_a_failure(call, step, tmp_path):
    lost = replace(step("lost"), result=tmp_path / "elsewhere.json")
    code, last = call(lost)
    assert code == 1
    assert last["outcomes"]["lost"] == f"failed: ended with 0 without {lost.result}"


def test_a_check_that_has_found_faults_is_done(call, step, ran):
    check = step("check", f"sys.exit({FAULTS})", code=FAULTS)
    code, last = call(check)
    assert code == 0
    assert last["outcomes"]["check"].startswith("ended with 4")
    call(check)
    assert ran() == ["check"]


@pytest.mark.parametrize("end", ["sys.exit(1)", f"sys.exit({GOES_ON})"])
def test_what_needs_a_step_waits_for_it(call, step, ran, end):
    code, last = call(step("capacity", end, is_needed=True), step("cells"))
    assert code != 0
    assert last["outcomes"]["cells"] == "waits for capacity"
    assert "cells" in last["left"]
    assert ran() == ["capacity"]


def test_what_cannot_run_here_is_left_out(call, step, ran):
    code, last = call(step("triton", lacks="jax-triton"), step("other"))
    assert code == 0
    assert last["outcomes"]["triton"] == "left out, needs jax-triton"
    assert ran() == ["other"]


def test_results_that_are_forgotten_are_made_again(call, step, ran, tmp_path):
    one, two = step("one"), step("two")
    call(one, two)
    folder = tmp_path / "cells"
    folder.mkdir()
    Done(tmp_path / "done.json").forget("part", [one, replace(two, result=folder)])
    assert not one.result.exists()
    assert not folder.exists()
    call(one, two)
    assert ran() == ["one", "two", "one", "two"]


APART = """
import subprocess
words = [sys.executable, "-c", "import signal; signal.pause()"]
child = subprocess.Popen(words, start_new_session=True)
pathlib.Path({file!r}).write_text(str(child.pid))
try:
    child.wait()
finally:
    child.kill()
    child.wait()
"""
"""As gpu_check.py does: a process that no signal to the step's group reaches."""


def is_gone(file):
    """Whether a process has ended; who adopts it may take a moment to notice."""
    pid, deadline = int(file.read_text()), time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_step_over_its_time_is_ended_with_all_that_it_started(call, step, tmp_path, monkeypatch):
    file = tmp_path / "pid"
    slow = step("slow", APART.format(file=str(file)), seconds=0.0)
    monkeypatch.setattr(gpu_all, "_END_S", 20.0)
    code, last = call(slow, step("next", seconds=0.0), limit=24.0)
    assert code == 1
    assert last["outcomes"]["slow"].startswith("failed: given up after")
    assert last["left"] == ["next"]
    assert is_gone(file)


def test_a_step_that_will_not_end_is_killed(call, step, monkeypatch):
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.pause()"
    monkeypatch.setattr(gpu_all, "_END_S", 0.5)
    code, last = call(step("deaf", deaf, seconds=0.0), limit=2.0)
    assert code == 1
    assert last["outcomes"]["deaf"].startswith("failed: given up after")


def test_a_step_is_told_less_time_than_it_has(call, step):
    told = step("told", "pathlib.Path(sys.argv[2]).write_text(sys.argv[1])")
    told = replace(told, command=[*told.command, "{left}", str(told.result)])
    assert call(told, limit=60.0)[0] == 0
    assert 0 < int(told.result.read_text()) <= 60 - gpu_all._END_S - gpu_all._SPARE_S


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("backend", ["cuda", "host"])
def test_every_step_of_a_part_has_a_name_and_a_time_of_its_own(part, backend):
    steps = list(PARTS[part](backend, Path("out"), is_brief=False))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert all(0 < step.seconds < 540 - 10 for step in steps)
    assert all(step.result.is_relative_to("out") for step in steps)


def test_the_headline_is_every_objective_rate_and_seed():
    steps = PARTS["headline"]("cuda", Path("out"), is_brief=False)
    cells = [step.command for step in steps if "cells" in step.command]
    asked = {
        (words[words.index("--objective") + 1], rate, words[words.index("--seed") + 1])
        for words in map(list, cells)
        for rate in words[words.index("--rates") + 1].split(",")
    }
    assert len(asked) == 3 * 5 * 3


def test_an_ended_call_ends_its_step(tmp_path):
    """By SIGTERM, as `timeout` does."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(gpu_all.__file__).parent)!r})
import gpu_all
from pathlib import Path
words = [sys.executable, "-c", {APART.format(file=str(tmp_path / "pid"))!r}]
words[2] = "import sys, pathlib" + words[2]
gpu_all.PARTS["check"] = lambda *a, **k: [gpu_all.Step("slow", words, 1, Path("none"))]
sys.argv = ["gpu_all.py", "check", "--backend", "host", "--out", {str(tmp_path)!r}]
sys.exit(gpu_all.main())
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    ends = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < ends
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert is_gone(tmp_path / "pid")

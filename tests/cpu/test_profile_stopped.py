"""`duetjax profile` that is stopped, or whose device fails or hangs, keeps what it has timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_profile import Scripted, profile

from duetjax import profile_command

PROGRAM = Path(__file__).with_name("scripted_profile.py")
ALL_FILES = ["errors.svg", "hardware-profile.json", "model-profile.json", "points.json"]
EARLY, LATE = 100, 700
"""Launches until something goes wrong: too few for a fit, and half of what 120 points take."""


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """The real one again after each test."""
    monkeypatch.setattr(profile_command, "prepare", None)


def files(folder):
    return sorted(file.name for file in (folder / "out").iterdir())


def points(folder):
    return json.loads((folder / "out/points.json").read_text())["points"]


def test_as_many_points_are_timed_as_are_asked_for(tmp_path, capsys):
    executor = Scripted()
    assert profile(executor, tmp_path, "--points", "120", "--minutes", "1e-6") == 0
    assert executor.was_closed
    assert len(points(tmp_path)) == 120
    assert files(tmp_path) == ALL_FILES
    assert "stopped" not in capsys.readouterr().out


def test_a_folder_that_nobody_names_is_named_for_the_device_and_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert profile(Scripted(), tmp_path, "--points", "120", is_out_named=False) == 0
    [made] = tmp_path.glob("profile-cpu-2-cores-*")
    assert sorted(file.name for file in made.iterdir()) == ALL_FILES


@pytest.mark.parametrize(
    ("what", "code", "complaint"),
    [
        ("stop", 130, ""),
        ("fail", 1, "launches can no longer be timed: RuntimeError('the bus has left')"),
    ],
)
def test_what_was_timed_until_then_is_fitted_to_and_written(
    what, code, complaint, tmp_path, capsys
):
    executor = Scripted(what, LATE)
    assert profile(executor, tmp_path, "--points", "120") == code
    assert executor.was_closed
    assert 20 < len(points(tmp_path)) < 120
    assert all(point["predicted_ms"] > 0 for point in points(tmp_path))
    assert files(tmp_path) == ALL_FILES
    told = capsys.readouterr()
    assert "stopped before its end" in told.out
    assert json.loads(told.out.splitlines()[-1])["num_points"] == len(points(tmp_path))
    assert [line for line in told.err.splitlines() if "error:" in line] == [
        f"duetjax: error: {complaint}" for _ in range(bool(complaint))
    ]


@pytest.mark.parametrize(("what", "code"), [("stop", 130), ("fail", 1)])
def test_too_few_launches_for_a_fit_are_written_all_the_same(what, code, tmp_path, capsys):
    executor = Scripted(what, EARLY)
    assert profile(executor, tmp_path, "--points", "120") == code
    assert executor.was_closed
    assert 0 < len(points(tmp_path)) < 20
    assert {point["predicted_ms"] for point in points(tmp_path)} == {None}
    assert "num_points" not in capsys.readouterr().out


@pytest.mark.parametrize(("at", "is_fitted"), [(EARLY, False), (LATE, True)])
def test_a_device_that_hangs_ends_the_process_with_one_line(at, is_fitted, tmp_path):
    paths = [str(PROGRAM.parent), str(PROGRAM.parents[1] / "unit")]
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path, str(at)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "error:" in line]
    assert line.startswith("duetjax: error: a step has not completed within 0.2 s")
    assert "Traceback" not in done.stderr
    assert points(tmp_path)
    assert (files(tmp_path) == ALL_FILES) == is_fitted


def test_a_device_that_cannot_be_closed_after_a_stop_is_left_alone(tmp_path, monkeypatch):
    """As when Ctrl-C came because it hung."""
    ends = []
    monkeypatch.setattr(profile_command, "_CLOSING_S", 0.1)
    monkeypatch.setattr("duetjax.cli_profile.atexit.register", lambda *call: ends.append(call))
    executor = Scripted("stop", LATE)
    monkeypatch.setattr(executor, "close", executor._ended.wait)
    assert profile(executor, tmp_path, "--points", "120") == 1
    executor._ended.set()
    assert [code for _, code in ends] == [1]
    assert files(tmp_path) == ALL_FILES


def test_what_nothing_was_timed_twice_for_is_told_as_a_dash(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile_command, "_AGAIN", 0.0)
    assert profile(Scripted(), tmp_path, "--points", "60") == 0
    lines = capsys.readouterr().out.splitlines()
    [noise] = [line for line in lines if line.startswith("perfect predictions")]
    assert noise.split()[-4:] == ["0", "-", "-", "-"]
    assert json.loads(lines[-1])["error_of_perfect"]["median"] is None
    assert "would have - and -" in (tmp_path / "out/errors.svg").read_text()


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(profile_command, "_hardware", None)
    (tmp_path / "out").write_text("a file")
    assert profile(Scripted(), tmp_path) == 1
    assert "name another folder" in capsys.readouterr().err

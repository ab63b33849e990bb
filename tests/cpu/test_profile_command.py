"""`duetjax profile` on this processor: real launches of the demo, few of them, and its files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from gpu_machine import bare_environment

from duetjax.calibration_file import CalibrationFile
from duetjax.cli import main
from duetjax.config import EngineConfig
from duetjax.planning import check_profiles
from duetjax.policy.foresight import Foresight
from duetjax.policy.grid import Kind
from duetjax.profile_files import read_hardware_profile, read_model_profile

GPU_ALL = Path(__file__).resolve().parents[2] / "benchmarks/gpu_all.py"


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """What gpu_all.py has measured without anything but what computing needs, and its output."""
    folder = tmp_path_factory.mktemp("profiled")
    out = folder / "host-brief/profile"
    cache = folder / "cache"
    done = subprocess.run(
        [sys.executable, GPU_ALL, "profile", "--backend", "host", "--brief", "--out", folder],
        env=bare_environment(folder / "site", DUETJAX_CACHE_DIR=str(cache), PYTHONWARNINGS="error"),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    [told] = [line for line in lines if line.startswith('{"model"')]
    return SimpleNamespace(
        out=out,
        lines=lines,
        told=json.loads(told),
        cache=cache,
        hardware=read_hardware_profile(out / "hardware-profile.json"),
        model=read_model_profile(out / "model-profile.json"),
        points=json.loads((out / "points.json").read_text())["points"],
    )


def test_nothing_but_the_files_that_were_promised_is_written(profiled):
    assert sorted(file.name for file in profiled.out.iterdir()) == [
        "errors.svg",
        "hardware-profile.json",
        "model-profile.json",
        "points.json",
    ]


def test_the_profiles_are_those_that_serve_and_simulate_take(profiled):
    hardware, model = (profiled.out / f"{name}-profile.json" for name in ("hardware", "model"))
    check_profiles(EngineConfig(hardware_profile=hardware, model_profile=model))
    assert profiled.hardware.name == f"cpu-{profiled.hardware.cores}-cores-measured"
    assert profiled.hardware.cores == len(os.sched_getaffinity(0))
    assert profiled.hardware.curve[-1].flops_per_s > 1e8
    assert profiled.model.model == profiled.told["model"]
    assert {program for program, _ in profiled.model.costs} == {"prefill", "decode"}


def test_the_calibration_is_where_an_engine_with_these_profiles_looks_for_it(profiled):
    names = profiled.model.model, profiled.hardware.name
    file = CalibrationFile(profiled.cache / "calibrations", *names)
    assert file.path.exists()
    kept = file.read()
    for key, by in profiled.told["factors"].items():
        lane, program = key.split()
        assert kept.factor(lane, program) == pytest.approx(by)
    Foresight(profiled.model, profiled.hardware, kept)


def test_every_kind_of_launch_was_timed_and_half_of_them_held_out(profiled):
    kinds = {point["kind"] for point in profiled.points}
    wanted = set(Kind) - {Kind.DECODE_ALONE, Kind.PREFILL_ALONE}
    assert kinds == {str(kind) for kind in wanted}
    held_out = [point for point in profiled.points if point["is_held_out"]]
    assert len(profiled.points) > 50
    assert 0.3 < len(held_out) / len(profiled.points) < 0.7
    assert profiled.told["error"]["num_launches"] == len(held_out)
    for point in profiled.points:
        assert 0 < point["measured_ms"] < 1e5
        assert 0 < point["predicted_ms"] < 1e5


def test_errors_are_told_beside_those_of_a_perfect_prediction(profiled):
    told = profiled.told
    for name in ("error", "error_before", "error_of_perfect"):
        assert 0 <= told[name]["median"] <= told[name]["p95"] <= told[name]["worst"]
    assert any(line.startswith("perfect predictions (noise)") for line in profiled.lines)
    assert set(told["error_by_kind"]) <= {str(kind) for kind in Kind}


def test_the_picture_is_one(profiled):
    root = ElementTree.parse(profiled.out / "errors.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = "".join(root.itertext())
    assert "launches that nothing was fitted to" in text
    assert Kind.PREFILL_BESIDE in text


def test_explain_takes_what_was_measured(profiled, capsys):
    files = [str(profiled.out / f"{name}-profile.json") for name in ("hardware", "model")]
    load = ["--prefill", "64", "--decode", "4x100"]
    asked = ["--hardware-profile", files[0], "--model-profile", files[1], *load]
    assert main(["explain", *asked, "--max-num-batched-tokens", "128"]) == 0
    assert profiled.hardware.name in capsys.readouterr().out


def refused(capsys, *arguments):
    assert main(["profile", *map(str, arguments)]) == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    return line.removeprefix("duetjax: error: ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--device", "sim"), "--device sim: nothing can be measured there; leave it out"),
        (("--deterministic",), "--deterministic runs nothing beside each other; leave it out"),
        (("--minutes", "0"), "--minutes 0: give a number above 0"),
        (("--minutes", "nan"), "--minutes nan: give a number above 0"),
        (("--points", "0"), "--points 0: give a number from 1 to"),
        (("--model", "no/such/model"), "no such folder, not a preset"),
        (("--hardware-profile", "h900"), "--hardware-profile h900: neither a file nor one of"),
        (("--load-format", "magic"), "magic"),
        (("--hardware-profile", "cpu-2-cores", "--out", "/dev/null"), "name another folder"),
    ],
    ids=str,
)
def test_what_cannot_be_profiled_is_refused_in_one_line(
    arguments, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert complaint in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []

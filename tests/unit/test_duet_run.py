"""The headline experiment's engines: their profiles, the capacity, and which checkout measured."""

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import PATIENCE, FakeEngine

from duetjax.profile_files import Kind, read_hardware_profile, shipped_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import duet_run
from checkout import commit
from duet_cells import BACKENDS, Variant
from duet_profiles import Profiles, choose, shipped_like
from duet_run import Experiment, Task, measure_capacity, static_split

BENCHMARKS = Path(duet_run.__file__).parent
CUDA = BACKENDS["cuda"]


# Profiles.


def no_gpu():
    raise AssertionError("the GPU was asked for")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "h200" / "headline"


def write_profile(file, **changes):
    """An H200's as if it had been measured."""
    found = read_hardware_profile(shipped_file(Kind.HARDWARE, "h200-sxm"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(replace(found, name="nvidia-h200-measured", **changes).to_json()))
    return file


@pytest.fixture
def measured(folder):
    return write_profile(folder.parent / "profile/hardware-profile.json")


def test_what_was_measured_beside_the_cells_is_used(folder, measured):
    model = measured.with_name("model-profile.json")
    alone = choose(CUDA, folder, gpu=no_gpu)
    assert (alone.hardware, alone.model) == ("hardware-profile.json", None)
    model.write_text("{}")
    both = choose(CUDA, folder, gpu=no_gpu)
    assert both.model == "model-profile.json"
    assert both.digest != alone.digest
    found = read_hardware_profile(Path(both.hardware_in(folder)))
    assert found.name == "nvidia-h200-measured"
    assert Path(both.model_in(folder)).read_text() == "{}"


def test_a_simulation_has_the_profile_that_it_is_named_for(folder, measured):
    assert choose(BACKENDS["sim"], folder, gpu=no_gpu).hardware == "h200-sxm"


def test_the_shipped_profile_of_the_gpu_is_used(folder, capsys):
    assert choose(CUDA, folder, gpu=lambda: ("NVIDIA L40S", 142)).hardware == "l40s"
    assert capsys.readouterr().out == ""


def test_an_unknown_gpu_is_warned_of(folder, capsys):
    found = choose(CUDA, folder, gpu=lambda: ("NVIDIA B300", 160))
    assert found.hardware == "h200-sxm"
    assert "WARNING: no shipped profile knows NVIDIA B300 with 160 SMs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "cores", "name"),
    [
        ("NVIDIA H200", 132, "h200-sxm"),
        ("NVIDIA H100 80GB HBM3", 132, "h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", 108, "a100-sxm-80gb"),
        ("NVIDIA L40S", 142, "l40s"),
        ("NVIDIA GeForce RTX 4090", 128, "rtx-4090"),
        ("NVIDIA GeForce RTX 4080", 76, None),
        ("NVIDIA H100 PCIe", 114, None),
    ],
)
def test_gpus_are_known_by_what_they_call_themselves(kind, cores, name):
    found = shipped_like(kind, cores)
    assert (found and found.name) == name


def test_what_was_chosen_is_kept_when_it_is_measured_anew(folder, measured):
    chosen = Profiles.of(choose(CUDA, folder, gpu=no_gpu).to_json())
    write_profile(measured, contention_decode=1.9)
    chosen.check(folder, None)
    with pytest.raises(SystemExit, match="leave --hardware-profile out"):
        chosen.check(folder, str(measured))
    write_profile(folder / chosen.hardware, contention_decode=1.9)
    with pytest.raises(SystemExit, match="is not what it was when the capacity was measured"):
        chosen.check(folder, None)


def test_a_named_profile_may_be_named_again(folder):
    chosen = choose(CUDA, folder, "l40s", gpu=no_gpu)
    chosen.check(folder, "l40s")
    with pytest.raises(SystemExit, match="profile l40s, which is kept"):
        chosen.check(folder, "h100")


def test_what_is_no_profile_is_refused(folder, tmp_path):
    (tmp_path / "p.json").write_text("{}")
    for named in ("p.json", "absent.json"):
        with pytest.raises(SystemExit, match=named):
            choose(CUDA, folder, str(tmp_path / named), gpu=no_gpu)


def test_the_command_line_needs_no_jax():
    code = "import sys, duet; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True)


def test_engines_plan_by_what_was_chosen(folder, measured):
    measured.with_name("model-profile.json").write_text("{}")
    profiles = choose(CUDA, folder, gpu=no_gpu)
    for policy, plans in (("duet", True), ("aggregated-slo", True), ("static-split", False)):
        config = config_of(policy, profiles, folder)
        assert config.hardware_profile == (str(folder / profiles.hardware) if plans else None)
        assert config.model_profile == (str(folder / profiles.model) if plans else None)
        found = read_hardware_profile(folder / profiles.hardware)
        assert config.split == static_split(found)


# The capacity.


def task(profiles, folder, **changes):
    given = {
        "backend": "host",
        "out": str(folder),
        "variant": Variant("aggregated", 128),
        "cells": (),
        "capacity": {"objective_scale": 1.0},
        "profiles": profiles,
        "is_brief": True,
        "seconds": 60.0,
        "command": "",
    }
    return Task(**given | changes)


def config_of(policy, profiles, folder):
    """An engine's, of which nothing is started."""
    experiment = object.__new__(Experiment)
    experiment.backend = CUDA
    experiment.load = CUDA.load
    experiment.task = task(profiles, folder, variant=Variant(policy, 8192, 25))
    return experiment._config()


class OverAlphabet(Experiment):
    def _open(self):
        load = self.load
        return FakeEngine(num_slots=load.slots, num_pages=4096, max_len=load.max_model_len)


@pytest.fixture
def experiment(folder):
    found = OverAlphabet(task(Profiles("cpu-2-cores", None, None), folder))
    gc.unfreeze()
    yield found
    found.engine.executor.release()
    assert found.engine.shutdown(PATIENCE)


def test_the_capacity_says_how_long_the_engine_alone_took_to_start(experiment):
    took = experiment.start_s
    found = measure_capacity(experiment)
    assert found["start_s"] == took < experiment.start_s
    assert found["prefill_tokens_per_s"] > 0
    assert found["decode_step_ms"] > 0
    assert found["hardware_profile"] == "cpu-2-cores"


def test_a_capacity_without_a_step_of_all_victims_ends_in_one_line(experiment, monkeypatch):
    monkeypatch.setattr(duet_run, "_is_decoding", lambda *_: False)
    patience_after(experiment, monkeypatch)
    with pytest.raises(SystemExit, match="not all victims have decoded at once") as refused:
        measure_capacity(experiment)
    assert "\n" not in str(refused.value)


def patience_after(experiment, monkeypatch):
    """Little of it once the victims decode."""
    fill = experiment.fill

    def filled():
        fill()
        monkeypatch.setattr(duet_run, "_PATIENCE_S", 0.1)

    monkeypatch.setattr(experiment, "fill", filled)


def test_victims_that_do_not_begin_end_it_in_one_line(experiment, monkeypatch):
    monkeypatch.setattr(duet_run, "_PATIENCE_S", 0.1)
    experiment.engine.executor.hold()
    with pytest.raises(SystemExit, match="not every victim has had a token within"):
        experiment.fill()


def test_requests_that_do_not_go_end_it_in_one_line(experiment, monkeypatch):
    experiment.fill()
    experiment.engine.executor.hold()
    monkeypatch.setattr(experiment.engine, "abort", lambda name: None)
    monkeypatch.setattr(duet_run, "_PATIENCE_S", 0.1)
    with pytest.raises(SystemExit, match="those that were aborted have not gone within"):
        experiment.crowd.leave()


# The checkout.


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    (root / "benchmarks/results").mkdir(parents=True)
    (root / "source.py").write_text("one")
    (root / ".gitignore").write_text("*.so\n")
    (root / "benchmarks/results/old.json").write_text("{}")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    git(root, *who, "commit", "--quiet", "--message", "one")
    return root


def git(root, *words):
    subprocess.run(["git", "-C", root, *words], check=True)


def of_now(root):
    commit.cache_clear()
    return commit(root)


def test_a_commit_is_dirty_where_sources_differ(checkout):
    clean = of_now(checkout)
    assert not clean.endswith("-dirty")
    (checkout / "benchmarks/results/new.json").write_text("{}")
    (checkout / "benchmarks/results/old.json").write_text("[]")
    (checkout / "built.so").write_text("")
    assert of_now(checkout) == clean
    (checkout / "new.py").write_text("")
    assert of_now(checkout) == f"{clean}-dirty"
    (checkout / "new.py").unlink()
    (checkout / "source.py").write_text("two")
    assert of_now(checkout) == f"{clean}-dirty"


def test_without_git_or_checkout_there_is_no_commit(tmp_path, checkout, monkeypatch):
    assert of_now(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert of_now(checkout) is None

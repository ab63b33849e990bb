"""Hardware profiles of what was measured, and of what a shipped profile knows beside it."""

import json
import os
import sys
from dataclasses import replace

import pytest

from duetjax.config import ConfigError
from duetjax.devices import memory_share
from duetjax.measured_hardware import gpu_profile, shipped_like
from duetjax.policy.profiles import Basis, HardwareProfile, Reach
from duetjax.runtime import host_rates as module
from duetjax.runtime.gpu_rates import GpuRates, rising
from duetjax.runtime.host_rates import HostRates, host_profile, host_rates, processor

RATES = GpuRates(
    curve=(Reach(8, 5e13, 6e11), Reach(124, 7e14, 4.2e12), Reach(132, 8e14, 4.3e12)),
    core_step=8,
    least_cores=8,
    launch_us=12.5,
    contention_decode=1.31,
    contention_prefill=0.99,
)
MEASURED = (
    *("cores", "core_step", "min_decode_cores", "min_prefill_cores", "launch_us"),
    *("curve_cores", "curve_flops_per_s", "curve_bytes_per_s"),
    *("contention_decode", "contention_prefill"),
)


def read_again(profile):
    return HardwareProfile.from_json(json.loads(json.dumps(profile.to_json())), "f")


def test_a_known_gpu_has_what_was_measured_and_the_rest_of_its_shipped_profile():
    known = shipped_like("NVIDIA H200", 132, 150e9)
    profile = gpu_profile("NVIDIA H200", RATES, 10**11, known)
    assert read_again(profile) == profile
    assert profile.name == "nvidia-h200"
    assert profile.curve == RATES.curve
    assert (profile.contention_decode, profile.contention_prefill) == (1.31, 1.0)
    assert len(profile.splits()) == 15
    assert (profile.memory_bytes, profile.board_watts) == (known.memory_bytes, known.board_watts)
    for name, origin in profile.origins.items():
        assert (origin.basis is Basis.MEASURED) == (name in MEASURED), name
    assert profile.origins["board_watts"] == known.origins["board_watts"]


def test_what_nobody_has_described_is_assumed_and_says_so():
    rates = GpuRates(RATES.curve, 8, 8, 12.5, None, None)
    profile = gpu_profile("NVIDIA B300", rates, 10**11, None)
    assert read_again(profile) == profile
    assert profile.memory_bytes == 10**11
    for name in ("contention_decode", "contention_prefill", "board_watts", "memory_bytes"):
        assert profile.origins[name].basis is Basis.ASSUMED
        assert "NVIDIA B300" in profile.origins[name].source


@pytest.mark.parametrize(
    ("kind", "cores", "gb", "name"),
    [
        ("NVIDIA H200", 132, 150.1, "h200-sxm"),
        ("NVIDIA H100 80GB HBM3", 132, 85.0, "h100-sxm"),
        ("NVIDIA H100 NVL", 132, 100.0, None),
        ("NVIDIA A100-SXM4-80GB", 108, 85.1, "a100-sxm-80gb"),
        ("NVIDIA A100-SXM4-40GB", 108, 42.4, None),
        ("NVIDIA L40S", 142, 47.7, "l40s"),
        ("NVIDIA GeForce RTX 4090", 128, 25.4, "rtx-4090"),
        ("NVIDIA GeForce RTX 4080", 76, 17.0, None),
        ("NVIDIA H100 PCIe", 114, 85.0, None),
    ],
)
def test_a_shipped_profile_is_found_by_what_the_gpu_calls_itself(kind, cores, gb, name):
    found = shipped_like(kind, cores, gb * 1e9)
    assert (found and found.name) == name


def test_the_whole_memory_counts_of_which_xla_has_a_share(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert memory_share() == 1.0
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")
    assert memory_share() == 0.8


def test_shares_that_the_driver_has_not_told_are_assumed():
    rates = replace(RATES, are_shares_told=False)
    profile = gpu_profile("NVIDIA H200", rates, 10**11, shipped_like("NVIDIA H200", 132, 150e9))
    assert profile.origins["cores"].basis is Basis.MEASURED
    for name in ("core_step", "min_decode_cores", "min_prefill_cores"):
        assert profile.origins[name].basis is Basis.ASSUMED


def test_where_more_cores_came_out_slower_the_fewer_count():
    found = rising(
        [Reach(16, 5.0, 9.0), Reach(8, 6.0, 3.0), Reach(16, 4.0, 10.0), Reach(24, 9.0, 8.0)]
    )
    assert found == (Reach(8, 6.0, 3.0), Reach(16, 6.0, 10.0), Reach(24, 9.0, 10.0))


def test_a_processors_profile_says_how_it_was_measured():
    rates = [HostRates(1, 1e11, 2e10, 30.0), HostRates(2, 2e11, 1.9e10, 20.0)]
    profile = host_profile("cpu-2-cores", rates, 10**10, "0.11")
    assert read_again(profile) == profile
    assert profile.curve == (Reach(1, 1e11, 2e10), Reach(2, 2e11, 2e10))
    assert processor() in profile.origins["cores"].source
    assert profile.origins["contention_decode"].basis is Basis.ASSUMED


def test_each_number_of_cores_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 9, 11, 20, 21, 22, 30, 40, 50, 60})
    asked = []

    def run(command, **_):
        asked.append(command[-2:])
        rates = {"cores": int(command[-2]), "flops_per_s": 1, "bytes_per_s": 1, "launch_us": 1}
        return type("Done", (), {"stdout": json.dumps(rates) + "\n"})

    monkeypatch.setattr(module.subprocess, "run", run)
    assert [each.cores for each in host_rates(3)] == [1, 2, 3, 4, 8, 10]
    assert asked[0] == ["1", "3"]


def test_a_system_without_affinity_is_refused_in_one_line(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    with pytest.raises(ConfigError, match="give --hardware-profile"):
        list(host_rates(1))


def test_a_measurement_that_fails_says_which(monkeypatch):
    monkeypatch.setattr(module, "_LIMIT_S", 1e-3)
    with pytest.raises(ConfigError, match="what 1 cores reach cannot be measured"):
        list(host_rates(1))


def test_a_measurement_that_fails_says_what_its_process_said_last(monkeypatch):
    run = module.subprocess.run

    def failing(_command, **rest):
        return run([sys.executable, "-c", "raise OSError('no such core')"], **rest)

    monkeypatch.setattr(module.subprocess, "run", failing)
    with pytest.raises(ConfigError, match="measured: OSError: no such core; give") as caught:
        list(host_rates(1))
    assert "\n" not in str(caught.value)

"""Parts of benchmarks/gpu_all.py as a GPU machine has them, without one: that they start and end.

The others are in test_profile_command.py and test_duet_benchmark.py.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_machine import bare_environment

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu_all.py"


@pytest.fixture
def part(tmp_path):
    def run(name):
        done = subprocess.run(
            [sys.executable, SCRIPT, name, "--backend", "host", "--brief", "--out", tmp_path],
            env=bare_environment(tmp_path / "site"),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])["outcomes"]

    return run


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_check_looks_at_its_items_and_skips_what_needs_a_gpu(part, tmp_path):
    assert all(outcome.startswith("ended with 0") for outcome in part("check").values())
    for name, item in (("launcher", "E0"), ("lanes", "L1")):
        found = json.loads((tmp_path / "host-brief" / name / "host/launcher.json").read_text())
        assert found["items"][item]["outcome"] == "SKIP"


def test_kernels_run_in_the_interpreter_and_what_needs_a_gpu_is_left_out(part, tmp_path):
    outcomes = part("kernels")
    assert outcomes.pop("write").startswith("ended with 0")
    assert outcomes == dict.fromkeys(("triton", "tune"), "left out, needs a GPU")
    rows = json.loads((tmp_path / "host-brief/kernels-write.json").read_text())["rows"]
    assert all(row["own"] > 0 for row in rows)

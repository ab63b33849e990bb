"""benchmarks/duet.py on this processor, from the capacity to the report, by way of gpu_all.py and
as a GPU machine has it: without any package but jax, flax and theirs, safetensors and tokenizers.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_machine import bare_environment

from duetjax.profile_files import Kind, shipped_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LEFT_OVER = 3
"""How a call ends that left something for the next one."""


@pytest.fixture
def cells(tmp_path):
    """The folder that both of the following use."""
    return tmp_path / "host-brief/headline"


@pytest.fixture
def run(tmp_path):
    environment = bare_environment(tmp_path / "site")

    def run(script, *arguments, code=0):
        command = [sys.executable, BENCHMARKS / script, *arguments, "--backend", "host", "--brief"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def duet(run, cells):
    return lambda *arguments, **how: run("duet.py", *arguments, "--out", cells, **how)


@pytest.fixture
def headline(run, tmp_path):
    return lambda **how: run("gpu_all.py", "headline", "--out", tmp_path, **how)


def test_the_path_from_capacity_to_report(headline, duet, cells):
    policies = ("duet", "static-split")
    measured = cells.parent / "profile/hardware-profile.json"
    measured.parent.mkdir(parents=True)
    measured.write_bytes(shipped_file(Kind.HARDWARE, "cpu-2-cores").read_bytes())
    outcomes = headline()["outcomes"]
    assert list(outcomes) == ["capacity", "tune", "25 ms, 50 %, seed 0", "report"]
    assert all(outcome.startswith("ended with 0") for outcome in outcomes.values())

    capacity = json.loads((cells / "capacity.json").read_text())
    assert capacity["prefill_tokens_per_s"] > 0
    assert capacity["hardware_profile"] == "hardware-profile.json"
    measured.write_text("measured anew, and no part of it any more")
    assert capacity["objective_scale"] == pytest.approx(capacity["decode_step_ms"] / 7.5, abs=1e-6)
    assert json.loads((cells / "tuned.json").read_text())["budgets"] == dict.fromkeys(
        ("15", "25", "50"), 128
    )
    files = sorted(cells.glob("*_rate50_seed0.json"))
    assert len(files) == 2
    for file in files:
        check_cell(json.loads(file.read_text()), capacity)

    written = [file.stat().st_mtime_ns for file in files]
    assert duet("cells", "--rates", "50", "--policies", ",".join(policies))["missing"] == []
    assert [file.stat().st_mtime_ns for file in files] == written
    again = headline()["outcomes"]
    assert [*again.values()][:3] == ["done before"] * 3
    assert again["report"].startswith("ended with 0")

    last = json.loads((cells / "headline.json").read_text())
    assert last["is_brief"]
    assert not last["simulation"]
    assert set(last["objectives"][0]["policies"]) == set(policies)
    assert last["tuned"] == {"15": 128, "25": 128, "50": 128}
    assert "by which nothing can be judged" in (cells / "headline.svg").read_text()
    assert "- aggregated_128, seed 0, rates 25, 50, 75" in (cells / "headline.md").read_text()


def check_cell(document, capacity):
    """Victims decoded, attackers came and were served, and what launches did adds up."""
    blocks = document["blocks"]
    assert len(blocks) == 2
    assert sum(count for block in blocks for _, count in block["gaps"]) > 10
    assert sum(block["output_tokens"] for block in blocks) > 10
    assert document["capacity"]["objective_scale"] == capacity["objective_scale"]
    assert 0 < document["victims_decoding"] <= 4
    assert document["preemptions"] == 0
    for name in ("hardware_profile", "model_profile", "profile_digest"):
        assert document[name] == capacity[name]
    most = document["pauses_ms"]["count"] + 4
    assert 0 <= document["prefix_hits"] <= 16 * most  # victims' pages alone
    assert sum(document["decisions"].values()) > 0
    assert {row["lane"] for row in document["launches"]} <= {"whole", "decode", "prefill"}
    assert document["split"] == [1, 1]
    if document["cell"]["variant"]["policy"] == "static-split":
        assert document["cell"]["variant"]["objective"] is None


def test_what_comes_too_early_says_what_to_do(duet):
    with pytest.raises(AssertionError, match="run the part `tune` to its end first"):
        duet("cells", "--rates", "50")
    with pytest.raises(AssertionError, match="run the part `capacity` first"):
        duet("cells", "--rates", "50", "--policies", "duet")


def test_no_cell_is_begun_without_time_for_it(duet, cells):
    cells.mkdir(parents=True)
    found = {"prefill_tokens_per_s": 1e4, "decode_step_ms": 7.5, "objective_scale": 1.0}
    found["hardware_profile"] = "cpu-2-cores"
    (cells / "capacity.json").write_text(json.dumps(found))
    last = duet("cells", "--policies", "duet", "--rates", "50", "--limit-s", "20", code=LEFT_OVER)
    assert last["missing"] == ["duet_128_25ms_rate50_seed0"]

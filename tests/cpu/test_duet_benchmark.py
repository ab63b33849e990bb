"""benchmarks/duet.py on this processor, from the capacity to the report, as a GPU machine has it:
without any package but jax, flax and what comes with them, numpy, safetensors and tokenizers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OVER = 3
"""How a call ends that left something for the next one."""

BLOCKING = """
import sys, sysconfig
from importlib.machinery import PathFinder

ALLOWED = {
    *("jax", "jaxlib", "jax_plugins", "flax", "numpy", "ml_dtypes", "safetensors", "tokenizers"),
    *("absl", "etils", "msgpack", "opt_einsum", "optax", "scipy", "treescope"),  # theirs
    *("rich", "pygments", "markdown_it", "mdurl", "yaml", "_yaml", "typing_extensions"),
    *("filelock", "markupsafe", "importlib_resources", "fsspec", "zipp", "attr", "chex"),
}
SITE = sysconfig.get_path("purelib")


class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        ours = top.startswith(("jax_cuda", "__editable__", "_distutils_hack", "nvidia"))
        if path is None and not ours and top not in ALLOWED:
            if PathFinder.find_spec(name, [SITE]) is not None:
                raise ModuleNotFoundError(f"{name} is not on a GPU machine", name=name)


sys.meta_path.insert(0, Blocked)
"""


@pytest.fixture
def duet(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCKING)
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"}

    def run(*arguments, code=0):
        command = [sys.executable, ROOT / "benchmarks/duet.py", *arguments]
        command += ["--backend", "host", "--brief", "--out", tmp_path / "cells"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_path_from_capacity_to_report(duet, tmp_path):
    cells, policies = tmp_path / "cells", ("duet", "static-split")
    duet("capacity")
    capacity = json.loads((cells / "capacity.json").read_text())
    assert capacity["prefill_tokens_per_s"] > 0
    assert capacity["objective_scale"] == pytest.approx(capacity["decode_step_ms"] / 7.5, abs=1e-6)

    duet("tune", "--budgets", "128")
    assert json.loads((cells / "tuned.json").read_text())["budgets"] == dict.fromkeys(
        ("15", "25", "50"), 128
    )
    asked = ("cells", "--rates", "50", "--policies", ",".join(policies))
    assert duet(*asked)["missing"] == []
    files = sorted(cells.glob("*_rate50_seed0.json"))
    assert len(files) == 2
    for file in files:
        check_cell(json.loads(file.read_text()), capacity)
    written = [file.stat().st_mtime_ns for file in files]
    assert duet(*asked)["missing"] == []
    assert [file.stat().st_mtime_ns for file in files] == written

    last = duet("report")
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


def test_no_cell_is_begun_without_time_for_it(duet, tmp_path):
    (tmp_path / "cells").mkdir()
    found = {"prefill_tokens_per_s": 1e4, "decode_step_ms": 7.5, "objective_scale": 1.0}
    (tmp_path / "cells/capacity.json").write_text(json.dumps(found))
    last = duet("cells", "--policies", "duet", "--rates", "50", "--limit-s", "20", code=LEFT_OVER)
    assert last["missing"] == ["duet_128_25ms_rate50_seed0"]

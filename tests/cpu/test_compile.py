"""`duetjax compile --profile`: programs compiled for an absent GPU, their costs written down."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from device_table import HAS_CUDA_WHEELS, WHY_NOT

from duetjax import compile_profile
from duetjax.cli import main
from duetjax.policy.launch import Program
from duetjax.policy.profiles import ModelProfile
from duetjax.runtime.profile import BUCKETS, FLOPS_TOLERANCE, SAMPLING_FLOPS

needs_cuda_wheels = pytest.mark.skipif(not HAS_CUDA_WHEELS, reason=WHY_NOT)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
FEW = ("--buckets-decode", "2", "--buckets-prefill", "64")


def write_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The process that compiled a decode and a prefill program, and the file it wrote."""
    folder = tmp_path_factory.mktemp("compiled")
    file = folder / "tiny.json"
    asked = ["--model", str(write_model(folder / "tiny")), "--gpu", "h200-sxm", "--profile", file]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "duetjax.cli", "compile", *asked, *FEW],
        env={name: value for name, value in os.environ.items() if not name.startswith("JAX_")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr.splitlines(), file=file)


def refused(capsys, *arguments):
    assert main(["compile", *map(str, arguments)]) == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    return line.removeprefix("duetjax: error: ")


@needs_cuda_wheels
def test_the_profile_holds_what_the_programs_cost(compiled):
    profile = ModelProfile.from_json(json.loads(compiled.file.read_text()), "tiny.json")
    assert (profile.model, profile.compiled_for, profile.dtype_bytes) == ("tiny", "h200-sxm", 2)
    assert (profile.num_layers, profile.num_heads, profile.head_dim) == (1, 4, 64)
    assert set(profile.costs) == {(Program.DECODE, 2), (Program.PREFILL, 64)}
    layer = 256 * 64 * (2 * 4 + 2 * 2) + 3 * 256 * 512
    head = 256 * 8192
    decode, prefill = profile.costs[Program.DECODE, 2], profile.costs[Program.PREFILL, 64]
    for cost, products in (
        (decode, 2 * 2 * (layer + head)),
        (prefill, 2 * 64 * layer + 2 * 2 * head),  # it has logits for as many rows
    ):
        most = products * (1 + FLOPS_TOLERANCE) + SAMPLING_FLOPS * 2 * 8192
        assert products < cost.flops < most
    assert decode.bytes > 2 * (layer + head)


@needs_cuda_wheels
def test_each_program_is_told_as_it_is_done(compiled):
    assert [line for line in compiled.err if "decode 2: " in line and "1/2" in line]
    assert [line for line in compiled.err if "prefill 64: " in line and "2/2" in line]
    assert compiled.out == f"wrote {compiled.file}: 2 programs of tiny for h200-sxm\n"


@needs_cuda_wheels
def test_nothing_is_left_beside_the_file(compiled):
    assert sorted(file.name for file in compiled.file.parent.iterdir()) == ["tiny", "tiny.json"]


@needs_cuda_wheels
def test_explain_reads_what_was_written(compiled, capsys):
    load = ["--prefill", "64", "--decode", "2x100", "--gpu", "h200-sxm"]
    assert main(["explain", "--model-profile", str(compiled.file), *load]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny on h200-sxm, 132 cores")
    assert "model derived (compiled for h200-sxm)" in out


def test_without_lists_all_the_usual_buckets_are_meant(tmp_path):
    request = compile_profile.ProfileRequest("tiny", "h200-sxm", tmp_path / "a.json")
    assert compile_profile._buckets(request) == BUCKETS


def test_a_list_is_sorted_and_there_are_as_many_slots_as_its_largest(tmp_path):
    asked = {"decode": [32, 4, 4, 8], "prefill": [512, 64]}
    request = compile_profile.ProfileRequest("tiny", "h200-sxm", tmp_path / "a.json", **asked)
    buckets = compile_profile._buckets(request)
    assert (buckets.decode, buckets.prefill, buckets.prefill_rows) == ((4, 8, 32), (64, 512), 32)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"--model": "no/such/model"}, "no such folder, not a preset (llama-3.1-8b,"),
        ({"--gpu": "h900"}, "unknown GPU 'h900'; known are a100-sxm-80gb, h100-sxm, h200-sxm"),
        ({"--buckets-decode": "1"}, "--buckets-decode 1: give numbers from 2 to 4096"),
        ({"--buckets-prefill": "100000"}, "--buckets-prefill 100000: give numbers from 2 to"),
        ({"--profile": "nowhere/a.json"}, "is no folder to write to; make it first"),
        ({"--profile": "."}, "is a folder; name a file in it"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_before_anything_is(
    changed, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    usual = {"--model": "llama-3.1-8b", "--gpu": "h200-sxm", "--profile": "a.json"}
    arguments = [text for pair in (usual | changed).items() for text in pair]
    assert complaint in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_without_the_plugin_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    def absent(**_):
        raise NotImplementedError

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)
    model = write_model(tmp_path / "tiny")
    asked = ["--model", model, "--gpu", "h200-sxm", "--profile", tmp_path / "a.json"]
    line = refused(capsys, *asked, *FEW)
    assert f"pip install jax-cuda13-plugin=={jax.__version__}" in line


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(tmp_path, monkeypatch, capsys):
    """The last moment: everything is compiled, and the file cannot be written."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    file = tmp_path / "a.json"
    file.write_text("old")
    monkeypatch.setattr("pathlib.Path.write_text", full)
    monkeypatch.setattr(
        compile_profile, "inspect_program", lambda *_: SimpleNamespace(compile_seconds=0.0)
    )
    profile = SimpleNamespace(
        costs={key: SimpleNamespace(flops=1, bytes=1) for key in BUCKETS}, to_json=dict
    )
    monkeypatch.setattr(compile_profile, "model_profile", lambda *_: profile)
    monkeypatch.setattr(compile_profile, "absent_gpu", lambda name: SimpleNamespace(name=name))
    programs = SimpleNamespace(lower=lambda key: None, layout=None)
    monkeypatch.setattr(compile_profile, "absent_programs", lambda *_: programs)
    asked = ["--model", "llama-3.1-8b", "--gpu", "h200-sxm", "--profile", file]
    assert f"--profile {file}: No space left on device" in refused(capsys, *asked)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["compile", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for flag in ("model", "gpu", "profile", "buckets-decode", "buckets-prefill"):
        assert f"--{flag}" in text

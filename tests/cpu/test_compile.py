"""`duetjax compile`: programs for absent GPUs and for this processor, and what is told of them."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from device_table import HAS_CUDA_WHEELS, PAIRS, WHY_NOT, Pair, key_name, read_table

from duetjax import compile_programs
from duetjax.absent import hidden_states
from duetjax.checkpoint.source import resolve_model
from duetjax.cli import main
from duetjax.compile_programs import CompiledProgram, CompileRequest
from duetjax.config import ConfigError, EngineConfig
from duetjax.policy.launch import Program
from duetjax.policy.memory import foreseen_temporaries, recorded_bytes
from duetjax.policy.profiles import ModelProfile
from duetjax.runtime.profile import BUCKETS, FLOPS_TOLERANCE, SAMPLING_FLOPS
from duetjax.runtime.target import gpu_facts

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
FEW = ("--max-num-seqs", "2", "--max-num-batched-tokens", "64")
FILES = {"model-profile.json", "report.json", "roofline.svg"}


def write_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(*arguments, **environment):
    """The command in a process of its own, without the settings that tests have."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "duetjax.cli", "compile", *map(str, arguments)],
        env=plain | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, document = done.stdout.splitlines()
    return SimpleNamespace(lines=lines, document=json.loads(document), log=done.stderr.splitlines())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the process told that compiled a decode and a prefill program, and what it wrote."""
    folder = tmp_path_factory.mktemp("compiled")
    asked = ["--model", write_model(folder / "tiny"), "--gpu", "h200", "--out", folder / "out"]
    told = run(*asked, *FEW)
    told.out = folder / "out"
    return told


def refused(capsys, *arguments):
    assert main(["compile", *map(str, arguments)]) == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    return line.removeprefix("duetjax: error: ")


# For a GPU that is not there.


@needs_cuda_wheels
def test_the_profile_holds_what_the_programs_cost(compiled):
    text = (compiled.out / "model-profile.json").read_text()
    profile = ModelProfile.from_json(json.loads(text), "tiny.json")
    assert (profile.model, profile.compiled_for, profile.dtype_bytes) == ("tiny", "h200-sxm", 2)
    assert (profile.num_layers, profile.num_heads, profile.head_dim) == (1, 4, 64)
    assert (profile.vocab_size, profile.shards) == (8192, 1)
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
    assert [line for line in compiled.log if "decode 2: " in line and "1/2" in line]
    assert [line for line in compiled.log if "prefill 64: " in line and "2/2" in line]


@needs_cuda_wheels
def test_programs_memory_and_predictions_are_told(compiled):
    programs = compiled.document["programs"]
    assert set(programs) == {"decode 2", "prefill 64"}
    assert all(each["kernels"] > 20 and each["violations"] == [] for each in programs.values())
    rows = [line.split() for line in compiled.lines]
    [decode] = [row for row in rows if row[:2] == ["decode", "2"]]
    assert int(decode[-2]) == programs["decode 2"]["kernels"]
    memory = compiled.document["memory"]["needed"]
    layer = 256 * (512 + 256 + 1024 + 512) + 2 * 256
    assert memory["weights"] == 2 * (layer + 256 + 2 * 8192 * 256)
    assert memory["sum"] == memory["weights"] + memory["slots"] + memory["temporaries"]
    assert [each["decode_cores"] for each in compiled.document["predicted_splits"]][:2] == [8, 16]
    assert set(compiled.document["predicted_ttft_ms"]) == {"128", "512", "2048"}
    assert 0 < compiled.document["predicted_ttft_ms"]["128"] < 1
    assert all(each["ms"] > 0 for each in compiled.document["predicted_tbt_ms"])
    assert [line for line in compiled.lines if line.startswith("duet: ")]


@needs_cuda_wheels
def test_the_files_of_the_folder_are_whole(compiled):
    assert {file.name for file in compiled.out.iterdir()} == FILES
    assert json.loads((compiled.out / "report.json").read_text()) == compiled.document
    picture = (compiled.out / "roofline.svg").read_text()
    assert "decode programs" in picture
    assert picture.rstrip().endswith("</svg>")


@needs_cuda_wheels
def test_explain_reads_what_was_written(compiled, capsys):
    load = ["--prefill", "64", "--decode", "2x100", "--gpu", "h200-sxm"]
    file = compiled.out / "model-profile.json"
    assert main(["explain", "--model-profile", str(file), *load]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny on h200-sxm, 132 cores")
    assert "model derived (compiled for h200-sxm)" in out


@needs_cuda_wheels
def test_a_shard_has_its_part_of_matrices_heads_and_vocabulary(tmp_path, capsys):
    model = write_model(tmp_path / "tiny")
    out = tmp_path / "out"
    asked = ["--model", model, "--gpu", "h200", "--tensor-parallel", "2", "--out", out, *FEW]
    assert main(["compile", *map(str, asked)]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    profile = ModelProfile.from_json(json.loads((out / "model-profile.json").read_text()), "")
    assert (profile.shards, profile.num_heads, profile.num_kv_heads) == (2, 2, 1)
    assert (profile.hidden_size, profile.vocab_size) == (256, 8192)
    products = 2 * 2 * (256 * 64 * (2 * 2 + 2 * 1) + 3 * 256 * 256 + 256 * 4096)
    flops = profile.costs[Program.DECODE, 2].flops
    assert products < flops < products * (1 + FLOPS_TOLERANCE) + SAMPLING_FLOPS * 2 * 4096
    assert first == "tiny for h200-sxm, one of 2 GPUs' share"


# For this machine.


def test_what_is_compiled_here_is_in_the_store_and_not_compiled_again(tmp_path):
    asked = ["--gpu", "local", "--max-num-seqs", "1", "--max-num-batched-tokens", "64"]
    first = run(*asked, DUETJAX_CACHE_DIR=str(tmp_path))
    assert not any(each["was_stored"] for each in first.document["programs"].values())
    again = run(*asked, "--hardware-profile", "cpu-2-cores", DUETJAX_CACHE_DIR=str(tmp_path))
    assert all(each["was_stored"] for each in again.document["programs"].values())
    assert "predicted_mixed_ms" not in first.document
    assert again.document["predicted_mixed_ms"] > 0
    assert "nothing is foretold without --hardware-profile" in first.lines[-1]


# Memory by arithmetic.


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_memory_foreseen_without_compiling_is_what_programs_need(names):
    """By the table of what XLA said of whole models; 2 % of all that is taken before KV pages."""
    pair, table = Pair(*names), read_table()["programs"][" ".join(names)]
    config = resolve_model(pair.model, load_format="dummy").config
    needed = {key: table[key_name(key)]["temp_bytes"] for key in BUCKETS}
    states = hidden_states(gpu_facts(pair.gpu)["compute_capability"])
    rows = BUCKETS.prefill_rows
    foreseen = foreseen_temporaries(config, 2, BUCKETS, rows, hidden_states=states)
    for key, size in needed.items():
        assert foreseen[key] == pytest.approx(size, rel=0.03), key
    weights = 2 * config.num_parameters
    total = weights + recorded_bytes(needed)
    assert weights + recorded_bytes(foreseen) == pytest.approx(total, rel=0.005)


def test_partial_results_of_long_contexts_count_where_the_vocabulary_is_small():
    config = resolve_model("mistral-7b-v0.3", load_format="dummy").config
    key = (Program.DECODE, 64)
    assert foreseen_temporaries(config, 2, [key], 64)[key] == pytest.approx(71_124_992, rel=0.02)


# Refusals.


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"--model": "no/such/model"}, "no such folder, not a preset (llama-3.1-70b,"),
        ({"--gpu": "h900"}, "--gpu h900: choose local, a100-sxm-80gb, h100-sxm, h200-sxm"),
        ({"--gpu": "h"}, "--gpu h: choose local"),
        ({"--tensor-parallel": "0"}, "--tensor-parallel 0 must be at least 1"),
        ({"--tensor-parallel": "3"}, "32 heads on 8 KV heads cannot be divided among 3"),
        ({"--tensor-parallel": "2", "--gpu": "local"}, "one GPU serves; name an absent one"),
        ({"--max-num-seqs": "0"}, "--max-num-seqs"),
        ({"--kernels": "fast"}, "--kernels fast: choose auto, xla, mosaic, triton"),
        ({"--hardware-profile": "none"}, "--hardware-profile none: neither a file nor one of"),
        ({"--out": "file/below"}, "--out file/below: Not a directory; name another folder"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_before_anything_is(
    changed, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(compile_programs, "plan_programs", None)
    usual = {"--model": "llama-3.1-8b", "--gpu": "h200-sxm"}
    arguments = [text for pair in (usual | changed).items() for text in pair]
    assert complaint in refused(capsys, *arguments)


def test_without_the_plugin_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    def absent(**_):
        raise NotImplementedError

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)
    line = refused(capsys, "--model", write_model(tmp_path / "tiny"), "--gpu", "h200-sxm", *FEW)
    assert f"pip install jax-cuda13-plugin=={jax.__version__}" in line


def test_a_full_disk_leaves_the_old_files_and_no_part_of_new_ones(tmp_path, monkeypatch, capsys):
    """The last moment: everything is compiled, and the files cannot be written."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    (tmp_path / "model-profile.json").write_text("old")
    monkeypatch.setattr("pathlib.Path.write_text", full)
    found = CompiledProgram(1e12, 1e9, 10**6, 5, 0.1, was_stored=False)
    monkeypatch.setattr(
        compile_programs,
        "_compiled",
        lambda programs, *_, **__: dict.fromkeys(programs.buckets, found),
    )
    monkeypatch.setenv("DUETJAX_CACHE_DIR", str(tmp_path / "cache"))
    line = refused(capsys, "--gpu", "local", "--out", tmp_path)
    assert line == f"--out {tmp_path}: No space left on device; name another folder"
    assert (tmp_path / "model-profile.json").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["model-profile.json"]


def test_serve_says_in_one_line_that_one_gpu_serves(capsys):
    assert main(["serve", "--tensor-parallel", "2"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        "duetjax: error: --tensor-parallel 2: DuetJAX serves on one GPU; leave it out, or see what"
        " several would do with duetjax compile, simulate or plan"
    )


# Sizes that were left open.


@pytest.mark.parametrize(("gpu", "sizes"), [("h200", (256, 2048)), ("local", (64, 512))])
def test_sizes_that_were_left_open_are_the_device_s(gpu, sizes, monkeypatch):
    planned = []

    def plan(config, engine, place):
        planned.append((engine.max_num_seqs, engine.max_num_batched_tokens))
        raise ConfigError("enough")

    monkeypatch.setattr(compile_programs, "plan_programs", plan)
    for asked in ({}, {"max_num_seqs": 8}, {"max_num_batched_tokens": 300}):
        with pytest.raises(ConfigError, match="enough"):
            compile_programs.compile_model(CompileRequest(None, gpu), EngineConfig(**asked))
    rows, tokens = sizes
    assert planned == [(rows, tokens), (8, tokens), (rows, 300)]

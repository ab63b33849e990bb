"""The command line as a process: exit codes, one-line refusals, answers on standard output."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from golden import tiny

from duetjax.cli import main

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
SIZES = ("--max-num-seqs", "1", "--max-num-batched-tokens", "64")  # few programs


def write_model(folder: Path) -> None:
    """A tiny model with a tokenizer, so that whatever is refused is what the test broke."""
    tiny.write_checkpoint("mistral", folder)
    shutil.copy(DEMO / "tokenizer.json", folder)


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "duetjax.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def config_with(**keys):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | keys)
    )


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def header_bomb(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


REFUSED = {
    "quantised": (config_with(quantization_config={"bits": 4}), "quantization_config"),
    "unknown architecture": (config_with(architectures=["GPT2LMHeadModel"]), "architectures"),
    "unknown rope": (config_with(rope_scaling={"rope_type": "yarn"}), "yarn"),
    "vocabulary of 10^12": (config_with(vocab_size=10**12), "vocab_size"),
    "mis-shaped": (config_with(vocab_size=100), "shape"),
    "truncated": (truncated, "model.safetensors"),
    "header bomb": (header_bomb, "model.safetensors"),
    "pickle only": (pickle_only, "safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("command", [["generate", "x"], ["serve", "--port", "0"]], ids=str)
def test_a_folder_that_cannot_be_served_ends_with_one_line_and_an_exit_code(
    fault, command, tmp_path, capsys
):
    damage, named = REFUSED[fault]
    write_model(tmp_path)
    damage(tmp_path)
    assert main([*command, "--model", str(tmp_path)]) == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert line.startswith("duetjax: error: ")
    assert named in line


def test_a_window_shorter_than_the_context_names_the_flag(tmp_path, capsys):
    write_model(tmp_path)
    config_with(sliding_window=64)(tmp_path)
    asked = ["--max-model-len", "128"]
    assert main(["generate", "x", "--model", str(tmp_path), *asked]) == 1
    assert "--max-model-len 64" in capsys.readouterr().err


def test_a_refusal_leaves_through_the_process_s_exit_code(tmp_path):
    done = run("generate", "x", "--model", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_generate_answers_on_standard_output_alone():
    done = run("generate", "What is TTFT?", "--temperature", "0", *SIZES)
    assert done.returncode == 0, done.stderr
    assert "first token" in done.stdout
    assert done.stdout.endswith("\n")
    assert "compil" in done.stderr


def test_generate_reads_the_prompt_from_standard_input(capsys):
    arguments = ["--raw", "--max-tokens", "4", "--temperature", "0", *SIZES]
    piped = run("generate", *arguments, input="A page of KV memory")
    assert piped.returncode == 0, piped.stderr
    assert main(["generate", "A page of KV memory", *arguments]) == 0
    assert piped.stdout == capsys.readouterr().out


def test_doctor_shows_versions_and_what_is_missing():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    for fact in ("jax", "devices", "launcher", "launches", "demo"):
        assert fact in done.stdout


def test_naming_the_model_twice_is_refused(capsys):
    assert main(["serve", "a", "--model", "b"]) == 1
    assert "once" in capsys.readouterr().err

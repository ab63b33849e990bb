"""Starts that cannot be: each ends with an exit code and one line, before long work and at once."""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tokenizers
from faults import Faults
from golden import tiny
from server_process import starting

import duetjax.build
import duetjax.config
import duetjax.sim.device
import duetjax.text.chat_template
import duetjax.text.tokenizer
from duetjax import cli, profile_files
from duetjax.checkpoint import folder, huggingface, shard, source
from duetjax.policy.profiles import Document
from duetjax.serve import server

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
SIZES = ("--max-num-seqs", "1", "--max-num-batched-tokens", "64")  # few programs
HERE = ("--disable-frontend-multiprocessing",)
SIM = ("--device", "sim", "--sim-step-ms", "1/1")
WEIGHTS = "model.safetensors"
STORE = "duetjax.runtime.store"
HOMES = ("HOME", "XDG_CACHE_HOME", "DUETJAX_CACHE_DIR")
LENIENT = 60  # seconds that a start may take to fail on a busy machine; alone it takes 1 or 2


class Machine:
    """A model folder, whole as yet, and starts of a server that would serve it."""

    def __init__(self, model: Path) -> None:
        self.model = model

    def start(self, *flags: str) -> str:
        """What comes of a start, in words: "starts", or the exit code and what is said."""
        out, err = io.StringIO(), io.StringIO()
        command = ["serve", "--port", "0", "--model", str(self.model), *HERE, *SIZES, *flags]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(command)
        except SystemExit as ended:
            code = ended.code
        except Exception as error:  # as Python would end with
            return f"a traceback, {type(error).__name__}"
        return self._words(code, err.getvalue()) if code else "starts"

    def _words(self, code: int, err: str) -> str:
        lines = [line for line in err.splitlines() if line.startswith("duetjax: error: ")]
        if len(lines) != 1:
            return f"exit {code}, {len(lines)} lines of errors"
        line = lines[0].removeprefix("duetjax: error: ").replace(str(self.model), "MODEL")
        while line != (shorter := re.sub(r" [(][^()]*[)]", "", line)):  # what libraries say
            line = shorter
        return f"exit {code}: {re.sub(r'[0-9.]+ GB', 'N GB', line)}"


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """Servers that start are not run."""
    sigterm = signal.getsignal(signal.SIGTERM)
    with (
        tempfile.TemporaryDirectory(prefix="duetjax-faults-") as name,
        mock.patch.object(server.HttpServer, "run"),
    ):
        model = Path(name) / "model"
        write_model(model)
        yield Machine(model)
    signal.signal(signal.SIGTERM, sigterm)


def write_model(model: Path, shards: int = 1) -> None:
    """A tiny model with a tokenizer, so that whatever is refused is what the test broke."""
    tiny.write_checkpoint("mistral", model, shards=shards)
    shutil.copy(DEMO / "tokenizer.json", model)


def harm(target: Machine) -> str | None:
    """Whether what failed is in the way of a start that has nothing wrong."""
    with machine() as healthy:
        seen = healthy.start(*SIM)
    return None if seen == "starts" else "a healthy start fails"


FAULTS = Faults("Start", machine, harm)


def broken(break_it: Callable[[Path], object], *flags: str) -> Callable[[Machine], str]:
    """An attack: a start after something was done to the folder."""

    def attack(target: Machine) -> str:
        break_it(target.model)
        return target.start(*flags)

    return attack


def flags(*given: str) -> Callable[[Machine], str]:
    """An attack: a start with these flags, on no device."""
    return lambda target: target.start(*SIM, *given)


def setting(target: object, name: str, value: object) -> Callable[[pytest.MonkeyPatch], None]:
    """A guard that goes when this attribute is replaced."""
    return lambda monkeypatch: monkeypatch.setattr(target, name, value)


def uncaught(module: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A guard that catches this exception in a module; it catches another one now."""
    return lambda monkeypatch: monkeypatch.setattr(module, name, ZeroDivisionError, raising=False)


def nothing(*_: object) -> None:
    """In place of a check."""


# The model's folder.


def config_with(**keys: object) -> Callable[[Path], object]:
    """Other values in config.json."""

    def change(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def writing(name: str, data: bytes) -> Callable[[Path], object]:
    """A file with this in it."""
    return lambda model: (model / name).write_bytes(data)


def removing(name: str) -> Callable[[Path], object]:
    """A file less."""
    return lambda model: (model / name).unlink()


def emptied(model: Path) -> None:
    """An empty folder."""
    for file in model.iterdir():
        file.unlink()


def padded(model: Path) -> None:
    """More of config.json than anybody means to read."""
    file = model / "config.json"
    file.write_bytes(file.read_bytes() + b" " * (17 << 20))


def without_a_shard(model: Path) -> None:
    """The second of two files of weights is away."""
    emptied(model)
    write_model(model, shards=2)
    (model / "model-00002-of-00002.safetensors").unlink()


def truncated(model: Path) -> None:
    """The last weights are away."""
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(model: Path) -> None:
    """Weights as torch saves them."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


FAULTS.add(
    "a model that nobody has",
    lambda target: target.start("--model", "nobody"),
    expected="exit 1: --model nobody: no such folder, not a preset, and not a hub id of the form"
    " org/name; correct it",
    guard="the three meanings of --model",
    off=setting(source, "_hub_folder", lambda model, _: Path(model)),
)
FAULTS.add(
    "an empty folder",
    broken(emptied),
    expected="exit 1: MODEL/config.json: no such file; download the model again",
    guard="files are looked for before they are read",
    off=setting(folder, "require_file", nothing),
)
FAULTS.add(
    "no config.json",
    broken(removing("config.json")),
    expected="exit 1: MODEL/config.json: no such file; download the model again",
    guard="files are looked for before they are read",
    off=setting(folder, "require_file", nothing),
)
FAULTS.add(
    "config.json is not JSON",
    broken(writing("config.json", b"{")),
    expected="exit 1: MODEL/config.json: not a JSON object; download the model again",
    guard="what JSON raises is caught",
    off=setting(source, "read_object", lambda file: json.loads(file.read_bytes())),
)
FAULTS.add(
    "config.json of 17 MiB",
    broken(padded, *SIM),
    expected="exit 1: MODEL/config.json: not a JSON object; download the model again",
    guard="16 MiB for a small file",
    off=setting(folder, "_MAX_JSON_BYTES", 1 << 40),
)
FAULTS.add(
    "an unknown architecture",
    broken(config_with(architectures=["GPT2LMHeadModel"]), *SIM),
    expected="exit 1: MODEL: config.json: architectures ['GPT2LMHeadModel'] is not supported;"
    " supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
    guard="the table of architectures",
    off=setting(
        duetjax.config,
        "_FAMILIES",
        duetjax.config._FAMILIES | {"GPT2LMHeadModel": duetjax.config._Family(qkv_bias=False)},
    ),
)
FAULTS.add(
    "vocab_size 10^12",
    broken(config_with(vocab_size=10**12)),
    expected="exit 1: MODEL: config.json: vocab_size must be an integer from 1 to 16777215, not"
    " 1000000000000",
    guard="sizes that no real model reaches",
    off=setting(duetjax.config, "_size", lambda hf, key, default=None, **_: hf.get(key, default)),
)
FAULTS.add(
    "shapes of another model",
    broken(config_with(vocab_size=100)),
    expected="exit 1: MODEL/model.safetensors: tensor model.embed_tokens.weight has shape"
    " [192, 64], but config.json says [100, 64]; download weights and config.json that belong"
    " together",
    guard="shapes are compared with config.json",
    off=setting(huggingface, "check_tensors", nothing),
)
FAULTS.add(
    "a missing shard",
    broken(without_a_shard),
    expected="exit 1: MODEL/model-00002-of-00002.safetensors: no such file; download the model"
    " again",
    guard="files are looked for before they are read",
    off=setting(huggingface, "require_file", nothing),
)
FAULTS.add(
    "a truncated safetensors file",
    broken(truncated),
    expected="exit 1: MODEL/model.safetensors: not a whole safetensors file; download or convert"
    " it again",
    guard="the whole header is checked first",
    off=setting(shard, "safe_open", lambda *_, **__: contextlib.nullcontext()),
)
FAULTS.add(
    "a safetensors header of 2^63 bytes",
    broken(writing("model.safetensors", (1 << 63).to_bytes(8, "little") + b"{}")),
    expected="exit 1: MODEL/model.safetensors: not a whole safetensors file; download or convert"
    " it again",
    guard="16 MiB for a header",
    off=setting(shard, "_MAX_HEADER_BYTES", 1 << 64),
)
FAULTS.add(
    "weights only in .bin",
    broken(pickled),
    expected="exit 1: MODEL: weights only in pytorch_model.bin, a pickle that could run any code;"
    " convert to safetensors",
    guard="pickles are known by their names",
    off=setting(huggingface, "_PICKLES", ()),
)
FAULTS.add(
    "no tokenizer",
    broken(removing("tokenizer.json")),
    expected="exit 1: MODEL has no tokenizer.json; copy it from where the model is from",
    guard="files are looked for before they are read",
    off=setting(duetjax.text.tokenizer, "_read_tokenizer_json", lambda _: b""),
)
FAULTS.add(
    "a tokenizer.json that is none",
    broken(writing("tokenizer.json", b"{}")),
    expected="exit 1: tokenizer.json cannot be loaded: Cannot instantiate Tokenizer from buffer:"
    " Model missing. at line 1 column 2; download it again, or name another folder with"
    " --tokenizer",
    guard="what the library raises is caught",
    off=setting(duetjax.text.tokenizer, "_load_backend", tokenizers.Tokenizer.from_buffer),
)
FAULTS.add(
    "a chat template that does not compile",
    broken(writing("chat_template.jinja", b"{% for")),
    expected="exit 1: chat template does not compile: syntax error: unexpected end of input,"
    " expected identifier; give another one with --chat-template FILE",
    guard="what the library raises is caught",
    off=uncaught(duetjax.text.chat_template, "TemplateError"),
)

# Where it is to listen.


@FAULTS.attack(
    "a port that is taken",
    expected="exit 1: --host 127.0.0.1 --port PORT: Address already in use; choose another address",
    guard="what the kernel refuses is caught",
    off=setting(server, "ConfigError", OSError),
)
def port_taken(target):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        return target.start("--port", port).replace(port, "PORT")


@FAULTS.attack(
    "a port that needs privileges",
    expected="exit 1: --host 127.0.0.1 --port 80: Permission denied; choose another address",
    guard="what the kernel refuses is caught",
    off=setting(server, "ConfigError", OSError),
)
def port_of_root(target):
    refused = PermissionError(13, "Permission denied")  # root is never told so
    with mock.patch.object(socket.socket, "bind", side_effect=refused):
        return target.start("--port", "80")


FAULTS.add(
    "port 70000",
    flags("--port", "70000"),
    expected="exit 1: --host 127.0.0.1 --port 70000: bind(): port must be 0-65535.;"
    " choose another address",
    guard="what Python refuses is caught",
    off=setting(server, "ConfigError", OverflowError),
)
FAULTS.add(
    "an address of another machine",
    flags("--host", "203.0.113.7"),
    expected="exit 1: --host 203.0.113.7 --port 0: Cannot assign requested address; choose another"
    " address",
    guard="what the kernel refuses is caught",
    off=setting(server, "ConfigError", OSError),
)

# Sizes and profiles.

FAULTS.add(
    "KV memory for no page",
    flags("--kv-cache-memory-bytes", "1000"),
    expected="exit 1: one context of 2 tokens needs 65536 bytes of KV pages, but there are 1000;"
    " raise --kv-cache-memory-bytes or lower --max-model-len",
    guard="pages are counted before they are taken",
    off=setting(duetjax.sim.device, "plan_pages", lambda *_: (33, 64)),
)
FAULTS.add(
    "more of the GPU's memory than all",
    flags("--gpu-memory-utilization", "7"),
    expected="exit 1: --gpu-memory-utilization 7.0 must be above 0 and at most 1",
    guard="ranges of EngineConfig",
    off=setting(duetjax.config.EngineConfig, "__post_init__", nothing),
)
FAULTS.add(
    "a share of memory that is no number",
    flags("--gpu-memory-utilization", "nan"),
    expected="exit 1: --gpu-memory-utilization nan must be above 0 and at most 1",
    guard="ranges of EngineConfig",
    off=setting(duetjax.config.EngineConfig, "__post_init__", nothing),
)
FAULTS.add(
    "a hardware profile that is not there",
    flags("--hardware-profile", "h300"),
    expected="exit 1: --hardware-profile h300: neither a file nor one of a100-sxm-80gb,"
    " cpu-2-cores, h100-sxm, h200-sxm, l40s, rtx-4090",
    guard="the shipped profiles are told",
    off=setting(profile_files, "os", SimpleNamespace(path=SimpleNamespace(exists=lambda _: True))),
)
FAULTS.add(
    "a hardware profile that is not JSON",
    lambda target: target.start(*SIM, "--hardware-profile", str(target.model / WEIGHTS)),
    expected="exit 1: MODEL/model.safetensors: not JSON; name a profile's file",
    guard="what JSON raises is caught",
    off=uncaught(profile_files, "ValueError"),
)
FAULTS.add(
    "a model profile that is another kind",
    lambda target: target.start(
        *(*SIM, "--hardware-profile", "l40s"), "--model-profile", str(target.model / "config.json")
    ),
    expected="exit 1: MODEL/config.json: kind must be 'model-profile', not None",
    guard="profiles say what they are",
    off=setting(Document, "open", classmethod(lambda cls, value, file, *_: cls(value, file))),
)
FAULTS.add(
    "a model profile for no hardware",
    flags("--model-profile", "mine.json"),
    expected="exit 1: --model-profile mine.json foretells nothing alone; give --hardware-profile"
    " as well",
    guard="profiles are looked at first",
    off=setting(duetjax.build, "check_profiles", nothing),
)


# The installation.


@FAULTS.attack(
    "no launcher, and --backend lanes",
    expected="exit 1: --backend lanes: the launcher has not been built; install a C compiler, then"
    " duetjax anew; leave it out to run plain JAX calls",
    guard="what was asked for and cannot be is refused",
    off=lambda monkeypatch: monkeypatch.setattr("duetjax.devices.ConfigError", ValueError),
)
def no_launcher(target):
    with mock.patch("duetjax.runtime.host_kernels._launcher", None):
        return target.start("--backend", "lanes")


@FAULTS.attack(
    "no home to keep programs in",
    expected="exit 1: no home folder to keep programs in; set DUETJAX_CACHE_DIR to a folder of"
    " your own",
    guard="what Python refuses is caught",
    off=lambda monkeypatch: uncaught(importlib.import_module(STORE), "RuntimeError")(monkeypatch),
)
def homeless(target):
    """As for a user id that the machine does not know."""
    others = {k: v for k, v in os.environ.items() if k not in HOMES}
    with (
        mock.patch.dict(os.environ, others, clear=True),
        mock.patch("pwd.getpwuid", side_effect=KeyError),
    ):
        return target.start()


test_guarded, test_unguarded = FAULTS.tests()


# As processes.


SICK = {
    "no such model": (nothing, ("--model", "nobody"), "correct it"),
    "not JSON": (writing("config.json", b"{"), (), "download the model again"),
    "truncated": (truncated, (), "download or convert it again"),
    "other shapes": (config_with(vocab_size=100), (), "that belong together"),
    "no port": (nothing, ("--port", "70000"), "choose another address"),
    "no pages": (nothing, ("--kv-cache-memory-bytes", "1000"), "raise --kv-cache-memory-bytes"),
}


@pytest.mark.parametrize("fault", SICK)
def test_a_start_that_cannot_be_ends_in_time_with_one_line(fault, tmp_path):
    damage, given, advice = SICK[fault]
    write_model(tmp_path / "model")
    damage(tmp_path / "model")
    with starting("--model", str(tmp_path / "model"), *SIZES, *given) as process:
        out, err = process.communicate(timeout=LENIENT)
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" not in err
    *notes, last = err.splitlines()
    assert last.startswith("duetjax: error: ")
    assert advice in last
    assert not any("error" in note for note in notes)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--port", "x"), "argument --port"),
        (("--max-model-len", "x"), "give tokens, or auto"),
        (("--split", "x"), "give cores as in 32/100"),
        (("--no-such-flag",), "--no-such-flag"),
    ],
)
def test_a_command_line_that_is_none_is_refused_in_one_line(given, named, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", *given])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("duetjax: error: ")
    assert named in line
    assert "--help" in line


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--host", ""), "--host is empty"),
        (("--shutdown-timeout", "nan"), "--shutdown-timeout nan"),
        (("--shutdown-timeout", "-1"), "--shutdown-timeout -1"),
        (("--kv-cache-memory-bytes", "0"), "--kv-cache-memory-bytes 0"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_the_name_of_its_flag(given, named):
    with machine() as target:
        assert named in target.start(*SIM, *given)

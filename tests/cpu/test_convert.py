"""`duetjax convert` and Orbax folders: every bit kept, the damaged refused, nothing left half."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from golden import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save_file

import duetjax
from duetjax import LLM, SamplingParams
from duetjax.checkpoint import convert as convert_module
from duetjax.checkpoint import orbax
from duetjax.checkpoint.convert import convert
from duetjax.checkpoint.source import resolve_model
from duetjax.checkpoint.weights import WeightFormat, read_weights
from duetjax.cli import main
from duetjax.config import ConfigError, ModelFolderError

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
NORM = "model.norm.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TIED, UNTIED = "llama-mha-tied", "qwen3"


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return tiny.tensor_shapes(tiny.CONFIGS[name])


def tensors_of(name: str, dtype=F32) -> dict[str, np.ndarray]:
    """Weights of a tiny model with any bits at all: NaNs of every payload, infinities, zeros."""
    random = np.random.default_rng(0)
    values = {}
    for tensor, shape in shapes_of(name).items():
        raw = random.bytes(int(np.prod(shape)) * dtype.itemsize)
        values[tensor] = np.frombuffer(raw, dtype).reshape(shape).copy()
    values[NORM][:] = -0.0  # as a whole: Orbax does not store chunks that equal zero
    return values


def write_folder(folder: Path, name=UNTIED, dtype=F32, shards=1, values=None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tiny.CONFIGS[name]))
    values = tensors_of(name, dtype) if values is None else values
    parts = np.array_split(np.array(list(values)), shards)
    files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    for file, part in zip(files if shards > 1 else [SINGLE], parts, strict=True):
        save_file({n: values[n] for n in map(str, part)}, folder / file)
    if shards > 1:
        weight_map = {str(n): f for f, part in zip(files, parts, strict=True) for n in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_orbax(folder: Path, tree, name=UNTIED) -> Path:
    """A folder as somebody makes it with Orbax alone."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tiny.CONFIGS[name]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", tree)
    return folder


def stored(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor in a folder's safetensors, by that library."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, entry in deserialize(file.read_bytes()):
            assert name not in found
            found[name] = (entry["dtype"], entry["shape"], bytes(entry["data"]))
    return found


def small_files(folder: Path) -> dict[str, bytes]:
    names = {p for p in folder.iterdir() if p.is_file() and "safetensors" not in p.name}
    return {file.name: file.read_bytes() for file in names}


def load(folder: Path, name=UNTIED, dtype=F32) -> dict[str, np.ndarray]:
    """What a start does with a folder: find and check it, then read every tensor."""
    source = resolve_model(str(folder))
    assert source.folder is not None
    return dict(read_weights(source.folder, shapes_of(name), dtype))


def bits(values: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (str(v.dtype), v.shape, v.tobytes()) for n, v in values.items()}


@pytest.mark.parametrize("shards", [1, 3], ids=["single", "sharded"])
@pytest.mark.parametrize("name", [TIED, UNTIED])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_round_trip_keeps_every_name_dtype_shape_and_bit(tmp_path, dtype, name, shards):
    source = write_folder(tmp_path / "hf", name, dtype, shards)
    done = convert(str(source), str(tmp_path / "orbax"))
    assert (done.format, done.num_tensors) == (WeightFormat.ORBAX, len(shapes_of(name)))
    assert done.nbytes == sum(value.nbytes for value in tensors_of(name, dtype).values())
    assert convert(str(tmp_path / "orbax"), str(tmp_path / "back")).format == "safetensors"
    assert stored(tmp_path / "back") == stored(source)
    assert not list(tmp_path.glob("orbax/*.safetensors*"))


def test_a_checkpoint_of_mixed_dtypes_keeps_them(tmp_path):
    values = tensors_of(UNTIED, BF16)
    values[NORM] = np.arange(values[NORM].size, dtype=np.float32)
    values["lm_head.weight"] = values["lm_head.weight"].astype(np.float16)
    source = write_folder(tmp_path / "hf", values=values)
    convert(str(source), str(tmp_path / "orbax"))
    convert(str(tmp_path / "orbax"), str(tmp_path / "back"))
    assert {entry[0] for entry in stored(source).values()} == {"BF16", "F16", "F32"}
    assert stored(tmp_path / "back") == stored(source)


@pytest.mark.parametrize("target", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", [TIED, UNTIED])
def test_an_orbax_folder_loads_the_bits_that_its_origin_loads(tmp_path, name, target):
    values = {n: v.astype(BF16) for n, v in tiny.weights(tiny.CONFIGS[name])}
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    values["lm_head.weight"] = np.ones(shapes_of(name)["model.embed_tokens.weight"], BF16)
    source = write_folder(tmp_path / "hf", name, values=values)
    convert(str(source), str(tmp_path / "orbax"))
    assert bits(load(tmp_path / "orbax", name, target)) == bits(load(source, name, target))


def test_orbax_alone_restores_the_flat_dict(tmp_path):
    source = write_folder(tmp_path / "hf", dtype=BF16)
    convert(str(source), str(tmp_path / "orbax"))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "orbax" / "orbax")
    assert bits(restored) == bits(tensors_of(UNTIED, BF16))


def test_what_orbax_alone_saved_from_device_arrays_is_read_and_converted(tmp_path):
    values = tensors_of(UNTIED, BF16)
    folder = write_orbax(tmp_path / "theirs", {n: jnp.asarray(v) for n, v in values.items()})
    assert bits(load(folder, dtype=BF16)) == bits(values)
    convert(str(folder), str(tmp_path / "hf"))
    assert stored(tmp_path / "hf") == stored(write_folder(tmp_path / "expected", dtype=BF16))


def test_tensors_read_one_by_one_are_the_same_as_together(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "hf")
    convert(str(source), str(tmp_path / "orbax"))
    together = bits(load(tmp_path / "orbax"))
    restored = []
    restore = orbax._restore
    monkeypatch.setattr(orbax, "_restore", lambda at, n: restored.append(n) or restore(at, n))
    monkeypatch.setattr(orbax, "_GROUP_BYTES", 1)
    assert bits(load(tmp_path / "orbax")) == together
    assert [len(names) for names in restored] == [1] * len(together)


def test_shards_keep_to_the_size_asked_for_and_their_index_is_right(tmp_path):
    convert(str(write_folder(tmp_path / "hf")), str(tmp_path / "orbax"))
    convert(str(tmp_path / "orbax"), str(tmp_path / "back"), max_shard_size=30_000)
    files = sorted(p.name for p in tmp_path.glob("back/*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    for file in files:
        held = [
            len(entry["data"]) for _, entry in deserialize((tmp_path / "back" / file).read_bytes())
        ]
        assert sum(held) <= 30_000 or len(held) == 1
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        len(e[2]) for e in stored(tmp_path / "hf").values()
    )
    assert index["weight_map"].keys() == shapes_of(UNTIED).keys()
    assert stored(tmp_path / "back") == stored(tmp_path / "hf")
    assert bits(load(tmp_path / "back")) == bits(load(tmp_path / "hf"))


@pytest.mark.parametrize("to", list(WeightFormat))
def test_a_folder_may_be_rewritten_in_the_format_that_it_has(tmp_path, to):
    source = write_folder(tmp_path / "hf")
    if to is WeightFormat.ORBAX:
        convert(str(source), str(tmp_path / "orbax"))
        source = tmp_path / "orbax"
    assert convert(str(source), str(tmp_path / "again"), to=to).format is to
    assert bits(load(tmp_path / "again")) == bits(load(tmp_path / "hf"))


def test_small_files_are_copied_byte_for_byte_and_other_weights_are_not(tmp_path):
    source = write_folder(tmp_path / "hf", shards=2)
    copied = {
        "tokenizer.json": b'{"a":  1}\r\n',
        "generation_config.json": b'{"temperature": 0.5}',
        "chat_template.jinja": b"{{ messages }}\xc3\xa9",
        "tokenizer.model": bytes(range(256)),
        "LICENSE": b"",
    }
    for name, content in copied.items():
        (tmp_path / name).write_bytes(content)
        (source / name).symlink_to(tmp_path / name)  # as hub caches are made
    for name in (".gitattributes", "pytorch_model.bin", "pytorch_model.bin.index.json", "x.gguf"):
        (source / name).write_bytes(b"{}")
    (source / "original").mkdir()
    convert(str(source), str(tmp_path / "orbax"))
    copied["config.json"] = (source / "config.json").read_bytes()
    assert small_files(tmp_path / "orbax") == copied
    assert not (tmp_path / "orbax" / "tokenizer.json").is_symlink()
    assert sorted(p.name for p in (tmp_path / "orbax").iterdir()) == sorted([*copied, "orbax"])
    convert(str(tmp_path / "orbax"), str(tmp_path / "back"))
    assert small_files(tmp_path / "back") == copied


# Whatever else the checkpoint has is not needed to read it.
def data_files(folder: Path) -> list[Path]:
    return [p for p in (folder / "orbax").rglob("*") if p.parent.name == "d"]


def change(**tensors: object):
    """Makes the checkpoint anew with other tensors; None leaves one out."""

    def mutate(folder: Path) -> None:
        shutil.rmtree(folder / "orbax")
        tree = {**tensors_of(UNTIED), **{k.replace("__", "."): v for k, v in tensors.items()}}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "orbax", {k: v for k, v in tree.items() if v is not None})

    return mutate


def nested(folder: Path) -> None:
    shutil.rmtree(folder / "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", {"params": tensors_of(UNTIED)})


def largest(folder: Path) -> Path:
    return max(data_files(folder), key=lambda file: file.stat().st_size)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


BROKEN = {
    # fault: (how to make it, words that name what is wrong, words of the remedy)
    "a data file is missing": (
        lambda f: largest(f).unlink(),
        "orbax: cannot be",
        "copy or convert",
    ),
    "a data file is cut": (lambda f: cut(largest(f)), "orbax: cannot be", "copy or convert"),
    "all data files are missing": (
        lambda f: [file.unlink() for file in data_files(f)],
        "orbax: cannot be",
        "copy or convert",
    ),
    "the manifest is missing": (
        lambda f: (f / "orbax" / "manifest.ocdbt").unlink(),
        "orbax: cannot be",
        "copy or convert",
    ),
    "the manifest is cut": (
        lambda f: cut(f / "orbax" / "manifest.ocdbt"),
        "orbax: cannot be",
        "copy or convert",
    ),
    "no metadata": (
        lambda f: (f / "orbax" / "_METADATA").unlink(),
        "orbax/_METADATA: no such file",
        "download",
    ),
    "metadata is cut": (
        lambda f: cut(f / "orbax" / "_METADATA"),
        "orbax/_METADATA: not a JSON object",
        "download",
    ),
    "metadata of another kind": (
        lambda f: (f / "orbax" / "_METADATA").write_text('{"a": [1]}'),
        "orbax: cannot be listed",
        "copy or convert",
    ),
    "orbax is an empty folder": (
        lambda f: (shutil.rmtree(f / "orbax"), (f / "orbax").mkdir()),
        "orbax/_METADATA: no such file",
        "download",
    ),
    "orbax is a file": (
        lambda f: (shutil.rmtree(f / "orbax"), (f / "orbax").touch()),
        "orbax/_METADATA: no such file",
        "download",
    ),
    "both formats": (
        lambda f: save_file(tensors_of(UNTIED), f / SINGLE),
        "weights in both model.safetensors and orbax/",
        "move one",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such", "download"),
    "another shape": (
        change(model__norm__weight=np.zeros((2, 4), np.float32)),
        f"orbax: tensor {NORM} has shape [2, 4], but config.json says",
        "belong together",
    ),
    "a missing tensor": (change(model__norm__weight=None), f"{NORM} missing in orbax", "download"),
    "a missing head": (change(lm_head__weight=None), "lm_head.weight is missing", "tie_word"),
    "an unexpected tensor": (change(extra=np.ones(3)), "orbax: extra unexpected", "config.json"),
    "an integer tensor": (
        change(model__norm__weight=np.ones(shapes_of(UNTIED)[NORM], np.int32)),
        f"{NORM} has dtype int32",
        "unquantised",
    ),
    "an 8-bit float tensor": (
        change(model__norm__weight=np.ones(shapes_of(UNTIED)[NORM], ml_dtypes.float8_e4m3fn)),
        f"{NORM} has dtype float8_e4m3fn",
        "unquantised",
    ),
    "a name of control characters": (
        change(**{"\n\x1b[31m": np.ones(1, np.float32)}),
        r"'\n\x1b[31m' unexpected",
        "config.json",
    ),
    "a nested tree": (nested, "orbax: params is not an array", "flat dict"),
    "a number among the arrays": (change(step=7), "orbax: step unexpected", "config.json"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("good")
    convert(str(write_folder(root / "hf")), str(root / "orbax"))
    return root / "orbax"


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_orbax_folder_is_refused_in_one_line_with_what_to_do(good, tmp_path, fault):
    break_it, named, remedy = BROKEN[fault]
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    break_it(folder)
    with pytest.raises(ModelFolderError) as refusal:
        load(folder)
    message = str(refusal.value)
    assert named in message
    assert remedy in message
    assert message.isprintable()
    assert len(message) < 700


@pytest.mark.parametrize(
    "fault", ["a data file is cut", "no metadata", "an 8-bit float tensor", "both formats"]
)
def test_what_cannot_be_loaded_is_not_converted_and_leaves_nothing(good, tmp_path, fault):
    shutil.copytree(good, tmp_path / "model")
    BROKEN[fault][0](tmp_path / "model")
    with pytest.raises(ModelFolderError):
        convert(str(tmp_path / "model"), str(tmp_path / "hf"), to=WeightFormat.SAFETENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def cuttable(good, tmp_path_factory) -> Iterator[tuple[Path, list[Path], dict]]:
    folder = tmp_path_factory.mktemp("cut") / "model"
    shutil.copytree(good, folder)
    files = sorted(p for p in (folder / "orbax").rglob("*") if p.is_file())
    return folder, files, bits(load(folder))


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused_or_was_not_needed(cuttable, data):
    folder, files, whole = cuttable
    file = data.draw(st.sampled_from(files), label="file")
    raw = file.read_bytes()
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1), label="bytes")])
    try:
        outcome: object = bits(load(folder))
    except ModelFolderError as refusal:
        outcome = str(refusal)
    finally:
        file.write_bytes(raw)
    assert outcome == whole or str(outcome).isprintable()


def test_the_target_must_be_new_or_empty_and_outside_of_the_source(tmp_path):
    source = write_folder(tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere-yet")
    (tmp_path / "empty").mkdir()
    for target in ("full", "file", "hf"):
        with pytest.raises(ConfigError, match="choose"):
            convert(str(source), str(tmp_path / target))
    with pytest.raises(ConfigError, match="lies in the model's own folder"):
        convert(str(source), str(source / "converted"))
    before = sorted(p.name for p in tmp_path.iterdir())
    convert(str(source), str(tmp_path / "empty"))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "full" / "x").exists()
    convert(str(source), str(tmp_path / "not" / "yet" / "there"))
    assert bits(load(tmp_path / "not/yet/there")) == bits(load(tmp_path / "empty"))


@pytest.mark.parametrize("size", [0, -1])
def test_a_shard_size_without_sense_is_refused(good, tmp_path, size):
    with pytest.raises(ConfigError, match=f"--max-shard-size {size}: must be at least 1"):
        convert(str(good), str(tmp_path / "hf"), max_shard_size=size)
    with pytest.raises(ConfigError, match="--max-shard-size is for safetensors"):
        convert(str(good), str(tmp_path / "x"), to=WeightFormat.ORBAX, max_shard_size=10**9)


def test_too_little_free_space_is_refused_before_anything_is_written(good, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"GB needed, 0\.00 GB free\); free space on its disk"):
        convert(str(good), str(tmp_path / "hf"))
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # Orbax cuts files as time allows
from duetjax.cli import main
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("to", list(WeightFormat))
def test_a_write_that_fails_midway_is_one_line_and_leaves_nothing(good, tmp_path, to):
    """A limit on file sizes, as a full disk cannot be had everywhere."""
    source = tmp_path / "model"
    shutil.copytree(good if to is WeightFormat.SAFETENSORS else good.parent / "hf", source)
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(source), str(tmp_path / "target")],
        env=os.environ | {"PYTHONPATH": str(Path(duetjax.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1
    [line] = [x for x in run.stderr.splitlines() if not x.startswith("converting")]
    assert line.startswith(f"duetjax: error: {tmp_path}/target: cannot be written (File too large)")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def interruptible():
    """A process of several that run the tests ignores SIGINT; this one must not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_orbax_and_leaves_nothing(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "hf")
    stopped = threading.Event()
    stop = orbax._Writer.stop
    monkeypatch.setattr(orbax._Writer, "stop", lambda self: (stop(self), stopped.set()))
    written = []

    def interrupt(nbytes: int) -> None:
        written.append(nbytes)
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped.wait(120)

    bar = convert_module._progress(0)
    monkeypatch.setattr(bar, "update", interrupt)
    monkeypatch.setattr(convert_module, "_progress", lambda total: bar)
    threads = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), str(tmp_path / "orbax"))
    assert 1 <= len(written) < len(shapes_of(UNTIED))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert set(threading.enumerate()) <= threads


def test_an_interrupt_while_writing_safetensors_leaves_nothing(good, tmp_path, monkeypatch):
    def interrupted(tensors, bar):
        yield next(tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "_counted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(good), str(tmp_path / "hf"))
    assert list(tmp_path.iterdir()) == []


LOAD = """
import logging, sys, threading
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
import jax, numpy as np
jax.process_index()
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
)
from golden import tiny
from duetjax.checkpoint.weights import read_weights
from pathlib import Path
print("begin")
shapes = tiny.tensor_shapes(tiny.CONFIGS["qwen3"])
values = list(read_weights(Path(sys.argv[1]), shapes, np.dtype("f4")))
assert {type(value) for _, value in values} == {np.ndarray}
for thread in set(threading.enumerate()) - {threading.main_thread()}:
    thread.join(30)
print("end", len(values), len(compiled), threading.active_count())
jax.jit(lambda x: x + 1)(1)
print("probe", len(compiled))
"""


def test_loading_an_orbax_folder_compiles_nothing_logs_nothing_and_leaves_no_thread(good):
    tests = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOAD, str(good)],
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = run.stdout.splitlines()
    after = lines[lines.index("begin") + 1 :]
    assert after[0] == f"end {len(shapes_of(UNTIED))} 0 1"
    assert after[-1] == "probe 1"
    assert run.stderr == ""


RESOLVE = """
import sys
from duetjax.checkpoint.source import resolve_model
import duetjax.checkpoint.convert, duetjax.checkpoint.weights, duetjax.cli
print(resolve_model(sys.argv[1]).name, sorted({"jax", "orbax"} & set(sys.modules)))
"""


def test_finding_a_folder_of_either_format_imports_neither_orbax_nor_jax(good):
    for folder in (good, good.parent / "hf"):
        run = subprocess.run(
            [sys.executable, "-c", RESOLVE, str(folder)],
            env=os.environ | {"PYTHONPATH": str(Path(duetjax.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert run.stdout == f"{folder.name} []\n"


def test_the_command_line_converts_there_and_back_and_says_what_it_wrote(tmp_path, capsys):
    source = write_folder(tmp_path / "hf", shards=2)
    assert main(["convert", str(source), str(tmp_path / "orbax")]) == 0
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    count = len(shapes_of(UNTIED))
    assert first.startswith(f"wrote {tmp_path}/orbax: {count} tensors as orbax, 0.000")
    assert second.startswith(f"wrote {tmp_path}/back: {count} tensors as safetensors, 0.000")
    assert first.endswith(" s")
    assert stored(tmp_path / "back") == stored(source)


def test_the_command_line_refuses_in_one_line(good, tmp_path, capsys):
    for arguments, words in {
        (str(good), str(good.parent / "hf")): "exists; remove it or choose another folder",
        (str(tmp_path), str(tmp_path / "x")): "config.json: no such file",
        (str(tmp_path / "no" / "such"), "x"): "no such folder",
        ("llama-3.2-1b", str(tmp_path / "x")): "is a preset, shapes without weights",
    }.items():
        assert main(["convert", *arguments]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("duetjax: error: ")
        assert words in line
    assert list(tmp_path.iterdir()) == []


def test_an_orbax_folder_generates_the_tokens_of_its_origin(tmp_path):
    convert(str(DEMO), str(tmp_path / "orbax"))
    params = SamplingParams(temperature=0, max_tokens=16)
    answers = []
    for model in (DEMO, tmp_path / "orbax"):
        with LLM(str(model), max_num_seqs=2, max_num_batched_tokens=64, max_model_len=64) as llm:
            answers += llm.generate("Prefill is", params, use_tqdm=False)
    assert answers[1].outputs[0].token_ids == answers[0].outputs[0].token_ids
    assert len(answers[0].outputs[0].token_ids) == 16

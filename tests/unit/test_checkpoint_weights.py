"""Weights on disk: what loads, and what is refused, before anything large is allocated."""

import json
import os
import struct
import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from duetjax.checkpoint.huggingface import read_weights
from duetjax.checkpoint.source import resolve_model
from duetjax.config import ModelFolderError

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
SHAPES = {
    "lm_head.weight": (12, 8),
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
    "model.norm.weight": (8,),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors(dtype=F32):
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def write_folder(folder: Path, dtype=F32, shards: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    values = tensors(dtype)
    if not shards:
        save_file(values, folder / SINGLE, metadata={"format": "pt"})
        return folder
    names = list(values)
    weight_map = {name: SHARDS[i >= 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        held = {name: values[name] for name in names if weight_map[name] == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(folder: Path, dtype=F32, shapes=SHAPES):
    """What a start does with a folder: find and check it, then read every tensor."""
    source = resolve_model(str(folder))
    assert source.folder is not None
    return dict(read_weights(source.folder, shapes, dtype))


def split(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def join(file: Path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def in_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        header, data = split(folder / SINGLE)
        change(header)
        join(folder / SINGLE, header, data)

    return mutate


def in_entry(key: str, value: object) -> Callable[[Path], None]:
    return in_header(lambda header: header["model.norm.weight"].__setitem__(key, value))


def in_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        values = tensors()
        change(values)
        save_file(values, folder / SINGLE)

    return mutate


def in_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / SINGLE).unlink()
        write_folder(folder, shards=True)
        (folder / SINGLE).unlink(missing_ok=True)
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return mutate


def replace_single(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / SINGLE).unlink()
        make(folder / SINGLE)

    return mutate


def with_header(text: bytes, length: int | None = None) -> Callable[[Path], None]:
    return lambda folder: join(folder / SINGLE, text, split(folder / SINGLE)[1], length)


def repeat_a_name(folder: Path) -> None:
    header, data = split(folder / SINGLE)
    again = json.dumps({"model.norm.weight": header["model.norm.weight"]})
    join(folder / SINGLE, json.dumps(header)[:-1].encode() + f", {again[1:]}".encode(), data)


def repeat_a_tensor_in_another_shard(folder: Path) -> None:
    in_index(lambda weight_map: None)(folder)
    save_file(tensors(), folder / SHARDS[1])


def without_its_index(folder: Path) -> None:
    in_index(lambda weight_map: None)(folder)
    (folder / INDEX).unlink()


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # fault: (how to make it, words that name the file or tensor, words of the remedy)
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such", "download"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json: not a regular file",
        "put the file itself there",
    ),
    "no weights": (
        lambda f: (f / SINGLE).unlink(),
        "no weights (model.safe",
        "--load-format dummy",
    ),
    "only a pickle": (
        replace_single(lambda s: (s.parent / "pytorch_model.bin").write_bytes(b"x")),
        "pytorch_model.bin",
        "convert to safetensors",
    ),
    "only a .pth pickle": (
        replace_single(lambda s: (s.parent / "consolidated.00.pth").write_bytes(b"x")),
        "consolidated.00.pth",
        "convert to safetensors",
    ),
    "shards without index": (without_its_index, SHARDS[0], "download the index"),
    "empty file": (lambda f: (f / SINGLE).write_bytes(b""), SINGLE, "download or convert"),
    "three bytes": (lambda f: (f / SINGLE).write_bytes(b"abc"), SINGLE, "download or convert"),
    "truncated": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-1]),
        f"{SINGLE}: not a whole",
        "download or convert",
    ),
    "trailing garbage": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"x"),
        f"{SINGLE}: not a whole",
        "download or convert",
    ),
    "a web page": (
        lambda f: (f / SINGLE).write_bytes(b"<!doctype html><html>Not Found</html>"),
        f"{SINGLE}: not a whole",
        "download or convert",
    ),
    "a folder": (replace_single(Path.mkdir), f"{SINGLE}: not a regular", "put the file itself"),
    "a pipe": (replace_single(os.mkfifo), f"{SINGLE}: not a regular", "put the file itself"),
    "a device": (
        replace_single(lambda s: s.symlink_to("/dev/zero")),
        f"{SINGLE}: not a regular",
        "put the file itself",
    ),
    "a broken link": (
        replace_single(lambda s: s.symlink_to("nowhere")),
        f"{SINGLE}: a broken link",
        "put the file itself",
    ),
    "header of 2^63 bytes": (with_header(b"{}", 2**63), str(2**63), "download or convert"),
    "header larger than file": (with_header(b"{}", 5000), SINGLE, "download or convert"),
    "header of 100 MB": (with_header(b" " * 100_000_000), "100000000", "download or convert"),
    "header nested deeply": (with_header(b"[" * 10**6), SINGLE, "download or convert"),
    "header entry nested deeply": (with_header(b'{"a":' * 10**5), SINGLE, "download or convert"),
    "header is no object": (with_header(b"[]"), SINGLE, "download or convert"),
    "header is not text": (with_header(b"\xff\xfe{}"), SINGLE, "download or convert"),
    "name twice": (repeat_a_name, f"{NORM} appears twice", "download or convert"),
    "negative offset": (in_entry("data_offsets", [-8, 24]), SINGLE, "download or convert"),
    "overlapping offsets": (in_entry("data_offsets", [0, 32]), SINGLE, "download or convert"),
    "offset out of range": (
        in_entry("data_offsets", [2**40, 2**40 + 32]),
        SINGLE,
        "download or convert",
    ),
    "offset beyond 64 bits": (in_entry("data_offsets", [2**70, 2**70]), SINGLE, "download or conv"),
    "shape beyond memory": (in_entry("shape", [2**40, 2**40]), SINGLE, "download or convert"),
    "unknown dtype": (in_entry("dtype", "Q4_K"), SINGLE, "download or convert"),
    "integer dtype": (in_entry("dtype", "I32"), f"{NORM} has dtype I32", "unquantised"),
    "8-bit float": (
        in_tensors(lambda t: t.update({NORM: np.zeros(8, ml_dtypes.float8_e4m3fn)})),
        f"{NORM} has dtype F8_E4M3",
        "unquantised",
    ),
    "double precision": (
        in_tensors(lambda t: t.update({NORM: np.zeros(8)})),
        f"{NORM} has dtype F64",
        "only F32, F16, BF16",
    ),
    "missing tensor": (
        in_tensors(lambda t: t.pop(NORM)),
        f"{NORM} missing",
        "download the weights",
    ),
    "missing head": (
        in_tensors(lambda t: t.pop("lm_head.weight")),
        "lm_head",
        "tie_word_embedding",
    ),
    "unexpected tensor": (
        in_tensors(lambda t: t.update({"model.layers.1.mlp.down_proj.weight": np.zeros(1)})),
        "model.layers.1.mlp.down_proj.weight unexpected",
        "download the config.json",
    ),
    "five unexpected tensors": (
        in_tensors(lambda t: t.update({f"extra.{i}": np.zeros(1) for i in range(5)})),
        "extra.0, extra.1, extra.2 and 2 more unexpected",
        "download the config.json",
    ),
    "a name of control characters": (
        in_tensors(lambda t: t.update({"\n\x1b[31m": np.zeros(1)})),
        r"'\n\x1b[31m' unexpected",
        "download the config.json",
    ),
    "a name of a megabyte": (
        in_tensors(lambda t: t.update({"x" * 10**6: np.zeros(1)})),
        "xxx... unexpected",
        "download the config.json",
    ),
    "another shape": (
        in_tensors(lambda t: t.update({NORM: np.zeros((2, 4), F32)})),
        f"{NORM} has shape [2, 4], but config.json says [8]",
        "belong together",
    ),
    "base model": (
        in_tensors(lambda t: [t.__setitem__(n.removeprefix("model."), t.pop(n)) for n in SHAPES]),
        "lack their 'model.' prefix",
        "save the causal language model",
    ),
    "missing shard": (
        lambda f: (in_index(lambda m: None)(f), (f / SHARDS[1]).unlink()),
        f"{SHARDS[1]}: no such file",
        "download",
    ),
    "index names another shard": (
        in_index(lambda m: m.update({NORM: SHARDS[0]})),
        f"{NORM} should be in {SHARDS[0]}",
        "download",
    ),
    "index leaves the folder": (
        in_index(lambda m: m.update({NORM: "../x.safetensors"})),
        f"{NORM} is placed in ../x.safetensors",
        "same folder",
    ),
    "index names an absolute path": (
        in_index(lambda m: m.update({NORM: "/etc/x.safetensors"})),
        f"{NORM} is placed in /etc/x.safetensors",
        "same folder",
    ),
    "index names a number": (in_index(lambda m: m.update({NORM: 3})), "placed in 3", "same folder"),
    "index names a pickle": (
        in_index(lambda m: m.update({NORM: "pytorch_model.bin"})),
        "pytorch_model.bin",
        "same folder",
    ),
    "index is empty": (in_index(dict.clear), f"{INDEX}: weight_map is missing", "download"),
    "index is no JSON": (
        lambda f: (in_index(dict.clear)(f), (f / INDEX).write_text("{'a': 1}")),
        f"{INDEX}: not a JSON object",
        "download",
    ),
    "tensor in two shards": (repeat_a_tensor_in_another_shard, SHARDS[1], "remove files of other"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused_in_one_line_with_file_and_remedy(tmp_path, fault):
    break_it, named, remedy = BROKEN[fault]
    break_it(write_folder(tmp_path / "model"))
    with pytest.raises(ModelFolderError) as refusal:
        load(tmp_path / "model")
    message = str(refusal.value)
    assert named in message
    assert remedy in message
    assert message.isprintable()
    assert len(message) < 700


def test_a_refusal_allocates_little(tmp_path):
    folder = write_folder(tmp_path / "model")
    tracemalloc.start()
    for fault in ("header of 2^63 bytes", "offset out of range", "shape beyond memory"):
        BROKEN[fault][0](folder)
        with pytest.raises(ModelFolderError):
            load(folder)
        write_folder(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_all_shards_are_checked_before_the_first_tensor_is_yielded(tmp_path):
    folder = write_folder(tmp_path / "model", shards=True)
    (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-1])
    with pytest.raises(ModelFolderError, match=SHARDS[1]):
        read_weights(folder, SHAPES, F32)


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("target", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("stored", [F32, F16, BF16], ids=str)
def test_every_dtype_loads_as_every_other_rounded_once(tmp_path, stored, target, shards):
    loaded = load(write_folder(tmp_path / "model", stored, shards), target)
    assert loaded.keys() == SHAPES.keys()
    for name, value in tensors(stored).items():
        assert loaded[name].dtype == target
        np.testing.assert_array_equal(loaded[name], value.astype(target))


def test_a_single_file_wins_over_an_index(tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / INDEX).write_text("not even JSON")
    assert load(folder).keys() == SHAPES.keys()


def test_links_to_files_are_followed_as_hub_caches_are_made_of_them(tmp_path):
    blobs = write_folder(tmp_path / "blobs")
    (tmp_path / "model").mkdir()
    for name in ("config.json", SINGLE):
        (tmp_path / "model" / name).symlink_to(blobs / name)
    assert load(tmp_path / "model").keys() == SHAPES.keys()


def test_a_stored_head_is_ignored_where_embeddings_are_tied(tmp_path):
    folder = write_folder(tmp_path / "model")
    tied = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    assert load(folder, shapes=tied).keys() == tied.keys()


def test_saved_rotary_buffers_are_ignored_whatever_their_dtype(tmp_path):
    folder = write_folder(tmp_path / "model")
    in_tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4)}))(
        folder
    )
    assert load(folder).keys() == SHAPES.keys()


def test_values_beyond_float16_are_refused_by_name_and_not_served_as_infinity(tmp_path):
    for stored in (F32, BF16):
        folder = write_folder(tmp_path / str(stored))
        save_file(tensors(stored) | {NORM: np.full(8, 1e6, stored)}, folder / SINGLE)
        with pytest.raises(ModelFolderError, match=f"{NORM} has values beyond .* --dtype bfloat16"):
            load(folder, F16)


def test_a_header_of_odd_length_still_gives_aligned_arrays(tmp_path):
    folder = write_folder(tmp_path / "model")
    header, data = split(folder / SINGLE)
    text = json.dumps(header).encode()
    join(folder / SINGLE, text + b" " * (5 - len(text) % 4), data)
    for name, value in load(folder).items():
        assert value.flags.aligned
        np.testing.assert_array_equal(value, tensors()[name])


@pytest.mark.parametrize(
    ("target", "most_bytes"), [(F32, 2**20), (BF16, 40 * 2**20)], ids=["mapped", "converted"]
)
def test_the_host_needs_memory_for_one_tensor_only(tmp_path, target, most_bytes):
    shapes = {f"model.layers.{i}.weight": (1024, 12 * 1024) for i in range(4)}  # 48 MiB each
    nbytes = 4 * 1024 * 12 * 1024
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [i * nbytes, (i + 1) * nbytes]}
        for i, (name, shape) in enumerate(shapes.items())
    }
    text = json.dumps(header).encode()
    join(tmp_path / SINGLE, text + b" " * (-len(text) % 8), b"")
    os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size + 4 * nbytes)  # sparse
    tracemalloc.start()
    deque(read_weights(tmp_path, shapes, target), maxlen=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most_bytes


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, bytes]:
    folder = write_folder(tmp_path_factory.mktemp("flipped"))
    return folder, (folder / SINGLE).read_bytes()


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_changed_byte_in_the_header_is_refused_or_changes_nothing(good, data):
    folder, raw = good
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    at = data.draw(st.integers(0, end - 1), label="position")
    byte = data.draw(st.integers(0, 255), label="byte")
    (folder / SINGLE).write_bytes(raw[:at] + bytes([byte]) + raw[at + 1 :])
    try:
        outcome: object = load(folder)
    except ModelFolderError as refusal:
        outcome = str(refusal)
    if isinstance(outcome, dict):
        for name, value in tensors().items():
            np.testing.assert_array_equal(outcome[name], value)
    else:
        assert str(outcome).isprintable()


@settings(deadline=None, max_examples=100)
@given(share=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_refused(good, share):
    folder, raw = good
    (folder / SINGLE).write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ModelFolderError, match=f"{SINGLE}: not a whole safetensors file"):
        load(folder)

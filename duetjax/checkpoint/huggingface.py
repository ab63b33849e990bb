"""Weights of a Hugging Face model folder: model.safetensors, or shards named by an index."""

import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from duetjax.checkpoint.folder import read_object, require_file, shown
from duetjax.checkpoint.shard import StoredTensor, read_header
from duetjax.config import ModelFolderError

type Shapes = Mapping[str, tuple[int, ...]]
type Weights = Iterator[tuple[str, NDArray[Any]]]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Buffers that old transformers versions saved; they follow from config.json.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
_HEAD = "lm_head.weight"


def weight_files(folder: Path) -> dict[Path, frozenset[str]]:
    """Names a folder's safetensors files, each with the tensors that the index promises in it.

    model.safetensors wins over an index, as in transformers, and promises nothing. Reads no
    tensor file; `ModelFolderError` where there are none, or where the index leaves the folder.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    if os.path.lexists(single):
        require_file(single)
        return {single: frozenset()}
    if not os.path.lexists(index):
        raise _no_weights(folder)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{shown(index)}: weight_map is missing; download the model again")
    promised: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise ModelFolderError(
                f"{shown(index)}: tensor {shown(name)} is placed in {shown(file)}, but shards must"
                " be *.safetensors files in the same folder; download the model again"
            )
        promised.setdefault(folder / file, set()).add(name)
    for file in promised:
        require_file(file)
    return {file: frozenset(promised[file]) for file in sorted(promised)}


def read_weights(folder: Path, shapes: Shapes, dtype: np.dtype[Any]) -> Weights:
    """Yields every tensor of `shapes` (Hugging Face names) in `dtype`, one at a time.

    A tensor already in `dtype` is a read-only view of the mapped file, any other is converted as
    it is yielded, so the host needs memory for one tensor beyond what the caller keeps. All
    files are checked before the call returns: `ModelFolderError` names tensors that are missing,
    unexpected, of another shape than `shapes` says, or neither F32, F16 nor BF16. Ignored:
    rotary inv_freq buffers, and lm_head.weight where `shapes` has none (tied embeddings).
    """
    files: dict[Path, dict[str, StoredTensor]] = {}
    home: dict[str, Path] = {}
    for file, promised in weight_files(folder).items():
        tensors = read_header(file)
        if absent := promised - tensors.keys():
            raise ModelFolderError(
                f"{shown(folder / _INDEX)}: {_few(absent)} should be in {shown(file.name)}, which"
                " lacks it; download the model again"
            )
        if twice := tensors.keys() & home.keys():
            raise ModelFolderError(
                f"{shown(file)}: {_few(twice)} is also in {shown(home[min(twice)].name)};"
                " remove files of other models from the folder"
            )
        home |= dict.fromkeys(tensors, file)
        files[file] = tensors
    _check_names(folder, shapes, home)
    wanted = {
        file: {name: tensor for name, tensor in tensors.items() if name in shapes}
        for file, tensors in files.items()
    }
    for file, tensors in wanted.items():
        _check_tensors(file, shapes, tensors)
    return _stream(wanted, dtype)


def _stream(files: Mapping[Path, Mapping[str, StoredTensor]], dtype: np.dtype[Any]) -> Weights:
    for file, tensors in files.items():
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        for name, tensor in tensors.items():
            stored = np.frombuffer(
                mapped, _DTYPES[tensor.dtype], math.prod(tensor.shape), tensor.offset
            ).reshape(tensor.shape)
            try:
                yield name, _converted(stored, dtype)
            except FloatingPointError as error:
                raise ModelFolderError(
                    f"{shown(file)}: tensor {shown(name)} has values beyond the range of {dtype};"
                    " use --dtype bfloat16 or float32"
                ) from error


def _converted(stored: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The same values in `dtype`; raises FloatingPointError where float16 cannot hold them."""
    if stored.dtype == dtype:
        return np.require(stored, requirements="A")  # a header of odd length misaligns the data
    if dtype == np.float16:
        stored = stored.astype(np.float32)  # bfloat16's own conversion overflows silently
    with np.errstate(over="raise"):
        return stored.astype(dtype)


def _check_names(folder: Path, shapes: Shapes, home: Mapping[str, Path]) -> None:
    unexpected = {
        name for name in home.keys() - shapes.keys() if name != _HEAD and not _DERIVED.search(name)
    }
    missing = shapes.keys() - home.keys()
    if unexpected and all(f"model.{name}" in shapes for name in unexpected):
        raise ModelFolderError(
            f"{shown(folder)}: tensor names such as {shown(min(unexpected))} lack their 'model.'"
            " prefix, as saved from a base model; save the causal language model instead"
        )
    if missing == {_HEAD}:
        raise ModelFolderError(
            f"{shown(folder)}: {_HEAD} is missing; set tie_word_embeddings to true in config.json"
            " if this model shares it with its embeddings"
        )
    if missing:
        raise ModelFolderError(
            f"{shown(folder)}: {_few(missing)} missing in {_few({f.name for f in home.values()})};"
            " download the weights that belong to this config.json"
        )
    if unexpected:
        raise ModelFolderError(
            f"{shown(home[min(unexpected)])}: {_few(unexpected)} unexpected;"
            " download the config.json that belongs to these weights"
        )


def _check_tensors(file: Path, shapes: Shapes, tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ModelFolderError(
                f"{shown(file)}: tensor {shown(name)} has shape {shown(list(tensor.shape))}, but"
                f" config.json says {list(shapes[name])}; download weights and config.json that"
                " belong together"
            )
        if tensor.dtype not in _DTYPES:
            raise ModelFolderError(
                f"{shown(file)}: tensor {shown(name)} has dtype {tensor.dtype}; only"
                f" {', '.join(_DTYPES)} are supported, use the unquantised model"
            )


def _no_weights(folder: Path) -> ModelFolderError:
    names = sorted(os.listdir(folder))
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        return ModelFolderError(
            f"{shown(folder)}: weights only in {_few(pickles)}, a pickle that could run any code;"
            " convert to safetensors (save_pretrained in transformers does)"
        )
    if stray := [name for name in names if name.endswith(".safetensors")]:
        return ModelFolderError(
            f"{shown(folder)}: {_few(stray)} without {_INDEX}; download the index as well,"
            f" or name a single file {_SINGLE}"
        )
    return ModelFolderError(
        f"{shown(folder)}: no weights ({_SINGLE}); download them,"
        " or use --load-format dummy for random ones"
    )


def _few(names: Iterable[str]) -> str:
    """At most three names and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(map(shown, ordered[:3])) + more

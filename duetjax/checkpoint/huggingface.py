"""Weights of a Hugging Face model folder: model.safetensors, or shards named by an index."""

import itertools
import json
import math
import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from duetjax.checkpoint.folder import read_object, require_file, shown
from duetjax.checkpoint.shard import ShardTensor, create, read_header
from duetjax.checkpoint.tensors import (
    DTYPES,
    Shapes,
    StoredTensor,
    Weights,
    check_tensors,
    converted,
    few,
)
from duetjax.config import ModelFolderError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
WEIGHT_FILES = (_SINGLE, _INDEX)  # a folder with weights has at least one of them
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


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


def stored_tensors(folder: Path) -> dict[str, ShardTensor]:
    """Lists the tensors of a folder's safetensors files by name, in the order of their bytes.

    Reads every header and no tensor. `ModelFolderError` for a file that is not whole, lacks what
    the index promises, or has a tensor that another has.
    """
    stored: dict[str, ShardTensor] = {}
    for file, promised in weight_files(folder).items():
        tensors = read_header(file)
        if absent := promised - tensors.keys():
            raise ModelFolderError(
                f"{shown(folder / _INDEX)}: {few(absent)} should be in {shown(file.name)}, which"
                " lacks it; download the model again"
            )
        if twice := tensors.keys() & stored.keys():
            raise ModelFolderError(
                f"{shown(file)}: {few(twice)} is also in {shown(stored[min(twice)].file.name)};"
                " remove files of other models from the folder"
            )
        stored |= tensors
    return stored


def read_weights(folder: Path, shapes: Shapes, dtype: np.dtype[Any]) -> Weights:
    """Yields every tensor of `shapes` (Hugging Face names) in `dtype`, one at a time.

    A tensor already in `dtype` is a read-only view of the mapped file, any other is converted as
    it is yielded, so the host needs memory for one tensor beyond what the caller keeps. All
    files are checked before the call returns, as `check_tensors` says.
    """
    stored = stored_tensors(folder)
    check_tensors(folder, shapes, stored)
    wanted = {name: tensor for name, tensor in stored.items() if name in shapes}
    return (
        (name, converted(name, wanted[name], value, dtype)) for name, value in read_stored(wanted)
    )


def read_stored(stored: Mapping[str, ShardTensor]) -> Weights:
    """Yields every tensor as it is stored: a read-only view of the mapped file."""
    for file, entries in itertools.groupby(stored.items(), lambda entry: entry[1].file):
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        for name, tensor in entries:
            flat = np.frombuffer(
                mapped, DTYPES[tensor.dtype], math.prod(tensor.shape), tensor.offset
            )
            yield name, flat.reshape(tensor.shape)


def write_weights(
    folder: Path, stored: Mapping[str, StoredTensor], tensors: Weights, max_shard_size: int
) -> None:
    """Writes `tensors`, which come in any order and are all of `stored`, into an empty folder.

    To model.safetensors, or if they take more than `max_shard_size` bytes to shards of at most
    that size (or one tensor) and their index. Everything is on disk when it returns. `OSError`
    where the disk is full.
    """
    places: dict[str, ShardTensor] = {}
    shards = _shards(stored, max_shard_size)
    for number, names in enumerate(shards, start=1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = folder / (_SINGLE if len(shards) == 1 else shard)
        places |= create(file, {name: stored[name] for name in names})
    for name, value in tensors:
        with places[name].file.open("r+b") as stream:
            stream.seek(places[name].offset)
            stream.write(np.ascontiguousarray(value).view(np.uint8).data)
    for file in {place.file for place in places.values()}:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in stored.values())},
            "weight_map": {name: places[name].file.name for name in sorted(places)},
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(stored: Mapping[str, StoredTensor], max_shard_size: int) -> list[list[str]]:
    """Splits names, sorted, into runs of at most `max_shard_size` bytes or one tensor."""
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name in sorted(stored):
        if shards[-1] and stored[name].nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= stored[name].nbytes
    return shards


def _no_weights(folder: Path) -> ModelFolderError:
    names = sorted(os.listdir(folder))
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        return ModelFolderError(
            f"{shown(folder)}: weights only in {few(pickles)}, a pickle that could run any code;"
            " convert to safetensors (save_pretrained in transformers does)"
        )
    if stray := [name for name in names if name.endswith(".safetensors")]:
        return ModelFolderError(
            f"{shown(folder)}: {few(stray)} without {_INDEX}; download the index as well,"
            f" or name a single file {_SINGLE}"
        )
    return ModelFolderError(
        f"{shown(folder)}: no weights ({_SINGLE}); download them,"
        " or use --load-format dummy for random ones"
    )

"""The tensors that a folder stores, in whichever format, held against those that a model needs."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from duetjax.checkpoint.folder import shown
from duetjax.config import ModelFolderError

type Shapes = Mapping[str, tuple[int, ...]]
type Weights = Iterator[tuple[str, NDArray[Any]]]

# By safetensors' names.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Buffers that old transformers versions saved; they follow from config.json.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk: the file or checkpoint that holds it, its dtype by safetensors' name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its values; the dtype must be one of DTYPES."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def check_tensors(folder: Path, shapes: Shapes, stored: Mapping[str, StoredTensor]) -> None:
    """Refuses what does not fit `shapes` (Hugging Face names), as `ModelFolderError`.

    That is tensors that are missing, unexpected, of another shape, or neither F32, F16 nor BF16.
    Ignored: rotary inv_freq buffers, and lm_head.weight where `shapes` has none (tied embeddings).
    """
    _check_names(folder, shapes, stored)
    for name, tensor in stored.items():
        if name not in shapes:
            continue
        if tensor.shape != shapes[name]:
            raise ModelFolderError(
                f"{shown(tensor.file)}: tensor {shown(name)} has shape"
                f" {shown(list(tensor.shape))}, but config.json says {list(shapes[name])};"
                " download weights and config.json that belong together"
            )
        check_dtype(name, tensor)


def check_dtype(name: str, tensor: StoredTensor) -> None:
    """Refuses a tensor that is neither F32, F16 nor BF16."""
    if tensor.dtype not in DTYPES:
        raise ModelFolderError(
            f"{shown(tensor.file)}: tensor {shown(name)} has dtype {shown(tensor.dtype)}; only"
            f" {', '.join(DTYPES)} are supported, use the unquantised model"
        )


def converted(
    name: str, tensor: StoredTensor, value: NDArray[Any], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """The same values in `dtype`, aligned; `ModelFolderError` where float16 cannot hold them."""
    if value.dtype == dtype:
        return np.require(value, requirements="A")  # a header of odd length misaligns the data
    if dtype == np.float16:
        value = value.astype(np.float32)  # bfloat16's own conversion overflows silently
    try:
        with np.errstate(over="raise"):
            return value.astype(dtype)
    except FloatingPointError as error:
        raise ModelFolderError(
            f"{shown(tensor.file)}: tensor {shown(name)} has values beyond the range of {dtype};"
            " use --dtype bfloat16 or float32"
        ) from error


def few(names: Iterable[str]) -> str:
    """At most three names and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(map(shown, ordered[:3])) + more


def _check_names(folder: Path, shapes: Shapes, stored: Mapping[str, StoredTensor]) -> None:
    unexpected = {
        name
        for name in stored.keys() - shapes.keys()
        if name != _HEAD and not _DERIVED.search(name)
    }
    missing = shapes.keys() - stored.keys()
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
        files = few({tensor.file.name for tensor in stored.values()})
        raise ModelFolderError(
            f"{shown(folder)}: {few(missing)} missing in {files};"
            " download the weights that belong to this config.json"
        )
    if unexpected:
        raise ModelFolderError(
            f"{shown(stored[min(unexpected)].file)}: {few(unexpected)} unexpected;"
            " download the config.json that belongs to these weights"
        )

"""Weights of a model folder in either of the two formats: safetensors files, or Orbax.

An Orbax folder has the small files of a Hugging Face folder and, in its subfolder orbax/, a
checkpoint of one flat dict: Hugging Face name -> array.
"""

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from duetjax.checkpoint import huggingface
from duetjax.checkpoint.folder import read_object, shown
from duetjax.checkpoint.tensors import Shapes, StoredTensor, Weights, check_dtype
from duetjax.config import ModelFolderError

ORBAX_FOLDER = "orbax"


class WeightFormat(StrEnum):
    """How a folder's weights are stored, by the name that --format has for it."""

    SAFETENSORS = "safetensors"
    ORBAX = "orbax"


def weight_format(folder: Path) -> WeightFormat:
    """Says which format a folder has, without reading its tensors.

    `ModelFolderError` where it has none or both, as nothing says that both hold the same.
    """
    checkpoint = folder / ORBAX_FOLDER
    if not os.path.lexists(checkpoint):
        huggingface.weight_files(folder)
        return WeightFormat.SAFETENSORS
    if files := [name for name in huggingface.WEIGHT_FILES if os.path.lexists(folder / name)]:
        raise ModelFolderError(
            f"{shown(folder)}: weights in both {files[0]} and {ORBAX_FOLDER}/;"
            " move one of them elsewhere"
        )
    read_object(checkpoint / "_METADATA")  # what every Orbax tree has; refuses other folders
    return WeightFormat.ORBAX


def check_weights(folder: Path) -> None:
    """Refuses weights that are not there, in neither format or not whole, as `ModelFolderError`.

    Reads no tensor; what a model needs of them is for `read_weights` to check.
    """
    if weight_format(folder) is WeightFormat.SAFETENSORS:
        huggingface.stored_tensors(folder)


def read_weights(folder: Path, shapes: Shapes, dtype: np.dtype[Any]) -> Weights:
    """Yields every tensor of `shapes` (Hugging Face names) in `dtype`, one at a time.

    The host needs memory for one tensor beyond what the caller keeps, from Orbax for 256 MB or
    one tensor. Before the call returns, what is stored is checked against `shapes`, see
    `check_tensors`; `ModelFolderError` also later, for Orbax files that turn out damaged.
    """
    if weight_format(folder) is WeightFormat.SAFETENSORS:
        return huggingface.read_weights(folder, shapes, dtype)
    from duetjax.checkpoint import orbax  # imports jax and takes seconds, and needed here only

    return orbax.read_weights(folder / ORBAX_FOLDER, shapes, dtype)


def read_stored(folder: Path) -> tuple[Mapping[str, StoredTensor], Weights]:
    """Lists all tensors of a folder and yields them as they are stored.

    `ModelFolderError` for tensors that are neither F32, F16 nor BF16; names and shapes may be any.
    """
    if weight_format(folder) is WeightFormat.SAFETENSORS:
        files = huggingface.stored_tensors(folder)
        _check_dtypes(files)
        return files, huggingface.read_stored(files)
    from duetjax.checkpoint import orbax  # imports jax and takes seconds, and needed here only

    stored = orbax.stored_tensors(folder / ORBAX_FOLDER)
    _check_dtypes(stored)
    return stored, orbax.read_stored(folder / ORBAX_FOLDER, stored)


def _check_dtypes(stored: Mapping[str, StoredTensor]) -> None:
    for name, tensor in stored.items():
        check_dtype(name, tensor)

"""Rewrites a model folder with its weights in the other format, bit for bit: `duetjax convert`."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from duetjax.checkpoint import huggingface
from duetjax.checkpoint.folder import reason, shown
from duetjax.checkpoint.source import resolve_model
from duetjax.checkpoint.tensors import Weights
from duetjax.checkpoint.weights import ORBAX_FOLDER, WeightFormat, read_stored, weight_format
from duetjax.config import ConfigError

_MAX_SHARD_BYTES = 5 * 10**9
# Weights, in these and in other programs' formats, with their indexes; all else is copied.
_WEIGHT_FILES = (
    *(".safetensors", ".index.json"),
    *(".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"),
)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` wrote; nbytes counts the tensors' values."""

    folder: Path
    format: WeightFormat
    num_tensors: int
    nbytes: int


def convert(
    model: str,
    target: str,
    *,
    to: WeightFormat | None = None,
    max_shard_size: int | None = None,
) -> Conversion:
    """Writes the model that `model` names (folder or hub id) into the new folder `target`.

    Tensors keep their names, dtypes and bits, the small files are copied. to: None is the format
    that the model does not have. max_shard_size: bytes in a safetensors file, 5 GB by default.
    The folder appears when it is complete and not at all on failure or interrupt. Raises
    `ModelFolderError` for the model and `ConfigError` for the target.
    """
    folder = resolve_model(model).folder
    assert folder is not None, f"{model} was found with weights but without a folder"
    final = Path(os.path.realpath(os.path.expanduser(target)))
    _check_target(folder, final)
    if to is None:
        have = weight_format(folder)
        [to] = (other for other in WeightFormat if other is not have)
    _check_shard_size(to, max_shard_size)
    stored, tensors = read_stored(folder)
    total = sum(tensor.nbytes for tensor in stored.values())
    with _appearing(final, total) as partial, _progress(total) as bar:
        _copy_small_files(folder, partial)
        if to is WeightFormat.ORBAX:
            from duetjax.checkpoint import orbax  # imports jax and takes seconds

            orbax.write_weights(partial / ORBAX_FOLDER, dict(tensors), bar.update)
        else:
            size = max_shard_size or _MAX_SHARD_BYTES
            huggingface.write_weights(partial, stored, _counted(tensors, bar), size)
    return Conversion(final, to, len(stored), total)


def _check_target(folder: Path, final: Path) -> None:
    if final.is_relative_to(folder):
        raise ConfigError(f"{shown(final)} lies in the model's own folder; choose one outside")
    if os.path.lexists(final) and not (final.is_dir() and not os.listdir(final)):
        raise ConfigError(f"{shown(final)} exists; remove it or choose another folder")


def _check_shard_size(to: WeightFormat, max_shard_size: int | None) -> None:
    if max_shard_size is None:
        return
    if to is WeightFormat.ORBAX:
        raise ConfigError("--max-shard-size is for safetensors; Orbax chooses its own file sizes")
    if max_shard_size < 1:
        raise ConfigError(f"--max-shard-size {max_shard_size}: must be at least 1 byte")


@contextmanager
def _appearing(final: Path, need: int) -> Iterator[Path]:
    """A new folder beside `final`, renamed to it in the end, or else removed."""
    partial = final.parent / f".{final.name}.{os.getpid()}.partial"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(final.parent).free) < need:
            raise OSError(f"{need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
        partial.mkdir()
        yield partial
        partial.rename(final)
    except OSError as error:
        raise ConfigError(
            f"{shown(final)}: cannot be written ({reason(error)}); free space on its disk, or"
            " choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_small_files(folder: Path, partial: Path) -> None:
    for file in folder.iterdir():
        hidden = file.name.startswith(".")
        if file.is_file() and not hidden and not file.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(file, partial / file.name)


def _progress(total: int) -> "tqdm[Any]":
    return tqdm(total=total, desc="converting", unit="B", unit_scale=True, disable=None)


def _counted(tensors: Weights, bar: "tqdm[Any]") -> Weights:
    for name, value in tensors:
        yield name, value
        bar.update(value.nbytes)

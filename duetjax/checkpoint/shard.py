"""One safetensors file: its header, checked in full before any tensor is touched, or written.

Layout: 8 bytes of header length (little endian), the header in JSON, the tensors back to back.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from duetjax.checkpoint.folder import reason, shown
from duetjax.checkpoint.tensors import DTYPES, StoredTensor
from duetjax.config import ModelFolderError

_MAX_HEADER_BYTES = 16 * 2**20  # the format allows 100 MB, which take seconds to parse


@dataclass(frozen=True, slots=True)
class ShardTensor(StoredTensor):
    """A tensor in a safetensors file, `offset` bytes into it."""

    offset: int


def read_header(file: Path) -> dict[str, ShardTensor]:
    """Lists a regular file's tensors by name, in the order of their bytes.

    `ModelFolderError` for a file that is truncated or lies about itself: the safetensors
    library checks that dtypes, shapes and offsets cover the file exactly, without gap or overlap;
    the header's size and repeated names, which it lets pass, are checked here.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes, over {_MAX_HEADER_BYTES}")
            text = stream.read(length)
        with safe_open(file, framework="np"):
            pass
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelFolderError(
            f"{shown(file)}: not a whole safetensors file ({reason(error)});"
            " download or convert it again"
        ) from error
    header.pop("__metadata__", None)
    tensors = {
        name: ShardTensor(
            file=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset))


def create(file: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, ShardTensor]:
    """Creates a safetensors file of zeros with the names, dtypes and shapes of `tensors`.

    Returns where each tensor belongs. Wide dtypes come first, so that every tensor is aligned.
    """
    ordered = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    starts, end = {}, 0
    for name in ordered:
        tensor, starts[name] = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return {
        name: ShardTensor(file, tensors[name].dtype, tensors[name].shape, 8 + len(text) + start)
        for name, start in starts.items()
    }


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object, refusing a name that the library would silently overwrite."""
    value: dict[str, Any] = {}
    for name, entry in pairs:
        if name in value:
            raise ValueError(f"{shown(name)} appears twice in its header")
        value[name] = entry
    return value

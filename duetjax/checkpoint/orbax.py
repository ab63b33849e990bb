"""Weights in an Orbax checkpoint: one flat dict, Hugging Face name -> array.

The one module that imports orbax, and with it jax; import it late. Arrays are numpy's, in and
out, so nothing is compiled and no device is used. What is written here, Orbax alone can restore:
`StandardCheckpointer().restore(folder)`.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray

from duetjax.checkpoint.folder import reason, shown
from duetjax.checkpoint.tensors import (
    DTYPES,
    Shapes,
    StoredTensor,
    Weights,
    check_tensors,
    converted,
)
from duetjax.config import ModelFolderError

# Tensors are restored together up to this size, as every call to Orbax reads all the names anew.
_GROUP_BYTES = 2**28


def stored_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """Lists a checkpoint's tensors by name, reading none of their values.

    `ModelFolderError` if it is no checkpoint of a flat dict of arrays.
    """
    with _explained(checkpoint, "listed"):
        tree = _handler().metadata(checkpoint.absolute()).tree
    if not isinstance(tree, dict) or not tree:
        raise ModelFolderError(
            f"{shown(checkpoint)}: holds no dict of arrays; save a dict Hugging Face name -> array"
        )
    stored = {}
    for name, entry in tree.items():
        if not isinstance(entry, ocp.metadata.ArrayMetadata):
            raise ModelFolderError(
                f"{shown(checkpoint)}: {shown(name)} is not an array;"
                " save a flat dict Hugging Face name -> array"
            )
        stored[name] = StoredTensor(checkpoint, _dtype_name(entry.dtype), tuple(entry.shape))
    return stored


def read_weights(checkpoint: Path, shapes: Shapes, dtype: np.dtype[Any]) -> Weights:
    """Yields every tensor of `shapes` in `dtype`; see `duetjax.checkpoint.weights`."""
    stored = stored_tensors(checkpoint)
    check_tensors(checkpoint, shapes, stored)
    wanted = {name: tensor for name, tensor in stored.items() if name in shapes}
    return (
        (name, converted(name, wanted[name], value, dtype))
        for name, value in read_stored(checkpoint, wanted)
    )


def read_stored(checkpoint: Path, stored: Mapping[str, StoredTensor]) -> Weights:
    """Yields the tensors of `stored` as they are; holds 256 MB of them, or one, at a time."""
    for names in _groups(stored):
        values = _restore(checkpoint, names)
        for name in names:
            yield name, values.pop(name)


def write_weights(checkpoint: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Writes a new checkpoint, from the arrays themselves: what is mapped is never copied.

    Uncompressed, because compressing would hold the whole model in memory once more. Raises what
    Orbax raises, of no common base. An interrupt does not stop Orbax's own threads.
    """
    handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
    with _quiet(), ocp.Checkpointer(_handler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(checkpoint.absolute(), args=ocp.args.PyTreeSave(dict(tensors)))


def _handler(**options: Any) -> Any:
    """Orbax's reader and writer of trees; pinning memory would ask for the accelerator."""
    return ocp.PyTreeCheckpointHandler(
        use_compression=False, enable_pinned_host_transfer=False, **options
    )


def _restore(checkpoint: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(names, 0),
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names},
        partial_restore=True,
    )
    with _explained(checkpoint, "read"), ocp.Checkpointer(_handler()) as checkpointer:
        return dict(checkpointer.restore(checkpoint.absolute(), args=args))


def _groups(stored: Mapping[str, StoredTensor]) -> Iterator[list[str]]:
    group: list[str] = []
    nbytes = 0
    for name, tensor in stored.items():
        if group and nbytes + tensor.nbytes > _GROUP_BYTES:
            yield group
            group, nbytes = [], 0
        group.append(name)
        nbytes += tensor.nbytes
    if group:
        yield group


def _dtype_name(dtype: Any) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


@contextmanager
def _explained(checkpoint: Path, action: str) -> Iterator[None]:
    """Turns what Orbax raises, of no common base, into `ModelFolderError`."""
    try:
        with _quiet():
            yield
    except Exception as error:
        raise ModelFolderError(
            f"{shown(checkpoint)}: cannot be {action} as an Orbax checkpoint ({reason(error)});"
            " copy or convert it again"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """While it lasts, Orbax's notes and warnings on its own workings are not logged."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

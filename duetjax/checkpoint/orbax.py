"""Weights in an Orbax checkpoint: one flat dict, Hugging Face name -> array.

The one module that imports orbax, and with it jax; import it late. Arrays are numpy's, in and
out, so nothing is compiled and no device is used. What is written here, Orbax alone can restore:
`StandardCheckpointer().restore(folder)`.
"""

import asyncio
import logging
import os
import re
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp  # type: ignore[import-untyped]
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
_ARRAYS_AT_ONCE = 16
_PATIENCE_S = 60.0
# How TensorStore, below Orbax, names the operating system's reason in its long messages.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


def stored_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """Lists a checkpoint's tensors by name, reading none of their values.

    `ModelFolderError` if it is no checkpoint of a flat dict of arrays.
    """
    with _explained(checkpoint, "listed"):
        tree = _reader().metadata(checkpoint.absolute()).tree
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


def write_weights(
    checkpoint: Path, tensors: Mapping[str, NDArray[Any]], progress: Callable[[int], object]
) -> None:
    """Writes a new checkpoint, from the arrays themselves: what is mapped is never copied.

    Uncompressed, because compressing would hold the whole model in memory once more. `progress`
    is called with the bytes of each tensor that is on disk, in a thread of Orbax. `OSError` where
    it cannot be written. After an error or interrupt nothing is being written any more.
    """
    writer = _Writer(progress)
    others = set(threading.enumerate())
    with _quiet():
        try:
            with ocp.Checkpointer(_handler((np.ndarray, writer))) as checkpointer:
                checkpointer.save(checkpoint.absolute(), args=ocp.args.PyTreeSave(dict(tensors)))
        except Exception as error:
            raise OSError(_cause(error)) from error
        except KeyboardInterrupt:
            writer.stop()
            for thread in set(threading.enumerate()) - others:
                threading.Thread.join(thread, _PATIENCE_S)  # Orbax's own join raises the fault
            raise


class _Writer(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
    """Orbax's writer of arrays: a few at a time, and none after a fault.

    Orbax's own starts all at once and leaves them running after a fault, in threads that outlive
    `save`, make a removed folder anew and report to a closed event loop, at length. Here the fault
    is raised when every array begun has ended. `_open_and_write` is Orbax's name; under another
    one day, weights would still be written, but without progress and these manners.
    """

    def __init__(self, progress: Callable[[int], object]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._progress = progress
        self._turns = asyncio.Semaphore(_ARRAYS_AT_ONCE)
        self._left = 0
        self._fault: Exception | None = None

    async def serialize(self, values: Sequence[NDArray[Any]], *others: object) -> object:
        self._left = len(values)
        return await super().serialize(values, *others)

    async def _open_and_write(self, value: NDArray[Any], *others: object) -> None:
        async with self._turns:
            if self._fault is None:
                try:
                    await super()._open_and_write(value, *others)
                    self._progress(value.nbytes)
                except Exception as error:
                    self._fault = error
        self._left -= 1
        if self._left == 0 and self._fault is not None:
            raise self._fault

    def stop(self) -> None:
        """Begins no further array, and fails when those begun have ended."""
        self._fault = InterruptedError("interrupted")


class _Reader(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
    """Orbax's reader of arrays, whether saved from the host or from devices.

    Orbax's own fails with the first array that is damaged, while others are still being read and
    then report to a closed event loop, at length. Here all end before the first fault is raised.
    """

    def __init__(self, typestr: str) -> None:
        super().__init__()
        self._typestr = typestr

    def typestr(self) -> str:
        return self._typestr

    async def metadata(self, infos: Sequence[Any]) -> list[Any]:
        return await _all([super().metadata([info]) for info in infos])

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        pairs = zip(infos, args, strict=True)
        return await _all([super().deserialize([info], [arg]) for info, arg in pairs])


async def _all(readings: Iterable[Awaitable[Sequence[Any]]]) -> list[Any]:
    """The one result of each of `readings`; raises the first fault when all have ended."""
    results = await asyncio.gather(*readings, return_exceptions=True)
    values: list[Any] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        values.extend(result)
    return values


def _reader() -> ocp.PyTreeCheckpointHandler:
    # Found by the first type that fits (np.ndarray, what is asked for) or by name (what was saved).
    names = {np.ndarray: "np.ndarray", int: "scalar", object: "jax.Array"}
    return _handler(*((kind, _Reader(name)) for kind, name in names.items()))


def _handler(*handlers: tuple[type, object]) -> ocp.PyTreeCheckpointHandler:
    """Orbax's reader and writer of trees; pinning memory would ask for the accelerator."""
    return ocp.PyTreeCheckpointHandler(
        use_compression=False,
        enable_pinned_host_transfer=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(*handlers),
    )


def _restore(checkpoint: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(names, 0),
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names},
        partial_restore=True,
    )
    with _explained(checkpoint, "read"), ocp.Checkpointer(_reader()) as checkpointer:
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


def _dtype_name(dtype: object) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


@contextmanager
def _explained(checkpoint: Path, action: str) -> Iterator[None]:
    """Turns what Orbax raises, of no common base, into `ModelFolderError`."""
    try:
        with _quiet():
            yield
    except Exception as error:
        raise ModelFolderError(
            f"{shown(checkpoint)}: cannot be {action} as an Orbax checkpoint ({_cause(error)});"
            " copy or convert it again"
        ) from error


def _cause(error: Exception) -> str:
    code = _OS_ERROR.search(str(error))
    return os.strerror(int(code[1])) if code else reason(error)


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

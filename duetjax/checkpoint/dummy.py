"""Random weights for --load-format dummy: the speed of a model without its download."""

import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duetjax.checkpoint.tensors import Shapes, Weights
from duetjax.config import ConfigError
from duetjax.host import host_memory

_STDDEV = 0.02  # initializer_range of the supported families
# Normals drawn per tensor and repeated to fill it: drawing 8 billion would take minutes. Prime,
# so that the first 262,147 rows of a matrix differ.
_BLOCK = 262_147


def dummy_weights(shapes: Shapes, dtype: np.dtype[Any], seed: int) -> Weights:
    """Yields a tensor of every name and shape in `dtype`: ones for norms, else small normals.

    A tensor depends on its name, shape, dtype and the seed only. `ConfigError` before the first
    one if all together exceed this machine's memory.
    """
    need = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    if need > (have := host_memory()):
        raise ConfigError(
            f"--load-format dummy: the weights take {need / 1e9:.1f} GB in {dtype}, this machine"
            f" has {have / 1e9:.1f} GB of memory; choose a smaller model or --dtype bfloat16"
        )
    return ((name, _tensor(name, shape, dtype, seed)) for name, shape in shapes.items())


def _tensor(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], seed: int) -> NDArray[Any]:
    if name.endswith("norm.weight"):
        return np.ones(shape, dtype)
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    block = random.standard_normal(min(_BLOCK, math.prod(shape)), dtype=np.float32) * _STDDEV
    return np.resize(block.astype(dtype), shape)

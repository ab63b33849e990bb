"""Which checkpoint tensors become one leaf of the programs: a table that reads both ways.

Projections of the same input are stacked along their output axis, so that a program multiplies
once. On disk weights are never fused.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duetjax.config import ModelConfig

PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

type Shape = tuple[int, ...]
type Tensor = NDArray[Any]


def part_rows(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Output features of each fused projection's parts, in order."""
    kv = config.num_kv_heads * config.head_dim
    return {
        "qkv_proj": (config.num_heads * config.head_dim, kv, kv),
        "gate_up_proj": (config.intermediate_size,) * 2,
    }


class Fusion:
    """The leaves of one model and the tensors that they are made of, by their full names.

    leaves: name -> shape, as programs take them. shapes: name -> shape, as checkpoints hold them.
    """

    def __init__(self, config: ModelConfig, leaves: Mapping[str, Shape]) -> None:
        self.leaves = dict(leaves)
        self.shapes: dict[str, Shape] = {}
        self._parts: dict[str, tuple[str, ...]] = {}
        self._leaf_of: dict[str, str] = {}
        rows = part_rows(config)
        for leaf, shape in self.leaves.items():
            *path, module, kind = leaf.split(".")
            if module in PARTS:
                names = tuple(".".join((*path, part, kind)) for part in PARTS[module])
                self.shapes |= {
                    n: (r, *shape[1:]) for n, r in zip(names, rows[module], strict=True)
                }
            else:
                names = (leaf,)
                self.shapes[leaf] = shape
            self._parts[leaf] = names
            self._leaf_of |= dict.fromkeys(names, leaf)

    def fuse(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Turns checkpoint tensors into leaves, each as soon as its last part has come."""
        waiting: dict[str, Tensor] = {}
        for name, tensor in tensors:
            leaf = self._leaf_of[name]
            waiting[name] = tensor
            parts = self._parts[leaf]
            if all(part in waiting for part in parts):
                arrays = [waiting.pop(part) for part in parts]
                yield leaf, np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        assert not waiting, f"parts are missing beside {list(waiting)}"

    def split(self, leaf: str, value: Tensor) -> dict[str, Tensor]:
        """The checkpoint tensors in a leaf, by name; the inverse of `fuse`."""
        names = self._parts[leaf]
        ends = np.cumsum([self.shapes[name][0] for name in names])[:-1]
        return dict(zip(names, np.split(value, ends), strict=True))

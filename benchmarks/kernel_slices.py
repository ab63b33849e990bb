"""How long a program takes on parts of a GPU: recorded once, replayed on every split.

What is timed ends when the host learns of it, so a program should hold many calls of a kernel.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import jax

import duetjax._launcher as _launcher
from duetjax.runtime.placeholders import mark
from duetjax.runtime.recorder import SPARE_BYTES, Memory, XlaMemory, captured
from duetjax.runtime.target import local_target

RUNS = 5
_PATIENCE_S = 60.0


class Runs(Protocol):
    """A compiled program that ends in the launcher's marker."""

    def __call__(self, *operands: Any) -> Any: ...  # noqa: ANN401, D102


class Slices:
    """A GPU's parts: the whole of it, and the decode share of each split.

    sms: how many multiprocessors each has, in the order of `seconds`; they are what the GPU makes
    of those asked for. libcuda, memory: others than the system's and XLA's.
    Raises `duetjax._launcher.LauncherError` where the GPU cannot be split.
    """

    def __init__(
        self, wanted: Sequence[int], *, libcuda: str | None = None, memory: Memory | None = None
    ) -> None:
        self._device = _launcher.Device(wanted, libcuda=libcuda)
        self._memory = memory or XlaMemory()
        self.sms = tuple(decode for _, decode, _ in self._device.splits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._device.close()

    def seconds(self, run: Runs, operands: Sequence[Any], temp_bytes: int) -> list[float]:
        """Of the shortest of some runs on each part; temp_bytes: that the program needs.

        Raises `duetjax._launcher.Unsafe` where a replay would not be what XLA ran.
        """
        take = self._memory.holder(temp_bytes + SPARE_BYTES)
        jax.block_until_ready(run(*operands))
        recording, outputs = captured(
            self._device,
            lambda: jax.block_until_ready(jax.tree.leaves(run(*operands))),
            lambda outputs: (run, operands, outputs),
        )
        held = take()
        arrays = (*jax.tree.leaves(operands), *outputs, held)
        recording.check([(each.unsafe_buffer_pointer(), each.nbytes, False) for each in arrays])
        for part in range(len(self.sms)):
            recording.build(_launcher.DECODE, part)
        return [self._shortest(recording, part) for part in range(len(self.sms))]

    def _shortest(self, recording: "_launcher.Program", part: int) -> float:
        shortest = math.inf
        for _ in range(1 + RUNS):
            began = time.perf_counter()
            step = recording.launch(_launcher.DECODE, part, 1, 0)
            if not self._device.wait(_launcher.DECODE, step, _PATIENCE_S):
                raise TimeoutError(f"a replay on {self.sms[part]} SMs takes over {_PATIENCE_S} s")
            shortest = min(shortest, time.perf_counter() - began)
            self._device.release(_launcher.DECODE, step)
        return shortest


def marked(
    run: Callable[..., jax.Array], operands: Sequence[jax.Array]
) -> tuple[jax.stages.Compiled, int]:
    """A function compiled for `Slices` on the default device, and the bytes of its temporaries."""
    lowered = jax.jit(lambda *operands: mark([run(*operands)])).lower(*operands)
    compiled = local_target().compile(lowered)
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA knows no sizes for this device"
    return compiled, memory.temp_size_in_bytes

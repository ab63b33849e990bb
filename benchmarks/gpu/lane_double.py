"""The lanes' items' programs on the double of libcuda: the toy model of the executor's tests."""

import sys
from ctypes import c_void_p
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from duetjax.runtime.programs import DeviceState, Upkeep
from gpu.bench import Skip
from gpu.building import ROOT
from gpu.driver import FakeDriver
from gpu.lane_rig import Rig, splits_here

if TYPE_CHECKING:
    from gpu.bench import Bench


class _Cuda:
    """The double, as the tests' stand-in for XLA wants it."""

    def __init__(self, bench: "Bench") -> None:
        driver = bench.driver
        assert isinstance(driver, FakeDriver), driver
        self.library, self.call = driver.library, driver.call
        self.memory, self.host = driver.allocate, driver._at
        self.stream, self.is_open = c_void_p(driver.stream()), True


def make(bench: "Bench") -> Rig:
    """Nothing is compiled: programs are functions of numpy arrays."""
    sys.path[:0] = [str(ROOT / each) for each in ("tests/cpu", "tests/unit", "tests")]
    try:
        import toy_programs as toy
        from fake_xla import FakeExecutable, FakeMemory
    except ModuleNotFoundError as error:
        raise Skip(f"the double's toy model is the tests': {error}") from None

    memory = FakeMemory(_Cuda(bench))
    executables: dict[Any, Any] = {
        key: FakeExecutable(
            memory, run, toy.result(key), donated=toy.DONATED, temp_bytes=toy.TEMPORARIES[key]
        )
        for key, run in toy.RUN.items()
    }

    def allocate() -> DeviceState:
        made: DeviceState = jax.tree.map(
            lambda leaf: memory.put(np.zeros(leaf.shape, leaf.dtype)), toy.STATE
        )
        return made

    executables[Upkeep.ALLOCATE] = allocate
    return Rig(
        bench,
        toy.PROGRAMS,
        executables,
        [memory.put(np.zeros(1))],
        toy.TEMPORARIES,
        splits_here(bench),
        toy.Serial,
        toy.PAGE,
        toy.NUM_PAGES,
        libcuda=bench.driver.libcuda,
        memory=memory,
    )

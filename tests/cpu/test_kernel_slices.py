"""Programs timed on parts of a GPU, on the double of libcuda."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_xla import FakeExecutable, FakeMemory, a_gpu

from duetjax._launcher import Unsafe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import kernel_slices
from kernel_slices import RUNS, Slices

WANTED = (16, 64)
RESULT = [jax.ShapeDtypeStruct((4,), np.float32)]


@pytest.fixture
def cuda():
    with a_gpu() as one:
        yield one


def program(memory, **changes):
    given = {"donated": slice(0), "temp_bytes": 512}
    return FakeExecutable(memory, lambda values: [2 * values[0]], RESULT, **given | changes)


def test_every_part_runs_the_program_on_its_own_multiprocessors(cuda):
    memory = FakeMemory(cuda)
    run, x = program(memory), memory.put(np.arange(4, dtype=np.float32))
    with Slices(WANTED, libcuda=cuda.path, memory=memory) as slices:
        assert slices.sms == (132, 16, 64)
        seconds = slices.seconds(run, [x], run.temp_bytes)
    assert len(seconds) == 3
    assert all(0 < each < 60 for each in seconds)
    replayed = run.sms[1:]  # after the run that warms up; what is recorded does not run
    assert replayed == [sms for sms in slices.sms for _ in range(1 + RUNS)]
    assert not run.clashes


def test_a_program_that_uses_memory_of_nobody_is_not_timed(cuda):
    memory = FakeMemory(cuda)
    stranger, x = memory.put(np.zeros(64)), memory.put(np.zeros(4, np.float32))
    run = program(memory, also=[stranger])
    with Slices(WANTED, libcuda=cuda.path, memory=memory) as slices, pytest.raises(Unsafe):
        slices.seconds(run, [x], run.temp_bytes)


def test_a_replay_that_never_ends_is_given_up(cuda, monkeypatch):
    memory = FakeMemory(cuda)
    run, x = program(memory), memory.put(np.zeros(4, np.float32))
    monkeypatch.setattr(kernel_slices, "_PATIENCE_S", 0.0)
    with Slices(WANTED, libcuda=cuda.path, memory=memory) as slices:
        monkeypatch.setattr(slices, "_device", Waiting(slices._device))
        with pytest.raises(TimeoutError, match="on 132 SMs"):
            slices.seconds(run, [x], run.temp_bytes)


class Waiting:
    """The launcher's device, whose steps do not complete in time."""

    def __init__(self, device):
        self._device = device

    def __getattr__(self, name):
        return getattr(self._device, name)

    def wait(self, *_):
        return False

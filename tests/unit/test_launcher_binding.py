"""duetjax._launcher from Python, on the double of libcuda; its core has tests in C."""

import gc
import selectors
import shutil
import threading
import weakref

import fake_cuda
import pytest
from fake_cuda import XLA, FakeCuda

_launcher = pytest.importorskip("duetjax._launcher", reason="no C compiler when installed")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")

PREFILL, DECODE = _launcher.PREFILL, _launcher.DECODE
SPLIT = 1
SOON = 30.0


class Kept:
    """Something that a recording keeps alive."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_cuda.build(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def cuda(library):
    fake = FakeCuda(library)
    yield fake
    fake.close()


@pytest.fixture
def device(cuda):
    with _launcher.Device([32], libcuda=cuda.path, result_slots=4) as opened:
        yield opened


def record(cuda, device, run=lambda address, sms: None, *, kept=None):
    """A recording of one kernel, checked, with the memory it uses."""
    cell = cuda.memory(8)
    device.arm(XLA)
    _launcher.begin_capture(XLA, cuda.stream.value)
    cuda.enqueue(cuda.kernel(run), cell)
    _launcher.end_capture(XLA)
    program = device.take(XLA, kept)
    program.add_result(cell, 8)
    program.check([(cell, 8, True)])
    return program, cell


def add_one(cuda):
    def run(address, _sms):
        fake_cuda.c_uint64.from_address(cuda.host(address)).value += 1

    return run


def test_splits_are_what_the_driver_gave(cuda):
    with _launcher.Device([12, 48], libcuda=cuda.path) as device:
        assert device.splits == ((0, 132, 132), (12, 16, 116), (48, 48, 84))


def test_a_launch_runs_on_the_sms_of_its_lane_while_python_waits(cuda, device):
    """The kernels are Python: they get nowhere unless waiting lets go of the interpreter."""
    seen = []
    program, _ = record(cuda, device, lambda _address, sms: seen.append(sms))
    for lane in (DECODE, PREFILL):
        program.build(lane, SPLIT)
        assert device.wait(lane, program.launch(lane, SPLIT, 1, 0), SOON)
    assert seen == [32, 100]


def test_each_step_s_result_is_its_own(cuda, device):
    program, cell = record(cuda, device, add_one(cuda))
    program.build(DECODE, SPLIT)
    assert program.launch(DECODE, SPLIT, 3, 1) == 3
    assert device.wait(DECODE, 3, SOON)
    results = [int.from_bytes(device.result(DECODE, step), "little") for step in (1, 2, 3)]
    assert results == [1, 2, 3]
    assert cuda.value(cell) == 3


def test_a_full_ring_is_busy_until_results_are_released(cuda, device):
    program, _ = record(cuda, device)
    program.build(DECODE, SPLIT)
    assert device.wait(DECODE, program.launch(DECODE, SPLIT, 4, 1), SOON)
    with pytest.raises(_launcher.Busy, match="4 steps have not been released"):
        program.launch(DECODE, SPLIT, 1, 1)
    device.release(DECODE, 1)
    assert program.launch(DECODE, SPLIT, 1, 1) == 5
    with pytest.raises(_launcher.LauncherError, match="step 1 has been released"):
        device.result(DECODE, 1)


def test_copies_from_the_host_come_before_the_next_launch(cuda, device):
    program, cell = record(cuda, device, add_one(cuda))
    program.build(DECODE, SPLIT)
    device.copy_in(DECODE, SPLIT, cell, (41).to_bytes(8, "little"))
    assert device.wait(DECODE, program.launch(DECODE, SPLIT, 1, 1), SOON)
    assert int.from_bytes(device.result(DECODE, 1), "little") == 42


def test_the_descriptor_tells_of_completed_steps(cuda, device):
    program, _ = record(cuda, device)
    program.build(DECODE, SPLIT)
    with selectors.DefaultSelector() as waiting:
        waiting.register(device, selectors.EVENT_READ)
        assert waiting.select(0) == []
        program.launch(DECODE, SPLIT, 1, 0)
        assert waiting.select(SOON)
        assert device.wait(DECODE, 1, SOON)
        device.clear()
        assert device.completed(DECODE) == 1


def test_a_step_that_does_not_end_is_not_waited_for_longer_than_asked(cuda, device):
    go_on = threading.Event()
    program, _ = record(cuda, device, lambda _address, _sms: go_on.wait(SOON))
    program.build(DECODE, SPLIT)
    step = program.launch(DECODE, SPLIT, 1, 0)
    assert not device.wait(DECODE, step, 0.01)
    go_on.set()
    assert device.wait(DECODE, step, SOON)


def test_memory_that_nobody_keeps_is_refused_by_name(cuda, device):
    program, cell = record(cuda, device)
    with pytest.raises(_launcher.Unsafe, match=rf"kernel .* uses {cell:#x}"):
        program.check([(cell + 8, 8, True)])


def test_two_lanes_may_not_use_the_same_private_memory(cuda, device):
    one, cell = record(cuda, device)
    one.check([(cell, 8, False)])
    other, own = record(cuda, device)
    other.add_copy(own, cell, 8)
    other.check([(cell, 8, True), (own, 8, True)])
    one.check_apart(other)
    other.check([(cell, 8, False), (own, 8, True)])
    with pytest.raises(_launcher.Unsafe, match="race"):
        one.check_apart(other)


def test_a_recording_keeps_what_it_was_given_until_it_is_freed(cuda, device):
    kept = Kept()
    gone = weakref.ref(kept)
    program, _ = record(cuda, device, kept=kept)
    del kept
    assert gone() is not None
    del program
    assert gone() is None


def test_a_recording_in_a_cycle_is_collected(cuda, device):
    kept = Kept()
    kept.program, _ = record(cuda, device, kept=kept)
    gone = weakref.ref(kept)
    del kept
    gc.collect()
    assert gone() is None


def test_a_device_outlives_its_name_while_a_recording_needs_it(cuda):
    device = _launcher.Device([32], libcuda=cuda.path)
    program, _ = record(cuda, device)
    program.build(DECODE, SPLIT)
    del device
    assert program.launch(DECODE, SPLIT, 1, 0) == 1


def test_a_closed_device_says_so(cuda, device):
    program, _ = record(cuda, device)
    device.close()
    device.close()
    for call in (lambda: device.arm(XLA), lambda: program.build(DECODE, SPLIT)):
        with pytest.raises(_launcher.LauncherError, match="closed"):
            call()


def test_a_refusal_of_the_driver_names_its_call_and_costs_that_call_alone(cuda, device):
    program, _ = record(cuda, device)
    cuda.fail("cuGraphInstantiateWithFlags", 1, 2)
    with pytest.raises(MemoryError, match="cuGraphInstantiateWithFlags: CUDA_ERROR_OUT_OF_MEMORY"):
        program.build(DECODE, SPLIT)
    program.build(DECODE, SPLIT)
    assert program.is_built(DECODE, SPLIT)
    assert not program.is_built(PREFILL, SPLIT)


def test_a_dead_device_wakes_who_waits_and_refuses_the_rest(cuda, device):
    go_on = threading.Event()
    program, _ = record(cuda, device, lambda _address, _sms: go_on.wait(SOON))
    program.build(DECODE, SPLIT)
    step = program.launch(DECODE, SPLIT, 1, 0)
    cuda.library.fake_die(700)
    with pytest.raises(_launcher.DeviceDead, match="ILLEGAL_ADDRESS"):
        device.wait(DECODE, step, SOON)
    with pytest.raises(_launcher.DeviceDead):
        device.arm(XLA)
    go_on.set()


def test_wrong_arguments_are_python_s_usual_errors(cuda, device):
    program, _ = record(cuda, device)
    with pytest.raises(ValueError, match="there is no split 9"):
        program.build(DECODE, 9)
    with pytest.raises(ValueError, match="there is no lane 5"):
        program.build(5, SPLIT)
    with pytest.raises(TypeError):
        program.check([1])
    with pytest.raises(TypeError):
        _launcher.Program()
    with pytest.raises(ValueError, match="no SMs"):
        _launcher.Device([0], libcuda=cuda.path)


def test_an_absent_driver_is_named():
    with pytest.raises(_launcher.NoDriver, match=r"no-such-cuda\.so"):
        _launcher.Device([8], libcuda="no-such-cuda.so")

"""What launches become on a GPU's lanes, one at a time: where they run, what waits for what."""

import gc
import threading
from ctypes import c_size_t
from dataclasses import replace

import pytest
from fake_xla import _launcher, a_gpu
from lane_plans import PATIENCE
from toy_gpu import (
    MANUAL,
    SPLITS,
    THREADS,
    Gpu,
    Twin,
    check_state,
    closing,
    decode_launch,
    delivered,
    everything,
    prefill_launch,
)
from toy_programs import PROGRAMS, Serial

from duetjax.policy.launch import FinishedStep, Lane, Split
from duetjax.runtime import rungs
from duetjax.runtime.cuda_lanes import RESULT_SLOTS, CudaLanes, Replay

DEVICE_MEMORY = 5  # of the kinds of things that the double counts, without the first


@pytest.fixture
def cuda():
    with a_gpu() as cuda:
        yield cuda


@pytest.fixture
def gpu(cuda):
    gpu = Gpu(cuda)
    yield gpu
    cuda.library.fake_mode(THREADS)
    gpu.lanes.close()


def sms_of(gpu, launch):
    """On how many SMs each of its kernels has run."""
    sms = gpu.executables[launch.program, launch.bucket].sms
    sms.clear()
    gpu.lanes.submit(launch)
    for _ in range(launch.k):
        gpu.deliveries.next()
    return sms


# Where.


def test_every_launch_runs_on_the_sms_of_its_lane_and_split(gpu):
    gpu.start()
    for split in SPLITS:
        assert sms_of(gpu, decode_launch(0, 0, split=split, k=2)) == [split.decode] * 2
        assert sms_of(gpu, prefill_launch(1, 1, split=split)) == [split.prefill]
        assert sms_of(gpu, decode_launch(2, 0, 1, 2, split=split)) == [split.decode]
    assert sms_of(gpu, decode_launch(3, 0, lane=Lane.WHOLE)) == [132]
    assert sms_of(gpu, prefill_launch(4, 0, lane=Lane.WHOLE)) == [132]


@pytest.mark.parametrize(("decode", "served"), [(8, 32), (40, 32), (48, 32), (56, 64), (96, 64)])
def test_a_split_that_has_not_been_built_is_served_by_the_nearest(gpu, decode, served):
    split = Split(decode, 132 - decode)
    assert sms_of(gpu.start(), decode_launch(0, 0, split=split)) == [served]
    assert sms_of(gpu, prefill_launch(1, 1, split=split)) == [132 - served]


def test_likely_tokens_are_copied_only_for_launches_that_want_them(gpu):
    twin, copies = Twin(gpu), []
    twin.run(prefill_launch(0, 0, lane=Lane.WHOLE))
    for ticket, wants_top in ((1, False), (2, True)):
        before = gpu.cuda.library.fake_calls(b"cuMemcpyDtoHAsync")
        twin.run(decode_launch(ticket, 0, lane=Lane.WHOLE, k=4, wants_top=wants_top))
        copies.append(gpu.cuda.library.fake_calls(b"cuMemcpyDtoHAsync") - before)
    assert copies == [4, 8]


@pytest.mark.parametrize("unchanged", ["limits", "pages"])
def test_a_slots_new_owner_finds_nothing_of_the_one_before(gpu, unchanged):
    twin = Twin(gpu)
    twin.run(prefill_launch(0, 0, lane=Lane.WHOLE))
    twin.run(prefill_launch(1, 0, lane=Lane.WHOLE, **{unchanged: ()}))
    check_state(twin)


# In what order.


@pytest.mark.parametrize("k", [RESULT_SLOTS // 4 + 1, RESULT_SLOTS, 2 * RESULT_SLOTS + 3])
def test_a_look_ahead_longer_than_the_ring_of_results_arrives_whole_and_in_order(gpu, k):
    twin = Twin(gpu)
    twin.run(prefill_launch(0, 0, lane=Lane.WHOLE))
    twin.submit(decode_launch(1, 0, lane=Lane.WHOLE, k=k))
    twin.submit(decode_launch(2, 0, lane=Lane.WHOLE))
    assert twin.rest() == [*((1, step) for step in range(k)), (2, 0)]


@pytest.fixture
def small_staging(monkeypatch):
    """A launcher with room for fewer copies than a launch of four new slots makes."""
    device = _launcher.Device

    def opened(*arguments, **options):
        return device(*arguments, **options | {"staging_bytes": 1000})

    monkeypatch.setattr(rungs._launcher, "Device", opened)


def prompts(ticket, *slots, lane=Lane.WHOLE):
    """Slots' prompts in one launch, all with penalties."""
    each = [prefill_launch(ticket + slot, slot, lane=lane) for slot in slots]
    columns = ("slots", "starts", "samples", "admitted", "pages", "limits")
    joined = {name: sum((getattr(one, name) for one in each), ()) for name in columns}
    packed = b"".join(one.packed[: 4 * 15] for one in each)
    return replace(each[0], ticket=ticket, counts=(15,) * len(slots), packed=packed, **joined)


@pytest.mark.usefixtures("small_staging")
def test_more_copies_than_there_is_room_for_are_made_in_turn(gpu):
    twin = Twin(gpu)
    for ticket in range(0, 30, 3):
        twin.submit(prompts(ticket, 0, 1, 2, 3))
        twin.submit(decode_launch(ticket + 1, 0, 1, 2, 3, lane=Lane.WHOLE, k=3))
        twin.submit(decode_launch(ticket + 2, 0, lane=Lane.WHOLE))
    assert len(twin.rest()) == 50
    assert gpu.cuda.library.fake_pending() == 0


@pytest.mark.usefixtures("small_staging")
def test_a_fence_on_one_lane_leaves_the_other_lanes_steps_alone(gpu):
    twin = Twin(gpu)
    twin.run(prompts(0, 0, 1, 2, 3))
    for ticket in range(1, 21, 2):
        twin.submit(decode_launch(ticket, 0, 1, k=2))
        twin.submit(prompts(ticket + 1, 2, 3, lane=Lane.PREFILL))
    assert len(twin.rest()) == 30


# When.


class Hasty:
    """A recording whose steps have been delivered before their launch returns."""

    def __init__(self, recording, gpu):
        self._recording, self._gpu = recording, gpu

    def launch(self, lane, split, steps, num_results):
        last = self._recording.launch(lane, split, steps, num_results)
        waited = threading.Event()
        while self._gpu.deliveries.is_empty():
            assert not waited.wait(0.001)
        return last


def hasty(replay, gpu):
    return Replay(Hasty(replay.recording, gpu), replay.inputs)


def test_steps_that_complete_before_submit_returns_are_delivered(gpu):
    recordings = gpu.lanes._recordings
    of = {key: hasty(replay, gpu) for key, replay in recordings.of.items()}
    gpu.lanes._recordings = replace(recordings, of=of)
    twin = Twin(gpu)
    twin.run(*everything())


class LateClear:
    """The launcher's device; when it is cleared for the first time, another step has completed."""

    def __init__(self, device, run):
        self._device, self._run = device, run

    def __getattr__(self, name):
        return getattr(self._device, name)

    def clear(self):
        self._run()
        self._device.clear()


def test_a_step_that_completes_while_others_are_delivered_is_delivered_too(gpu):
    gpu.cuda.library.fake_mode(MANUAL)
    device = gpu.lanes._device

    def run_all():
        while not device.wait(1, 2, 0.001):
            gpu.cuda.library.fake_step(c_size_t(0))

    recordings = replace(gpu.lanes._recordings, device=LateClear(device, run_all))
    gpu.lanes = CudaLanes(PROGRAMS, recordings)
    gpu.start()
    gpu.lanes.submit(decode_launch(0, 0, k=2))
    while not device.completed(1):
        gpu.cuda.library.fake_step(c_size_t(0))
    assert [gpu.deliveries.next().step for _ in range(2)] == [0, 1]


def test_nothing_is_delivered_that_has_not_been_computed(gpu):
    gpu.cuda.library.fake_mode(MANUAL)
    gpu.cuda.library.fake_stall(1)  # computed, but nobody has said so
    gpu.start()
    gpu.lanes.submit(decode_launch(0, 0, k=2))
    gpu.cuda.library.fake_drain(c_size_t(0))
    assert not gpu.lanes._device.wait(1, 1, 0.05)
    assert gpu.deliveries.is_empty()
    gpu.cuda.library.fake_stall(0)
    gpu.cuda.library.fake_drain(c_size_t(0))
    assert [gpu.deliveries.next().step for _ in range(2)] == [0, 1]


def test_launches_run_one_at_a_time_before_the_start_and_are_not_delivered_again(gpu):
    serial = Serial()
    before = [replace(each, k=1) for each in everything()]
    for launch in before:
        assert [gpu.lanes.run(launch)] == serial.run(launch)
    gpu.start()
    after = decode_launch(100, 0, 1, 2, k=2)
    gpu.lanes.submit(after)
    assert [gpu.deliveries.next().result for _ in range(2)] == serial.run(after)
    assert gpu.deliveries.is_empty()


# The end.


def in_flight():
    """Launches that are not done when lanes are closed, and the steps that they owe."""
    decode, prefill = decode_launch(0, 0, k=3), prefill_launch(1, 1)
    steps = [(0, 0), (0, 1), (0, 2)]
    yield [decode], steps
    yield [prefill], [(1, 0)]
    yield [decode, prefill, decode_launch(2, 0)], [*steps, (1, 0), (2, 0)]


@pytest.mark.parametrize(("launches", "steps"), list(in_flight()))
def test_close_waits_until_everything_in_flight_has_been_delivered(gpu, launches, steps):
    gpu.cuda.library.fake_mode(MANUAL)
    gpu.start()
    for launch in launches:
        gpu.lanes.submit(launch)
    thread = closing(gpu)
    thread.join(0.2)
    assert thread.is_alive()
    assert gpu.deliveries.is_empty()
    gpu.cuda.library.fake_drain(c_size_t(0))
    thread.join(PATIENCE)
    assert sorted(delivered(gpu)) == steps


def test_close_gives_everything_back_and_may_be_repeated():
    with a_gpu() as cuda:
        kinds = range(1, 8)  # from green contexts to pinned memory; XLA holds on to its context
        before = [cuda.library.fake_live(kind) for kind in kinds]
        gpu = Gpu(cuda)
        Twin(gpu).run(*everything())
        for _ in range(2):
            gpu.lanes.close()
        xla = [cuda.library.fake_live(kind) for kind in kinds]
        xla[DEVICE_MEMORY] -= 1  # which arrays are in
        assert xla == before
        del gpu
        gc.collect()
        assert [cuda.library.fake_live(kind) for kind in kinds] == before


def test_close_before_the_start_returns(gpu):
    gpu.lanes.run(prefill_launch(0, 0))
    thread = closing(gpu)
    thread.join(PATIENCE)
    assert not thread.is_alive()


class Refusing:
    """A recording that the launcher does not launch."""

    def launch(self, *_):
        raise _launcher.LauncherError("not built")


def test_close_does_not_wait_for_a_launch_that_was_refused(gpu):
    launch, recordings = decode_launch(0, 0), gpu.lanes._recordings
    key = launch.lane, (launch.program, launch.bucket)
    refused = replace(recordings.of[key], recording=Refusing())
    gpu.lanes._recordings = replace(recordings, of={**recordings.of, key: refused})
    gpu.start()
    with pytest.raises(_launcher.LauncherError, match="not built"):
        gpu.lanes.submit(launch)
    gpu.lanes._recordings = recordings
    gpu.lanes.submit(launch)
    assert gpu.deliveries.next().ticket == 0
    thread = closing(gpu)
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_launch_does_not_wait_for_results_that_nobody_takes_any_more(gpu):
    told = []

    def deliver(finished):
        told.append(finished)
        if len(told) == 1:
            raise OSError("nobody is there")

    gpu.lanes.start(deliver)
    for ticket in range(RESULT_SLOTS + 1):  # one of them leaves the ring
        gpu.lanes.submit(decode_launch(ticket, 0))
    with pytest.raises(_launcher.Busy):
        gpu.lanes.submit(decode_launch(RESULT_SLOTS + 1, 0))
    assert [type(each) for each in told] == [FinishedStep, OSError]

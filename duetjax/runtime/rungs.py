"""Which way launches run on a GPU: the first of a ladder's rungs that holds, tried at start."""

import gc
import logging
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import jax

from duetjax.config import MAX_LOGPROBS, ConfigError
from duetjax.policy.launch import Split
from duetjax.runtime.cuda_lanes import RESULT_SLOTS, CudaLanes
from duetjax.runtime.executor import Executables
from duetjax.runtime.programs import Key, Leaves, Programs
from duetjax.runtime.recorder import Memory, Progress, Recorder, XlaMemory
from duetjax.runtime.slot_state import PARAMS

try:
    import duetjax._launcher as _launcher
except ImportError:  # installed where there was no C compiler
    _launcher = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

_LEAST_STAGING = 4 * 2**20


class Rung(StrEnum):
    """How launches run.

    GRAPHS: as CUDA graphs on streams that see a split's SMs alone. LISTS: kernel by kernel on such
    streams. STREAMS: as graphs on two ordinary streams, decode's first: without splits. JAX: as
    plain calls, one after another. LANES: on the processor, in threads.
    """

    GRAPHS = "graphs"
    LISTS = "lists"
    STREAMS = "streams"
    JAX = "jax"
    LANES = "lanes"


class NoRung(Exception):
    """No rung above plain JAX calls holds; says why each does not."""


def open_lanes(
    programs: Programs,
    executables: Executables,
    weights: Leaves,
    temporaries: Mapping[Key, int],
    splits: Sequence[Split],
    *,
    built: Progress = lambda *_: None,
    libcuda: str | None = None,
    memory: Memory | None = None,
) -> tuple[CudaLanes, Rung]:
    """The lanes of a GPU, on the highest rung that holds.

    temporaries: bytes that each program needs while it runs. splits: those that the policy may
    choose, the most useful one first. built: told how many graphs are, of how many. libcuda,
    memory: others than the system's and XLA's.
    Raises `NoRung`, and `DeviceDead` if the GPU has failed for good.
    """
    lanes = _Opening(
        programs, executables, weights, temporaries, built, libcuda, memory or XlaMemory()
    )
    reasons = []
    for rung in (Rung.GRAPHS, Rung.LISTS, Rung.STREAMS) if splits else (Rung.GRAPHS, Rung.LISTS):
        try:
            return lanes.on(rung, () if rung is Rung.STREAMS else splits), rung
        except _launcher.DeviceDead:
            raise
        except (_launcher.LauncherError, MemoryError, jax.errors.JaxRuntimeError) as error:
            _log.warning("launches cannot run as %s: %s", rung, str(error))  # not its frames
            reasons.append(f"{rung}: {error}")
        gc.collect()  # what has failed makes room
    raise NoRung("; ".join(reasons))


class _Opening(NamedTuple):
    """What lanes are made of."""

    programs: Programs
    executables: Executables
    weights: Leaves
    temporaries: Mapping[Key, int]
    built: Progress
    libcuda: str | None
    memory: Memory

    def on(self, rung: Rung, splits: Sequence[Split]) -> CudaLanes:
        programs, executables, weights, temporaries, built, libcuda, memory = self
        device = _open(programs, splits, libcuda, replay_lists=rung is Rung.LISTS)
        recorder = Recorder(device, programs, executables, weights, temporaries, memory)
        return CudaLanes(programs, recorder.record(_numbered(device, splits), built))


def _open(
    programs: Programs, splits: Sequence[Split], libcuda: str | None, *, replay_lists: bool
) -> "_launcher.Device":
    buckets, slots = programs.buckets, programs.slots
    rows = max(*buckets.decode, *map(buckets.rows_of, buckets.prefill))
    top = min(MAX_LOGPROBS, slots.vocab_size)
    widest = max(PARAMS.itemsize, 4 * slots.table_width, 2 * slots.vocab_size, *buckets.prefill)
    masks = slots.rows * (4 * slots.mask_words + PARAMS.itemsize)
    return _launcher.Device(
        [split.decode for split in splits],
        libcuda=libcuda,
        result_bytes=rows * (12 + 8 * top),
        result_slots=RESULT_SLOTS,
        # Twice what a launch copies where all its slots have new masks, beside the widest rows.
        staging_bytes=max(_LEAST_STAGING, 16 * widest) + 2 * masks,
        replay_lists=replay_lists,
    )


def _numbered(device: "_launcher.Device", splits: Sequence[Split]) -> dict[Split, int]:
    """The launcher's number of each split that came out as it was asked for.

    Raises `ConfigError` if none did.
    """
    made = [Split(decode, prefill) for _, decode, prefill in device.splits[1:]]
    usable = {one: n for n, one in enumerate(splits, 1) if one == made[n - 1]}
    others = [
        f"{got.decode}/{got.prefill} SMs of a split of {one.decode}/{one.prefill}"
        for one, got in zip(splits, made, strict=True)
        if one != got
    ]
    if splits and not usable:
        raise ConfigError(
            f"the GPU makes {', '.join(others)}: choose another --hardware-profile or --split"
        )
    if others:
        _log.warning("left out, as the GPU makes %s", ", ".join(others))
    return usable

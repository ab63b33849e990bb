"""What a GPU reaches on every part of it that a split makes.

A large product of bfloat16 matrices (FLOP/s) and a copy that no cache holds (bytes/s, reads and
writes both counted), each recorded once and replayed on the whole GPU and on both shares of every
split. Then the one beside the other, for what the lanes cost each other. The fastest of a few runs
counts: what makes one slower is somebody else's doing.
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from duetjax.config import ConfigError, DuetJAXError
from duetjax.policy.profiles import Reach
from duetjax.runtime.recorder import Memory
from duetjax.runtime.slices import Part, Recorded, Runs, Slices, marked

try:
    import duetjax._launcher as _launcher
except ImportError:  # installed where there was no C compiler
    _launcher = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

PRODUCT_SIZE = 8192
COPY_BYTES = 2**30
_REPLAYS = 3
_ANY_SHARE = 8
"""Multiples of it are shares that every GPU with green contexts makes."""
_CONTENDED = 5
"""On so many splits, evenly over all of them, contention is measured."""


class Load(NamedTuple):
    """A compiled program with its operands; temp_bytes: that it needs. work: FLOPs or bytes."""

    run: Runs
    operands: Sequence[Any]
    temp_bytes: int
    work: float


@dataclass(frozen=True, slots=True)
class GpuRates:
    """What was measured. curve: ascending in cores, nothing in it decreasing.

    core_step, least_cores: the shares that the driver makes. contention_*: how many times as long
    a lane takes beside the other one, the median over some splits; None where there are none.
    are_shares_told: by the driver; else they are those of any GPU.
    """

    curve: tuple[Reach, ...]
    core_step: int
    least_cores: int
    launch_us: float
    contention_decode: float | None
    contention_prefill: float | None
    are_shares_told: bool = True


def loads() -> tuple[Load, Load, Load]:
    """The product, the copy, and a program of nearly nothing, for the default device."""
    # Products of alike numbers draw less power, so a GPU is faster at them than it can stay.
    matrix = jax.random.normal(jax.random.key(0), (PRODUCT_SIZE, PRODUCT_SIZE), jnp.bfloat16)
    source = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    work = 2.0 * PRODUCT_SIZE**3, 2.0 * COPY_BYTES, 1.0
    return (
        _load(jnp.matmul, (matrix, matrix), work[0]),
        _load(lambda x: x + 1, (source,), work[1]),  # a plain copy would be no kernel
        _load(lambda x: x + 1, (jnp.zeros(1, jnp.float32),), work[2]),
    )


def gpu_rates(
    product: Load,
    copy: Load,
    nothing: Load,
    *,
    libcuda: str | None = None,
    memory: Memory | None = None,
) -> GpuRates:
    """Measures; some ten seconds. libcuda, memory: others than the system's and XLA's.

    Raises `ConfigError` where the launcher has not been built or the GPU cannot be divided, and
    `DuetJAXError` where a replay does not end.
    """
    if _launcher is None:
        raise ConfigError(
            "the launcher has not been built, and parts of a GPU cannot be timed without it;"
            " install a C compiler, then duetjax anew, or give --hardware-profile"
        )
    reasons = []
    for replay_lists in (False, True):
        try:
            shares = _shares(libcuda)
            wanted = range(shares.least, shares.cores - shares.least + 1, shares.step)
            with Slices(
                wanted, replay_lists=replay_lists, libcuda=libcuda, memory=memory
            ) as slices:
                return _measured(slices, (product, copy, nothing), shares)
        except _launcher.DeviceDead:
            raise
        except TimeoutError as error:
            raise DuetJAXError(
                f"parts of the GPU cannot be timed ({error}); give --hardware-profile"
            ) from error
        except (_launcher.LauncherError, MemoryError, jax.errors.JaxRuntimeError) as error:
            reasons.append(str(error))
            _log.warning("parts of the GPU cannot be timed: %s", str(error))
    raise ConfigError(
        f"parts of the GPU cannot be timed ({'; '.join(reasons)}); give --hardware-profile"
    )


def rising(reached: Iterable[Reach]) -> tuple[Reach, ...]:
    """One `Reach` for each number of cores, ascending; where more came out slower, fewer count."""
    best: dict[int, Reach] = {}
    for each in sorted(reached, key=lambda one: one.cores):
        before = best.get(each.cores, each)
        best[each.cores] = Reach(
            each.cores,
            max(before.flops_per_s, each.flops_per_s),
            max(before.bytes_per_s, each.bytes_per_s),
        )
    flops = accumulate([each.flops_per_s for each in best.values()], max)
    moved = accumulate([each.bytes_per_s for each in best.values()], max)
    return tuple([Reach(*each) for each in zip(best, flops, moved, strict=True)])


class _Shares(NamedTuple):
    """The least one that the driver makes, how much more the next one has, and all cores.

    are_told: by the driver.
    """

    least: int
    step: int
    cores: int
    are_told: bool


def _shares(libcuda: str | None) -> _Shares:
    """As the driver makes them of what is too little; where it refuses, shares of any GPU."""
    with _launcher.Device([], libcuda=libcuda) as device:
        [(_, cores, _)] = device.splits
    try:
        with _launcher.Device([1], libcuda=libcuda) as device:
            least = device.splits[1][1]
        with _launcher.Device([least + 1], libcuda=libcuda) as device:
            step = device.splits[1][1] - least
    except _launcher.DeviceDead:
        raise
    except _launcher.LauncherError:
        return _Shares(_ANY_SHARE, _ANY_SHARE, cores, are_told=False)
    return _Shares(least, max(step, 1), cores, are_told=True)


def _measured(slices: Slices, programs: tuple[Load, Load, Load], shares: _Shares) -> GpuRates:
    product, copy, nothing = (
        slices.recorded(each.run, each.operands, each.temp_bytes) for each in programs
    )
    parts = [slices.whole, *(part for split in slices.splits for part in split)]
    reached = {part: each for part in parts if (each := _reach(part, (product, copy), programs))}
    if slices.whole not in reached:
        raise _launcher.LauncherError("nothing runs on the whole of it")
    decode, prefill = [], []
    for one, other in _some([each for each in slices.splits if set(each) <= set(reached)]):
        with suppress(TimeoutError):  # the other splits will do
            decode.append(copy.beside(one, product, other))
            prefill.append(product.beside(other, copy, one))
    return GpuRates(
        curve=rising(reached.values()),
        core_step=shares.step,
        least_cores=shares.least,
        launch_us=1e6 * nothing.shortest(slices.whole),
        contention_decode=median(decode) if decode else None,
        contention_prefill=median(prefill) if prefill else None,
        are_shares_told=shares.are_told,
    )


def _reach(part: Part, pair: tuple[Recorded, Recorded], programs: Sequence[Load]) -> Reach | None:
    """None where the programs cannot be replayed, as one of clusters that do not fit."""
    try:
        flops, moved = (
            load.work / recorded.shortest(part, _REPLAYS)
            for recorded, load in zip(pair, programs, strict=False)
        )
    except _launcher.DeviceDead:
        raise
    except _launcher.LauncherError as error:
        _log.warning("left out, a share of %d SMs: %s", part.sms, str(error))
        return None
    _log.info("%d SMs: %.1f TFLOP/s, %.2f TB/s", part.sms, flops / 1e12, moved / 1e12)
    return Reach(part.sms, flops, moved)


def _some[S](splits: Sequence[S]) -> list[S]:
    """At most so many of them, evenly from the first to the last."""
    if len(splits) <= _CONTENDED:
        return list(splits)
    last = len(splits) - 1
    return [splits[last * n // (_CONTENDED - 1)] for n in range(_CONTENDED)]


def _load(run: Any, operands: tuple[jax.Array, ...], work: float) -> Load:  # noqa: ANN401
    compiled, temp_bytes = marked(run, operands)
    return Load(compiled, operands, temp_bytes, work)

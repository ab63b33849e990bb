"""What this processor reaches on 1 to n of its cores.

For every number of cores a process of its own is bound to that many and times a large matrix
product of JAX's (FLOP/s), copies between arrays that no cache holds (bytes/s, reads and writes
both counted) and a call that computes nearly nothing (launch). The best of several repeats counts:
what makes one slower is other programs' doing. Needs Linux (processor affinity).
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from duetjax.config import ConfigError
from duetjax.policy.profiles import Basis, HardwareProfile, Origin, Reach

PRODUCT_SIZE = 2048
COPY_BYTES = 2**28
LAUNCHES = 200
WATTS_PER_CORE = 50
_LIMIT_S = 120.0
_EVERY = 4


@dataclass(frozen=True, slots=True)
class HostRates:
    """What some cores reached. launch_us: of a call."""

    cores: int
    flops_per_s: float
    bytes_per_s: float
    launch_us: float

    def __str__(self) -> str:
        return (
            f"{self.cores} cores: {self.flops_per_s / 1e9:.1f} GFLOP/s,"
            f" {self.bytes_per_s / 1e9:.2f} GB/s, {self.launch_us:.0f} us a launch"
        )


def host_rates(repeats: int) -> Iterator[HostRates]:
    """Of the numbers of cores that this process may use, from some on only powers of 2, and all.

    Each is measured in a new process.
    Raises `ConfigError` where processes cannot be bound to cores, or fail.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigError(
            "this system binds no process to cores, so nothing tells what some of them reach; give"
            " --hardware-profile"
        )
    for cores in _counts(len(os.sched_getaffinity(0))):
        command = [sys.executable, "-m", "duetjax.runtime.host_rates", str(cores), str(repeats)]
        try:
            run = subprocess.run(
                command,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                check=True,
                timeout=_LIMIT_S,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise ConfigError(
                f"what {cores} cores reach cannot be measured: {_reason(error)}; give"
                " --hardware-profile"
            ) from error
        yield HostRates(**json.loads(run.stdout.splitlines()[-1]))


def _reason(error: subprocess.CalledProcessError | subprocess.TimeoutExpired) -> str:
    """What the process has said last, if it has ended by itself."""
    said = error.stderr.split("\n") if isinstance(error.stderr, str) else []
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    return last or str(error)


def _counts(cores: int) -> list[int]:
    powers = [2**n for n in range(cores.bit_length())]
    return sorted({*range(1, min(cores, _EVERY) + 1), *powers, cores})


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def host_profile(name: str, found: list[HostRates], memory: int, jax: str) -> HardwareProfile:
    """The profile; where more cores came out slower than fewer, the fewer count.

    memory: bytes. jax: the version that multiplied.
    """
    by = Basis.MEASURED
    product = f"float32 product of {PRODUCT_SIZE} by {PRODUCT_SIZE} matrices, JAX {jax}"
    bound = "duetjax profile: each number of cores in a process bound to them"
    share = Origin(Basis.DERIVED, "a process can be bound to any number of cores")
    unknown = Origin(Basis.ASSUMED, "until measured")
    flops = accumulate([each.flops_per_s for each in found], max)
    moved = accumulate([each.bytes_per_s for each in found], max)
    reached = zip([each.cores for each in found], flops, moved, strict=True)
    return HardwareProfile(
        name=name,
        cores=found[-1].cores,
        core_step=1,
        min_decode_cores=1,
        min_prefill_cores=1,
        curve=tuple([Reach(*each) for each in reached]),
        contention_decode=1.25,
        contention_prefill=1.10,
        launch_us=found[-1].launch_us,
        interconnect_bytes_per_s=found[-1].bytes_per_s,
        memory_bytes=memory,
        board_watts=WATTS_PER_CORE * found[-1].cores,
        origins={
            "cores": Origin(by, f"affinity of the process; {processor()}"),
            "core_step": share,
            "min_decode_cores": share,
            "min_prefill_cores": share,
            "curve_cores": Origin(by, bound),
            "curve_flops_per_s": Origin(by, product),
            "curve_bytes_per_s": Origin(by, f"copies of {COPY_BYTES >> 20} MiB, both ways counted"),
            "contention_decode": unknown,
            "contention_prefill": unknown,
            "launch_us": Origin(by, f"a jitted addition of scalars, waited for, JAX {jax}"),
            "interconnect_bytes_per_s": Origin(Basis.ASSUMED, "that of its own memory"),
            "memory_bytes": Origin(by, "all of the machine's"),
            "board_watts": Origin(Basis.ASSUMED, f"{WATTS_PER_CORE} W a core"),
        },
    )


def _measure(cores: int, repeats: int) -> HostRates:
    """In this process, which is bound to the cores before jax starts its threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((PRODUCT_SIZE, PRODUCT_SIZE), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    seconds = _best(lambda: product(matrix).block_until_ready(), repeats)
    small, step = jnp.zeros(()), jax.jit(lambda x: x + 1)

    def launches() -> None:
        for _ in range(LAUNCHES):
            step(small).block_until_ready()

    return HostRates(
        cores=cores,
        flops_per_s=2 * PRODUCT_SIZE**3 / seconds,
        bytes_per_s=2 * COPY_BYTES / _best(_copies(cores), repeats),
        launch_us=_best(launches, repeats) / LAUNCHES * 1e6,
    )


def _best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _copies(threads: int) -> Callable[[], object]:
    """Copies COPY_BYTES, a part in each thread."""
    source = np.ones(COPY_BYTES // 8)
    copied = np.array_split(source.copy(), threads)
    parts = list(zip(np.array_split(source, threads), copied, strict=True))
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_measure(*map(int, sys.argv[1:])))))

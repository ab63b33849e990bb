"""What this processor reaches on 1 to n of its cores: its hardware profile.

For every number of cores a process of its own is bound to that many and times a large matrix
product of JAX's (FLOP/s), copies between arrays that no cache holds (bytes/s, reads and writes
both counted) and a call that computes nearly nothing (launch). The best of several repeats counts:
what makes one slower is other programs' doing. Contention and interconnect are not measured. Needs
Linux (processor affinity). Last line: one JSON document.

    python benchmarks/cpu_profile.py [--name cpu] [--cores N] [--repeats 5] [--output FILE]

--output writes the hardware profile that `duetjax.policy.profiles` reads.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import numpy as np

from duetjax.host import host_memory
from duetjax.policy.profiles import Basis, HardwareProfile, Origin, Reach

PRODUCT_SIZE = 2048
COPY_BYTES = 2**28
LAUNCHES = 200
WATTS_PER_CORE = 50


@dataclass(frozen=True)
class Measured:
    """What some cores reached."""

    cores: int
    flops_per_s: float
    bytes_per_s: float
    launch_us: float


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure(cores: int, repeats: int) -> Measured:
    """In this process, which is bound to the cores before jax starts its threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((PRODUCT_SIZE, PRODUCT_SIZE), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    seconds = best(lambda: product(matrix).block_until_ready(), repeats)
    small, step = jnp.zeros(()), jax.jit(lambda x: x + 1)

    def launches() -> None:
        for _ in range(LAUNCHES):
            step(small).block_until_ready()

    return Measured(
        cores=cores,
        flops_per_s=2 * PRODUCT_SIZE**3 / seconds,
        bytes_per_s=2 * COPY_BYTES / best(copies(cores), repeats),
        launch_us=best(launches, repeats) / LAUNCHES * 1e6,
    )


def copies(threads: int) -> Callable[[], object]:
    """Copies COPY_BYTES, a part in each thread."""
    source = np.ones(COPY_BYTES // 8)
    parts = list(zip(np.split(source, threads), np.split(source.copy(), threads), strict=True))
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))


def measured(most: int, repeats: int) -> list[Measured]:
    """Every number of cores, each in a new process."""
    found = []
    for cores in range(1, most + 1):
        command = [sys.executable, __file__, "--child", str(cores), "--repeats", str(repeats)]
        run = subprocess.run(
            command,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        )
        each = Measured(**json.loads(run.stdout.splitlines()[-1]))
        found.append(each)
        print(
            f"{cores} cores: {each.flops_per_s / 1e9:.1f} GFLOP/s,"
            f" {each.bytes_per_s / 1e9:.2f} GB/s, {each.launch_us:.0f} us a launch",
            flush=True,
        )
    return found


def profile(name: str, found: Sequence[Measured]) -> HardwareProfile:
    """The profile; where more cores came out slower than fewer, the fewer count."""
    by, machine = Basis.MEASURED, processor()
    jax = f"JAX {version('jax')}"
    product = f"float32 product of {PRODUCT_SIZE} by {PRODUCT_SIZE} matrices, {jax}"
    bound = "benchmarks/cpu_profile.py: each number of cores in a process bound to them"
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
        memory_bytes=host_memory(),
        board_watts=WATTS_PER_CORE * found[-1].cores,
        origins={
            "cores": Origin(by, f"affinity of the process; {machine}"),
            "core_step": share,
            "min_decode_cores": share,
            "min_prefill_cores": share,
            "curve_cores": Origin(by, bound),
            "curve_flops_per_s": Origin(by, product),
            "curve_bytes_per_s": Origin(by, f"copies of {COPY_BYTES >> 20} MiB, both ways counted"),
            "contention_decode": unknown,
            "contention_prefill": unknown,
            "launch_us": Origin(by, f"a jitted addition of scalars, waited for, {jax}"),
            "interconnect_bytes_per_s": Origin(Basis.ASSUMED, "that of its own memory"),
            "memory_bytes": Origin(by, "all of the machine's"),
            "board_watts": Origin(Basis.ASSUMED, f"{WATTS_PER_CORE} W a core"),
        },
    )


def processor() -> str:
    """The processor's name, as the system gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Measures, prints what it found, and writes the profile."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="cpu", help="name of the profile")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where to write the hardware profile")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(vars(measure(arguments.child, arguments.repeats))))
        return
    available = len(os.sched_getaffinity(0))
    if not 1 <= arguments.cores <= available:
        parser.error(f"--cores must be from 1 to {available}, not {arguments.cores}")
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {arguments.repeats}")
    found = measured(arguments.cores, arguments.repeats)
    document = profile(arguments.name, found).to_json()
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"processor": processor(), "profile": document}))


if __name__ == "__main__":
    main()

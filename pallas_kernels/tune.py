"""`python -m pallas_kernels.tune`: measures tunings on this machine's GPU and writes the table.

For each shape the fastest of a few dozen candidates, found one field after another, at 64 rows of
4096 keys. `chunk` changes results in their last bits, and so is left alone unless asked for.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import jax
import jax.numpy as jnp

from pallas_kernels.cost import Heads
from pallas_kernels.mosaic import MosaicKernels
from pallas_kernels.shapes import HEAD_DIMS, PAGE_SIZES, PLAIN_SCORES, WIDE_DTYPES, Sizes, Tuning
from pallas_kernels.timing import Workload, decode_seconds
from pallas_kernels.tuning import TABLE, Case, Entry, read_table, table_text, tuning_for

SHARED_MEMORY = 232448
"""Bytes a block can have on compute capability 9.0."""

_BARRIERS = 256


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a line per candidate and writes the table; 2 if there is no Hopper GPU."""
    options = _parse(arguments)
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        print(f"tuning needs a GPU of compute capability 9.0; here is {device.device_kind}")  # noqa: T201
        return 2
    table = dict(read_table(TABLE))
    for case in _cases(options):
        tuning, seconds = fastest(case, device.core_count, with_chunk=options.chunk)
        source = f"measured on {device.device_kind}, jax {jax.__version__}: {seconds * 1e6:.1f} us"
        table[case] = Entry(tuning, datetime.now(UTC).date().isoformat(), source)
        TABLE.write_text(table_text(table), encoding="utf-8")
    return 0


def fastest(case: Case, cores: int, *, with_chunk: bool) -> tuple[Tuning, float]:
    """The best tuning that was found for a case, and seconds of the workload with it."""
    heads = Heads(32, 8, case.head_dim, jnp.dtype(case.dtype).itemsize)
    load = Workload(64, 4096, heads, case.page_size, case.dtype)
    entry = tuning_for(case)
    assert entry is not None, case
    best = (entry.tuning, decode_seconds(MosaicKernels(entry.tuning), load))
    for field, values in _choices(cores, with_chunk=with_chunk):
        for value in values:
            tuning = replace(best[0], **{field: value})
            if tuning == best[0] or not fits(tuning, load):
                continue
            seconds = decode_seconds(MosaicKernels(tuning), load)
            print(f"{case} {tuning} {seconds * 1e6:.1f} us", flush=True)  # noqa: T201
            best = min(best, (tuning, seconds), key=lambda pair: pair[1])
    return best


def fits(tuning: Tuning, load: Workload) -> bool:
    """Whether a block's shared memory is enough."""
    heads = load.heads
    q = jax.ShapeDtypeStruct((1, heads.num_heads, heads.head_dim), load.dtype)
    shape = (1, heads.num_kv_heads, 2, load.page_size, heads.head_dim)
    pages, table = jax.ShapeDtypeStruct(shape, load.dtype), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    sizes = Sizes.of(q, pages, table, tuning, PLAIN_SCORES, interpreted=False)
    return sizes.shared_bytes + _BARRIERS <= SHARED_MEMORY


def _choices(cores: int, *, with_chunk: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Fields and their values, in the order in which they are settled."""
    yield "step", (64, 128)
    yield "stages", (2, 3, 4, 6)
    yield "blocks", tuple(cores * times for times in (1, 2, 3, 4, 6, 8))
    if with_chunk:
        yield "chunk", (256, 512, 1024, 2048)


def _cases(options: argparse.Namespace) -> list[Case]:
    return [
        Case("sm_90", head_dim, page_size, dtype)
        for dtype in options.dtype
        for head_dim in options.head_dim
        for page_size in options.page_size
    ]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.add_argument("--head-dim", type=int, nargs="+", choices=HEAD_DIMS, default=[128])
    parser.add_argument("--page-size", type=int, nargs="+", choices=PAGE_SIZES, default=[64])
    parser.add_argument("--dtype", nargs="+", choices=WIDE_DTYPES, default=["bfloat16"])
    parser.add_argument("--chunk", action="store_true", help="tune what changes bits, too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

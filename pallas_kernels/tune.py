"""`python -m pallas_kernels.tune`: measures tunings on this machine's GPU and writes the table.

--out FILE has what was measured beside what the table has, and leaves the package as it is.

For each shape the fastest of a few dozen candidates, found one field after another: of decode at 64
rows of 4096 keys, of prefill at a prompt of 8192, of its spans at 256 tokens behind 7936. Chunks,
spans and steps change results in their last bits; the first two are left alone unless asked for.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.cost import Heads
from pallas_kernels.mosaic import MosaicKernels
from pallas_kernels.shapes import DTYPES, HEAD_DIMS, PAGE_SIZES, PLAIN_SCORES, Sizes, Tuning
from pallas_kernels.timing import (
    PrefillLoad,
    Workload,
    decode_seconds,
    in_wide_table,
    seconds_per_call,
    wide,
)
from pallas_kernels.tuning import TABLE, Case, Entry, read_table, table_text, tuning_for

SHARED_MEMORY = 232448
"""Bytes a block can have on compute capability 9.0."""

_BARRIERS = 256

type Choices = list[tuple[str, tuple[int, ...]]]
"""Fields of a tuning and their values, in the order in which they are settled."""

_OF_PREFILL: Choices = [("prefill_step", (64, 128)), ("prefill_stages", (2, 3, 4))]
_OF_SPANS: Choices = [("prefill_span", (512, 1024, 2048, 4096))]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints what it finds and writes the table; 2 if there is no Hopper GPU."""
    options = _parse(arguments)
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        print(f"tuning needs a GPU of compute capability 9.0; here is {device.device_kind}")  # noqa: T201
        return 2
    table = dict(read_table(TABLE))
    for case in _cases(options):
        tuning, found = fastest(case, device.core_count, with_chunk=options.chunk)
        source = f"measured on {device.device_kind}, jax {jax.__version__}: {found}"
        table[case] = Entry(tuning, datetime.now(UTC).date().isoformat(), source)
        options.out.write_text(table_text(table), encoding="utf-8")
    return 0


def fastest(case: Case, cores: int, *, with_chunk: bool) -> tuple[Tuning, str]:
    """The best tuning that was found for a case, and how long the workloads take with it."""
    heads = Heads(32, 8, case.head_dim, 2, jnp.dtype(case.dtype).itemsize)
    decode = Workload(64, 4096, heads, case.page_size, case.dtype)
    prefill, few = (
        PrefillLoad(1, new, cached, heads, case.page_size, case.dtype)
        for new, cached in ((8192, 0), (256, 7936))
    )
    entry = tuning_for(case)
    assert entry is not None, case
    tuning, found = entry.tuning, []

    def of_decode(tuning: Tuning) -> float:
        return decode_seconds(MosaicKernels(tuning), decode)

    def of_prefill(load: PrefillLoad, tuning: Tuning) -> float:
        q, pages, table, *rows = load.operands()
        table = in_wide_table(table, load.page_size)
        attention = MosaicKernels(tuning).prefill_attention
        return seconds_per_call(attention, (q, pages, table, *rows))

    for name, seconds_of, choices in (
        ("decode", of_decode, _of_decode(cores, with_chunk=with_chunk)),
        ("prefill", partial(of_prefill, prefill), _OF_PREFILL),
        ("few tokens", partial(of_prefill, few), _OF_SPANS if with_chunk else []),
    ):
        tuning, seconds = settled(tuning, seconds_of, choices, lambda it: fits(it, decode))
        print(f"{case} {tuning} {name} {seconds * 1e6:.1f} us", flush=True)  # noqa: T201
        found.append(f"{name} {seconds * 1e6:.1f} us")
    return tuning, ", ".join(found)


def settled(
    tuning: Tuning,
    seconds_of: Callable[[Tuning], float],
    choices: Choices,
    can_be: Callable[[Tuning], bool],
) -> tuple[Tuning, float]:
    """A tuning with one field after another as quick as it gets, and its seconds."""
    best = (tuning, seconds_of(tuning))
    for field, values in choices:
        for value in values:
            other = replace(best[0], **{field: value})
            if other != best[0] and can_be(other):
                best = min(best, (other, seconds_of(other)), key=lambda pair: pair[1])
    return best


def fits(tuning: Tuning, load: Workload) -> bool:
    """Whether kernels can be so, and blocks' shared memory is enough."""
    heads = load.heads
    q = jax.ShapeDtypeStruct((1, heads.num_heads, heads.head_dim), wide(load.dtype))
    shape = (1, heads.num_kv_heads, 2, load.page_size, heads.head_dim)
    pages, table = jax.ShapeDtypeStruct(shape, load.dtype), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    try:
        sizes = Sizes.of(q, pages, table, tuning, PLAIN_SCORES, interpreted=False)
    except ValueError:
        return False
    return max(sizes.shared_bytes, sizes.prefill_shared_bytes) + _BARRIERS <= SHARED_MEMORY


def _of_decode(cores: int, *, with_chunk: bool) -> Choices:
    blocks = tuple(cores * times for times in (1, 2, 3, 4, 6, 8))
    choices: Choices = [("step", (64, 128)), ("stages", (2, 3, 4, 6)), ("blocks", blocks)]
    return [*choices, ("chunk", (256, 512, 1024, 2048))] if with_chunk else choices


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
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--chunk", action="store_true", help="tune chunks and spans, too")
    parser.add_argument("--out", type=Path, default=TABLE, help="in place of the package's table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

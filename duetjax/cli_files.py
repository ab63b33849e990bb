"""`duetjax convert` and `trace-plot`: files made of files."""

import argparse
import os
import time
from pathlib import Path

from duetjax.cli_flags import Commands, write_picture


def add_convert(commands: Commands) -> None:
    """Adds `duetjax convert`."""
    convert = commands.add_parser("convert", help="rewrite a model folder for Orbax, or back")
    convert.add_argument("source", metavar="SRC", help="folder or hub id")
    convert.add_argument("target", metavar="DST", help="new folder")
    convert.add_argument(
        "--format", choices=("orbax", "safetensors"), help="default: the one that SRC has not"
    )
    convert.add_argument(
        "--max-shard-size", type=int, metavar="BYTES", help="per safetensors file; default: 5 GB"
    )
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    # Orbax asks jax for its devices; converting needs none, and others may be using them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from duetjax.checkpoint.convert import convert
    from duetjax.checkpoint.weights import WeightFormat

    started = time.perf_counter()
    done = convert(
        args.source,
        args.target,
        to=None if args.format is None else WeightFormat(args.format),
        max_shard_size=args.max_shard_size,
    )
    print(
        f"wrote {done.folder}: {done.num_tensors} tensors as {done.format},"
        f" {done.nbytes / 1e9:.3g} GB in {time.perf_counter() - started:.1f} s"
    )
    return 0


def add_trace_plot(commands: Commands) -> None:
    """Adds `duetjax trace-plot`."""
    plot = commands.add_parser(
        "trace-plot", help="draw a trace of serve: lanes, splits and requests over time"
    )
    plot.add_argument("file", type=Path, metavar="FILE", help="from serve --trace or /debug/trace")
    plot.add_argument("--out", type=Path, metavar="FILE", help="default: FILE with .svg at its end")
    plot.add_argument("--start", type=float, default=0.0, metavar="S", help="from there on")
    plot.add_argument("--duration", type=float, metavar="S", help="only so much of it")
    plot.set_defaults(run=_trace_plot)


def _trace_plot(args: argparse.Namespace) -> int:
    from duetjax import timeline

    picture = timeline.draw(timeline.read(args.file, args.start, args.duration))
    out = args.out or args.file.with_suffix(".svg")
    write_picture(out, picture, "--out")
    print(f"wrote {out}")
    return 0

"""`duetjax compile` and `profile`: what a model costs and a device reaches, as files."""

import argparse
import atexit
import json
import os
from pathlib import Path

from duetjax.cli_end import exit_at_once
from duetjax.cli_flags import EPILOG, Commands, add_engine_flags, engine_settings, fields_of
from duetjax.config import EngineConfig


def add_compile(commands: Commands) -> None:
    """Adds `duetjax compile`."""
    compile_ = commands.add_parser(
        "compile", help="compile a model, here or for a GPU that need not be there, and foretell it"
    )
    compile_.add_argument("--model", help="preset name, folder or hub id; default: the demo")
    compile_.add_argument(
        "--gpu",
        required=True,
        metavar="NAME",
        help="local: this machine's device, into the store; or h200, h100, a100, l40s",
    )
    compile_.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="one of N GPUs' share"
    )
    compile_.add_argument(
        "--out", type=Path, metavar="DIR", help="write model profile, report and picture there"
    )
    add_engine_flags(compile_)
    compile_.set_defaults(run=_compile)


def _compile(args: argparse.Namespace) -> int:
    # For an absent GPU neither a driver nor a device is wanted, even where there is one.
    if args.gpu != "local":
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from duetjax import compile_programs as command
    from duetjax import compile_report

    engine = EngineConfig(**engine_settings(args))
    compiled = command.compile_model(fields_of(command.CompileRequest, args), engine)
    document = compile_report.document(compiled)
    for line in compile_report.lines(compiled):
        print(line)
    if args.out is not None:
        files = command.write(compiled, args.out, document, compile_report.draw(compiled))
        print(f"wrote {', '.join(map(str, files))}")
    print(json.dumps(document))
    return 0


def add_profile(commands: Commands) -> None:
    """Adds `duetjax profile`."""
    profile = commands.add_parser(
        "profile",
        help="time the device and a model on it, and fit what foretells launches",
        epilog=EPILOG,
    )
    profile.add_argument("--model", help="folder, preset name or hub id; weights may be dummy")
    profile.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write; default: profile-HARDWARE-MODEL"
    )
    profile.add_argument(
        "--minutes", type=float, default=5.0, help="beside loading and compiling; default: 5"
    )
    profile.add_argument(
        "--points", type=int, metavar="N", help="time so many launches, however long it takes"
    )
    add_engine_flags(profile)
    profile.set_defaults(run=_profile, load_format="dummy")


def _profile(args: argparse.Namespace) -> int:
    from duetjax import profile_report
    from duetjax.profile_command import ProfileRequest, profile
    from duetjax.runtime.case_timer import DeviceHangs

    try:
        report = profile(fields_of(ProfileRequest, args), EngineConfig(**engine_settings(args)))
        for line in profile_report.lines(report):
            print(line)
        print(json.dumps(profile_report.document(report)))
        if report.stopped_by is not None:
            raise report.stopped_by
    except DeviceHangs:
        atexit.register(exit_at_once, 1)
        raise
    return 0

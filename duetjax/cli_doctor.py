"""`duetjax doctor`: what this installation can do."""

import argparse
import os

from duetjax.cli_flags import Commands


def add_doctor(commands: Commands) -> None:
    """Adds `duetjax doctor`."""
    doctor = commands.add_parser("doctor", help="show what this installation can do")
    doctor.set_defaults(run=_doctor)


def _doctor(_args: argparse.Namespace) -> int:
    """Facts for a bug report."""
    import importlib.metadata
    import platform

    import jax

    from duetjax.checkpoint.source import preset_names, resolve_model

    packages = ("duetjax", "jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers")
    print(f"python       {platform.python_version()} on {platform.platform()}")
    for package in packages:
        print(f"{package:12} {importlib.metadata.version(package)}")
    print(f"devices      {', '.join(map(str, jax.devices()))} ({os.cpu_count()} cores)")
    print(f"launcher     {_launcher_status()}")
    print(f"launches     {_rung()}")
    if jax.devices()[0].platform != "cpu":
        print(f"kernels      {_kernels()}")
    print(f"presets      {', '.join(preset_names())}")
    print(f"demo         {resolve_model(None).folder}")
    return 0


def _rung() -> str:
    """How launches would run on this machine, and why not better."""
    import jax

    from duetjax.runtime import host_kernels

    if jax.devices()[0].platform != "cpu":
        return "as graphs, lists, streams or plain JAX calls; tried at start, see duetjax_rung"
    reason = host_kernels.why_not(num_heads=8, num_kv_heads=8, head_dim=64, dtype="float32")
    if reason is not None:
        return f"plain JAX calls, one after another: {reason}"
    return "in lanes, beside each other where the policy says so"


def _kernels() -> str:
    """What would attend to the pages of a usual model here, and why."""
    from duetjax.devices import capability
    from pallas_kernels.choice import ModelShapes, choose

    usual = ModelShapes(32, 8, head_dim=128, page_size=64, dtype="bfloat16")
    choice = choose(capability(), usual)
    return f"{choice.name}: {choice.why} (32 heads of 128 on 8, pages of 64 in bfloat16)"


def _launcher_status() -> str:
    """What is there of the launcher, what is missing, and which splits it makes of a GPU."""
    try:
        import duetjax._launcher as _launcher
    except ImportError as error:
        return f"not built ({error}): install a C compiler, then duetjax anew"
    try:
        with _launcher.Device([]) as device:
            [(_, cores, _)] = device.splits
        with _launcher.Device(range(8, cores // 2 + 1, 8)) as device:
            splits = [f"{decode}/{prefill}" for _, decode, prefill in device.splits[1:]]
    except _launcher.LauncherError as error:
        return f"built, but {error}"
    return f"built; splits of {cores} SMs: {', '.join(splits)}"

"""Profiles of a small model and a small device, whose times can be worked out by hand."""

from dataclasses import replace

from duetjax.policy.launch import Program
from duetjax.policy.profiles import Basis, Cost, HardwareProfile, ModelProfile, Origin, Reach

VALUES = (
    "cores",
    "core_step",
    "min_decode_cores",
    "min_prefill_cores",
    "contention_decode",
    "contention_prefill",
    "launch_us",
    "interconnect_bytes_per_s",
    "memory_bytes",
    "board_watts",
    "curve_cores",
    "curve_flops_per_s",
    "curve_bytes_per_s",
)
"""What a hardware profile says where it has it from."""

_MODEL = ModelProfile(
    model="small",
    compiled_for="nothing",
    dtype_bytes=2,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    vocab_size=100,
    costs={(Program.DECODE, 2): Cost(4e6, 3e6), (Program.PREFILL, 16): Cost(4e7, 5e6)},
)
_HARDWARE = HardwareProfile(
    name="card",
    cores=4,
    core_step=1,
    min_decode_cores=1,
    min_prefill_cores=1,
    curve=(Reach(2, 1e9, 1e9), Reach(4, 2e9, 1e9)),
    contention_decode=1.25,
    contention_prefill=1.1,
    launch_us=500.0,
    interconnect_bytes_per_s=1e9,
    memory_bytes=1e9,
    board_watts=100.0,
    origins={name: Origin(Basis.ASSUMED, "made up") for name in VALUES},
)


def small_model(**changes: object) -> ModelProfile:
    """3 layers and one bucket of each program, but for the changes."""
    return replace(_MODEL, **changes)


def small_hardware(**changes: object) -> HardwareProfile:
    """4 cores, 2 of which reach half of the FLOP/s and all of the bytes/s, but for the changes."""
    return replace(_HARDWARE, **changes)

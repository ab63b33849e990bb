"""Where results of this machine's GPU, or of what stands for one, are kept."""

import ctypes
from pathlib import Path

from gpu.report import slug_of

RESULTS = Path(__file__).resolve().parent / "results"


def results_of(backend: str, folder: Path = RESULTS, *, may_lack: bool = False) -> Path:
    """A folder for each GPU, and for each backend that is none ("host", "sim", "fake").

    may_lack: without a GPU it is one called "cuda"; else SystemExit says what is missing.
    """
    if backend != "cuda":
        return folder / backend
    try:
        return folder / slug_of(gpu_name())
    except SystemExit:
        if not may_lack:
            raise
        return folder / backend


def gpu_name() -> str:
    """As the driver calls it, without taking memory there. SystemExit says what is missing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SystemExit(f"no CUDA driver ({error}); choose another backend") from None
    name, device = ctypes.create_string_buffer(100), ctypes.c_int()
    codes = (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, 100, device),
    )
    if any(codes):
        raise SystemExit(f"the CUDA driver finds no GPU ({max(codes)})")
    return name.value.decode()

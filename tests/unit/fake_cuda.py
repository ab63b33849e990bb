"""The double of libcuda (tests/native) from Python: a device whose kernels are Python callables."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
XLA = 7  # any number: which recording


class Run(ctypes.Structure):
    """The beginning of struct fake_run."""

    _fields_ = (
        ("function", ctypes.c_char_p),
        ("params", POINTER(c_void_p)),
        ("num_params", c_size_t),
        ("sm_count", c_uint),
    )


Callback = ctypes.CFUNCTYPE(None, POINTER(Run), c_void_p)


class LaunchConfig(ctypes.Structure):
    """drv_launch_config."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("num_attributes", c_uint),
    )


def build(folder: Path) -> Path:
    """Compiles the double; a few seconds."""
    compiler, library = shutil.which("gcc"), folder / "libfake_cuda.so"
    assert compiler, "no C compiler"
    sources = sorted((ROOT / "tests/native").glob("fake_*.c"))
    flags = ("-std=c11", "-D_GNU_SOURCE", "-O1", "-fPIC", "-shared", "-pthread")
    include = f"-I{ROOT / 'launcher/csrc'}"
    subprocess.run([compiler, *flags, include, *sources, "-o", library], check=True)
    return library


class FakeCuda:
    """An H200 with XLA's context, current here, and XLA's stream."""

    def __init__(self, path: Path):
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_reset()
        self.library.fake_function.restype = c_void_p
        self.library.fake_host.restype = c_void_p
        self._callbacks: list[object] = []
        context, self.stream = c_void_p(), c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", byref(context), 0)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreateWithPriority", byref(self.stream), 1, 0)

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments)
        assert code == 0, f"{name}: {code}"

    def memory(self, size: int) -> int:
        address = c_uint64()
        self.call("cuMemAlloc_v2", byref(address), c_size_t(size))
        ctypes.memset(self.host(address.value), 0, size)
        return address.value

    def host(self, address: int) -> int:
        return self.library.fake_host(c_uint64(address))

    def value(self, address: int) -> int:
        return c_uint64.from_address(self.host(address)).value

    def kernel(self, run: Callable[[int, int], None]) -> c_void_p:
        """A module's function of one address; `run` gets it and the number of SMs."""

        def callback(given: object, _user: object) -> None:
            seen = given.contents  # type: ignore[attr-defined]
            run(c_uint64.from_address(seen.params[0]).value, seen.sm_count)

        self._callbacks.append(Callback(callback))
        sizes = (c_size_t * 1)(8)
        return c_void_p(
            self.library.fake_function(b"kernel", sizes, c_size_t(1), 0, self._callbacks[-1], None)
        )

    def enqueue(self, kernel: c_void_p, address: int) -> None:
        """What XLA does when an executable runs."""
        config = LaunchConfig((1, 1, 1), (1, 1, 1), 0, self.stream, None, 0)
        value = c_uint64(address)
        params = (c_void_p * 1)(ctypes.addressof(value))
        self.call("cuLaunchKernelEx", byref(config), kernel, params, None)

    def fail(self, name: str, nth: int, code: int) -> None:
        self.library.fake_fail(name.encode(), c_size_t(nth), c_int(code))

    def close(self) -> None:
        self.library.fake_reset()

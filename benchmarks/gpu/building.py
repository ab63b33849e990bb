"""Compiles the launcher and the driver's double with gcc alone, and loads the launcher.

A GPU machine may have no environment of ours: there the extension is built into a folder of its
own, which shadows nothing, and loaded from there under its usual name.
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import duetjax

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "_launcher.abi3.so"
FAKE = "libfake_cuda.so"

_FLAGS = ("-std=c11", "-O2", "-D_GNU_SOURCE", "-fPIC", "-shared")
_CSRC = ROOT / "launcher/csrc"
_NATIVE = ROOT / "tests/native"


def build_launcher(folder: Path) -> tuple[Path, str]:
    """The extension and where it came from: the one installed if it is newer than its sources,
    else one compiled into `folder`. Without Python's headers an old one has to do.
    """
    sources = sorted(_CSRC.glob("*.c"))
    installed = ROOT / "duetjax" / LAUNCHER
    if _is_newer(installed, [*sources, *_CSRC.glob("*.h")]):
        return installed, "installed"
    made = folder / LAUNCHER
    if _is_newer(made, [*sources, *_CSRC.glob("*.h")]):
        return made, "compiled"
    flags = ("-DPy_LIMITED_API=0x030c0000", "-fvisibility=hidden")
    include = f"-I{sysconfig.get_path('include')}"
    try:
        _compile(made, sources, (*flags, include))
    except RuntimeError as error:
        if not installed.exists():
            raise
        print(f"the launcher cannot be compiled, so the older one is used: {error}", flush=True)
        return installed, "installed, older than its sources"
    return made, "compiled"


def build_fake(folder: Path) -> Path:
    """The double of libcuda, compiled into `folder`."""
    sources = sorted(_NATIVE.glob("fake_*.c"))
    made = folder / FAKE
    headers = [*_NATIVE.glob("fake_*.h"), _CSRC / "driver.h"]
    if not _is_newer(made, [*sources, *headers]):
        _compile(made, sources, (f"-I{_CSRC}", f"-I{_NATIVE}"))
    return made


def load_launcher(path: Path) -> ModuleType:
    """The launcher from `path`, as `duetjax._launcher` for whoever imports it later."""
    name = "duetjax._launcher"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    duetjax._launcher = module
    return module


def _is_newer(made: Path, sources: Sequence[Path]) -> bool:
    return made.exists() and made.stat().st_mtime >= max(file.stat().st_mtime for file in sources)


def _compile(made: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
    made.parent.mkdir(parents=True, exist_ok=True)
    unfinished = made.with_suffix(f".{os.getpid()}")
    command = ["gcc", *_FLAGS, *flags, *map(str, sources), "-o", str(unfinished), "-lpthread"]
    try:
        done = subprocess.run([*command, "-ldl"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("gcc is not there") from None
    if done.returncode != 0:
        raise RuntimeError(f"gcc: {done.stderr[-2000:]}")
    unfinished.replace(made)

"""Which profiles the headline experiment's engines plan by: chosen once, with the capacity.

Files are copied beside the cells, so that a profile measured anew later changes nothing.
"""

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from duet_cells import Backend
from results_folder import gpu_name

from duetjax.config import ConfigError
from duetjax.profile_files import (
    Kind,
    by_name,
    read_hardware_profile,
    shipped,
    shipped_file,
    shipped_like,
)

HARDWARE_FILE, MODEL_FILE = "hardware-profile.json", "model-profile.json"
"""As `duetjax profile` writes them, and as they are copied."""
UNKNOWN = "h200-sxm"
"""For a GPU that no shipped profile knows."""
_MULTIPROCESSORS = 16
"""The driver's number of the attribute."""


@dataclass(frozen=True, slots=True)
class Profiles:
    """hardware: a shipped name, or a file beside the cells. model: such a file; None: the shipped.

    digest: of what is in them; None where it was not written down.
    """

    hardware: str
    model: str | None
    digest: str | None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Those by which a capacity or a cell was measured."""
        return cls(
            document["hardware_profile"],
            document.get("model_profile"),
            document.get("profile_digest"),
        )

    def to_json(self) -> dict[str, str | None]:
        """As `of` reads them."""
        return {
            "hardware_profile": self.hardware,
            "model_profile": self.model,
            "profile_digest": self.digest,
        }

    def hardware_in(self, folder: Path) -> str:
        """What an engine is given. folder: of the cells."""
        return str(folder / self.hardware) if self.hardware == HARDWARE_FILE else self.hardware

    def model_in(self, folder: Path) -> str | None:
        """What an engine is given."""
        return None if self.model is None else str(folder / self.model)

    def check(self, folder: Path, named: str | None) -> None:
        """SystemExit if they are not what they were, or not what is named."""
        used = _file_of(self.hardware_in(folder))
        if named is not None and _digest(_file_of(named)) != _digest(used):
            raise SystemExit(
                f"duet.py: the capacity was measured with the profile {self.hardware}, which is"
                " kept; leave --hardware-profile out, or name another folder by --out"
            )
        model = None if self.model is None else folder / self.model
        if self.digest not in (None, _digest(used, model)):
            raise SystemExit(
                f"duet.py: {self.hardware} is not what it was when the capacity was measured;"
                f" delete what is in {folder}, and begin with the part `capacity`"
            )


def gpu_at_hand() -> tuple[str, int]:
    """Its name and how many SMs it has, as the driver says. SystemExit says what is missing."""
    kind = gpu_name()
    driver, device, cores = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
    codes = (
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetAttribute(ctypes.byref(cores), _MULTIPROCESSORS, device),
    )
    if any(codes):
        raise SystemExit(f"the CUDA driver does not say how many SMs {kind} has ({max(codes)})")
    return kind, cores.value


def choose(
    backend: Backend,
    folder: Path,
    named: str | None = None,
    gpu: Callable[[], tuple[str, int]] = gpu_at_hand,
) -> Profiles:
    """What is named; or what was measured on this device, in `profile` beside the cells' folder; or
    the backend's; or the GPU's shipped one. SystemExit for a file that is no profile.
    """
    measured = folder.parent / "profile"
    if named is not None:
        name = by_name(named, shipped(Kind.HARDWARE))
        return _shipped(name) if name is not None else _copied(Path(named), None, folder)
    if not backend.is_simulation and (measured / HARDWARE_FILE).exists():
        model = measured / MODEL_FILE
        return _copied(measured / HARDWARE_FILE, model if model.exists() else None, folder)
    if backend.hardware_profile is not None:
        return _shipped(backend.hardware_profile)
    kind, cores = gpu()
    known = shipped_like(kind, cores)
    if known is None:
        print(
            f"WARNING: no shipped profile knows {kind} with {cores} SMs: policies plan as for"
            f" {UNKNOWN}; measure its own first (gpu_all.py profile)",
            flush=True,
        )
        return _shipped(UNKNOWN)
    return _shipped(known.name)


def _shipped(name: str) -> Profiles:
    return Profiles(name, None, _digest(_file_of(name)))


def _copied(hardware: Path, model: Path | None, folder: Path) -> Profiles:
    try:
        read_hardware_profile(hardware)
    except ConfigError as error:
        raise SystemExit(f"duet.py: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    digest = _digest(hardware, model)
    (folder / HARDWARE_FILE).write_bytes(hardware.read_bytes())
    if model is None:
        return Profiles(HARDWARE_FILE, None, digest)
    (folder / MODEL_FILE).write_bytes(model.read_bytes())
    return Profiles(HARDWARE_FILE, MODEL_FILE, digest)


def _file_of(hardware: str) -> Path:
    name = by_name(hardware, shipped(Kind.HARDWARE))
    return Path(hardware) if name is None else shipped_file(Kind.HARDWARE, name)


def _digest(hardware: Path, model: Path | None = None) -> str:
    """SystemExit if a file is not there."""
    found = hashlib.sha256()
    for file in (hardware, model):
        if file is not None:
            try:
                found.update(file.read_bytes())
            except OSError as error:
                raise SystemExit(f"duet.py: {file}: {error.strerror}") from None
    return found.hexdigest()[:12]

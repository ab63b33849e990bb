"""The store of compiled programs: one file each, so that a second start compiles nothing.

    sha256 of the rest | header's length, 8 bytes | header, JSON | payload, a pickle

An entry is native code and a pickle: whoever can write to the folder can run code in the server.
The digest finds damage, not malice, so the store makes its folder 0700 and its files 0600. What a
load refuses is compiled again and written over; no fault of the disk stops a server.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import platform
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from duetjax.config import ConfigError
from duetjax.whole_file import write_whole

_log = logging.getLogger(__name__)

_FORMAT = 1
_ENTRY = re.compile(r"[0-9a-f]{64}\.program")
_UNFINISHED = re.compile(r"[0-9a-f]{64}\.\w+\.tmp")
_ABANDONED_SECONDS = 3600.0
_DIGEST_BYTES = 32
_LENGTH_BYTES = 8
_X86_FACTS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
_ARM_FACTS = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features")
_ENVIRONMENT = ("NPROC", "TRITON_DEFAULT_FP_FUSION", "TRITON_OVERRIDE_ARCH")
_JAX_OPTIONS = (
    "jax_compiler_enable_remat_pass",
    "jax_disable_most_optimizations",
    "jax_memory_fitting_level",
    "jax_optimization_level",
    "jax_xla_profile_version",
)


@dataclass(frozen=True, slots=True)
class ProgramFacts:
    """What compiling told about a program: bytes on the device, seconds, work of one call.

    alias_bytes: of the arguments that outputs overwrite. flops, bytes_accessed: XLA's estimate,
    None where it makes none.
    """

    compile_seconds: float
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    flops: float | None
    bytes_accessed: float | None


@dataclass(frozen=True, slots=True)
class StoredProgram:
    """A program ready to be called. tuned: its kernels were chosen by timing them on the target.

    is_new: this process has compiled it.
    """

    executable: jax.stages.Compiled
    facts: ProgramFacts
    tuned: bool
    is_new: bool = False


class _RefusedError(Exception):
    """Why a file is not the entry that was looked for."""


def facts_of(compiled: jax.stages.Compiled, seconds: float) -> ProgramFacts:
    """The facts of a program that took `seconds` to compile; a backend's silence counts as 0 B."""
    memory = compiled.memory_analysis()
    cost: Mapping[str, float] = compiled.cost_analysis() or {}
    return ProgramFacts(
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes if memory else 0,
        output_bytes=memory.output_size_in_bytes if memory else 0,
        alias_bytes=memory.alias_size_in_bytes if memory else 0,
        temp_bytes=memory.temp_size_in_bytes if memory else 0,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
    )


def default_folder() -> Path:
    """$DUETJAX_CACHE_DIR/programs, else duetjax/programs in $XDG_CACHE_HOME or ~/.cache.

    Raises `ConfigError` where the user has no home.
    """
    if ours := os.environ.get("DUETJAX_CACHE_DIR"):
        return Path(ours) / "programs"
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "duetjax" / "programs"
    except RuntimeError:
        raise ConfigError(
            "no home folder to keep programs in; set DUETJAX_CACHE_DIR to a folder of your own"
        ) from None


@functools.cache
def host_target() -> str:
    """This machine's processor: equal on two machines only where native code runs on both.

    On Linux a digest of model and features, and the number of cores, by which XLA splits work.
    Elsewhere the features are not to be had, so the machine's own name takes their place.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = (*_X86_FACTS, *_ARM_FACTS)
        facts = sorted({line for line in lines if line.partition(":")[0].strip() in names})
    except OSError:
        facts = []
    if not any(line.startswith(("flags", "Features")) for line in facts):
        facts += platform.uname()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return f"cpu {platform.machine()} {cores} cores {digest[:32]}"


class ProgramStore:
    """Compiled programs in a folder, by key. Without a folder it keeps and finds nothing.

    max_bytes: beyond it the entries unused for longest go. Threads and processes may share it.
    """

    def __init__(self, folder: Path | None, *, max_bytes: int = 4 << 30) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._warning = threading.Lock()
        self._warned = False

    @staticmethod
    def key(
        lowered: jax.stages.Lowered,
        compiler_options: Mapping[str, str | bool | int],
        target: str,
        autotune: bytes = b"",
    ) -> str:
        """Hex digest of all that decides the code; a target that starts "cpu" means this machine's.

        autotune: the results that compiling is given. Raises `ValueError` where the program was
        not traced with keep_unused=True: its text would not tell which arguments it drops.
        """
        leaves = jax.tree.leaves(lowered.args_info)
        parameters = _parameters(lowered)
        if len(leaves) != parameters:
            raise ValueError(
                f"a program of {parameters} parameters for {len(leaves)} arguments has no key;"
                " jit it with keep_unused=True"
            )
        parts = {
            "module": lowered.as_text(),
            "arguments": [str(leaf) for leaf in leaves],
            "trees": [str(lowered.in_tree), str(lowered.out_tree)],
            "options": dict(compiler_options),
            "target": target,
            "code": {"host": host_target()} if target.startswith("cpu") else _cuda_versions(),
            "versions": _versions(),
            "environment": _environment(),
            "autotune": hashlib.sha256(autotune).hexdigest(),
            "format": _FORMAT,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def load(self, key: str) -> StoredProgram | None:
        """The program saved under `key`, or None: nothing there, or, with a warning, unusable."""
        if self._folder is None:
            return None
        path = _path(self._folder, key)
        try:
            data = _read(path)
            if data is None:
                return None
            header, payload = _unpack(data, key)
            program = StoredProgram(
                _deserialise(header, payload), ProgramFacts(**header["facts"]), header["tuned"]
            )
        except Exception as error:  # native code answers for what is inside: it may raise anything
            _log.warning("%s is not used, the program is compiled: %s", path, _line(error))
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return program

    def save(
        self, key: str, compiled: jax.stages.Compiled, facts: ProgramFacts, tuned: bool
    ) -> None:
        """Keeps a program that this process compiled and did not call yet; where it cannot, warns.

        After its first call a CPU program that sorts is refused by XLA. A loaded program must not
        be given: saved again it loads but fails when called. That goes for what JAX's own cache
        returns too, so while that is on nothing is kept. Nor may a CPU program call LAPACK
        (jax.numpy.linalg): it would crash another process.
        """
        if self._folder is None:
            return
        if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir:
            self._warn("programs cannot be stored while JAX_COMPILATION_CACHE_DIR is set; unset it")
            return
        try:
            data = _pack(key, compiled, facts, tuned)
        except Exception as error:  # as varied as what a program may refer to
            _log.warning("a program cannot be stored: %s", _line(error))
            return
        try:
            path = _path(self._folder, key)
            write_whole(path, data, ".tmp")
            _prune(self._folder, self._max_bytes, newest=path)
        except OSError as error:
            reason = f"programs cannot be stored in {self._folder}, so every start compiles them"
            self._warn(f"{reason}: {_line(error)}")

    def _warn(self, message: str) -> None:
        """Once per store: what is wrong with a folder is wrong for every program."""
        with self._warning:
            if not self._warned:
                self._warned = True
                _log.warning("%s", message)


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.program"


def _line(error: Exception) -> str:
    """An error in one line: XLA's own go on for pages."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _parameters(lowered: jax.stages.Lowered) -> int:
    module = lowered.compiler_ir("stablehlo")
    assert module is not None, "every jit lowers to StableHLO"
    mains = [op for op in module.body.operations if str(op.name) == '"main"']
    assert len(mains) == 1, f"{len(mains)} functions named main in a module"
    return len(mains[0].type.inputs)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}


@functools.cache
def _cuda_versions() -> dict[str, str]:
    """XLA's CUDA compiler and the libraries whose kernels and algorithm numbers it refers to."""
    installed = ((item.name.lower(), item.version) for item in importlib.metadata.distributions())
    names = re.compile(r"(jax[-_]cuda|nvidia[-_])")
    return {name.replace("_", "-"): version for name, version in installed if names.match(name)}


def _environment() -> dict[str, str | None]:
    """Settings that reach the compiler past its options; XLA_FLAGS may name a file of flags."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flags and not flags.lstrip().startswith("-"):
        with contextlib.suppress(OSError):
            flags = Path(flags).read_text(encoding="utf-8", errors="replace")
    found = {name: os.environ.get(name) for name in _ENVIRONMENT}
    options = {name: str(jax.config.values.get(name)) for name in _JAX_OPTIONS}
    return {"XLA_FLAGS": flags, **found, **options}


def _pack(key: str, compiled: jax.stages.Compiled, facts: ProgramFacts, tuned: bool) -> bytes:
    payload = pickle.dumps(serialize_executable.serialize(compiled))
    devices = _devices(compiled)
    header = {
        "format": _FORMAT,
        "key": key,
        "versions": _versions(),
        "facts": asdict(facts),
        "tuned": tuned,
        "platform": devices[0].platform,
        "devices": [device.id for device in devices],
        "payload_bytes": len(payload),
    }
    text = json.dumps(header).encode()
    rest = len(text).to_bytes(_LENGTH_BYTES, "little") + text + payload
    return hashlib.sha256(rest).digest() + rest


def _unpack(data: bytes, key: str) -> tuple[dict[str, Any], bytes]:
    """Header and payload of an undamaged entry; reads nothing before the digest is found right."""
    digest, rest = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(rest).digest() != digest:
        raise _RefusedError("the file is damaged: its digest is another")
    start = _LENGTH_BYTES + int.from_bytes(rest[:_LENGTH_BYTES], "little")
    header = json.loads(rest[_LENGTH_BYTES:start])
    if header["format"] != _FORMAT:
        raise _RefusedError(f"its format is {header['format']}, not {_FORMAT}")
    if header["key"] != key:
        raise _RefusedError(f"it holds the program {header['key']}")
    payload = rest[start:]
    if header["payload_bytes"] != len(payload):
        raise _RefusedError(f"{len(payload)} bytes of {header['payload_bytes']} are there")
    return header, payload


def _devices(compiled: jax.stages.Compiled) -> list[jax.Device]:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    devices = {device for sharding in shardings for device in sharding.device_set}
    return sorted(devices, key=lambda device: device.id)


def _deserialise(header: Mapping[str, Any], payload: bytes) -> jax.stages.Compiled:
    """Loads native code onto the devices that it was compiled for: JAX's default is all of them."""
    present = {device.id: device for device in jax.devices(header["platform"])}
    devices = [present[index] for index in header["devices"]]
    serialised, in_tree, out_tree = pickle.loads(payload)
    executable: jax.stages.Compiled = serialize_executable.deserialize_and_load(
        serialised, in_tree, out_tree, devices[0].client, devices
    )
    return executable


def _read(path: Path) -> bytes | None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _RefusedError("it is not a regular file")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _prune(folder: Path, max_bytes: int, newest: Path) -> None:
    """Removes the entries unused for longest until the rest fits; never `newest` or other files."""
    entries = sorted(_entries(folder))
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total <= max_bytes:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            total -= size


def _entries(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """(time of last use, bytes, path) of every entry; clears what a killed process left behind."""
    for path in folder.iterdir():
        unfinished = _UNFINISHED.fullmatch(path.name)
        if not unfinished and not _ENTRY.fullmatch(path.name):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process removed or renamed it
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):
                continue
            if not unfinished:
                yield found.st_mtime_ns, found.st_size, path
            elif found.st_mtime < time.time() - _ABANDONED_SECONDS:
                path.unlink()

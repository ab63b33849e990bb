"""This machine's memory, as far as this process may use it. Imports the standard library only."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def host_memory() -> int:
    """Bytes of memory: the machine's, or its container's if less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read(_CGROUP / "memory.max").strip()
    return min(memory, int(limit)) if limit.isdecimal() else memory


def free_host_memory() -> int:
    """Bytes of it that nobody holds; what the file cache holds counts as free.

    Where the system does not say (it does on Linux), all of it.
    """
    total = host_memory()
    available = _field(_read(Path("/proc/meminfo")), "MemAvailable:")
    free = total if available is None else min(total, available * 1024)
    used = _read(_CGROUP / "memory.current").strip()
    if used.isdecimal():
        cached = _field(_read(_CGROUP / "memory.stat"), "inactive_file") or 0
        free = min(free, total - int(used) + cached)
    return free


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> int | None:
    """The number after a name that begins a line."""
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.removeprefix(name).split()[0])
    return None

"""The small files of a model folder, which anybody may have written: bounded, one-line errors."""

import json
import os
from pathlib import Path
from typing import Any

from duetjax.config import ModelFolderError

_MAX_JSON_BYTES = 16 * 2**20
_MAX_SHOWN = 160


def shown(text: object) -> str:
    """Text for an error message: one line, printable and short, whatever a file holds."""
    line = str(text)
    line = line if line.isprintable() else repr(line)
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}..."


def reason(error: Exception) -> str:
    """What went wrong, as one line; an OSError without its path, which the message names."""
    strerror = error.strerror if isinstance(error, OSError) else None
    lines = (strerror or str(error)).splitlines() or [type(error).__name__]
    return shown(lines[0])


def require_file(file: Path) -> None:
    """Refuses what cannot be read like a file; links are followed, as hub caches need."""
    if os.path.isfile(file):  # false for folders, pipes, devices, and never raises
        return
    if os.path.lexists(file):
        wrong = "not a regular file" if os.path.exists(file) else "a broken link"
        raise ModelFolderError(f"{shown(file)}: {wrong}; put the file itself there")
    raise ModelFolderError(f"{shown(file)}: no such file; download the model again")


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object of at most 16 MiB; `ModelFolderError` names the file and the fault."""
    require_file(file)
    try:
        if (size := file.stat().st_size) > _MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, over {_MAX_JSON_BYTES}")
        value = json.loads(file.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} where an object is needed")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(
            f"{shown(file)}: not a JSON object ({reason(error)}); download the model again"
        ) from error
    return value

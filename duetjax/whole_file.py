"""Files that are there whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes, unfinished_suffix: str) -> None:
    """Puts a file in place whole or not at all, also beside another process that does the same.

    Its folder is made, for its owner alone. unfinished_suffix: of what a killed process leaves
    behind, `<stem>.<random><suffix>` in the same folder. Raises `OSError`.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(unfinished_suffix, f"{path.stem}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise

"""Calibrations on disk: what an engine has learned of its launches, for the next one to start with.

One small JSON file for each pair of model and hardware, beside the program store. No fault of the
disk stops an engine: what cannot be read is learned again and written over.
"""

import contextlib
import hashlib
import json
import logging
import re
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from duetjax.config import ConfigError
from duetjax.policy.calibration import Calibration
from duetjax.policy.durations import Step
from duetjax.policy.foresight import Foresight
from duetjax.whole_file import write_whole

_log = logging.getLogger(__name__)

MOST_FILES = 64
"""Beyond it the calibrations unused for longest go."""
SAVE_SECONDS = 180.0
FEWEST_LAUNCHES = 256
"""Between two saves while serving there are at least so many seconds, and so many launches."""
_CLOSE_SECONDS = 5.0
_MOST_BYTES = 2**20
_ENTRY = re.compile(r".+-[0-9a-f]{16}\.json")
_UNFINISHED = re.compile(r".+\.part")
_ABANDONED_SECONDS = 3600.0


class CalibrationFile:
    """Where the calibration of one model on one device is kept; the folder holds others' too."""

    def __init__(self, folder: Path, model: str, hardware: str) -> None:
        digest = hashlib.sha256(f"{model}\0{hardware}".encode()).hexdigest()[:16]
        readable = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{model}-on-{hardware}")[:100]
        self.path = folder / f"{readable}-{digest}.json"
        self._model = model
        self._hardware = hardware
        self._has_warned = False

    def read(self) -> Calibration:
        """What was learned before; nothing, with a warning, where the file is of no use."""
        try:
            if (text := self._text()) is not None:
                value = json.loads(text)
                return Calibration.from_json(
                    value, str(self.path), model=self._model, hardware=self._hardware
                )
        except (ConfigError, OSError, ValueError, RecursionError) as error:
            why = error if isinstance(error, ConfigError) else f"{self.path}: {_line(error)}"
            _log.warning("a calibration is not used and will be replaced: %s", why)
        return Calibration(self._model, self._hardware)

    def write(self, document: dict[str, object]) -> None:
        """Puts a calibration's document in place, whole or not at all; where it cannot, warns."""
        try:
            write_whole(self.path, json.dumps(document).encode(), ".part")
            _prune(self.path)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                _log.warning(
                    "what launches taught cannot be kept in %s, so every start learns it anew: %s",
                    self.path.parent,
                    _line(error),
                )

    def _text(self) -> bytes | None:
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            raise ValueError("not a file of a calibration's size")
        return self.path.read_bytes()


class KeptForesight:
    """Implements `durations.Durations`: a `Foresight` that is saved now and then and when closed.

    Everything happens on the engine's thread but the writing, which has a thread of its own.
    clock: seconds, monotonic.
    """

    def __init__(
        self,
        foresight: Foresight,
        file: CalibrationFile,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._foresight = foresight
        self._file = file
        self._clock = clock
        self._unsaved = 0
        self._saved_at = clock()
        self._writer: threading.Thread | None = None

    @property
    def median_error(self) -> float:
        """See `Durations`."""
        return self._foresight.median_error

    @property
    def is_trusted(self) -> bool:
        """See `Durations`."""
        return self._foresight.is_trusted

    def step_ms(self, step: Step) -> float:
        """See `Durations`."""
        return self._foresight.step_ms(step)

    def observe(self, step: Step, measured_ms: float) -> None:
        """See `Durations`; saves if it is time."""
        self._foresight.observe(step, measured_ms)
        self._unsaved += 1
        if self._unsaved >= FEWEST_LAUNCHES:
            now = self._clock()
            if now - self._saved_at >= SAVE_SECONDS:
                self._saved_at = now
                self._save()

    def close(self) -> None:
        """Saves what is new; gives up on a disk that does not answer within seconds."""
        self._wait()  # or an older state might be written over this one
        self._save()
        self._wait()

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join(_CLOSE_SECONDS)

    def _save(self) -> None:
        """Begins to write, unless nothing is new or the disk is still busy with the last save."""
        if not self._unsaved or (self._writer is not None and self._writer.is_alive()):
            return
        document = self._foresight.calibration.to_json()
        writer = threading.Thread(
            target=self._file.write, args=(document,), name="duetjax-calibration", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # no thread to be had now: the next save tries
            writer.start()
            self._writer, self._unsaved = writer, 0


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _prune(newest: Path) -> None:
    """Keeps the folder small; clears what killed processes left behind."""
    entries, abandoned = [], time.time() - _ABANDONED_SECONDS
    for path in newest.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode) or path == newest:
                continue
            if _ENTRY.fullmatch(path.name):
                entries.append((found.st_mtime_ns, path))
            elif _UNFINISHED.fullmatch(path.name) and found.st_mtime < abandoned:
                path.unlink()
    for _, path in sorted(entries, reverse=True)[MOST_FILES - 1 :]:
        path.unlink(missing_ok=True)

"""`duetjax compile --profile`: a model's programs compiled for a GPU that need not be there.

Nothing of it can run: attention, KV writes and the marker are placeholders. What stays is what the
programs cost, as a model profile.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from duetjax.checkpoint.source import resolve_model
from duetjax.config import ConfigError
from duetjax.policy.profiles import ModelProfile
from duetjax.runtime.inspection import ProgramFacts, inspect_program
from duetjax.runtime.profile import BUCKETS, absent_programs, model_profile
from duetjax.runtime.programs import Buckets, Key
from duetjax.runtime.target import absent_gpu

_log = logging.getLogger(__name__)

_MOST_ROWS = 4096
_MOST_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class ProfileRequest:
    """The flags of `duetjax compile`.

    model: None is the demo. decode, prefill: buckets in any order, None for the usual.
    """

    model: str | None
    gpu: str
    file: Path
    decode: Sequence[int] | None = None
    prefill: Sequence[int] | None = None


def compile_profile(request: ProfileRequest) -> ModelProfile:
    """Compiles every bucket's program, says how far it is, and writes the profile in the end.

    Takes some 10 to 20 s for each program of a large model. The file appears whole or not at all.
    Raises `DuetJAXError` with one line for whatever the caller can mend, most of it at once.
    """
    buckets = _buckets(request)
    file = _writable(request.file)
    source = resolve_model(request.model, load_format="dummy")
    name, config = source.name, source.config
    target = absent_gpu(request.gpu)
    programs = absent_programs(config, target, buckets)
    counted: dict[Key, ProgramFacts] = {}
    _log.info("compiling %d programs of %s for %s", len(buckets), name, target.name)
    for done, key in enumerate(buckets, 1):
        counted[key] = facts = inspect_program(programs.lower(key), target, programs.layout)
        profile = model_profile(name, config, programs, counted)  # refuses a wrong count early
        cost = profile.costs[key]
        _log.info(
            "%d/%d %s %d: %.4g GFLOP, %.4g GB; compiled in %.1f s",
            *(done, len(buckets), *key, cost.flops / 1e9, cost.bytes / 1e9, facts.compile_seconds),
        )
    _write(profile, file)
    return profile


def _buckets(request: ProfileRequest) -> Buckets:
    """With as many slots, and so rows of prefill, as the largest decode bucket."""
    decode = _sizes("--buckets-decode", request.decode, BUCKETS.decode, (2, _MOST_ROWS))
    prefill = _sizes("--buckets-prefill", request.prefill, BUCKETS.prefill, (2, _MOST_TOKENS))
    return Buckets(decode, prefill, prefill_rows=decode[-1])


def _sizes(
    flag: str, given: Sequence[int] | None, usual: tuple[int, ...], between: tuple[int, int]
) -> tuple[int, ...]:
    sizes = tuple(sorted(set(usual if given is None else given)))
    if not sizes or not between[0] <= sizes[0] <= sizes[-1] <= between[1]:
        listed = " ".join(map(str, given or ())) or "without a number"
        raise ConfigError(f"{flag} {listed}: give numbers from {between[0]} to {between[1]}")
    return sizes


def _writable(file: Path) -> Path:
    """Found out before the minutes of compiling, not after them."""
    folder = file.resolve().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(f"--profile {file}: {folder} is no folder to write to; make it first")
    if file.is_dir():
        raise ConfigError(f"--profile {file} is a folder; name a file in it")
    return file.resolve()


def _write(profile: ModelProfile, file: Path) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(profile.to_json(), indent=1) + "\n", encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"--profile {file}: {error.strerror}; name another file") from error
    finally:
        part.unlink(missing_ok=True)

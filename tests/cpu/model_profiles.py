"""The model profiles that ship with the package, made from device_programs.json.

`python tests/cpu/model_profiles.py` writes duetjax/presets/profiles/*.json anew, after
device_table.py has renewed the table. Compiles nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from device_table import BUCKETS, PAIRS, Pair, key_name, read_table

import duetjax
from duetjax.checkpoint.source import resolve_model
from duetjax.policy.launch import Program
from duetjax.policy.profiles import ModelProfile
from duetjax.runtime.profile import model_profile

FOLDER = Path(duetjax.__file__).parent / "presets" / "profiles"
SHIPPED = tuple(pair for pair in PAIRS if pair[1] == "h200-sxm")


@dataclass(frozen=True)
class Counted:
    """A row of the table, as `model_profile` takes it."""

    flops: float
    bytes_accessed: float


def counted(pair: Pair) -> dict[tuple[Program, int], Counted]:
    rows = read_table()["programs"][pair.name]
    found = {key: rows[key_name(key)] for key in BUCKETS}
    return {key: Counted(row["flops"], row["bytes_accessed"]) for key, row in found.items()}


def profile_of(pair: Pair) -> ModelProfile:
    config = resolve_model(pair.model, load_format="dummy").config
    return model_profile(pair.model, config, pair.programs, counted(pair))


def text_of(profile: ModelProfile) -> str:
    return json.dumps(profile.to_json(), indent=1) + "\n"


def main() -> None:
    for pair in (Pair(*names) for names in SHIPPED):
        (FOLDER / f"{pair.model}.json").write_text(text_of(profile_of(pair)), encoding="utf-8")


if __name__ == "__main__":
    main()

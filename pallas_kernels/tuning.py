"""The table of tunings by architecture, head_dim, page size and dtype: tuning.json.

Every entry has its date and where it comes from; `python -m pallas_kernels.tune` measures entries.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from pallas_kernels.shapes import Tuning

TABLE = Path(__file__).with_name("tuning.json")


@dataclass(frozen=True, slots=True)
class Case:
    """What an entry is for. architecture: sm_ and the compute capability, as in "sm_90"."""

    architecture: str
    head_dim: int
    page_size: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A tuning, the day it was found (ISO 8601) and how."""

    tuning: Tuning
    date: str
    source: str


def tuning_for(case: Case) -> Entry | None:
    """The table's entry; None where it has none."""
    return read_table(TABLE).get(case)


@cache
def read_table(path: Path) -> dict[Case, Entry]:
    """All entries of a file that `table_text` wrote; raises ValueError where it is another's."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {
            Case(**row["case"]): Entry(Tuning(**row["tuning"]), row["date"], row["source"])
            for row in rows
        }
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a table of tunings: {error!r}; restore it") from error


def table_text(table: dict[Case, Entry]) -> str:
    """A table as JSON, an entry per line, in the order of cases."""
    rows = [
        json.dumps({"case": asdict(case), **asdict(table[case])})
        for case in sorted(table, key=lambda case: (case.architecture, case.dtype, *_sizes(case)))
    ]
    return "[\n" + ",\n".join(rows) + "\n]\n"


def _sizes(case: Case) -> tuple[int, int]:
    return case.head_dim, case.page_size

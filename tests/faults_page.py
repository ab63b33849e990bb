"""Writes docs/faults.md from what the tests of faults have seen: `make faults`."""

import json
import sys
from pathlib import Path

from faults import PAGE, cell

_INTRO = """\
# Faults, and what guards against them

Each row is a test that attacks a running server. With the guard the attack must see what is \
expected, and afterwards the server must be
ready, hold no page, and answer a control request as before; after a fault that ends the process, \
the exit is the one stated and a new one
answers. The last column is what the same attack saw with the guard switched off, where it is this \
project's own: it must differ, or end with
a server that is harmed. `make faults` writes this page; the tests compare it row by row.
"""


def main(folder: str) -> None:
    """Reads what was seen from `folder`, groups and faults in the order in which it was seen."""
    groups: dict[str, dict[str, dict[str, str]]] = {}
    for file in sorted(Path(folder).glob("*.jsonl")):
        for line in file.read_text().splitlines():
            seen = json.loads(line)
            row = groups.setdefault(seen.pop("group"), {}).setdefault(seen.pop("name"), {})
            row.update(seen)
    lines = [_INTRO]
    for group, rows in sorted(groups.items()):
        lines += [f"## {group}", "", "| fault | expected, and seen | guard | seen without it |"]
        lines.append("| --- | --- | --- | --- |")
        for name, row in rows.items():
            cells = (name, row["expected"], row["guard"], row["without"])
            lines.append(f"| {' | '.join(map(cell, cells))} |")
        lines.append("")
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

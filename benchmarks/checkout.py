"""Which checkout measured."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The checkout's short commit id; None where there is no git or no checkout."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None

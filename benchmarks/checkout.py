"""Which checkout measured."""

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def commit(root: Path = ROOT) -> str | None:
    """The checkout's short commit id, as it is when first asked for; None without git or checkout.

    It ends in "-dirty" where files differ from the commit or are not in it; results do not count.
    """
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        rest = ("--", ".", ":(exclude)benchmarks/results")
        changed = _git(root, "--no-optional-locks", "status", "--porcelain", *rest)
    except FileNotFoundError:
        return None
    if not head.stdout.strip():
        return None
    is_dirty = changed.returncode != 0 or changed.stdout.strip() != ""
    return head.stdout.strip() + ("-dirty" if is_dirty else "")


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)

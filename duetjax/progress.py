"""Progress bars on a terminal, where tqdm is installed; elsewhere nothing is shown."""

from contextlib import AbstractContextManager
from typing import Protocol, cast

try:
    from tqdm import tqdm
except ImportError:  # a machine with nothing but what computing needs
    tqdm = None  # type: ignore[assignment,misc]


class Bar(Protocol):
    """How far something is."""

    def update(self, done: float = 1) -> object:
        """So much more is done."""


class _NoBar:
    """Shows nothing."""

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: float = 1) -> None:
        """See `Bar`."""


def progress_bar(total: float, what: str, unit: str) -> AbstractContextManager[Bar]:
    """A bar on standard error while it is a terminal; "B" as unit: bytes, shortened."""
    if tqdm is None:
        return _NoBar()
    bar = tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=None)
    return cast(AbstractContextManager[Bar], bar)

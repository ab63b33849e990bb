"""Faults that a server must survive: each is tried with what guards against it, and without.

An attack says in words what it saw, the same words every time. With the guard they must be what is
expected, and the server unharmed; without it one of the two must fail, or the guard guards nothing.
docs/faults.md shows both. The tests compare it row by row; `make faults` writes it.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
OUT = os.environ.get("DUETJAX_FAULTS_OUT")  # a folder for what was seen, in place of comparing it


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to do harm. attack: does it to a target and says what it saw.

    guard: what prevents the harm, in words. off: takes it away; None where it is a library's, which
    `guard` names. settings: for the target.
    """

    name: str
    attack: Callable[[Any], str]
    expected: str
    guard: str
    off: Callable[[pytest.MonkeyPatch], None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Faults:
    """The faults of one group. open: a target, from `settings`; harm: what is wrong with it now."""

    def __init__(
        self,
        group: str,
        open: Callable[..., AbstractContextManager[Any]],  # noqa: A002
        harm: Callable[[Any], str | None],
    ) -> None:
        self._group = group
        self._open = open
        self._harm = harm
        self._faults: list[Fault] = []

    def add(self, *args: Any, **kwargs: Any) -> None:
        """One more `Fault`."""
        self._faults.append(Fault(*args, **kwargs))

    def attack(self, name: str, **kwargs: Any) -> Callable[..., Any]:
        """Decorates the attack of a fault."""

        def add(attack: Callable[[Any], str]) -> Callable[[Any], str]:
            self.add(name, attack, **kwargs)
            return attack

        return add

    def tests(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """Two tests for a module: all faults with their guards, and those of our own without."""
        own = [fault for fault in self._faults if fault.off is not None]

        @pytest.mark.parametrize("fault", self._faults, ids=lambda fault: fault.name)
        def guarded(fault: Fault) -> None:
            row = _Row(self._group, fault)
            with self._open(**fault.settings) as target:
                assert fault.attack(target) == fault.expected
                assert self._harm(target) is None
            row.check_guarded()

        @pytest.mark.parametrize("fault", own, ids=lambda fault: fault.name)
        def unguarded(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
            fault.off(monkeypatch)
            seen = self._seen(fault)
            assert seen != fault.expected, "it makes no difference: this is not what guards"
            _Row(self._group, fault).check_unguarded(seen)

        return guarded, unguarded

    def _seen(self, fault: Fault) -> str:
        """What an attack comes to where anything may happen."""
        seen = ""
        try:
            with self._open(**fault.settings) as target:
                try:
                    seen = fault.attack(target)
                except Exception as error:
                    seen = _words(error)
                try:
                    harm = self._harm(target)
                except Exception as error:
                    harm = f"then {_words(error)}"
                seen = "; ".join(filter(None, (seen, harm)))
        except (AssertionError, OSError):  # it does not even stop as it should
            seen = f"{seen}; does not stop" if seen else "does not start"
        return seen


def _words(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return "no answer"
    if isinstance(error, httpx.TransportError | ConnectionError):
        return "connection broken"
    return (
        f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        if str(error)
        else str(type(error).__name__)
    )


class _Row:
    """A row of the page, read or in the making."""

    def __init__(self, group: str, fault: Fault) -> None:
        self._group = group
        self._fault = fault

    def check_guarded(self) -> None:
        """What is expected was seen."""
        fault = self._fault
        self._check({"expected": fault.expected, "guard": fault.guard})
        if fault.off is None:
            self._check({"without": "(not ours to switch off)"})

    def check_unguarded(self, seen: str) -> None:
        """This was seen without the guard."""
        self._check({"without": seen})

    def _check(self, cells: Mapping[str, str]) -> None:
        if OUT is None:
            told = read_page().get((self._group, self._fault.name))
            assert told is not None, "docs/faults.md does not have it; run `make faults`"
            told = {name: told[name] for name in cells}
            assert told == {k: cell(v) for k, v in cells.items()}, (
                "run `make faults` if it is right"
            )
            return
        line = {"group": self._group, "name": self._fault.name} | dict(cells)
        with (Path(OUT) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def cell(text: str) -> str:
    """As it stands in a table."""
    return text.replace("|", "\\|")


def read_page() -> dict[tuple[str, str], dict[str, str]]:
    """The rows of docs/faults.md by group and fault."""
    rows, group = {}, ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            group = line[3:]
        elif line.startswith("| ") and not line.startswith(("| fault |", "| --- |")):
            name, expected, guard, without = line[2:-2].replace("\\|", "\0").split(" | ")
            cells = {"expected": expected, "guard": guard, "without": without}
            rows[group, name.replace("\0", "|")] = {
                k: v.replace("\0", "\\|") for k, v in cells.items()
            }
    return rows

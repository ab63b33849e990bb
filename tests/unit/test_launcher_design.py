"""launcher/DESIGN.md names a test for each of its rules: those tests must exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DESIGN = (ROOT / "launcher/DESIGN.md").read_text(encoding="utf-8")
HEADING = "## Rules, and the tests that hold them"


def rules() -> list[tuple[str, str, str]]:
    """The rows of the table: rule, file, test."""
    _, _, section = DESIGN.partition(HEADING)
    section, _, _ = section.partition("\n## ")
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [(rule.strip(), file.strip(), test.strip()) for rule, file, test in rows[2:]]


def source_of(file: str) -> str:
    path = ROOT / file if "/" in file else ROOT / "tests/native" / file
    return path.read_text(encoding="utf-8")


def test_there_are_rules():
    assert len(rules()) > 15


@pytest.mark.parametrize(("rule", "file", "test"), rules())
def test_the_test_that_holds_a_rule_exists(rule, file, test):
    source = source_of(file)
    if test.startswith("all"):
        assert len(source.splitlines()) > 50
    elif file.endswith(".py"):
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), rule
    else:
        assert f"static void {test}(void)" in source, rule
        assert f"TEST({test})" in source, f"{test} is never run"


def test_every_suite_of_the_launcher_is_run():
    harness = source_of("harness.c")
    for path in (ROOT / "tests/native").glob("test_launcher_*.c"):
        (suite,) = re.findall(r"^SUITE\((\w+),", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert re.search(rf"\b{suite}\b", harness.partition("suites[] = {")[2]), path.name

"""What the documents give a reader to run, to copy and to follow: commands, blocks, links.

A fenced block without a language, or of sh or console, holds commands; one of python is a program;
of json, jsonl and yaml data; one of text is none of it. In prose and tables a code span that begins
with a program and has arguments is a command.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"docs/faults.md", "docs/log.md", "docs/results.md"}
"""Written by programs, or what was true on a day."""

PROGRAMS = {".", "cd", "curl", "duetjax", "git", "make", "python", "python3"}
"""What a command may begin with, or with a path; any other one has to be declared."""
FOREIGN = {"apt", "docker", "helm", "kubectl", "nvidia-modprobe", "nvidia-smi", "openssl", "pip"}
FOREIGN |= {"npm", "pytest", "ray", "sudo", "systemctl", "systemd-analyze", "uv"}
"""Programs that code spans are searched for beside those."""

_COMMENT = re.compile(r"\s+# ")
_SPAN = re.compile(r"`([^`]+)`")
_FENCE = re.compile(r"\s*```(\S*)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Kind(Enum):
    """What a passage is."""

    COMMAND = "command"
    PROGRAM = "program"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Passage:
    """Something of a document that can be tried.

    document: its path from the repository's root. language: of the block, empty for a code span and
    for a block without one. comment: what stands behind a command.
    """

    kind: Kind
    text: str
    document: str
    line: int
    language: str = ""
    is_span: bool = False
    comment: str = ""

    @property
    def words(self) -> str:
        """A command on one line, blanks made alike: what it is declared by."""
        return " ".join(self.text.replace("\\\n", " ").split())

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"{self.document}:{self.line}"


def documents(root: Path = ROOT) -> list[str]:
    """Those that are checked, from the root of the repository; the README first."""
    guides = sorted(f"docs/{path.name}" for path in (root / "docs").glob("*.md"))
    others = ["CONTRIBUTING.md", "checkpoints/README.md", "checkpoints/demo/README.md"]
    return ["README.md", *(guide for guide in guides if guide not in GENERATED), *others]


def passages(document: str, text: str) -> list[Passage]:
    """All that can be tried, in the order of the document. `ValueError`: a block nobody knows."""
    found: list[Passage] = []
    prose: list[str] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if not (fence := _FENCE.match(line)):
            prose.append(line)
            if line.strip():
                continue
            number += 1
        found += _spans(document, number - len(prose), prose)
        prose = []
        if fence:
            block = []
            for _, inside in lines:
                if inside.strip() == "```":
                    break
                block.append(inside)
            found += _block(document, number + 1, fence[1], block)
    found += _spans(document, len(text.splitlines()) + 1 - len(prose), prose)
    return found


def _spans(document: str, first: int, paragraph: list[str]) -> Iterator[Passage]:
    text = "\n".join(paragraph)
    for match in _SPAN.finditer(text):
        span = " ".join(match[1].split())
        line = first + text.count("\n", 0, match.start())
        program = program_of(span)
        if program in PROGRAMS - {".", "cd"} | FOREIGN and " " in span:
            yield Passage(Kind.COMMAND, span, document, line, is_span=True)


def program_of(command: str) -> str:
    """The first word that is no assignment, of a folder's programs the last part of the path."""
    words = command.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words[0].rpartition("/")[2] if words else ""


def _block(document: str, first: int, language: str, lines: list[str]) -> Iterator[Passage]:
    if language in ("", "sh", "console"):
        yield from _commands(document, first, language, lines)
    elif language == "python":
        yield Passage(Kind.PROGRAM, "\n".join(lines) + "\n", document, first, language)
    elif language in ("json", "jsonl", "yaml"):
        yield Passage(Kind.DATA, "\n".join(lines) + "\n", document, first, language)
    elif language != "text":
        raise ValueError(f"{document}:{first}: a block of {language!r}; teach documents.py of it")


def _commands(document: str, first: int, language: str, lines: list[str]) -> Iterator[Passage]:
    """Commands, each as many lines as its backslashes and quotes take."""
    parts: list[str] = []
    for number, line in enumerate(lines, first):
        if language == "console" and not parts:
            if not line.startswith("$ "):
                continue  # what it prints
            line = line[2:]
        if not parts and (not line.strip() or line.startswith("#")):
            continue
        parts.append(line)
        said = ""
        for comment in _COMMENT.finditer(line):
            before = line[: comment.start()]
            if not _is_open("\n".join([*parts[:-1], before])):
                parts[-1], said = before, line[comment.end() :]
                break
        if parts[-1].endswith("\\") or _is_open("\n".join(parts)):
            continue
        start = number + 1 - len(parts)
        yield Passage(Kind.COMMAND, "\n".join(parts), document, start, language, comment=said)
        parts = []
    if parts:
        raise ValueError(f"{document}:{first}: a command without an end: {parts[0]}")


def _is_open(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return True
    return False


def check_data(passage: Passage) -> None:
    """Reads a block of data; `ValueError` where it is none."""
    try:
        if passage.language == "yaml":
            list(yaml.safe_load_all(passage.text))
        elif passage.language == "jsonl":
            [json.loads(line) for line in passage.text.splitlines() if line]
        else:
            json.loads(passage.text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{passage.place}: not {passage.language}: {error}") from error


def broken_links(document: str, text: str, root: Path = ROOT) -> list[str]:
    """Links to files of the repository, and to headings in them, that are not there."""
    broken = []
    for target in _LINK.findall(_without_blocks(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (root / document).parent / name if name else root / document
        if not file.exists():
            broken.append(f"{document}: {target}: there is no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            broken.append(f"{document}: {target}: there is no such heading")
    return broken


def anchors(text: str) -> set[str]:
    """What a link may name of a page: its headings as GitHub writes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", _without_blocks(text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def _without_blocks(text: str) -> str:
    return re.sub(r"^\s*```.*?^\s*```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)

"""What `make check-docs` finds in the documents, and that it knows what to do with each."""

import argparse
import sys
from pathlib import Path

import pytest

from duetjax.cli import _parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

from declared import DECLARED, Instead, NotRun, choice, filled, unused
from documents import (
    ROOT,
    Kind,
    Passage,
    anchors,
    broken_links,
    check_data,
    documents,
    passages,
    program_of,
)

PAGE = """# A page
Say `duetjax doctor --fast` or `make`, or
`make
lint`, not `--flag` or `serve`.

```
duetjax serve --port 0 \\
    --max-num-seqs 2   # a comment
curl -d '{"a":
  "b # c"}' http://x   # another
```

```console
$ cd folder
what it prints
```

```text
not a command `make test`
```

```json
{"a": 1}
```

```python
print("hi")
```
"""
FOUND = [each for name in documents() for each in passages(name, (ROOT / name).read_text("utf-8"))]
COMMANDS = [each for each in FOUND if each.kind is Kind.COMMAND]


def test_what_a_page_gives_to_try_is_found_in_its_order():
    found = passages("page.md", PAGE)
    assert [(each.kind, each.words, each.line) for each in found] == [
        (Kind.COMMAND, "duetjax doctor --fast", 2),
        (Kind.COMMAND, "make lint", 3),
        (Kind.COMMAND, "duetjax serve --port 0 --max-num-seqs 2", 7),
        (Kind.COMMAND, """curl -d '{"a": "b # c"}' http://x""", 9),
        (Kind.COMMAND, "cd folder", 14),
        (Kind.DATA, '{"a": 1}', 23),
        (Kind.PROGRAM, 'print("hi")', 27),
    ]
    assert [each.comment for each in found[2:4]] == ["a comment", "another"]
    assert [each.is_span for each in found[:3]] == [True, True, False]


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```rust\nfn main\n```\n", "page.md:2: a block of 'rust'"),
        ("```\nmake \\\n```\n", "a command without an end"),
    ],
)
def test_a_block_that_nobody_knows_is_refused(page, complaint):
    with pytest.raises(ValueError, match=complaint):
        passages("page.md", page)


@pytest.mark.parametrize(
    ("command", "program"),
    [("A=1 make x", "make"), ("client/bin/python a.py", "python"), ("", ""), (". x", ".")],
)
def test_a_program_is_the_first_word_that_is_no_assignment(command, program):
    assert program_of(command) == program


def test_a_command_that_nobody_can_run_has_to_be_declared():
    with pytest.raises(ValueError, match=r"page\.md:1: nobody has declared how to run: docker ps"):
        choice(Passage(Kind.COMMAND, "docker ps", "page.md", 1))


def test_a_command_is_run_as_it_stands_or_as_declared_and_shows_its_flags_where_it_is_named():
    fenced = Passage(Kind.COMMAND, "duetjax doctor", "page.md", 1)
    assert choice(fenced) is fenced
    named = choice(Passage(Kind.COMMAND, "duetjax doctor", "page.md", 1, is_span=True))
    assert isinstance(named, Instead)
    assert named.command == "duetjax doctor --help"
    declared = choice(Passage(Kind.COMMAND, "make  soak", "page.md", 1))
    assert declared is DECLARED["make soak"]


def test_a_declaration_that_no_document_uses_is_told():
    assert unused(COMMANDS[:0]) == sorted(DECLARED)


def test_placeholders_and_the_port_are_filled_in():
    assert filled("curl http://HOST:PORT/x", 9, "r") == "curl http://127.0.0.1:9/x"
    assert filled("duetjax serve", 9, "r") == "duetjax serve --port 9"
    assert filled("duetjax serve --port 8000", 9, "r") == "duetjax serve --port 9"
    assert filled("duetjax bench", 9, "r") == "duetjax bench --base-url http://127.0.0.1:9"
    assert filled("git clone ADDRESS x", 9, "/r") == "git clone /r x"
    assert filled("a --n 18000", 9, "r") == "a --n 18000"


@pytest.mark.parametrize(("language", "text"), [("json", "{"), ("jsonl", "1\n{"), ("yaml", "a: [")])
def test_data_that_is_none_is_refused(language, text):
    with pytest.raises(ValueError, match=f"page.md:1: not {language}"):
        check_data(Passage(Kind.DATA, text, "page.md", 1, language))


def test_links_to_files_and_headings_that_are_not_there_are_told(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/b.md").write_text("# One `two`, three\n## Same\n## Same\n")
    links = ("b.md", "b.md#one-two-three", "b.md#same-1", "b.md#gone", "c.md", "https://x.y/z#a")
    text = "".join(f"[x]({link})\n" for link in links) + "```\n[x](in-a-block.md)\n```\n"
    assert broken_links("docs/a.md", text, tmp_path) == [
        "docs/a.md: b.md#gone: there is no such heading",
        "docs/a.md: c.md: there is no such file",
    ]
    assert anchors("# A_b-c (d)\n") == {"a_b-c-d"}


def test_every_command_of_the_documents_can_be_run_or_is_declared_and_every_block_is_known():
    assert {"README.md", "docs/quickstart.md"} < {each.document for each in COMMANDS}
    for each in COMMANDS:
        choice(each)
    for each in FOUND:
        if each.kind is Kind.DATA:
            check_data(each)
        elif each.kind is Kind.PROGRAM:
            compile(each.text, each.place, "exec")


def test_every_declaration_is_of_a_command_that_a_document_has():
    assert unused(COMMANDS) == []


def test_every_link_between_documents_leads_somewhere():
    broken = [broken_links(name, (ROOT / name).read_text("utf-8")) for name in documents()]
    assert [each for several in broken for each in several] == []


def subparsers():
    actions = _parser()._actions
    [commands] = [each for each in actions if isinstance(each, argparse._SubParsersAction)]
    return commands.choices


@pytest.mark.parametrize("command", sorted({each.words for each in COMMANDS}))
def test_a_command_has_only_subcommands_flags_and_targets_that_exist(command):
    words = command.replace("[", "").replace("]", "").split()
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "duetjax":
        flags = {word for word in words[2:] if word.startswith("--")}
        assert flags <= subparsers()[words[1]]._option_string_actions.keys()
    elif words[0] == "make":
        targets = (ROOT / "Makefile").read_text("utf-8")
        assert all(f"\n{word}:" in targets for word in words[1:] if "=" not in word)


@pytest.mark.parametrize("kept", DECLARED.values(), ids=DECLARED)
def test_a_declaration_says_why(kept):
    assert kept.why
    assert isinstance(kept, NotRun) or kept.command

"""Runs what README and docs tell a reader to run: `make check-docs`.

    python tests/docs/check_docs.py [DOCUMENT ...]

Each document has a folder of its own with a clone of the working tree, or an empty one where it
begins with `git clone`. Its commands are run there one after another in one shell's environment, as
they stand or as declared.py says. A server runs until the document starts another one or ends: it
must become ready, answer a streamed question and end with 0. Blocks of Python are programs; one
whose first line is `# NAME.py` is that file, for a later command. Blocks of data are parsed, links
followed. Prints as it goes; exits with 1 where anything failed.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from declared import DEMO, Instead, NotRun, choice, filled, unused
from documents import ROOT, Kind, Passage, broken_links, check_data, documents, passages
from reader import MESSAGES, Failed, Reader

ENDED = "once serve has been ended"
"""The comment behind a command that wants the server gone."""


class Check:
    """One run over documents."""

    def __init__(self, folder: Path) -> None:
        """folder: an empty one for everything that is written."""
        self._folder = folder
        self._repository = folder / "repository"
        self._tried: set[str] = set()
        self.counts = dict.fromkeys(("run", "instead", "not run"), 0)
        self.faults: list[str] = []

    def snapshot(self) -> None:
        """Makes a repository of the working tree, for documents to clone."""
        listed = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
        for name in subprocess.check_output(listed, text=True).split("\0"):
            source, target = ROOT / name, self._repository / name
            if name and source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        author = ["-c", "user.name=check-docs", "-c", "user.email=check-docs@localhost"]
        for arguments in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "as it is"]):
            subprocess.run(["git", "-C", str(self._repository), *arguments], check=True)

    def document(self, name: str, found: list[Passage]) -> None:
        """Tries all of a document."""
        folder = self._folder / name.replace("/", "-").removesuffix(".md")
        if any(each.words.startswith("git clone ") for each in found):
            folder.mkdir()
        else:
            subprocess.run(["git", "clone", "-q", self._repository, folder], check=True)
        _give(folder, self._repository)
        port = _free_port()
        with Reader(folder, port) as reader:
            for passage in found:
                with self._noted(passage):
                    self._try(reader, passage, port)
            with self._noted(Passage(Kind.COMMAND, "the end of its server", name, 0)):
                reader.end_server()

    @contextmanager
    def _noted(self, passage: Passage) -> Iterator[None]:
        try:
            yield
        except (Failed, ValueError) as error:
            self.faults.append(f"{passage.place}  {passage.words[:100]}\n    {error}")
            print(f"FAILED  {self.faults[-1]}", flush=True)

    def _try(self, reader: Reader, passage: Passage, port: int) -> None:
        if passage.kind is Kind.DATA:
            check_data(passage)
            return
        if passage.kind is Kind.PROGRAM:
            head = passage.text.partition("\n")[0]
            name = head.removeprefix("# ") if head.endswith(".py") else "block.py"
            reader.write(name, filled(passage.text, port, str(self._repository)))
            if name == "block.py":
                self._run(reader, passage, "python block.py", "", port)
            return
        if passage.is_span and passage.words in self._tried:
            return
        self._tried.add(passage.words)
        taken = choice(passage)
        if isinstance(taken, NotRun):
            self.counts["not run"] += 1
            print(f"      not run  {passage.place}  {passage.words}: {taken.why}", flush=True)
            return
        why = taken.why if isinstance(taken, Instead) else ""
        text = taken.command if isinstance(taken, Instead) else passage.text
        if passage.comment == ENDED:
            reader.end_server()
        self._run(reader, passage, text, why, port)

    def _run(self, reader: Reader, passage: Passage, text: str, why: str, port: int) -> None:
        command = filled(text, port, str(self._repository))
        began = time.monotonic()
        print(f"          ...  {passage.place}  {command}", flush=True)
        if command.startswith("duetjax serve") and "--help" not in command:
            reader.serve(command)
        else:
            if str(port) in command and not reader.has_server:
                reader.serve(f"duetjax serve --port {port}")  # as prose takes for granted
            reader.run(command)
        self.counts["instead" if why else "run"] += 1
        instead = f"  (instead of {passage.words}: {why})" if why else ""
        print(f"{time.monotonic() - began:7.1f} s  ok  {passage.place}{instead}", flush=True)


def _give(folder: Path, repository: Path) -> None:
    """What the documents take for granted: a model's folder, a batch, a trace."""
    for name in ("Llama-3.2-1B-Instruct", "Llama-3.2-3B", "my-model"):
        shutil.copytree(repository / DEMO, folder / name)
    body = {"model": "duetjax-demo", "messages": MESSAGES, "max_tokens": 16}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (folder / "batch.jsonl").write_text(json.dumps(line) + "\n")
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for i in range(200):
        at = f"2023-11-16 18:{i // 60:02}:{i % 60:02}.0000000"
        lines.append(f"{at},{100 + 37 * i % 2000},{20 + 11 * i % 300}")
    (folder / "traces").mkdir()
    for name in ("traces/azure_conv_2023.csv", "AzureLLMInferenceTrace_conv.csv"):
        (folder / name).write_text("\n".join(lines) + "\n")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(folder: Path) -> None:
    """This Python's programs first on PATH, a cache of its own, curl that fails on errors."""
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"):
        os.environ.pop(name, None)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["DUETJAX_CACHE_DIR"] = str(folder / "cache")
    os.environ["CURL_HOME"] = str(folder)
    (folder / ".curlrc").write_text('fail-with-body\nsilent\nshow-error\nnoproxy = "*"\n')
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


def main(only: list[str]) -> int:
    """Checks the documents named, or all."""
    began = time.monotonic()
    found = {name: passages(name, (ROOT / name).read_text("utf-8")) for name in documents()}
    if missing := set(only) - found.keys():
        sys.exit(f"no such documents: {', '.join(sorted(missing))}; there are {', '.join(found)}")
    with tempfile.TemporaryDirectory(prefix="duetjax-docs-") as folder:
        check = Check(Path(folder))
        for name in found:
            check.faults += broken_links(name, (ROOT / name).read_text("utf-8"))
        everything = [each for several in found.values() for each in several]
        check.faults += [f"declared, but in no document: {each}" for each in unused(everything)]
        check.snapshot()
        _environment(Path(folder))
        for name in only or found:
            print(f"--- {name}", flush=True)
            check.document(name, found[name])
    counts = ", ".join(f"{number} {what}" for what, number in check.counts.items())
    print(f"=== {counts}, {len(check.faults)} failed; {time.monotonic() - began:.0f} s")
    for fault in check.faults:
        print(f"FAILED  {fault}")
    return bool(check.faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

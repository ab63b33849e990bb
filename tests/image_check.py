"""Does here what deploy/Dockerfile does, as far as that needs no container, and tries the result.

`python image_check.py FOLDER`: copies what the build stage copies and runs its pip and Python, with
FOLDER for a root and without the apt-get; then asks the program for a diagnosis and, started
as the image starts it, for an answer. Prints how large the image's packages are, by their files.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
MB = 1e6


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest) of each line of deploy/Dockerfile."""
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    split = [line.split(maxsplit=1) for line in joined.splitlines() if line]
    return [(name, rest) for name, rest in split]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def build(root: Path) -> dict[str, str]:
    """Runs the build stage with `root` for /; returns its environment."""
    environment, folder = dict(os.environ), root
    stages = [i for i, (name, _) in enumerate(instructions()) if name == "FROM"]
    for name, rest in instructions()[stages[0] + 1 : stages[1]]:
        if name == "ENV":
            environment |= _variables(rest, root, environment)
        elif name == "WORKDIR":
            folder = root / rest.strip("/")
            folder.mkdir(exist_ok=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                _copy(ROOT / source, folder / target / (source if target == "./" else ""))
        elif name == "RUN" and not rest.startswith("apt-get"):
            _say(f"RUN {rest}")
            command = ["sh", "-ec", _beneath(root, rest)]
            subprocess.run(command, cwd=folder, env=environment, check=True)
        elif name == "ARG":
            environment = _variables(rest, root, environment) | environment
        else:
            assert name == "RUN", name
    return environment


def _beneath(root: Path, text: str) -> str:
    """A command or value with the image's own paths beneath `root`."""
    return re.sub(r"(?<![\w./*-])/(?=(opt|wheels|source|var)/?)", f"{root}/", text)


def _variables(text: str, root: Path, environment: dict[str, str]) -> dict[str, str]:
    pairs = (each.partition("=") for each in _beneath(root, text).split())
    return {name: value.replace("$PATH", environment["PATH"]) for name, _, value in pairs}


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    else:
        shutil.copy(source, target)


def answer(command: list[str], environment: dict[str, str], cwd: Path) -> str:
    """What the image's command, on a loopback address, answers to a chat; it must end well."""
    arguments = ["--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, text=True, env=environment, cwd=cwd
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found, "the server did not start"
        chat = {"model": "duetjax-demo", "messages": [{"role": "user", "content": "What is 2+2?"}]}
        request = urllib.request.Request(
            f"{found[0]}/v1/chat/completions",
            json.dumps(chat).encode(),
            {"content-type": "application/json"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=60) as response:
            text = json.load(response)["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        assert code == 0, f"the server ended with {code}"
        return text
    finally:
        process.kill()
        process.wait()


def sizes(site: Path) -> dict[str, int]:
    """Bytes of each package's files in a site-packages, largest first."""
    found = {}
    for each in distributions(path=[str(site)]):
        files = [Path(str(file.locate())) for file in each.files or []]
        found[each.name] = sum(file.stat().st_size for file in files if file.is_file())
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def check(root: Path) -> None:
    """Builds beneath a new folder, and fails where the image would not serve."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    environment = build(root)
    for name, rest in instructions():
        if name == "ENV":
            environment |= _variables(rest, root, environment)
    cache = Path(environment["DUETJAX_CACHE_DIR"])
    cache.mkdir(parents=True)
    subprocess.run(["duetjax", "doctor"], env=environment, cwd=cache, check=True)
    [entry] = [json.loads(rest) for name, rest in instructions() if name == "ENTRYPOINT"]
    _say(f"\nIt answers: {answer(entry, environment, cache)}")
    [copied] = [rest.split()[1] for name, rest in instructions() if rest.startswith("--from")]
    folder = root / copied.strip("/")
    [site] = folder.glob("lib/python*/site-packages")
    packages = sizes(site)
    total = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    _say(f"{copied}: {total / MB:,.0f} MB in {len(packages)} packages, the largest of which are")
    for name, size in list(packages.items())[:12]:
        _say(f"  {size / MB:8,.0f} MB  {name}")


if __name__ == "__main__":
    check(Path(sys.argv[1]).resolve())

"""The wheel and the sdist as a stranger gets them: built from a copy, used outside the tree."""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LARGEST_WHEEL = 16 * 1024**2


def run(*command: str | Path, cwd: Path) -> str:
    """The command's standard output; its errors are shown when it fails."""
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Built:
    """The two archives of one build."""

    wheel: Path
    sdist: Path

    def in_wheel(self) -> set[str]:
        return set(zipfile.ZipFile(self.wheel).namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Builds the sdist from a copy of the tree and the wheel from the sdist, without a network.

    In the tree itself a build would take files over from earlier ones.
    """
    tree = tmp_path_factory.mktemp("source") / "tree"
    left_behind = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist"
    )
    shutil.copytree(ROOT, tree, ignore=left_behind)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    (wheel,), (sdist,) = tree.glob("dist/*.whl"), tree.glob("dist/*.tar.gz")
    return Built(wheel, sdist)


def required(name: str, extras: frozenset[str] = frozenset()) -> Iterator[str]:
    """What an installer would bring for the installed package `name`, itself first."""
    yield name
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
        )
        if wanted:
            yield from required(requirement.name, frozenset(requirement.extras))


def dependencies_of(wheel: Path) -> set[str]:
    ...


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of an environment with the wheel and its declared dependencies alone.

    The dependencies are links to the packages that this interpreter has, to spare a download.
    """
    ...

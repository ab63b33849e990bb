"""The wheel as a stranger gets it: built from a copy of the tree, used outside of it."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LARGEST_WHEEL_BYTES = 16 * 1024**2
HAS_COMPILER = shutil.which("gcc", path="/usr/bin:/bin") is not None


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """The standard output of a command that knows nothing of this session's environment."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), **variables}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: files of earlier builds would get into a wheel."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    ignored = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ignored, "dist", "*.so"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """Made from the sdist."""
    run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    (built,) = tree.glob("dist/*.whl")
    return built


@pytest.fixture(scope="module")
def bare_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made where the C compiler fails."""
    folder = tmp_path_factory.mktemp("bare")
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, tree),
        cwd=folder,
        CC="/bin/false",
    )
    (built,) = folder.glob("*.whl")
    return built


def requirements(package: Distribution, extras: set[str]) -> list[Requirement]:
    """What an installer brings for a package asked for with these extras."""
    found = [Requirement(line) for line in package.requires or []]
    asked = [{"extra": extra} for extra in extras | {""}]
    return [r for r in found if r.marker is None or any(map(r.marker.evaluate, asked))]


def link_dependencies(package: Distribution, site: Path) -> None:
    """Puts the packages that `package` declares, and theirs, into `site` as links to ours."""
    waiting, seen = requirements(package, set()), set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        ours = distribution(requirement.name)
        waiting += requirements(ours, requirement.extras)
        for top in {file.parts[0] for file in ours.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(ours.locate_file(top))))


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel and its declared dependencies only."""
    folder = tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "venv", "env", cwd=folder)
    pip = folder / "env/bin/python", "-m", "pip", "--disable-pip-version-check"
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder)
    (metadata,) = folder.glob("env/lib/python*/site-packages/duetjax-*.dist-info")
    link_dependencies(PathDistribution(metadata), metadata.parent)
    return folder / "env/bin"


def held(wheel: Path) -> set[str]:
    """The files in a wheel, without its own description."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_module_preset_and_demo_file_and_nothing_else(wheel: Path) -> None:
    def files(folder: str, pattern: str) -> set[str]:
        return {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern)}

    demo = {f"duetjax/demo/{path.name}" for path in (ROOT / "checkpoints/demo").glob("*.*")}
    code = files("duetjax", "**/*.py") | files("pallas_kernels", "**/*.py")
    facts = files("duetjax", "presets/**/*.json") | files("pallas_kernels", "*.json")
    facts |= files("duetjax", "*.jsonl")
    expected = code | demo | facts | {"duetjax/py.typed", "duetjax/serve/page/index.html"}
    launcher = {"duetjax/_launcher.pyi"} | (
        {"duetjax/_launcher.abi3.so"} if HAS_COMPILER else set()
    )
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected | launcher


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler here")
def test_one_wheel_serves_every_python_from_3_12_on(wheel: Path, scripts: Path) -> None:
    assert "-cp312-abi3-" in wheel.name
    show = "from duetjax import _launcher; print(_launcher.Device.__name__)"
    assert run(scripts / "python", "-c", show, cwd=scripts.parent) == "Device\n"


def test_without_a_compiler_all_but_the_launcher_is_there(bare_wheel: Path, wheel: Path) -> None:
    assert held(wheel) - held(bare_wheel) <= {"duetjax/_launcher.abi3.so"}
    assert "duetjax/_launcher.abi3.so" not in held(bare_wheel)


def test_doctor_says_that_the_launcher_is_missing(
    bare_wheel: Path, scripts: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(bare_wheel).extractall(tmp_path)
    command = scripts / "python", "-m", "duetjax.cli", "doctor"
    doctor = run(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    (line,) = [line for line in doctor.splitlines() if line.startswith("launcher")]
    assert "not built" in line
    assert "install a C compiler" in line


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler here")
def test_an_editable_install_has_the_launcher(tree: Path, scripts: Path, tmp_path: Path) -> None:
    bare = "--without-pip", "--system-site-packages"
    run(sys.executable, "-m", "venv", *bare, "env", cwd=tmp_path)
    python = tmp_path / "env/bin/python"
    pip = scripts / "python", "-m", "pip", "--disable-pip-version-check", "--python", python
    quick = tmp_path / "cc"
    quick.write_text('#!/bin/sh\nexec gcc "$@" -O0\n')
    quick.chmod(0o755)
    (setuptools,) = {str(distribution("setuptools").locate_file(""))}
    run(
        *(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", "-e", tree),
        cwd=tmp_path,
        PYTHONPATH=setuptools,
        CC=str(quick),
    )
    show = "from duetjax import _launcher; print(_launcher.__file__)"
    where = run(python, "-c", show, cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tree)


def test_the_wheel_carries_its_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (licence,) = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_is_small_enough_to_ship_its_demo(wheel: Path) -> None:
    assert wheel.stat().st_size < LARGEST_WHEEL_BYTES


def test_an_environment_with_the_wheel_alone_answers_a_question(scripts: Path) -> None:
    away = scripts.parent
    command = scripts / "duetjax", "generate", "What is TTFT?", "--max-tokens", "16"
    few = "--max-num-seqs", "1", "--max-num-batched-tokens", "64"  # programs
    answer = run(*command, *few, cwd=away)
    assert answer.strip()
    imported = run(scripts / "python", "-c", "import duetjax; print(duetjax.__file__)", cwd=away)
    assert Path(imported.strip()).is_relative_to(away)


def test_that_environment_has_none_of_the_development_packages(scripts: Path) -> None:
    find = "from importlib.util import find_spec; print(find_spec('pytest'), find_spec('mypy'))"
    assert run(scripts / "python", "-c", find, cwd=scripts.parent) == "None None\n"

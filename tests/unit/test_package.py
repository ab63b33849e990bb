"""What pyproject.toml and the lock files promise, held against the source and each other."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
DEVELOPMENT = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
TRITON = [Requirement(line) for line in PROJECT["optional-dependencies"]["triton"]]
CUDA13 = [Requirement(line) for line in PROJECT["optional-dependencies"]["cuda13"]]
RUN, DEV = ROOT / "requirements.lock", ROOT / "requirements-dev.lock"
CUDA = ROOT / "requirements-cuda13.lock"

# Imported under their own name, but part of a declared package's own interface.
PART_OF = {"pydantic-core": "pydantic", "ml-dtypes": "jax"}


def requirement_lines(lock: Path) -> list[str]:
    """The lock's requirements, each with its hashes on the same line."""
    joined = lock.read_text(encoding="utf-8").replace("\\\n", "")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def pins(lock: Path) -> dict[str, str]:
    """Locked version by package, without the packages that only other systems need."""
    found: dict[str, str] = {}
    for line in requirement_lines(lock):
        requirement = Requirement(line.partition("--hash")[0])
        if requirement.marker is None or requirement.marker.evaluate():
            found[canonicalize_name(requirement.name)] = str(requirement.specifier)[2:]
    return found


def imported_packages() -> set[str]:
    """The declared name of every third-party package that the shipped source imports."""
    names = set()
    for path in [*ROOT.glob("duetjax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    names -= {"duetjax", "pallas_kernels", *sys.stdlib_module_names}
    owners = packages_distributions()
    packages = {canonicalize_name(owners.get(name, [name])[0]) for name in names}
    return {PART_OF.get(package, package) for package in packages}


def test_the_declared_dependencies_are_the_packages_that_the_source_imports() -> None:
    declared = [*DEPENDENCIES, *TRITON]  # Triton alone is imported where it is needed
    assert {canonicalize_name(r.name) for r in declared} == imported_packages()


@pytest.mark.parametrize("lock", [RUN, DEV, CUDA], ids=lambda lock: lock.name)
def test_a_lock_names_exact_versions_and_hashes_and_no_place_to_fetch_them_from(lock: Path) -> None:
    for line in requirement_lines(lock):
        assert re.match(r"[a-z0-9-]+==[^ ;*]+ .*--hash=sha256:[0-9a-f]{64}", line), line
    assert not re.search(r"://|--(extra-)?index|--find-links", lock.read_text(encoding="utf-8"))


def test_the_locks_pin_the_tested_jax_and_no_torch() -> None:
    assert pins(RUN)["jax"] == pins(RUN)["jaxlib"] == "0.11.2"
    assert "torch" not in pins(DEV)


def test_the_development_lock_adds_to_the_run_time_lock_and_changes_nothing() -> None:
    assert pins(RUN).items() < pins(DEV).items()


def test_the_lock_with_cuda_adds_to_the_run_time_lock_and_has_the_compilers_of_development() -> (
    None
):
    cuda, dev = pins(CUDA), pins(DEV)
    assert pins(RUN).items() < cuda.items()
    assert cuda["jax-cuda13-plugin"] == cuda["jax-cuda13-pjrt"] == cuda["jax"]
    both = cuda.keys() & dev.keys()
    assert {"nvidia-cuda-nvcc", "nvidia-nvvm"} < both
    assert {name: cuda[name] for name in both} == {name: dev[name] for name in both}


@pytest.mark.parametrize(
    ("lock", "declared"),
    [(RUN, DEPENDENCIES), (DEV, DEVELOPMENT), (CUDA, CUDA13)],
    ids=["run", "dev", "cuda13"],
)
def test_a_lock_satisfies_what_pyproject_declares(lock: Path, declared: list[Requirement]) -> None:
    locked = pins(lock)
    for requirement in declared:
        version = locked.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in {lock.name}: run `make lock`"
        assert version in requirement.specifier, (
            f"{requirement} excludes {version}: run `make lock`"
        )

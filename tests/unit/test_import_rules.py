"""Who may import whom (docs/design.md), read from the source: typing-only and late imports too."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST_PARTY = ("duetjax", "pallas_kernels")


@dataclass(frozen=True)
class Rule:
    """What one unit may import besides itself and the standard library less `never`."""

    ours: tuple[str, ...] = ()
    theirs: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


CLOCKS = ("time", "datetime", "sched", "asyncio", "threading")

# A unit is a package, or a module directly in duetjax/; the longest name that fits is the unit.
RULES = {
    "duetjax": Rule(ours=("duetjax.async_llm", "duetjax.config", "duetjax.llm")),
    "duetjax.config": Rule(),
    "duetjax.host": Rule(),
    "duetjax.log_lines": Rule(),
    "duetjax.whole_file": Rule(),
    "duetjax.presets": Rule(),
    "duetjax.progress": Rule(theirs=("tqdm",)),
    "duetjax.policy": Rule(ours=("duetjax.config",), theirs=("numpy",), never=CLOCKS),
    "duetjax.sim": Rule(ours=("duetjax.config", "duetjax.policy"), theirs=("numpy",)),
    "duetjax.text": Rule(ours=("duetjax.config",), theirs=("tokenizers", "minijinja")),
    "pallas_kernels": Rule(ours=("pallas_kernels.triton_kernels",), theirs=("jax",)),
    "pallas_kernels.triton_kernels": Rule(
        ours=("pallas_kernels",), theirs=("jax", "jax_triton", "triton")
    ),
    "duetjax.model": Rule(
        ours=("duetjax.config", "pallas_kernels.pages"), theirs=("jax", "flax", "numpy")
    ),
    "duetjax.checkpoint": Rule(
        ours=("duetjax.config", "duetjax.host", "duetjax.model"),
        theirs=(
            "jax",
            "flax",
            "numpy",
            "ml_dtypes",
            "safetensors",
            "orbax",
            "huggingface_hub",
            "tqdm",
        ),
    ),
    "duetjax.runtime": Rule(
        ours=(
            "duetjax._launcher",
            "duetjax.config",
            "duetjax.model",
            "duetjax.checkpoint",
            "duetjax.policy.grid",
            "duetjax.policy.launch",
            "duetjax.policy.limits",
            "duetjax.policy.memory",
            "duetjax.policy.profiles",
            "duetjax.whole_file",
            "pallas_kernels.pages",
        ),
        theirs=("jax", "numpy"),
    ),
    "duetjax.form": Rule(ours=("duetjax.policy.request", "duetjax.text")),
    "duetjax.constrain": Rule(
        ours=("duetjax.config", "duetjax.policy.request", "duetjax.text.tool_grammar"),
        theirs=("llguidance", "numpy"),
    ),
    "duetjax.engine": Rule(ours=("duetjax.config", "duetjax.policy", "duetjax.watchdog")),
    "duetjax.wire": Rule(ours=("duetjax.config", "duetjax.policy")),
    "duetjax.engine_process": Rule(
        ours=(
            "duetjax.config",
            "duetjax.engine",
            "duetjax.log_lines",
            "duetjax.policy",
            "duetjax.watchdog",
            "duetjax.wire",
        )
    ),
    "duetjax.engine_worker": Rule(
        ours=(
            "duetjax.build",
            "duetjax.config",
            "duetjax.engine",
            "duetjax.log_lines",
            "duetjax.policy.request",
            "duetjax.wire",
        )
    ),
    "duetjax.watchdog": Rule(ours=("duetjax.config", "duetjax.policy.launch"), never=CLOCKS),
    "duetjax.build": Rule(
        ours=(
            "duetjax.build_device",
            "duetjax.build_sim",
            "duetjax.checkpoint",
            "duetjax.config",
            "duetjax.constrain.grammars",
            "duetjax.engine",
            "duetjax.engine_process",
            "duetjax.form",
            "duetjax.log_lines",
            "duetjax.planning",
            "duetjax.policy.request",
            "duetjax.runtime.compilations",
            "duetjax.text",
        )
    ),
    "duetjax.build_service": Rule(ours=("duetjax.build", "duetjax.serve.context")),
    "duetjax.build_permits": Rule(
        ours=("duetjax.checkpoint.source", "duetjax.constrain.permits", "duetjax.text")
    ),
    "duetjax.build_device": Rule(
        ours=(
            "duetjax.build_permits",
            "duetjax.checkpoint",
            "duetjax.config",
            "duetjax.devices",
            "duetjax.engine",
            "duetjax.model",
            "duetjax.planning",
            "duetjax.policy",
            "duetjax.progress",
            "duetjax.runtime",
            "duetjax.text",
        ),
        theirs=("jax", "numpy"),
    ),
    "duetjax.build_sim": Rule(
        ours=(
            "duetjax.build_permits",
            "duetjax.checkpoint",
            "duetjax.config",
            "duetjax.engine",
            "duetjax.planning",
            "duetjax.policy",
            "duetjax.sim",
            "duetjax.text",
        )
    ),
    "duetjax.devices": Rule(
        ours=(
            "duetjax.config",
            "duetjax.host",
            "duetjax.model",
            "duetjax.policy.launch",
            "duetjax.policy.memory",
            "duetjax.runtime",
            "pallas_kernels",
        ),
        theirs=("jax",),
    ),
    "duetjax.simulate": Rule(
        ours=(
            "duetjax.checkpoint.source",
            "duetjax.config",
            "duetjax.planning",
            "duetjax.policy",
            "duetjax.profile_files",
            "duetjax.sim",
        ),
        theirs=("numpy",),
    ),
    "duetjax.simulate_report": Rule(
        ours=(
            "duetjax.chart",
            "duetjax.config",
            "duetjax.policy.profiles",
            "duetjax.profile_files",
            "duetjax.sim",
            "duetjax.simulate",
        ),
        theirs=("tqdm",),
    ),
    "duetjax.bench": Rule(
        ours=(
            "duetjax.bench_client",
            "duetjax.bench_endpoint",
            "duetjax.bench_in_process",
            "duetjax.bench_load",
            "duetjax.bench_report",
            "duetjax.bench_run",
            "duetjax.build",
            "duetjax.config",
            "duetjax.sim",
        ),
        theirs=("orjson",),
    ),
    "duetjax.bench_client": Rule(ours=("duetjax.config",), theirs=("h11", "orjson")),
    "duetjax.bench_endpoint": Rule(
        ours=(
            "duetjax.bench_client",
            "duetjax.bench_load",
            "duetjax.bench_run",
            "duetjax.config",
        ),
        theirs=("orjson",),
    ),
    "duetjax.bench_in_process": Rule(
        ours=(
            "duetjax.bench_client",
            "duetjax.bench_load",
            "duetjax.bench_run",
            "duetjax.build",
            "duetjax.config",
            "duetjax.engine",
            "duetjax.policy.request",
        )
    ),
    "duetjax.bench_load": Rule(ours=("duetjax.config", "duetjax.sim"), theirs=("numpy", "orjson")),
    "duetjax.bench_report": Rule(ours=("duetjax.bench_client", "duetjax.sim"), theirs=("numpy",)),
    "duetjax.bench_questions": Rule(ours=("duetjax.config",), theirs=("orjson",)),
    "duetjax.bench_score": Rule(
        ours=(
            "duetjax.bench",
            "duetjax.bench_client",
            "duetjax.bench_endpoint",
            "duetjax.bench_load",
            "duetjax.bench_questions",
            "duetjax.bench_score_report",
            "duetjax.config",
            "duetjax.progress",
        ),
        theirs=("orjson",),
    ),
    "duetjax.bench_score_report": Rule(ours=("duetjax.chart", "duetjax.config"), theirs=("numpy",)),
    "duetjax.bench_run": Rule(
        ours=(
            "duetjax.bench_client",
            "duetjax.bench_load",
            "duetjax.bench_report",
            "duetjax.sim",
        ),
        theirs=("tqdm",),
    ),
    "duetjax.arrangements": Rule(
        ours=("duetjax.config", "duetjax.simulate", "duetjax.simulate_report")
    ),
    "duetjax.profile_files": Rule(ours=("duetjax.config", "duetjax.policy.profiles")),
    "duetjax.calibration_file": Rule(
        ours=("duetjax.config", "duetjax.policy", "duetjax.whole_file")
    ),
    "duetjax.planning": Rule(
        ours=(
            "duetjax.calibration_file",
            "duetjax.config",
            "duetjax.policy",
            "duetjax.profile_files",
        )
    ),
    # The engine's client takes and gives the plain values of policy.request.
    "duetjax.completion": Rule(
        ours=(
            "duetjax.config",
            "duetjax.engine",
            "duetjax.form",
            "duetjax.policy.request",
            "duetjax.text",
        )
    ),
    "duetjax.async_llm": Rule(
        ours=(
            "duetjax.build",
            "duetjax.completion",
            "duetjax.config",
            "duetjax.llm",
            "duetjax.form",
            "duetjax.policy.request",
        )
    ),
    "duetjax.explain": Rule(
        ours=("duetjax.config", "duetjax.policy", "duetjax.profile_files"), theirs=("numpy",)
    ),
    "duetjax.chart": Rule(ours=("duetjax.chart_axis", "duetjax.chart_svg")),
    "duetjax.chart_axis": Rule(ours=("duetjax.chart_svg",)),
    "duetjax.chart_svg": Rule(),
    "duetjax.picture": Rule(ours=("duetjax.chart", "duetjax.config", "duetjax.explain")),
    "duetjax.absent": Rule(
        ours=(
            "duetjax.config",
            "duetjax.devices",
            "duetjax.policy.memory",
            "duetjax.runtime",
            "pallas_kernels.choice",
        ),
        theirs=("jax",),
    ),
    "duetjax.measured_hardware": Rule(
        ours=(
            "duetjax.devices",
            "duetjax.host",
            "duetjax.policy.profiles",
            "duetjax.profile_files",
            "duetjax.runtime",
        ),
        theirs=("jax",),
    ),
    "duetjax.profile_command": Rule(
        ours=(
            "duetjax.build_device",
            "duetjax.calibration_file",
            "duetjax.checkpoint.source",
            "duetjax.config",
            "duetjax.devices",
            "duetjax.measured_hardware",
            "duetjax.policy",
            "duetjax.profile_files",
            "duetjax.profile_report",
            "duetjax.progress",
            "duetjax.runtime",
            "duetjax.whole_file",
        ),
        theirs=("numpy",),
    ),
    "duetjax.profile_report": Rule(ours=("duetjax.chart", "duetjax.policy"), theirs=("numpy",)),
    "duetjax.compile_programs": Rule(
        ours=(
            "duetjax.absent",
            "duetjax.build_device",
            "duetjax.checkpoint",
            "duetjax.config",
            "duetjax.devices",
            "duetjax.policy",
            "duetjax.profile_files",
            "duetjax.progress",
            "duetjax.runtime",
        ),
        theirs=("jax",),
    ),
    "duetjax.compile_report": Rule(
        ours=("duetjax.chart", "duetjax.compile_programs", "duetjax.explain", "duetjax.policy"),
        theirs=("numpy",),
    ),
    "duetjax.batch": Rule(ours=("duetjax.config",), theirs=("orjson",)),
    "duetjax.run_batch": Rule(
        ours=("duetjax.batch", "duetjax.config", "duetjax.engine", "duetjax.serve"),
        theirs=("orjson", "starlette", "tqdm"),
    ),
    "duetjax.llm": Rule(
        ours=(
            "duetjax.build",
            "duetjax.completion",
            "duetjax.config",
            "duetjax.engine",
            "duetjax.form",
            "duetjax.policy.request",
            "duetjax.text",
        ),
        theirs=("tqdm",),
    ),
    "duetjax.trace_events": Rule(
        ours=("duetjax.policy.completed_launch", "duetjax.policy.launch"), theirs=("orjson",)
    ),
    "duetjax.timeline": Rule(ours=("duetjax.chart_axis", "duetjax.chart_svg", "duetjax.config")),
    "duetjax.serve": Rule(
        ours=(
            "duetjax.config",
            "duetjax.constrain",
            "duetjax.form",
            "duetjax.engine",
            "duetjax.log_lines",
            "duetjax.policy.completed_launch",
            "duetjax.policy.launch_counts",
            "duetjax.policy.request",
            "duetjax.policy.stats",
            "duetjax.text",
            "duetjax.trace_events",
            "duetjax.whole_file",
        ),
        theirs=(
            "starlette",
            "pydantic",
            "pydantic_core",
            "orjson",
            "uvicorn",
            "h11",
        ),
    ),
    "duetjax.cli": Rule(
        ours=(
            "duetjax.cli_bench",
            "duetjax.cli_doctor",
            "duetjax.cli_end",
            "duetjax.cli_files",
            "duetjax.cli_flags",
            "duetjax.cli_foretell",
            "duetjax.cli_generate",
            "duetjax.cli_profile",
            "duetjax.cli_serve",
            "duetjax.config",
            "duetjax.log_lines",
        )
    ),
    "duetjax.cli_bench": Rule(
        ours=(
            "duetjax.bench",
            "duetjax.bench_score",
            "duetjax.build",
            "duetjax.cli_end",
            "duetjax.cli_flags",
            "duetjax.config",
        )
    ),
    "duetjax.cli_doctor": Rule(
        ours=(
            "duetjax._launcher",
            "duetjax.checkpoint.source",
            "duetjax.cli_flags",
            "duetjax.devices",
            "duetjax.runtime.host_kernels",
            "pallas_kernels.choice",
        ),
        theirs=("jax",),
    ),
    "duetjax.cli_end": Rule(ours=("duetjax.config", "duetjax.engine")),
    "duetjax.cli_files": Rule(
        ours=(
            "duetjax.checkpoint.convert",
            "duetjax.checkpoint.weights",
            "duetjax.cli_flags",
            "duetjax.timeline",
        )
    ),
    "duetjax.cli_flags": Rule(ours=("duetjax.config", "duetjax.text.answer")),
    "duetjax.cli_foretell": Rule(
        ours=(
            "duetjax.arrangements",
            "duetjax.cli_flags",
            "duetjax.explain",
            "duetjax.picture",
            "duetjax.simulate_report",
        )
    ),
    "duetjax.cli_generate": Rule(
        ours=(
            "duetjax.batch",
            "duetjax.build",
            "duetjax.build_service",
            "duetjax.cli_end",
            "duetjax.cli_flags",
            "duetjax.config",
            "duetjax.constrain.checker",
            "duetjax.llm",
            "duetjax.run_batch",
            "duetjax.serve.limits",
        )
    ),
    "duetjax.cli_profile": Rule(
        ours=(
            "duetjax.cli_end",
            "duetjax.cli_flags",
            "duetjax.compile_programs",
            "duetjax.compile_report",
            "duetjax.config",
            "duetjax.profile_command",
            "duetjax.profile_report",
            "duetjax.runtime.case_timer",
        )
    ),
    "duetjax.cli_serve": Rule(
        ours=(
            "duetjax.build",
            "duetjax.build_service",
            "duetjax.cli_end",
            "duetjax.cli_flags",
            "duetjax.config",
            "duetjax.log_lines",
            "duetjax.serve",
        )
    ),
}
COMMAND_LINE = [unit for unit in RULES if unit.startswith("duetjax.cli")]


def modules(root: Path) -> dict[str, Path]:
    """Every first-party module under `root` by dotted name; a package stands for its __init__."""
    found = {}
    for package in FIRST_PARTY:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def unit_of(module: str) -> str | None:
    """The row of RULES for a module. The row "duetjax" is for duetjax/__init__.py alone."""
    fits = [u for u in RULES if module == u or (u != "duetjax" and module.startswith(u + "."))]
    return max(fits, key=len, default=None)


def called_import(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__")


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str, str]]:
    """Line, module and name ("" for a whole module) of every import, at any depth of the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(up if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, base, alias.name
        elif isinstance(node, ast.Call) and called_import(node):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield node.lineno, name, ""
                case _:
                    yield node.lineno, "<a computed name>", ""


def offences(source: str, module: str, known: frozenset[str], is_package: bool) -> list[str]:
    """One line for each import in `source`, the text of `module`, that RULES does not allow."""
    unit = unit_of(module)
    if unit is None:
        return [f"{module} has no row in the import rules"]
    rule = RULES[unit]
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for line, base, name in imported(ast.parse(source), package):
        whole = f"{base}.{name}" if f"{base}.{name}" in known else base
        top = base.partition(".")[0]
        if top in FIRST_PARTY:
            mine = unit_of(whole) == unit
            fine = mine or any(inside(whole, ours) for ours in rule.ours)
        elif top in sys.stdlib_module_names:
            fine = top not in rule.never
        else:
            fine = top in rule.theirs
        if not fine:
            found.append(f"{module}:{line} imports {whole}, which {unit} may not")
    return found


TREE = modules(ROOT)


@pytest.mark.parametrize("module", TREE)
def test_a_module_imports_only_what_its_row_allows(module: str) -> None:
    path = TREE[module]
    source = path.read_text(encoding="utf-8")
    assert offences(source, module, frozenset(TREE), path.name == "__init__.py") == []


def test_every_row_stands_for_a_module_that_exists() -> None:
    assert [unit for unit in RULES if unit not in TREE] == []


def importing(units: list[str]) -> list[str]:
    """The units whose rows allow any of these."""
    return [
        unit
        for unit, rule in RULES.items()
        if any(inside(wanted, ours) for ours in rule.ours for wanted in units)
    ]


def test_nothing_imports_the_command_line_and_only_itself_its_parts() -> None:
    assert importing(["duetjax.cli"]) == []
    assert set(importing(COMMAND_LINE)) <= set(COMMAND_LINE)


def test_the_checkpoint_folder_in_the_package_has_no_code_but_its_docstring() -> None:
    body = ast.parse((ROOT / "checkpoints/demo/__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("duetjax.engine", "import jax.numpy as jnp", "jax.numpy"),
        ("duetjax.engine", "def step():\n    from jax import numpy", "jax"),
        ("duetjax.engine", "if TYPE_CHECKING:\n    from jax import Array", "jax"),
        ("duetjax.engine", "from duetjax.runtime import executor", "duetjax.runtime"),
        ("duetjax.engine", "import importlib\nimportlib.import_module('jax')", "jax"),
        ("duetjax.engine", "__import__('ja' + 'x')", "<a computed name>"),
        ("duetjax.policy.pages", "from ..model import decoder", "duetjax.model.decoder"),
        ("duetjax.policy.pages", "from .. import engine", "duetjax.engine"),
        ("duetjax.policy.pages", "from time import monotonic", "time"),
        ("duetjax.config", "import pydantic", "pydantic"),
        ("duetjax.config", "from duetjax.policy.launch import Launch", "duetjax.policy.launch"),
        (
            "duetjax.runtime.programs",
            "from duetjax.policy import request",
            "duetjax.policy.request",
        ),
        ("duetjax.serve.app", "from duetjax import cli", "duetjax.cli"),
        ("duetjax.serve.app", "from duetjax import SamplingParams", "duetjax"),
        ("duetjax.llm", "from duetjax.runtime.executor import HostExecutor", "duetjax.runtime"),
        ("duetjax.cli", "import requests", "requests"),
        ("duetjax.cli_serve", "from duetjax.cli import main", "duetjax.cli"),
        ("pallas_kernels.xla", "from duetjax.config import ModelConfig", "duetjax.config"),
    ],
)
def test_a_forbidden_import_is_reported(module: str, source: str, named: str) -> None:
    known = frozenset({*TREE, "duetjax.cli", "duetjax.model.decoder", "duetjax.policy.request"})
    report = offences(source, module, known, is_package=False)
    assert len(report) == 1, report
    assert f"imports {named}" in report[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("duetjax.policy.pages", "from . import request\nfrom .launch import Launch"),
        ("duetjax.policy.pages", "from ..config import SamplingParams"),
        ("duetjax.runtime.programs", "from duetjax.policy import launch\nimport jax"),
        ("duetjax.cli_bench", "import argparse\nfrom duetjax import bench\nimport duetjax.build"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, source: str) -> None:
    known = frozenset({*TREE, "duetjax.build", "duetjax.policy.launch", "duetjax.policy.request"})
    assert offences(source, module, known, is_package=False) == []


def test_a_module_without_a_row_is_reported() -> None:
    assert offences("", "duetjax.newcomer", frozenset(TREE), is_package=False) == [
        "duetjax.newcomer has no row in the import rules"
    ]


def loaded_by(statements: str, heavy: tuple[str, ...]) -> set[str]:
    """Which of the `heavy` top-level modules a new interpreter holds after these statements."""
    ask = f"{statements}\nimport sys\nprint(*({set(heavy)!r} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", ask],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


HEAVY = ("jax", "jaxlib", "flax", "numpy", "starlette", "uvicorn", "tokenizers")


@pytest.mark.parametrize("statement", ["import duetjax", "from duetjax import SamplingParams"])
def test_importing_the_package_loads_no_framework(statement: str) -> None:
    assert loaded_by(statement, HEAVY) == set()


@pytest.mark.parametrize(
    "unit",
    ["config", "policy", "text", "engine", "planning", "sim", "build", "build_sim", "llm", "cli"],
)
def test_importing_all_of_a_light_unit_loads_neither_jax_nor_starlette(unit: str) -> None:
    names = [name for name in TREE if inside(name, f"duetjax.{unit}")]
    assert names
    assert loaded_by("import " + ", ".join(names), ("jax", "jaxlib", "flax", "starlette")) == set()


def test_the_probe_for_loaded_modules_sees_jax_where_it_is_loaded() -> None:
    assert "jax" in loaded_by("import duetjax.model.decoder", HEAVY)

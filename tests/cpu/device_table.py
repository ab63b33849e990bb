"""What every serving program compiles to for GPUs that are absent: device_programs.json.

`python tests/cpu/device_table.py` (make check-device) compiles the programs whose lowered text is
not the one in the table, or all with --all, checks them and writes the table as it goes, so that an
interrupted run is taken up again. It fails if a program breaks a rule.
"""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata, util
from pathlib import Path

import jax
import numpy as np

from duetjax.checkpoint.source import resolve_model
from duetjax.policy.launch import Program
from duetjax.runtime.inspection import ProgramFacts, inspect_program
from duetjax.runtime.profile import BUCKETS, NUM_PAGES, absent_programs
from duetjax.runtime.programs import Key, Programs
from duetjax.runtime.target import Target, absent_gpu

TABLE = Path(__file__).with_name("device_programs.json")
HAS_CUDA_WHEELS = (sys.platform, platform.machine()) == ("linux", "x86_64")
WHY_NOT = "jax's CUDA plugin exists for Linux on x86-64 alone"

PAIRS = (
    ("llama-3.1-8b", "h200-sxm"),
    ("qwen3-8b", "h200-sxm"),
    ("qwen3-14b", "h200-sxm"),
    ("llama-3.1-8b", "a100-sxm-80gb"),
)
FEW_PAGES = 256

SAMPLED = (Program.DECODE, 64)
"""The program whose temporaries are held against the sampler's budget."""
TWO_POOLS = (SAMPLED, (Program.PREFILL, 2048))
"""Programs compiled for a second number of pages, which must not change what they allocate."""
ALIGNMENT = 4096  # buffers move by some hundred bytes; a buffer that grew with the pages would not
SAMPLING_BUDGET = 64_000_000

type Row = dict[str, object]


@dataclass(frozen=True)
class Pair:
    """One model compiled for one absent GPU."""

    model: str
    gpu: str
    num_pages: int = NUM_PAGES

    @property
    def name(self) -> str:
        return f"{self.model} {self.gpu}"

    @cached_property
    def target(self) -> Target:
        return absent_gpu(self.gpu)

    @cached_property
    def programs(self) -> Programs:
        config = resolve_model(self.model, load_format="dummy").config
        return absent_programs(config, self.target, num_pages=self.num_pages)

    def lower(self, key: Key) -> jax.stages.Lowered:
        return self.programs.lower(key)

    def inspect(self, key: Key, lowered: jax.stages.Lowered) -> ProgramFacts:
        return inspect_program(lowered, self.target, self.programs.layout)

    def with_few_pages(self) -> "Pair":
        return Pair(self.model, self.gpu, FEW_PAGES)


def key_name(key: Key) -> str:
    return f"{key[0]} {key[1]}"


def text_hash(lowered: jax.stages.Lowered) -> str:
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def closed_form_flops(programs: Programs, key: Key) -> float:
    """Multiply-adds of the matrix products, twice: 2 N W for the layers, 2 R V D for the head."""
    program, size = key
    leaves = programs.definition.fusion.leaves
    layers = sum(
        int(np.prod(shape)) for name, shape in leaves.items() if ".layers." in name and shape[1:]
    )
    vocabulary, hidden = leaves["model.embed_tokens.weight"]
    rows = size if program is Program.DECODE else programs.buckets.rows_of(size)
    return 2.0 * size * layers + 2.0 * rows * vocabulary * hidden


def broken_rules(pair: Pair, key: Key, facts: ProgramFacts) -> list[str]:
    """What inspection found, and the budgets that this table's programs must keep."""
    found = list(facts.violations)
    flops = closed_form_flops(pair.programs, key)
    if abs(facts.flops / flops - 1) > 0.05:
        found.append(f"{facts.flops:.4g} FLOPs, where the products alone have {flops:.4g}")
    if key == SAMPLED:
        over = facts.temp_bytes - 4 * key[1] * pair.programs.slots.vocab_size
        if over >= SAMPLING_BUDGET:
            found.append(f"{over} bytes of temporaries beside the logits, not < {SAMPLING_BUDGET}")
    return found


def row_of(pair: Pair, key: Key, lowered: jax.stages.Lowered) -> Row:
    """Compiles a program and says what came of it."""
    facts = pair.inspect(key, lowered)
    broken = broken_rules(pair, key, facts)
    if key in TWO_POOLS:
        few = pair.with_few_pages()
        other = few.inspect(key, few.lower(key))
        if abs(other.temp_bytes - facts.temp_bytes) > ALIGNMENT:
            broken.append(
                f"{facts.temp_bytes} bytes of temporaries with {NUM_PAGES} pages,"
                f" {other.temp_bytes} with {FEW_PAGES}"
            )
    return {
        "sha256": text_hash(lowered),
        "entries": len(facts.thunks),
        "copies": facts.thunks.count("kCopy"),
        "temp_bytes": facts.temp_bytes,
        "alias_bytes": facts.alias_bytes,
        "flops": facts.flops,
        "bytes_accessed": facts.bytes_accessed,
        "compile_seconds": round(facts.compile_seconds, 1),
        "broken_rules": broken,
    }


def versions() -> dict[str, str]:
    """Of everything that decides what a program compiles to."""
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt")
    return {name: metadata.version(name) for name in packages} | {"ptxas": _ptxas_version()}


def _ptxas_version() -> str:
    """XLA takes the ptxas on PATH, or else the one beside its plugin."""
    found = shutil.which("ptxas")
    if found is None:
        spec = util.find_spec("nvidia.cu13")
        assert spec is not None, "no ptxas: install nvidia-cuda-nvcc"
        found = str(Path(next(iter(spec.submodule_search_locations or ()))) / "bin" / "ptxas")
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    return said.rpartition("V")[2].split()[0]


def header() -> dict[str, object]:
    """What the facts hold for; a difference makes all of them stale."""
    targets = {gpu: absent_gpu(gpu) for gpu in dict.fromkeys(gpu for _, gpu in PAIRS)}
    return {
        "versions": versions(),
        "targets": {
            name: {"identity": target.identity, "options": dict(target.compiler_options)}
            for name, target in targets.items()
        },
    }


def read_table() -> dict[str, object]:
    empty = {"versions": {}, "targets": {}, "programs": {}}
    return json.loads(TABLE.read_text()) if TABLE.exists() else empty


def write_table(head: dict[str, object], rows: dict[str, dict[str, Row]]) -> None:
    TABLE.write_text(json.dumps({**head, "programs": rows}, indent=1) + "\n")


def renew(everything: bool) -> dict[str, dict[str, Row]]:
    """The rows of all programs, those that are still true taken from the table."""
    head, old = header(), read_table()
    kept = old["programs"] if head.items() <= old.items() else {}
    kept = {} if everything else kept
    rows: dict[str, dict[str, Row]] = {}
    total, done = len(PAIRS) * len(BUCKETS), 0
    for pair in (Pair(*names) for names in PAIRS):
        rows[pair.name] = {}
        for key in BUCKETS:
            done += 1
            lowered = pair.lower(key)
            row = kept.get(pair.name, {}).get(key_name(key), {})
            is_new = row.get("sha256") != text_hash(lowered)
            if is_new:
                row = row_of(pair, key, lowered)
            rows[pair.name][key_name(key)] = row
            write_table(head, kept | rows | {pair.name: kept.get(pair.name, {}) | rows[pair.name]})
            time = f"{row['compile_seconds']} s" if is_new else "unchanged"
            size = f"{row['entries']} entries, {row['temp_bytes'] / 1e6:.1f} MB"
            say(f"{done}/{total} {pair.name} {key_name(key)}: {size}, {time}")
            for broken in row["broken_rules"]:
                say(f"    {broken}")
    write_table(head, rows)
    return rows


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="also compile unchanged programs")
    arguments = parser.parse_args()
    if not HAS_CUDA_WHEELS:
        say(WHY_NOT)
        return 1
    rows = renew(arguments.all)
    broken = sum(bool(row["broken_rules"]) for group in rows.values() for row in group.values())
    say(f"{TABLE.name}: {broken} programs break a rule")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""docs/results.md with its pictures, and the README's table, from benchmarks/results.

    make report

Nothing is typed by hand, and what has not been measured is said. Needs no GPU and no jax. The study
has a page of its own (benchmarks/study.py), the headline's cells too (benchmarks/duet.py report).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import report_compiled as compiled  # noqa: E402
import report_device as device  # noqa: E402
from report_device import Document, percent, read, table  # noqa: E402
from results_folder import RESULTS  # noqa: E402
from study_report import Found, gathered, verdict  # noqa: E402

BEGIN, END = "<!-- results -->", "<!-- /results -->"
"""Around what is this program's in the README."""
_NO_GPU = ("host", "sim", "fake", "study", "compile")
_IDEAL = "ideal"


@dataclass(frozen=True, slots=True)
class Results:
    """What there is in benchmarks/results, or in a folder like it."""

    folder: Path

    @property
    def gpus(self) -> list[Path]:
        """Folders of GPUs that have been measured, in part at least."""
        folders = sorted(each for each in self.folder.iterdir() if each.is_dir())
        return [
            each
            for each in folders
            if each.name not in _NO_GPU and not each.name.endswith("-brief")
        ]

    @property
    def compiled(self) -> list[tuple[Path, Document]]:
        """Reports of `duetjax compile`, by file, with the seconds that each took."""
        found = []
        for file in sorted((self.folder / "compile").glob("*/*.json")):
            document = json.loads(file.read_text("utf-8"))
            found.append((file, document["report"] | {"seconds": document["seconds"]}))
        return found

    @property
    def study(self) -> list[Document]:
        """The study's cells."""
        files = sorted((self.folder / "study").glob("*.json"))
        return [json.loads(file.read_text("utf-8")) for file in files]

    def pictures(self) -> dict[str, Path]:
        """Which file becomes which of docs/results."""
        found = {}
        for folder in (*self.gpus, self.folder / "sim", self.folder / "host"):
            found[f"{folder.name}-headline.svg"] = folder / "headline/headline.svg"
            found[f"{folder.name}-profile.svg"] = folder / "profile/errors.svg"
        for file, _ in self.compiled:
            drawn = file.with_suffix(".svg")
            found[f"compile-{file.parent.name}-{file.stem}.svg"] = drawn
        return {name: file for name, file in found.items() if file.exists()}


def page(results: Results) -> str:
    """docs/results.md."""
    return "\n".join(_page(results)).rstrip() + "\n"


def _page(results: Results) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield (
        "Written by `make report` from benchmarks/results; nothing here is typed by hand. What was"
        " measured on a processor is in the README and in docs/log.md, with its commands."
    )
    yield ""
    if not results.gpus:
        yield "## Measured on a GPU"
        yield ""
        yield _NOT_YET
        yield ""
    for folder in results.gpus:
        yield f"## Measured on a GPU: {folder.name.upper()}"
        yield ""
        yield from device.headline(folder, folder.name)
        yield from device.profile(folder, folder.name)
        yield from device.kernels(folder)
        yield from device.check(folder)
    yield "## Compiled for GPUs that are absent"
    yield ""
    yield from compiled.section(results.compiled)
    yield from _simulated(results)
    yield "## On a processor, scaled: the same paths, no more"
    yield ""
    yield "What a processor does says that the path works, and nothing of a GPU."
    yield ""
    yield from device.headline(results.folder / "host", "host")
    if device.held_out(results.folder / "host") is not None:
        yield from device.profile(results.folder / "host", "host")


_NOT_YET = "No GPU has been measured yet; `make gpu-all PART=check|kernels|profile|headline` does."


def _simulated(results: Results) -> Iterator[str]:
    yield "## Simulated, not measured"
    yield ""
    yield (
        "Scheduler and engine are the server's own; the GPU is made of numbers, some of them"
        " assumed ([how](simulation.md))."
    )
    yield ""
    yield from device.headline(results.folder / "sim", "sim")
    yield "### The study"
    yield ""
    cells = results.study
    if not cells:
        yield "Not simulated yet; `make study TRACES=DIR` does."
        yield ""
        return
    found = gathered(cells)
    yield f"Of {len(cells)} cells; [all of it](results/study.md), with its load and objectives."
    yield ""
    loads = list(dict.fromkeys((model, trace) for model, trace, *_ in found))
    yield from verdict(found, loads)
    yield ""


def block(results: Results) -> str:
    """What stands between the README's marks."""
    lines = [
        "Written by `make report`, with pictures and more in [docs/results.md](docs/results.md). Of"
        " the simulated H200 some numbers are assumed; only a GPU can say how far they hold.",
        "",
        *table(("what", "result", "command"), list(_rows(results))),
    ]
    return "\n".join(lines)


def _rows(results: Results) -> Iterator[Sequence[object]]:
    if not results.gpus:
        yield "measured on a GPU", "nothing yet", "`make gpu-all PART=...`"
    for folder in results.gpus:
        yield from _gpu_rows(folder)
    if line := device.headline_line(results.folder / "sim"):
        what = "**simulated** H200, Llama 3.1 8B: the headline experiment at 25 ms"
        yield what, line, "`python benchmarks/duet.py cells --backend sim`"
    if cells := results.study:
        yield (
            "**simulated** H200: highest rates of Azure's traces, `duet` to the best other policy"
            " ([the study](docs/results/study.md))",
            _study_line(gathered(cells)),
            "`make study TRACES=DIR`",
        )
    yield from compiled.rows([document for _, document in results.compiled])


def _gpu_rows(folder: Path) -> Iterator[Sequence[object]]:
    """At most four of a GPU."""
    gpu = f"**measured**, {folder.name.upper()}"
    if line := device.headline_line(folder):
        yield f"{gpu}: the headline experiment at 25 ms", line, "`make gpu-all PART=headline`"
    if errors := device.held_out(folder):
        of = errors["all"]
        said = f"median {percent(of.median)}, p95 {percent(of.p95)}, worst {percent(of.worst)}"
        what = f"{gpu}: error of predictions, {of.num_launches} launches"
        yield what, said, "`make gpu-all PART=profile`"
    kernels = []
    if (found := read(folder / "kernels-decode.json")) and found["rows"]:
        shares = [row["share"] for row in found["rows"]]
        least = percent(min(shares), 0)
        kernels += [f"decode {percent(shares[0], 0)} of a copy's bytes/s (all: from {least})"]
    if (found := read(folder / "kernels-prefill.json")) and found["rows"]:
        kernels += [f"prefill of 8,192 tokens {found['rows'][0]['tflops']:.0f} TFLOP/s"]
    if kernels:
        yield f"{gpu}: kernels", "; ".join(kernels), "`make gpu-all PART=kernels`"
    if outcomes := device.outcomes(folder):
        passed, tried = outcomes
        said = f"{passed} of {tried} items pass"
        yield f"{gpu}: what only a GPU can tell", said, "`make gpu-all PART=check`"


def _study_line(found: Found) -> str:
    ratios, ceilings = [], []
    for model, trace, ms in dict.fromkeys((key[0], key[1], key[4]) for key in found):
        rates: dict[tuple[str, str], float] = {
            (policy, variant): 0.0 if best is None else best["rate"]
            for (of, on, policy, variant, at), best in found.items()
            if (of, on, at) == (model, trace, ms)
        }
        others = max((rate for (policy, _), rate in rates.items() if policy != "duet"), default=0)
        if others:
            ratios.append(rates.get(("duet", ""), 0.0) / others)
            if ("duet", _IDEAL) in rates:
                ceilings.append(rates["duet", _IDEAL] / others)
    said = f"{min(ratios):.2f} to {max(ratios):.2f} x"
    if ceilings:
        said += "; without contention and with FLOP/s in proportion to SMs at most"
        said += f" {max(ceilings):.2f} x"
    return said


def with_block(readme: str, text: str) -> str:
    """The README with its table renewed. Raises ValueError where the marks are not there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must have {BEGIN} and {END} once")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Writes everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()
    results, docs, readme = Results(RESULTS), ROOT / "docs", ROOT / "README.md"
    pictures = results.pictures()
    for file in (docs / "results").glob("*.svg"):
        if file.name not in pictures and not file.name.startswith("study-"):
            file.unlink()
    for name, file in pictures.items():
        (docs / "results" / name).write_bytes(file.read_bytes())
    (docs / "results.md").write_text(page(results), encoding="utf-8")
    readme.write_text(with_block(readme.read_text("utf-8"), block(results)), encoding="utf-8")
    document: dict[str, Any] = {
        "gpus": [folder.name for folder in results.gpus],
        "compiled": len(results.compiled),
        "study": len(results.study),
        "pictures": sorted(pictures),
    }
    print(json.dumps({"benchmark": "report", **document}))


if __name__ == "__main__":
    main()

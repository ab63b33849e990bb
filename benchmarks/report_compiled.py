"""What is told of compilations for GPUs that are absent."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from report_device import Cells, Document, table


def section(reports: Sequence[tuple[Path, Document]]) -> Iterator[str]:
    """All reports, by file, and the pictures beside them."""
    if not reports:
        yield ("Nothing has been compiled yet; `python benchmarks/compile_matrix.py` does.")
        yield ""
        return
    yield (
        "By `python benchmarks/compile_matrix.py`, which asks [`duetjax compile`](compile.md):"
        " memory as foreseen without compiling and as the compiler says, and what a roofline over"
        " assumed profiles foretells, not measured. A share is what one of several GPUs has of the"
        " model."
    )
    yield ""
    names = (
        *("model", "GPU", "share", "programs", "most kernels", "KV tokens that fit"),
        *("memory foreseen [GB]", "compiled [GB]", "off", "all of it [s]"),
        *("8,192 tokens' TTFT [ms]", "TBT of 64 rows at 2,048 [ms]"),
    )
    yield from table(names, [_row(document) for _, document in reports])
    for file, _ in reports:
        name = f"compile-{file.parent.name}-{file.stem}"
        if file.with_suffix(".svg").exists():
            yield f"![{name}](results/{name}.svg)"
            yield ""


def _row(document: Document) -> list[object]:
    programs = document["programs"].values()
    foreseen, needed = document["memory"]["foreseen"], document["memory"]["needed"]
    shards = document["tensor_parallel"]
    ttft = document.get("predicted_ttft_ms", {}).get("8192")
    tbt = {
        (each["rows"], each["context"]): each["ms"] for each in document.get("predicted_tbt_ms", ())
    }.get((64, 2048))
    return [
        *(document["model"], document["gpu"], f"1 of {shards}" if shards > 1 else "all"),
        *(len(programs), max(each["kernels"] for each in programs), f"{needed['tokens']:,}"),
        *(f"{use['sum'] / 1e9:.3f}" for use in (foreseen, needed)),
        f"{100 * _off(document):+.2f} %",
        f"{document['seconds']:.0f}",
        "-" if ttft is None else f"{float(ttft):.1f}",
        "-" if tbt is None else f"{float(tbt):.2f}",
    ]


def _off(document: Document) -> float:
    """What was foreseen over what the compiler says, less 1."""
    memory = document["memory"]
    return float(memory["foreseen"]["sum"] / memory["needed"]["sum"] - 1)


def rows(documents: Sequence[Document]) -> Iterator[Cells]:
    """For the README: what fits, and how well memory was foreseen."""
    if not documents:
        return
    fit: dict[str, list[str]] = {}
    for each in documents:
        said = f"{each['memory']['needed']['tokens']:,} ({each['gpu']}{_of(each)})"
        fit.setdefault(each["model"], []).append(said)
    said = "; ".join(f"{model} {', '.join(on)}" for model, on in sorted(fit.items()))
    yield "**compiled**, not run: KV tokens that fit", said, "`duetjax compile`"
    worst = max(documents, key=lambda each: abs(_off(each)))
    said = f"{100 * _off(worst):+.2f} % at worst of {len(documents)} ({_named(worst)})"
    yield "memory as foreseen, against compiled", said, "`duetjax compile`"


def _named(document: Document) -> str:
    return f"{document['model']}, {document['gpu']}{_of(document)}"


def _of(document: Document) -> str:
    shards = document["tensor_parallel"]
    return f", one of {shards}" if shards > 1 else ""

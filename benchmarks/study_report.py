"""docs/results/study.md and its pictures, from the study's cells: nothing is typed by hand."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from duetjax.chart import Bars, Panel, picture

DOCS = Path(__file__).parents[1] / "docs" / "results"
OBJECTIVES_MS = (15.0, 25.0, 50.0, 100.0)
ROWS = (
    ("duet", ""),
    ("aggregated-slo", ""),
    ("aggregated", ""),
    ("duet", "no-contention"),
    ("duet", "ideal"),
)
NAMES = {
    ("duet", ""): "duet",
    ("aggregated-slo", ""): "aggregated-slo",
    ("aggregated", ""): "aggregated, best budget",
    ("duet", "no-contention"): "duet, no contention",
    ("duet", "ideal"): "duet, ideal SMs",
}
WINS = 1.02
"""Times the rate of the best other policy; rates are 2 % apart."""

type Best = dict[str, Any]
type Found = Mapping[tuple[str, str, str, str, float], Best | None]
"""By model, trace, policy, variant, objective: the figures of the best rate; None where none is."""


def write_report(documents: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the report of these cells, and its pictures; where it is."""
    found = gathered(documents)
    loads = list(dict.fromkeys((model, trace) for model, trace, *_ in found))
    DOCS.mkdir(parents=True, exist_ok=True)
    for model, trace in loads:
        file = DOCS / f"study-{model}-{trace}.svg"
        file.write_text(drawn(found, model, trace), encoding="utf-8")
    commits = sorted({document["commit"] for document in documents})
    beside = {
        (cell["model"], cell["trace"], cell["objective_ms"]): document["beside"]
        for document in documents
        if (cell := document["cell"])["policy"] == "duet" and not cell["variant"]
    }
    text = "\n".join([*_head(len(documents), commits), *_section(found, loads)])
    for model, trace in loads:
        text += "\n" + "\n".join(_load(found, beside, model, trace))
    report = DOCS / "study.md"
    report.write_text(text + "\n", encoding="utf-8")
    return report


def gathered(documents: Sequence[Mapping[str, Any]]) -> Found:
    """The best of each policy; of aggregated, the best of its budgets for each objective."""
    found: dict[tuple[str, str, str, str, float], Best | None] = {}
    for document in documents:
        cell = document["cell"]
        of = cell["model"], cell["trace"], cell["policy"], cell["variant"]
        for objective_ms, best in zip(document["judged_ms"], document["best"], strict=True):
            key = (*of, objective_ms)
            if _rate(best) > _rate(found.get(key)) or key not in found:
                found[key] = best
    order = {model: n for n, model in enumerate(dict.fromkeys(key[0] for key in found))}
    return dict(sorted(found.items(), key=lambda item: (order[item[0][0]], item[0])))


def drawn(found: Found, model: str, trace: str) -> str:
    """Bars of the highest rate, a group for each objective."""
    bars = []
    for policy, variant in ROWS:
        rates = [_rate(found.get((model, trace, policy, variant, ms))) for ms in OBJECTIVES_MS]
        bars.append(Bars(NAMES[policy, variant], rates))
    panel = Panel(
        "Highest rate at which 90 % of the requests keep both objectives",
        "objective for the time between tokens",
        "requests/s",
        bars=tuple(bars),
        groups=tuple(f"{ms:g} ms" for ms in OBJECTIVES_MS),
    )
    return picture(f"{model} on an H200, Azure {trace}: simulated", "", [panel])


def _head(cells: int, commits: Sequence[str]) -> Iterator[str]:
    yield "# The study: simulated, not measured"
    yield ""
    yield (
        "The server's own scheduler in virtual time; launches last as the shipped profiles foretell"
        " (docs/simulation.md). The H200's profile is derived and assumed, not measured:"
        " above all what parts of the SMs reach and how much lanes slow each other down. Judge"
        " policies by it with that in mind, and hardware not at all."
    )
    yield ""
    yield (
        "Load: the first 600 s of Azure's LLM inference traces of 2023 (CC-BY 4.0), conversation"
        " and code; for other rates all times are rescaled linearly. A request counts if its first"
        " token comes within 1,000 ms and 99 % of the gaps between its tokens are within the"
        " objective. The rate of a policy is the highest, on a grid of 2 %, at which 90 % of the"
        " requests count."
    )
    yield ""
    yield (
        f"From {cells} cells in benchmarks/results/study, of commit {', '.join(commits)};"
        " `make study TRACES=...` makes them anew."
    )
    yield ""


def _section(found: Found, loads: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield "## What it says"
    yield ""
    yield from verdict(found, loads)
    yield ""


def verdict(found: Found, loads: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Where duet wins and where not, counted."""
    wins, ties, losses, ideal = [], [], [], []
    for model, trace in loads:
        for ms in OBJECTIVES_MS:
            rates = {row: _rate(found.get((model, trace, *row, ms))) for row in ROWS}
            baseline = max(rates["aggregated-slo", ""], rates["aggregated", ""])
            case = f"{model}, {trace}, {ms:g} ms"
            if not baseline:
                if rates["duet", ""]:
                    wins.append(f"{case} (alone)")
                continue
            ratio = rates["duet", ""] / baseline
            where = wins if ratio >= WINS else losses if ratio <= 1 / WINS else ties
            where.append(f"{case} ({ratio:.2f} x)")
            if (model, trace, "duet", "ideal", ms) in found:
                ideal.append((rates["duet", "ideal"] / baseline, case))
    yield f"- duet serves more than both baselines in {len(wins)} cases: {_listed(wins)}."
    yield f"- It serves as much (within 2 %) in {len(ties)}: {_listed(ties)}."
    yield f"- It serves less in {len(losses)}: {_listed(losses)}."
    if ideal:
        best, case = max(ideal)
        better = sum(ratio >= WINS for ratio, _ in ideal)
        yield (
            "- The ceiling: without contention and with FLOP/s in proportion to SMs it would serve"
            f" more in {better} of {len(ideal)} cases, at most {best:.2f} x ({case})."
        )


def _load(found: Found, beside: Mapping[Any, Any], model: str, trace: str) -> Iterator[str]:
    yield f"## {model}, Azure {trace}"
    yield ""
    yield f"![highest rates](study-{model}-{trace}.svg)"
    yield ""
    yield "Requests/s (output tokens/s) at the highest rate:"
    yield ""
    yield f"| policy | {' | '.join(f'{ms:g} ms' for ms in OBJECTIVES_MS)} |"
    yield f"|---|{'---|' * len(OBJECTIVES_MS)}"
    for policy, variant in ROWS:
        cells = []
        for ms in OBJECTIVES_MS:
            best = found.get((model, trace, policy, variant, ms))
            if best is None:
                cells.append("-")
                continue
            budget = f", {best['budget']}" if policy == "aggregated" else ""
            cells.append(f"{best['rate']:.2f} ({best['output_per_s']:.0f}{budget})")
        yield f"| {NAMES[policy, variant]} | {' | '.join(cells)} |"
    yield ""
    yield (
        "What the first token pays, at duet's highest rate: TTFT p50 / p99 and TBT p99 [ms], and"
        " the share of requests that keep both objectives."
    )
    yield ""
    yield "| objective | req/s | duet | aggregated-slo | aggregated, 2048 |"
    yield "|---|---|---|---|---|"
    for ms in OBJECTIVES_MS:
        best = found.get((model, trace, "duet", "", ms))
        others = beside.get((model, trace, ms), {})
        if best is None or not others:
            continue
        rows = (best, others["aggregated-slo"], others["aggregated"])
        yield f"| {ms:g} ms | {best['rate']:.2f} | {' | '.join(map(_paid, rows))} |"
    yield ""


def _paid(row: Best) -> str:
    ttft, tbt = row["ttft_ms"], row["tbt_ms"]
    kept = row["attained"][0]
    return f"{ttft['p50']:.0f} / {ttft['p99']:.0f}, {tbt['p99']:.1f}, {kept:.0%}"


def _rate(best: Best | None) -> float:
    return 0.0 if best is None else float(best["rate"])


def _listed(cases: Sequence[str]) -> str:
    return "; ".join(cases) or "none"

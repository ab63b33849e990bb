"""The headline experiment's report from its cells: a table, a picture, a JSON document.

Nothing is typed by hand; cells that are missing are named.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from duet_cells import (
    OBJECTIVES,
    PLANS_BY_OBJECTIVE,
    POLICIES,
    RATES,
    SEEDS,
    Cell,
    Results,
    Variant,
    variant,
)
from duet_load import Load
from duet_profiles import Profiles
from duet_statistics import (
    Document,
    Figures,
    Floats,
    Kept,
    draws,
    figures,
    highest_kept,
    interval,
    measured,
    ratios,
)

from duetjax.chart import Bars, Line, Mark, Panel, picture
from duetjax.config import PolicyName

GOAL_OBJECTIVE, GOAL_TOKENS, GOAL_STRETCH, GOAL_TTFT = 25, 1.15, 1.3, 1.5
OURS = str(PolicyName.DUET)
_DECODING = 0.9
"""Of the victims: where fewer decoded on average it is said."""

type Group = dict[int, Document]
"""A variant's cells at a rate, by seed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one objective. exact: as measured; drawn: of each draw; by policy and rate.

    seeds: those that have all cells that any of them has; left_out: those that have only some.
    missing: cells that were planned, by name.
    """

    objective: int
    objective_ms: float
    seeds: tuple[int, ...]
    left_out: tuple[int, ...]
    groups: Mapping[str, Mapping[int, Group]]
    exact: Mapping[str, Mapping[int, Figures]]
    drawn: Mapping[str, Mapping[int, Figures]]
    missing: tuple[str, ...]
    kept: Mapping[str, Kept] = field(default_factory=dict)
    kept_drawn: Mapping[str, Kept] = field(default_factory=dict)


def best_budgets(documents: Sequence[Document]) -> dict[int, int]:
    """By objective, the budget with the most tokens/s at the highest rate that keeps it.

    Where none keeps it, the one with the least 99th percentile at the lowest rate.
    """
    found: dict[int, dict[int, Figures]] = {}
    for document in documents:
        cell = document["cell"]
        one = measured([document])
        rates = found.setdefault(cell["variant"]["budget"], {})
        rates[cell["rate"]] = figures(one, np.ones((1, len(one.tokens))))
    scale = documents[0]["capacity"]["objective_scale"]
    best: dict[int, int] = {}
    for objective in OBJECTIVES:
        kept = {
            budget: highest_kept(rates, objective * scale).tokens_per_s.item()
            for budget, rates in found.items()
        }
        if any(kept.values()):
            best[objective] = max(kept, key=lambda budget: kept[budget])
        else:
            best[objective] = min(found, key=lambda budget: _lowest_p99(found[budget]))
    return best


def _lowest_p99(rates: Mapping[int, Figures]) -> float:
    p99 = rates[min(rates)].p99.item()
    return math.inf if math.isnan(p99) else p99


def judge(
    documents: Sequence[Document], objective: int, tuned: Mapping[int, int] | None, load: Load
) -> Verdict:
    """All policies under an objective, with the cells that there are.

    Of the seeds the one with the most cells decides what is shown: one that is still being measured
    takes nothing away.
    """
    scale = documents[0]["capacity"]["objective_scale"]
    by_name = {cell_of(document).name: document for document in documents}
    cells: dict[tuple[str, int], dict[int, Cell]] = {}
    missing: list[str] = []
    for policy in POLICIES:
        if policy == PolicyName.AGGREGATED and tuned is None:
            missing.append("aggregated: no budget has been tuned")
            continue
        of = variant(policy, objective, load, tuned or {})
        for rate in RATES:
            cells[policy, rate] = {seed: Cell(of, rate, seed) for seed in SEEDS}
            missing += [
                cell.name for cell in cells[policy, rate].values() if cell.name not in by_name
            ]
    there = {
        seed: {at for at, of_seed in cells.items() if of_seed[seed].name in by_name}
        for seed in SEEDS
    }
    shown = max(there.values(), key=len)
    seeds = tuple(seed for seed in SEEDS if there[seed] and there[seed] >= shown)
    left_out = tuple(seed for seed in SEEDS if there[seed] and seed not in seeds)
    groups: dict[str, dict[int, Group]] = {}
    for policy, rate in cells:
        if (policy, rate) in shown:
            of_seed = cells[policy, rate]
            group = {seed: by_name[of_seed[seed].name] for seed in seeds}
            groups.setdefault(policy, {})[rate] = group
    return _judged(objective, objective * scale, seeds, left_out, groups, missing)


def _judged(
    objective: int,
    objective_ms: float,
    seeds: tuple[int, ...],
    left_out: tuple[int, ...],
    groups: Mapping[str, Mapping[int, Group]],
    missing: Iterable[str],
) -> Verdict:
    exact: dict[str, dict[int, Figures]] = {}
    drawn: dict[str, dict[int, Figures]] = {}
    for policy, rates in groups.items():
        for rate, group in rates.items():
            one = measured([group[seed] for seed in seeds])
            blocks = len(one.tokens) // len(seeds)
            ones = np.ones((1, len(one.tokens)))
            exact.setdefault(policy, {})[rate] = figures(one, ones)
            drawn.setdefault(policy, {})[rate] = figures(one, draws(len(seeds), blocks))
    return Verdict(
        objective,
        objective_ms,
        seeds,
        left_out,
        groups,
        exact,
        drawn,
        tuple(missing),
        {policy: highest_kept(rates, objective_ms) for policy, rates in exact.items()},
        {policy: highest_kept(rates, objective_ms) for policy, rates in drawn.items()},
    )


def cell_of(document: Document) -> Cell:
    """Which cell a document is of."""
    cell = document["cell"]
    return Cell(Variant(**cell["variant"]), cell["rate"], cell["seed"])


def summary(verdict: Verdict) -> dict[str, Any]:
    """A verdict in plain values; None for what is not known or not finite."""
    policies = {
        policy: {
            name: {"value": _plain(getattr(kept, name)[0]), "interval": _pair(getattr(among, name))}
            for name in ("rate", "tokens_per_s", "worst", "ttft_p50", "ttft_p99")
        }
        for policy, kept in verdict.kept.items()
        for among in (verdict.kept_drawn[policy],)
    }
    found: dict[str, Any] = {
        "objective": verdict.objective,
        "objective_ms": round(verdict.objective_ms, 3),
        "seeds": list(verdict.seeds),
        "seeds_left_out": list(verdict.left_out),
        "policies": policies,
        "missing": len(verdict.missing),
    }
    others = {policy: kept for policy, kept in verdict.kept.items() if policy != OURS}
    if OURS in verdict.kept and others:
        exact = ratios(verdict.kept[OURS], others)
        among = {policy: verdict.kept_drawn[policy] for policy in others}
        drawn = ratios(verdict.kept_drawn[OURS], among)
        tokens, ttft = exact.tokens[0].item(), exact.ttft[0].item()
        found["ratio"] = {
            "best_other": exact.best[0] if others[exact.best[0]].rate[0] else None,
            "tokens": {"value": _plain(tokens), "interval": _pair(drawn.tokens)},
            "ttft_p50": {"value": _plain(ttft), "interval": _pair(drawn.ttft)},
            "alone": tokens == math.inf,
        }
        if verdict.objective == GOAL_OBJECTIVE:
            found["goal_met"] = tokens >= GOAL_TOKENS and ttft <= GOAL_TTFT
            found["stretch_met"] = tokens >= GOAL_STRETCH and ttft <= GOAL_TTFT
    return found


def losses(verdict: Verdict) -> list[str]:
    """Rate by rate, where another policy does better than duet: a line each."""
    found = []
    for rate in RATES:
        ours = verdict.exact.get(OURS, {}).get(rate)
        if ours is None:
            continue
        for policy, rates in verdict.exact.items():
            theirs = rates.get(rate)
            if policy == OURS or theirs is None:
                continue
            if said := _better(theirs, ours, verdict.objective_ms):
                found.append(f"{rate} %, {policy}: {'; '.join(said)}")
    return found


def _better(theirs: Figures, ours: Figures, objective_ms: float) -> list[str]:
    """In what another policy does better than duet; where it breaks the objective, by how much."""
    said = []
    if not theirs.p99[0] <= objective_ms:
        if theirs.p99[0] < ours.p99[0]:
            said.append(f"breaks it less, gap p99 {_ms(theirs.p99[0])}, not {_ms(ours.p99[0])} ms")
        return said
    if not ours.p99[0] <= objective_ms:
        said.append("keeps the objective, which duet does not")
    if theirs.tokens_per_s[0] > ours.tokens_per_s[0]:
        said.append(f"{theirs.tokens_per_s[0]:.0f} tokens/s, not {ours.tokens_per_s[0]:.0f}")
    if theirs.ttft_p50[0] < ours.ttft_p50[0]:
        said.append(f"TTFT p50 {_ms(theirs.ttft_p50[0])}, not {_ms(ours.ttft_p50[0])} ms")
    return said


def write_report(results: Results, load: Load, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Writes headline.md, headline.svg and headline.json beside the cells; the latter's content.

    SystemExit where there are none, or some were measured by another capacity or profile.
    """
    results.refuse_mixed()
    documents = [each for each in results.documents() if each["cell"]["seed"] in seeds]
    if not documents:
        raise SystemExit(f"no cells in {results.folder}; run `cells` first")
    tuned = results.tuned()
    verdicts = [
        verdict
        for verdict in (judge(documents, objective, tuned, load) for objective in OBJECTIVES)
        if any(policy in verdict.groups for policy in PLANS_BY_OBJECTIVE)
    ]
    document = {
        "benchmark": "duet",
        "backend": documents[0]["backend"],
        "simulation": documents[0]["simulation"],
        "is_brief": any(each["is_brief"] for each in documents),
        **Profiles.of(documents[0]).to_json(),
        "capacity": documents[0]["capacity"],
        "tuned": tuned,
        "commits": sorted({str(each["commit"]) for each in documents}),
        "versions": _versions(documents),
        "cells": len(documents),
        "objectives": [summary(verdict) for verdict in verdicts],
    }
    results.write("headline", document)
    text = "\n".join(_page(document, verdicts)) + "\n"
    (results.folder / "headline.md").write_text(text, encoding="utf-8")
    if panels := _panels(verdicts):
        drawn = picture(_title(document), _subtitle(document), panels, columns=2)
        (results.folder / "headline.svg").write_text(drawn, encoding="utf-8")
    return document


def _versions(documents: Sequence[Document]) -> dict[str, str | list[str] | None]:
    """By package; a list where cells differ."""
    found: dict[str, str | list[str] | None] = {}
    for name in dict.fromkeys(name for each in documents for name in each["versions"]):
        values = {each["versions"].get(name) for each in documents}
        found[name] = values.pop() if len(values) == 1 else sorted(map(str, values))
    return found


def _title(document: Mapping[str, Any]) -> str:
    where = {"cuda": "measured", "sim": "SIMULATED", "host": "on a processor, scaled"}
    return f"Tokens that keep the objective between tokens: {where[document['backend']]}"


def _subtitle(document: Mapping[str, Any]) -> str:
    said = f"{document['cells']} cells; rates in % of the prefill capacity"
    return (
        f"{said}; brief windows, by which nothing can be judged" if document["is_brief"] else said
    )


def _page(document: Mapping[str, Any], verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield f"# The headline experiment: {_title(document)}"
    yield ""
    if document["simulation"]:
        yield (
            "**Simulation, not measurement**: scheduler, engine and time are real, the GPU is made"
            f" of numbers by the profile {document['hardware_profile']} (docs/simulation.md)."
        )
        yield ""
    if document["is_brief"]:
        yield "**Brief windows: nothing can be judged by this.**"
        yield ""
    capacity = document["capacity"]
    yield (
        f"Protocol: the head of benchmarks/duet.py. Capacity {capacity['prefill_tokens_per_s']:.0f}"
        f" prompt tokens/s; a decode step of the victims alone {capacity['decode_step_ms']:.2f} ms."
        f" Aggregated's tuned budgets: {_budgets(document['tuned'])}."
        f" Planned by {_planned_by(document)}."
        f" {document['cells']} cells of commit {', '.join(document['commits'])}. Intervals:"
        " 95 %, bootstrap over seeds and blocks of their windows."
    )
    yield ""
    for name, found in document["versions"].items():
        if isinstance(found, list):
            yield f"Cells differ in the version of {name}: {', '.join(found)}."
            yield ""
    yield "![picture](headline.svg)"
    yield ""
    for verdict, found in zip(verdicts, document["objectives"], strict=True):
        yield from _section(verdict, found)


def _planned_by(document: Mapping[str, Any]) -> str:
    names = [document["hardware_profile"], document["model_profile"]]
    said = " and ".join(name for name in names if name is not None)
    digest = document["profile_digest"]
    return said if digest is None else f"{said} ({digest})"


def _budgets(tuned: Mapping[int, int] | None) -> str:
    if tuned is None:
        return "none yet"
    return ", ".join(f"{budget} at {objective} ms" for objective, budget in tuned.items())


def _section(verdict: Verdict, found: Mapping[str, Any]) -> Iterator[str]:
    ms = verdict.objective_ms
    scaled = "" if ms == verdict.objective else f" (scaled: {ms:.2f} ms)"
    seeds = ", ".join(map(str, verdict.seeds))
    yield f"## Objective {verdict.objective} ms{scaled}, seeds {seeds}"
    yield ""
    yield ratio_line(found)
    yield ""
    yield from _reservations(verdict)
    yield "At the highest rate kept, with 95 % intervals:"
    yield ""
    yield "| policy | rate [%] | tokens/s | worst gap [ms] | TTFT p50 [ms] | TTFT p99 [ms] |"
    yield "|---|---|---|---|---|---|"
    for policy, of in found["policies"].items():
        if not of["rate"]["value"]:
            yield f"| {policy} | none | - | - | - | - |"
            continue
        names = ("rate", "tokens_per_s", "worst", "ttft_p50", "ttft_p99")
        yield f"| {policy} | {' | '.join(with_interval(of[name]) for name in names)} |"
    yield ""
    yield "All cells; p99 in bold where it breaks the objective:"
    yield ""
    yield (
        "| policy | rate [%] | gap p99 [ms] | worst [ms] | tokens/s | TTFT p50 [ms] | TTFT p99 [ms]"
        " | victims decoding | pause p99 [ms] |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for policy, rates in verdict.exact.items():
        for rate, of in rates.items():
            yield _cell_row(verdict, policy, rate, of)
    yield ""
    yield "Where duet loses, rate by rate:"
    yield ""
    yield from [f"- {line}" for line in losses(verdict)] or ["- nowhere"]
    yield ""
    yield "What was decided, and the launches by why, lane and split, of the highest rate:"
    yield ""
    for policy, groups in verdict.groups.items():
        yield from _evidence(policy, groups)
    yield ""
    if verdict.missing:
        yield f"Missing: {len(verdict.missing)} cells."
        yield ""
        yield from [f"- {line}" for line in _gathered(verdict.missing)]
        yield ""


def _reservations(verdict: Verdict) -> Iterator[str]:
    """What to bear in mind: of the seeds, and of the highest rates."""
    for seed in verdict.left_out:
        yield f"Seed {seed} is left out: it lacks cells that seed {verdict.seeds[0]} has."
        yield ""
    rates = {policy: set(of) for policy, of in verdict.exact.items()}
    everybody = set.intersection(*rates.values())
    for policy, measured_at in rates.items():
        if more := sorted(measured_at - everybody):
            yield f"{policy} was measured at {_percents(more)} as well, not every other policy."
            yield ""
        best = verdict.kept[policy].rate[0]
        breaks = [
            rate
            for rate, of in verdict.exact[policy].items()
            if rate < best and not of.p99[0] <= verdict.objective_ms
        ]
        if breaks:
            yield f"{policy} keeps {best:.0f} %, but breaks the objective at {_percents(breaks)}."
            yield ""


def _percents(rates: Iterable[int]) -> str:
    return ", ".join(f"{rate} %" for rate in rates)


def _gathered(missing: Sequence[str]) -> list[str]:
    """Names of cells, those of a variant and seed on one line."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name in missing:
        of, _, rest = name.partition("_rate")
        rate, _, seed = rest.partition("_seed")
        lines.setdefault((of, seed), []).append(rate)
    return [
        f"{of}, seed {seed}, rates {', '.join(rates)}" if seed else of
        for (of, seed), rates in lines.items()
    ]


def ratio_line(found: Mapping[str, Any]) -> str:
    """duet beside the best other policy, from a summary."""
    ratio = found.get("ratio")
    if ratio is None:
        return "No ratio: duet or every other policy is missing."
    best = ratio["best_other"]
    if ratio["alone"]:
        line = "duet alone keeps the objective."
    elif best is None:
        line = "Nobody keeps the objective."
    else:
        line = (
            f"duet to the best other, {best}: {with_interval(ratio['tokens'], 2)} x the"
            f" tokens/s, {with_interval(ratio['ttft_p50'], 2)} x the TTFT p50."
        )
    if "goal_met" in found:
        met = "met" if found["goal_met"] else "not met"
        line += f" The goal ({GOAL_TOKENS} x at TTFT of {GOAL_TTFT} x at most) is {met}."
    return line


def _cell_row(verdict: Verdict, policy: str, rate: int, of: Figures) -> str:
    group = verdict.groups[policy][rate].values()
    p99 = _ms(of.p99[0])
    if not of.p99[0] <= verdict.objective_ms:
        p99 = f"**{p99}**"
    decoding = sum(each["victims_decoding"] for each in group) / len(group)
    pauses = [each["pauses_ms"]["p99"] for each in group if each["pauses_ms"]["count"]]
    values = (
        *(p99, _ms(of.worst[0]), f"{of.tokens_per_s[0]:.0f}"),
        *(_ms(of.ttft_p50[0]), _ms(of.ttft_p99[0])),
        *(f"{decoding:.1f}", _ms(max(pauses, default=math.nan))),
    )
    return f"| {policy} | {rate} | {' | '.join(values)} |"


def _evidence(policy: str, groups: Mapping[int, Group]) -> Iterator[str]:
    rate = max(groups)
    document = next(iter(groups[rate].values()))
    decisions = {why: count for why, count in document["decisions"].items() if count}
    yield f"- {policy} at {rate} %: {', '.join(f'{why} {n}' for why, n in decisions.items())}"
    for row in sorted(document["launches"], key=lambda row: -row["launches"])[:6]:
        split = f" {row['split']}" if row["split"] else ""
        yield (
            f"  - {row['why']}, {row['lane']}{split}, {row['program']}:"
            f" {row['launches']} launches, k {row['k']},"
            f" {row['decode_rows']} rows, {row['prompt_tokens']:.0f} prompt tokens,"
            f" {row['step_ms']} ms a step"
        )


def _panels(verdicts: Sequence[Verdict]) -> list[Panel]:
    found = []
    policies = [each for each in POLICIES if any(each in verdict.kept for verdict in verdicts)]
    if policies:
        bars = [
            Bars(policy, [_tokens_of(verdict, policy) for verdict in verdicts])
            for policy in policies
        ]
        groups = tuple(f"{verdict.objective} ms" for verdict in verdicts)
        title = "Tokens/s at the highest rate that keeps the objective"
        found.append(Panel(title, "objective", "tokens/s", bars=bars, groups=groups))
    for verdict in verdicts:
        objective = Mark(verdict.objective_ms, f"{verdict.objective_ms:.3g} ms")
        for name, title, marks in (
            ("p99", "Victims' gaps, 99th percentile", [objective]),
            ("ttft_p50", "Attackers' TTFT, median", []),
        ):
            lines = [
                Line(policy, [(float(r), _drawable(getattr(of, name)[0])) for r, of in at.items()])
                for policy, at in verdict.exact.items()
            ]
            if any(y is not None for line in lines for _, y in line.points):
                title = f"{title}; objective {verdict.objective} ms"
                found.append(Panel(title, "rate [%]", "ms", lines=lines, marks=marks, log_y=True))
    return found


def _tokens_of(verdict: Verdict, policy: str) -> float | None:
    kept = verdict.kept.get(policy)
    return None if kept is None else float(kept.tokens_per_s[0])


def _drawable(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _pair(values: Floats) -> list[float | None] | None:
    found = interval(values)
    return None if found is None else [_plain(each) for each in found]


def with_interval(of: Mapping[str, Any], places: int = 0) -> str:
    """A value of a summary and its interval."""
    value = "∞" if of["value"] is None else f"{of['value']:.{places}f}"
    if of["interval"] is None:
        return value
    low, high = ("∞" if each is None else f"{each:.{places}f}" for each in of["interval"])
    return f"{value} ({low} to {high})"


def _ms(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "∞" if math.isinf(value) else f"{value:.1f}" if value < 1000 else f"{value:.0f}"

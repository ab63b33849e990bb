"""What `duetjax profile` has found: a table, a JSON document, and a picture of the errors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from duetjax.chart import Line, Mark, Panel, picture
from duetjax.policy.fit import Correction, Errors, Floats, Timed, by_kind, relative_errors
from duetjax.policy.grid import Kind, Shape
from duetjax.policy.launch import Lane, Program
from duetjax.policy.profiles import HardwareProfile, ModelProfile

GOAL_MEDIAN, GOAL_P95 = 0.05, 0.10
"""What predictions on a GPU are meant to keep."""
_MOST_SHOWN = 40
"""Points of a kind that are drawn one by one."""


@dataclass(frozen=True, slots=True)
class Point:
    """A launch that was timed."""

    kind: Kind
    shape: Shape
    timed: Timed
    is_held_out: bool


@dataclass(frozen=True, slots=True, eq=False)
class ProfileReport:
    """Everything found. noise [M]: of what was timed twice, what a perfect prediction would miss.

    before, after: what foretells, without and with the fit. foretold_before, foretold [N]:
    milliseconds of every point. stopped_by: what ended the timing of launches too early.
    """

    folder: Path
    model: ModelProfile
    before: Correction
    after: Correction
    points: Sequence[Point]
    foretold_before: Floats
    foretold: Floats
    noise: Floats
    stopped_by: BaseException | None = None

    @property
    def held_out(self) -> list[int]:
        """Places of the points that the fit has not seen."""
        return [place for place, each in enumerate(self.points) if each.is_held_out]

    def errors(self, foretold: Floats) -> Floats:
        """Of the held-out points."""
        places = self.held_out
        return relative_errors(foretold[places], [self.points[n].timed for n in places])

    def kinds(self) -> Iterator[tuple[Kind, Errors]]:
        """Errors of held-out points by kind, in the order of `Kind`."""
        kinds = [self.points[place].kind for place in self.held_out]
        found = dict(by_kind(kinds, self.errors(self.foretold)))
        yield from ((kind, found[kind]) for kind in Kind if kind in found)

    def points_document(self) -> dict[str, object]:
        """Every point, in numbers."""
        foretold = zip(self.foretold.tolist(), self.foretold_before.tolist(), strict=True)
        return points_document(
            self.model.model, self.after.hardware.name, self.points, list(foretold)
        )


def points_document(
    model: str,
    hardware: str,
    points: Sequence[Point],
    foretold: Sequence[tuple[float, float]] | None = None,
) -> dict[str, object]:
    """Every point, in numbers. foretold: milliseconds of each, after and before fitting."""
    if foretold is None:
        rows = [_row(point, None, None) for point in points]
    else:
        rows = [_row(point, *ms) for point, ms in zip(points, foretold, strict=True)]
    return {"model": model, "hardware": hardware, "points": rows}


def _row(point: Point, foretold: float | None, before: float | None) -> dict[str, object]:
    step, shape = point.timed.step, point.shape
    return {
        "kind": point.kind,
        "lane": step.lane,
        "split": None if step.split is None else [step.split.decode, step.split.prefill],
        "program": step.program,
        "bucket": step.bucket,
        "contexts": shape.contexts,
        "chunks": shape.chunks,
        "k": shape.k,
        "measured_ms": point.timed.ms,
        "predicted_ms": foretold,
        "predicted_before_ms": before,
        "is_held_out": point.is_held_out,
    }


def lines(report: ProfileReport) -> Iterator[str]:
    """A short table."""
    hardware, before = report.after.hardware, report.before.hardware
    yield f"{report.model.model} on {hardware.name}, {hardware.cores} cores (SMs on a GPU)"
    yield ""
    yield f"{'cores':>8}{'TFLOP/s':>12}{'GB/s':>12}"
    for each in hardware.curve:
        yield f"{each.cores:8}{each.flops_per_s / 1e12:12.3f}{each.bytes_per_s / 1e9:12.2f}"
    yield ""
    yield from _facts(before, hardware, report.after)
    yield ""
    yield f"{'held-out launches':28}{'number':>8}{'median':>9}{'p95':>9}{'worst':>9}"
    for kind, found in report.kinds():
        yield _errors(kind, found)
    yield _errors("all", Errors.of(report.errors(report.foretold)))
    yield _errors("all, before fitting", Errors.of(report.errors(report.foretold_before)))
    yield _errors("perfect predictions (noise)", _noise(report))
    yield ""
    if report.stopped_by is not None:
        yield "stopped before its end"
    yield f"wrote {report.folder}/: --hardware-profile and --model-profile take what is there"


def _facts(
    before: HardwareProfile, after: HardwareProfile, correction: Correction
) -> Iterator[str]:
    for name, what in (
        ("contention_decode", "decode beside prefill, times"),
        ("contention_prefill", "prefill beside decode, times"),
        ("launch_us", "a launch, us"),
        ("attention_compute", "attention, of FLOP/s"),
        ("attention_memory", "attention, of bytes/s"),
    ):
        was, now = getattr(before, name), getattr(after, name)
        yield f"{what:32}{now:10.4g}{'' if now == was else f'  (was {was:.4g})'}"
    for lane, program in (
        (Lane.WHOLE, Program.DECODE),
        (Lane.WHOLE, Program.PREFILL),
        (Lane.DECODE, Program.DECODE),
        (Lane.PREFILL, Program.PREFILL),
    ):
        what = f"factor of {program}, {lane} {'device' if lane is Lane.WHOLE else 'lane'}"
        yield f"{what:32}{correction.factors[lane, program]:10.4g}"


def _errors(name: str, found: Errors) -> str:
    shares = "".join(f"{_percent(each):>9}" for each in found[1:])
    return f"{name:28}{found.num_launches:8}{shares}"


def _percent(share: float) -> str:
    """Of nothing there is none."""
    return "-" if math.isnan(share) else f"{share:.1%}"


def _noise(report: ProfileReport) -> Errors:
    return Errors.of(report.noise[np.isfinite(report.noise)])


def document(report: ProfileReport) -> dict[str, object]:
    """What the last line of the output says."""
    after = report.after
    return {
        "model": report.model.model,
        "hardware": after.hardware.name,
        "folder": str(report.folder),
        "num_points": len(report.points),
        "error": _plain(Errors.of(report.errors(report.foretold))),
        "error_before": _plain(Errors.of(report.errors(report.foretold_before))),
        "error_of_perfect": _plain(_noise(report)),
        "error_by_kind": {kind: _plain(found) for kind, found in report.kinds()},
        "contention_decode": after.hardware.contention_decode,
        "contention_prefill": after.hardware.contention_prefill,
        "launch_us": after.hardware.launch_us,
        "attention_compute": after.hardware.attention_compute,
        "attention_memory": after.hardware.attention_memory,
        "factors": {f"{lane} {program}": by for (lane, program), by in after.factors.items()},
        "curve": [[at.cores, at.flops_per_s, at.bytes_per_s] for at in after.hardware.curve],
    }


def _plain(found: Errors) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {name: None if math.isnan(value) else value for name, value in found._asdict().items()}


def draw(report: ProfileReport) -> str:
    """The errors as SVG text: how many are within each size, and foretold beside measured."""
    found = Errors.of(report.errors(report.foretold))
    noise = _noise(report)
    return picture(
        f"{report.model.model} on {report.after.hardware.name}: predicted and measured launches",
        f"{found.num_launches} launches that nothing was fitted to: error median"
        f" {_percent(found.median)}, p95 {_percent(found.p95)}, worst {_percent(found.worst)}; a"
        f" perfect prediction would have {_percent(noise.median)} and {_percent(noise.p95)}, as"
        " times vary",
        [_shares(report), _scatter(report)],
    )


def _shares(report: ProfileReport) -> Panel:
    """Which share of each kind is within an error."""
    errors = report.errors(report.foretold)
    kinds = [report.points[place].kind for place in report.held_out]
    drawn = [
        Line(kind, _distribution(errors[[each is kind for each in kinds]]))
        for kind in Kind
        if kind in kinds
    ]
    before = Line("all, before fitting", _distribution(report.errors(report.foretold_before)))
    return Panel(
        "Launches within an error",
        "error [%], |predicted - measured| / measured, logarithmic",
        "share of launches [%]",
        lines=[*drawn, before],
        marks=[
            Mark(100 * GOAL_MEDIAN, f"{GOAL_MEDIAN:.0%}", upright=True),
            Mark(100 * GOAL_P95, f"{GOAL_P95:.0%}", upright=True),
        ],
        log_x=True,
    )


def _distribution(errors: Floats) -> list[tuple[float, float | None]]:
    ordered = np.sort(np.maximum(100 * errors, 0.01)).tolist()
    return [(error, 100 * (n + 1) / len(ordered)) for n, error in enumerate(ordered)]


def _scatter(report: ProfileReport) -> Panel:
    """Some points of every kind, each alone: a gap keeps them from being joined."""
    drawn = []
    for kind in Kind:
        places = [place for place in report.held_out if report.points[place].kind is kind]
        if not places:
            continue
        some = places[:: math.ceil(len(places) / _MOST_SHOWN)]
        pairs = sorted((report.points[n].timed.ms, float(report.foretold[n])) for n in some)
        drawn.append(Line(kind, _apart(pairs)))
    return Panel(
        f"Some of each kind, at most {_MOST_SHOWN}",
        "measured [ms], logarithmic",
        "predicted [ms], logarithmic",
        lines=drawn,
        log_x=True,
        log_y=True,
    )


def _apart(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float | None]]:
    found: list[tuple[float, float | None]] = []
    for (x, y), (after, _) in pairwise([*pairs, pairs[-1]]):
        found += [(x, y), (after, None)]
    return found

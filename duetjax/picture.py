"""An explanation as a picture: decode step and prefill launch on every split, the objective.

SVG, with its own colours for light and for dark surroundings.
"""

from math import floor, log10
from pathlib import Path
from xml.sax.saxutils import escape

from duetjax.config import ConfigError
from duetjax.explain import Explanation

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 24, 94, 68
_MOST_LABELS = 16
_STYLE = """
.back { fill: #ffffff } text { fill: #24292f } .grid { stroke: #d8dee4 }
.decode { color: #0a5fa8 } .prefill { color: #b4451f } .slo { stroke: #6e40aa; fill: none }
.slo-text { fill: #6e40aa } .chosen { fill: #f3e2b8 }
.line { stroke: currentColor; fill: none; stroke-width: 2 } .mark { fill: currentColor }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117 } text { fill: #e6edf3 } .grid { stroke: #30363d }
.decode { color: #6cb6ff } .prefill { color: #f69d50 } .slo { stroke: #cba6ff }
.slo-text { fill: #cba6ff } .chosen { fill: #4a3d12 }
}"""


def draw(told: Explanation, file: Path) -> None:
    """Writes the picture; `ConfigError` where it cannot be written, or nothing is to be seen."""
    if not told.candidates.splits:
        raise ConfigError(f"--picture: {told.hardware.name} has no splits to draw; leave it out")
    try:
        file.write_text(svg(told), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--picture {file}: {error.strerror}; name another file") from error


def svg(told: Explanation) -> str:
    """The text of the picture. Prefill is drawn for the tokens chosen, or else for all of them."""
    found, chosen = told.candidates, told.chosen
    sizes = found.prefill_tokens
    tokens = chosen.prefill_tokens if chosen and chosen.prefill_tokens in sizes else sizes[-1]
    decode_ms = found.decode_ms.tolist()
    prefill_ms = found.prefill_ms[:, sizes.index(tokens)].tolist()
    axes = _Axes(len(decode_ms), [*decode_ms, *prefill_ms, told.tbt_slo_ms])
    rows = len(told.details.contexts)
    slo = f"{told.tbt_slo_ms:g} ms"
    title = (
        f"{told.model.model} on {told.hardware.name}: {rows} rows decode, {tokens} tokens prefill"
    )
    mixed = "meets" if told.mixed_ms <= told.tbt_slo_ms else "misses"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        ' font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        '<rect class="back" width="100%" height="100%"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="43">predicted; a mixed launch of {told.mixed_tokens} tokens takes'
        f" {told.mixed_ms:.4g} ms and {mixed} the objective of {slo}</text>",
        *_chosen(told, axes),
        *_grid(told, axes),
        *_series("decode", f"decode step of {rows} rows", axes.points(decode_ms), 0),
        *_series("prefill", f"prefill launch of {tokens} tokens", axes.points(prefill_ms), 1),
        f'<line class="slo" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{axes.y(told.tbt_slo_ms):.1f}"'
        f' y2="{axes.y(told.tbt_slo_ms):.1f}" stroke-width="2" stroke-dasharray="7 5"/>',
        f'<text class="slo-text" x="{_WIDTH - _RIGHT}" y="{axes.y(told.tbt_slo_ms) - 6:.1f}"'
        f' text-anchor="end">objective: {slo} a decode step</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Axes:
    """Where things are: splits side by side, milliseconds upwards on a logarithmic scale."""

    def __init__(self, count: int, values: list[float]) -> None:
        self._low, self._high = log10(min(values) / 1.4), log10(max(values) * 1.4)
        self.step = (_WIDTH - _LEFT - _RIGHT) / count

    def x(self, index: int) -> float:
        return _LEFT + (index + 0.5) * self.step

    def y(self, milliseconds: float) -> float:
        part = (log10(milliseconds) - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _BOTTOM - _TOP)

    def points(self, values: list[float]) -> list[tuple[float, float]]:
        return [(self.x(index), self.y(value)) for index, value in enumerate(values)]

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten; the powers alone where those would be many."""
        decades = range(floor(self._low), floor(self._high) + 1)
        factors = (1, 2, 5) if len(decades) < 5 else (1,)
        found = [factor * 10.0**power for power in decades for factor in factors]
        return [tick for tick in found if self._low <= log10(tick) <= self._high]


def _grid(told: Explanation, axes: _Axes) -> list[str]:
    """Lines and labels of both axes."""
    parts, bottom = [], _HEIGHT - _BOTTOM
    for tick in axes.ticks():
        y = axes.y(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    splits = told.candidates.splits
    every = -(-len(splits) // _MOST_LABELS)
    for index, split in enumerate(splits):
        if index % every == 0:
            parts.append(
                f'<text x="{axes.x(index):.1f}" y="{bottom + 18}" text-anchor="middle"'
                f' font-size="11">{split.decode}/{split.prefill}</text>'
            )
    middle, centre = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + bottom) / 2
    return [
        *parts,
        f'<text x="{middle:.1f}" y="{bottom + 46}" text-anchor="middle">cores that decode / cores'
        " that prefill (SMs on a GPU)</text>",
        f'<text x="18" y="{centre:.1f}" text-anchor="middle" transform="rotate(-90 18'
        f' {centre:.1f})">time [ms], logarithmic</text>',
    ]


def _series(kind: str, name: str, points: list[tuple[float, float]], place: int) -> list[str]:
    """A line with its marks, and its entry in the legend; told apart by shape as by colour."""
    x, y = _LEFT + 6 + 280 * place, 60
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = [_mark(kind, *at) for at in (*points, (x, y))]
    return [
        f'<g class="{kind}"><polyline class="line" points="{path}"/>',
        *marks,
        f'</g><text x="{x + 12}" y="{y + 4}">{name}</text>',
    ]


def _mark(kind: str, x: float, y: float) -> str:
    if kind == "decode":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    return f'<rect class="mark" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'


def _chosen(told: Explanation, axes: _Axes) -> list[str]:
    """A band behind the split that is chosen, if one is."""
    if told.chosen is None or told.chosen.split is None:
        return []
    split = told.chosen.split
    x = axes.x(told.candidates.splits.index(split))
    label_x = min(max(x, 90), _WIDTH - 90)  # wider than the band
    return [
        f'<rect class="chosen" x="{x - axes.step / 2:.1f}" y="{_TOP}" width="{axes.step:.1f}"'
        f' height="{_HEIGHT - _BOTTOM - _TOP}"/>',
        f'<text x="{label_x:.1f}" y="{_TOP - 6}" text-anchor="middle" font-weight="bold">'
        f"chosen: {split.decode}/{split.prefill}</text>",
    ]

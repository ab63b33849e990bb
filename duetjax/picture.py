"""An explanation as a picture: decode step and prefill launch on every split, the objective."""

from pathlib import Path

from duetjax.chart import Line, Mark, Panel, picture
from duetjax.config import ConfigError
from duetjax.explain import Explanation


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
    prefill_ms = found.prefill_ms[:, sizes.index(tokens)].tolist()
    rows = len(told.details.contexts)
    mixed = "meets" if told.mixed_ms <= told.tbt_slo_ms else "misses"
    splits = [f"{split.decode}/{split.prefill}" for split in found.splits]
    marks = [Mark(told.tbt_slo_ms, f"objective: {told.tbt_slo_ms:g} ms a decode step")]
    if chosen is not None and chosen.split is not None:
        place = found.splits.index(chosen.split)
        marks.append(Mark(place, f"chosen: {splits[place]}", upright=True))
    panel = Panel(
        title="",
        x_label="cores that decode / cores that prefill (SMs on a GPU)",
        y_label="time [ms], logarithmic",
        lines=(
            Line(f"decode step of {rows} rows", list(enumerate(found.decode_ms.tolist()))),
            Line(f"prefill launch of {tokens} tokens", list(enumerate(prefill_ms))),
        ),
        groups=splits,
        marks=marks,
        log_y=True,
    )
    return picture(
        f"{told.model.model} on {told.hardware.name}: {rows} rows decode, {tokens} tokens prefill",
        f"predicted; a mixed launch of {told.mixed_tokens} tokens takes {told.mixed_ms:.4g} ms and"
        f" {mixed} the objective of {told.tbt_slo_ms:g} ms",
        [panel],
    )

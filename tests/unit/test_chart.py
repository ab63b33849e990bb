"""Charts: what is drawn where, read from the SVG; labels keep apart; what cannot be drawn."""

import math
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import batched, combinations, pairwise
from xml.etree import ElementTree

import pytest

from duetjax.chart import Bars, Line, Mark, Panel, picture
from duetjax.chart_axis import axis_for

SVG = "{http://www.w3.org/2000/svg}"
CHARACTER = 0.6  # mean width, in sizes of the font
SQUARES = Panel(
    "Squares", "number", "square", lines=(Line("all", [(x, x * x) for x in range(2, 11, 2)]),)
)


def root_of(*panels, title="Title", subtitle="Subtitle", columns=1):
    return ElementTree.fromstring(picture(title, subtitle, panels, columns))


def of_class(root, name):
    return [each for each in root.iter() if each.get("class") == name]


def panels_of(root):
    return of_class(root, "panel")


def series_of(root, name):
    """What draws a series in one panel."""
    (found,) = [each for each in root.iter(f"{SVG}g") if each.findtext(f"{SVG}title") == name]
    return found


def numbers(element, *names):
    return tuple(float(element.get(name)) for name in names)


def shapes_of(group):
    """Where the shapes of a series are, and what they look like."""
    (drawn,) = of_class(group, "fill")[-1:]
    found = re.findall(r"M([-\d.]+),([-\d.]+)([^M]*)", drawn.get("d"))
    return [(float(x), float(y)) for x, y, _ in found], {shape for _, _, shape in found}


def strokes_of(group):
    """The vertices of a line, one list for each piece between gaps."""
    (drawn,) = of_class(group, "line")
    pieces = [piece.removesuffix("h0").split() for piece in drawn.get("d").split("M")[1:]]
    return [[tuple(map(float, each.split(","))) for each in piece] for piece in pieces]


def ticks_of(panel):
    """Places of the numbers along x, and upwards, by their values."""
    along, upwards = {}, {}
    for each in panel.findall(f"{SVG}text"):
        if each.get("font-size") == "11":
            x, y = numbers(each, "x", "y")
            value = float(each.text.replace(",", ""))
            if each.get("text-anchor") == "middle":
                along[value] = x
            else:
                upwards[value] = y - 4
    return along, upwards


def at(ticks, value, scale=float):
    """Where a value is by the first tick and the last one."""
    (low, start), (high, end) = min(ticks.items()), max(ticks.items())
    part = (scale(value) - scale(low)) / (scale(high) - scale(low))
    return start + part * (end - start)


@dataclass(frozen=True)
class Box:
    """What a text covers."""

    text: str
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other):
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)


def boxes(element, dx=0.0, dy=0.0, size=12.0):
    """Of all texts in an element, by the length of what they say."""
    size = float(element.get("font-size", size))
    moves = re.findall(r"translate\(([-\d.]+),([-\d.]+)\)", element.get("transform", ""))
    for x, y in moves:
        dx, dy = dx + float(x), dy + float(y)
    if element.tag == f"{SVG}text" and element.text:
        x, y = numbers(element, "x", "y")
        width = CHARACTER * size * len(element.text)
        start = x - width * {"middle": 0.5, "end": 1.0}.get(element.get("text-anchor"), 0.0)
        left, right, top, bottom = start, start + width, y - 0.75 * size, y + 0.2 * size
        if "rotate(-90)" in element.get("transform", ""):
            left, right, top, bottom = top, bottom, -right, -left
        yield Box(element.text, dx + left, dy + top, dx + right, dy + bottom)
    for each in element:
        yield from boxes(each, dx, dy, size)


def check_labels(root):
    """They lie within the picture, and no two on each other."""
    _, _, width, height = map(float, root.get("viewBox").split())
    found = list(boxes(root))
    for box in found:
        assert box.left >= 0 and box.right <= width, box  # noqa: PT018
        assert box.top >= 0 and box.bottom <= height, box  # noqa: PT018
    assert [pair for pair in combinations(found, 2) if pair[0].overlaps(pair[1])] == []


def test_points_are_in_order_where_the_ticks_say():
    root = root_of(SQUARES)
    along, upwards = ticks_of(panels_of(root)[0])
    assert list(along) == list(range(2, 11))
    assert {0, 20, 100} <= set(upwards)
    group = series_of(root, "all")
    points, _ = shapes_of(group)
    assert points == [
        (pytest.approx(at(along, x), abs=0.06), pytest.approx(at(upwards, x * x), abs=0.06))
        for x in range(2, 11, 2)
    ]
    assert strokes_of(group) == [points]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)


def test_heights_are_seen_from_zero_on_and_places_from_where_they_begin():
    root = root_of(Panel("", "", "", lines=(Line("one", [(3600, 55), (3660, 60)]),)))
    along, upwards = ticks_of(panels_of(root)[0])
    assert min(upwards) == 0
    assert min(along) == 3600


def test_logarithmic_axes_have_1_2_5_and_leave_out_zeros():
    line = Line("one", [(0, 5), (1, 0), (2, 3), (20, 30), (200, 300)])
    root = root_of(Panel("", "", "", lines=(line,), log_x=True, log_y=True))
    along, upwards = ticks_of(panels_of(root)[0])
    assert list(along) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert list(upwards) == [2, 5, 10, 20, 50, 100, 200, 500]
    points, _ = shapes_of(series_of(root, "one"))
    assert points == [
        (
            pytest.approx(at(along, x, math.log), abs=0.06),
            pytest.approx(at(upwards, y, math.log), abs=0.06),
        )
        for x, y in line.points[2:]
    ]


def test_many_decades_have_powers_of_ten_alone():
    line = Line("one", [(1e-6, 1), (1e6, 1e12)])
    root = root_of(Panel("", "", "", lines=(line,), log_x=True, log_y=True))
    along, upwards = ticks_of(panels_of(root)[0])
    for ticks in (along, upwards):
        assert {math.log10(tick) % 1 for tick in ticks} == {0.0}
        assert 3 <= len(ticks) <= 12


@pytest.mark.parametrize("log", [False, True], ids=["linear", "logarithmic"])
def test_ticks_of_any_range_are_round_cover_it_and_leave_room(log):
    draw = random.Random(5)
    for _ in range(500):
        low = 10 ** draw.uniform(-9, 9) * (1 if log else draw.choice((-1, 1)))
        high = low + abs(low) * 10 ** draw.uniform(-7, 7)
        for start, end in ((0.0, 330.0), (190.0, 0.0)):
            axis = axis_for([low, high], start, end, log)
            ticks = axis.ticks
            assert 2 <= len(ticks) <= 14
            assert ticks[0] <= low + 1e-6 * (high - low)
            assert ticks[-1] >= high - 1e-6 * (high - low)
            if log:
                assert all(
                    f"{tick:e}"[:8] in ("1.000000", "2.000000", "5.000000") for tick in ticks
                )
            else:
                assert f"{ticks[1] - ticks[0]:.3e}"[:5] in ("1.000", "2.000", "5.000")
            places = [axis.at(tick) for tick in ticks]
            assert (places[0], places[-1]) == (pytest.approx(start), pytest.approx(end))
            assert min(abs(b - a) for a, b in pairwise(places)) > 14


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_missing_value_is_a_gap_and_a_point_between_gaps_a_dot(missing):
    points = [(0, 1), (1, 2), (2, missing), (3, 4), (4, missing), (5, 6), (6, 7)]
    group = series_of(root_of(Panel("", "", "", lines=(Line("one", points),))), "one")
    assert [len(piece) for piece in strokes_of(group)] == [2, 1, 2]
    assert of_class(group, "line")[0].get("d").count("h0") == 1
    assert len(shapes_of(group)[0]) == 5


def test_a_stepped_value_holds_until_the_next_point():
    points = [(0, 4), (1, 8), (2, None), (3, 2), (5, 6)]
    root = root_of(Panel("", "", "", lines=(Line("one", points, step=True),)))
    along, upwards = ticks_of(panels_of(root)[0])
    first, second = strokes_of(series_of(root, "one"))

    def placed(*points):
        return [
            tuple(pytest.approx(at(*each), abs=0.06) for each in ((along, x), (upwards, y)))
            for x, y in points
        ]

    assert first == placed((0, 4), (1, 4), (1, 8), (2, 8))
    assert second == placed((3, 2), (5, 2), (5, 6))


def many_points(gap=range(0)):
    draw = random.Random(7)
    return [(k * 0.36, None if k in gap else draw.uniform(10, 90)) for k in range(10_000)]


@pytest.mark.parametrize("step", [False, True])
def test_a_long_line_is_thinned_and_keeps_its_extremes_and_gaps(step):
    points = many_points(gap=range(4000, 4300))
    points[1234], points[8765] = (1234 * 0.36, 99.0), (8765 * 0.36, 1.0)
    text = picture("", "", [Panel("", "", "", lines=(Line("one", points, step),))])
    assert len(text) < 20_000
    root = ElementTree.fromstring(text)
    group = series_of(root, "one")
    before, after = strokes_of(group)
    assert 500 < len(before) + len(after) <= 1000
    along, upwards = ticks_of(panels_of(root)[0])
    for index, high_or_low in ((1234, min), (8765, max)):
        x, y = high_or_low(before + after, key=lambda vertex: vertex[1])
        assert x == pytest.approx(at(along, points[index][0]), abs=0.06)
        assert y == pytest.approx(at(upwards, points[index][1]), abs=0.06)
    assert before[0][0] == pytest.approx(at(along, 0), abs=0.06)
    assert before[-1][0] == pytest.approx(at(along, 4000 * 0.36), abs=4)
    assert after[0][0] == pytest.approx(at(along, 4300 * 0.36), abs=4)
    assert after[-1][0] == pytest.approx(at(along, 9999 * 0.36), abs=0.06)
    assert all(a[0] <= b[0] for a, b in pairwise(before + after))
    assert not of_class(group, "fill")  # shapes would cover each other


def test_no_coordinate_has_more_than_one_decimal():
    line = Line("one", many_points())
    bars = Bars("two", [1 / 3, 2 / 3, 1 / 7])
    text = picture(
        "", "", [Panel("", "", "", lines=(line,)), Panel("", "", "", bars=(bars,), groups="abc")], 2
    )
    drawing = text.partition("</style>")[2]
    assert not re.search(r"\d\.\d\d", re.sub(r">[^<]*<", "><", drawing))


def test_a_series_looks_the_same_in_all_panels_and_in_the_legend():
    points = [(0, 1), (1, 2)]
    first = Panel("", "", "", lines=(Line("a", points), Line("b", points)))
    second = Panel("", "", "", lines=(Line("c", points), Line("b", points)), bars=())
    third = Panel("", "", "", bars=(Bars("c", [1]), Bars("a", [2])), groups=("all",))
    root = root_of(first, second, third)
    looks = {}
    for panel in panels_of(root):
        for group in panel.findall(f"{SVG}g"):
            _, shapes = shapes_of(group)
            looks.setdefault(group.findtext(f"{SVG}title"), set()).add(
                (group.get("class"), *shapes)
            )
    assert all(len(found) == 1 for found in looks.values())
    assert len(set.union(*looks.values())) == 3
    legend = [each for each in root.findall(f"{SVG}g") if each not in panels_of(root)]
    assert [(each.get("class"), *shapes_of(each)[1]) for each in legend] == [
        next(iter(looks[name])) for name in "abc"
    ]
    names = [each.text for each in root.findall(f"{SVG}text")]
    assert names == ["Title", "Subtitle", "a", "b", "c"]


def test_eight_series_differ_in_colour_dashes_and_shape():
    lines = tuple(Line(f"s{index}", [(0, index), (1, 1)]) for index in range(8))
    root = root_of(Panel("", "", "", lines=lines))
    shapes = [shapes_of(series_of(root, line.name))[1] for line in lines]
    assert len({shape for each in shapes for shape in each}) == 8
    style = root.findtext(f"{SVG}style")
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for part in (light, dark):
        assert len(set(re.findall(r"\.s\d { color: (#\w{6}) }", part))) == 8
    assert len(set(re.findall(r"\.s\d { stroke-dasharray: ([\w ]+) }", light))) == 8


# What is left of red, green and blue light without one of the cones: Machado, Oliveira and
# Fernandes, "A physiologically-based model for simulation of color vision deficiency" (2009).
EYES = {
    "all cones": "1 0 0  0 1 0  0 0 1",
    "protanopia": ".152286 1.052583 -.204868  .114503 .786281 .099216  -.003882 -.048116 1.051998",
    "deuteranopia": ".367322 .860646 -.227968  .280085 .672501 .047413  -.01182 .04294 .968881",
    "tritanopia": "1.255528 -.076749 -.178779  -.078411 .930809 .147602  .004733 .691367 .3039",
}


def linear(colour):
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def cielab(light):
    xyz = times(
        ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8728)), light
    )
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_are_told_apart_by_all_eyes_and_from_what_is_behind(scheme):
    lines = tuple(Line(f"s{index}", [(0, 1)]) for index in range(8))
    style = root_of(Panel("", "", "", lines=lines)).findtext(f"{SVG}style")
    part = style.split("@media")[scheme]
    (back,) = re.findall(r"\.back { fill: (#\w{6}) }", part)
    (ink,) = re.findall(r"text { fill: (#\w{6}) }", part)
    colours = [ink, *re.findall(r"\.s\d { color: (#\w{6}) }", part)]
    for eye, text in EYES.items():
        matrix = list(batched(map(float, text.split()), 3))
        seen = [
            cielab([min(1, max(0, c)) for c in times(matrix, linear(each))]) for each in colours
        ]
        assert min(math.dist(a, b) for a, b in combinations(seen, 2)) >= 19, eye
    for colour in colours:
        bright = [times(((0.2126, 0.7152, 0.0722),), linear(each))[0] for each in (colour, back)]
        assert (max(bright) + 0.05) / (min(bright) + 0.05) >= 3, colour


def test_a_mark_across_is_at_its_value_with_its_label_above():
    root = root_of(replace(SQUARES, marks=(Mark(50, "objective 50 ms"),)))
    (panel,) = panels_of(root)
    (mark,) = of_class(panel, "mark")
    wanted = at(ticks_of(panel)[1], 50)
    assert numbers(mark, "y1", "y2") == (pytest.approx(wanted, abs=0.06),) * 2
    (label,) = of_class(panel, "halo")
    assert label.text == "objective 50 ms"
    assert wanted - 8 < float(label.get("y")) < wanted


@pytest.mark.parametrize("values", [(0, 0.5, 1, 1.5), (98, 99, 100, 100), (50, 51, 52, 53)])
def test_labels_of_marks_that_are_near_keep_apart(values):
    root = root_of(replace(SQUARES, marks=[Mark(value, f"at {value}") for value in values]))
    check_labels(root)
    downs = [float(each.get("y")) for each in of_class(root, "halo")]
    assert len(downs) == 4
    assert all(12 <= down < 260 for down in downs)


def test_a_mark_beyond_the_points_is_seen():
    root = root_of(replace(SQUARES, marks=(Mark(500, "far"), Mark(30, "there", upright=True))))
    along, upwards = ticks_of(panels_of(root)[0])
    assert max(upwards) >= 500
    assert max(along) >= 30


def test_an_upright_mark_is_at_its_value_with_its_label_on_top():
    marks = (Mark(8, "eight", upright=True), Mark(8.1, "a little more", upright=True))
    root = root_of(replace(SQUARES, marks=marks))
    (panel,) = panels_of(root)
    along, _ = ticks_of(panel)
    drawn = [numbers(each, "x1", "x2") for each in of_class(panel, "mark")]
    assert drawn == [(pytest.approx(at(along, mark.value), abs=0.06),) * 2 for mark in marks]
    labels = {each.text: numbers(each, "x", "y") for each in panel.findall(f"{SVG}text")}
    assert labels["eight"][0] == pytest.approx(at(along, 8), abs=0.06)
    assert labels["a little more"][1] < labels["eight"][1] < 0
    check_labels(root)


def test_an_upright_mark_among_groups_is_a_band_behind_one():
    panel = Panel(
        "", "", "", lines=(Line("one", [(0, 1), (1, 2), (2, 3)]),), groups=("a", "b", "c"),
        marks=(Mark(1, "chosen: b", upright=True),),
    )  # fmt: skip
    root = root_of(panel)
    (band,) = of_class(root, "band")
    left, width = numbers(band, "x", "width")
    points, _ = shapes_of(series_of(root, "one"))
    assert [left < x < left + width for x, _ in points] == [False, True, False]
    assert points[1][0] == pytest.approx(left + width / 2, abs=0.1)


GROUPS = ("TTFT 1 s, TBT 50 ms", "TTFT 5 s, TBT 50 ms", "none")


def test_bars_stand_on_zero_side_by_side_in_their_groups():
    values = {"duet": [4, 8, 0], "aggregated": [2, None, 6]}
    bars = tuple(Bars(name, each) for name, each in values.items())
    root = root_of(Panel("", "", "requests/s", bars=bars, groups=GROUPS))
    (panel,) = panels_of(root)
    upwards = {
        float(each.text): float(each.get("y")) - 4
        for each in panel.findall(f"{SVG}text")
        if each.get("text-anchor") == "end"
    }
    found = {name: of_class(series_of(root, name), "fill")[:-1] for name in values}
    for name, each in values.items():
        heights = [at(upwards, 0) - at(upwards, value) for value in each if value is not None]
        assert [float(bar.get("height")) for bar in found[name]] == pytest.approx(heights, abs=0.11)
        for bar in found[name]:
            y, height = numbers(bar, "y", "height")
            assert y + height == pytest.approx(at(upwards, 0), abs=0.11)
        assert len(shapes_of(series_of(root, name))[0]) == len(heights)  # one on a bar of 0 too
    spans = sorted(numbers(bar, "x", "width") for bars in found.values() for bar in bars)
    assert all(x + width <= after for (x, width), (after, _) in pairwise(spans))
    third = [float(found[name][index].get("x")) for name, index in (("duet", 2), ("aggregated", 1))]
    assert 640 * 2 / 3 < third[0] < third[1] < 640


def test_bars_below_zero_hang_from_it():
    root = root_of(Panel("", "", "", bars=(Bars("one", [-3.5, 5]),), groups=("a", "b")))
    down, up = of_class(series_of(root, "one"), "fill")[:-1]
    assert float(down.get("y")) == sum(numbers(up, "y", "height"))
    (zero,) = [each for each in root.iter(f"{SVG}text") if each.text == "0"]
    assert float(down.get("y")) == pytest.approx(float(zero.get("y")) - 4, abs=0.11)


def test_names_of_groups_are_whole_where_they_fit_and_fewer_where_not():
    few = root_of(Panel("", "", "", bars=(Bars("one", [1, 2, 3]),), groups=GROUPS), columns=2)
    texts = " ".join(each.text for each in panels_of(few)[0].findall(f"{SVG}text"))
    assert all(name in texts for name in GROUPS)
    splits = tuple(f"{split}/{132 - split}" for split in range(2, 132, 2))
    many = root_of(Panel("", "", "", bars=(Bars("one", range(65)),), groups=splits))
    shown = [each.text for each in panels_of(many)[0].findall(f"{SVG}text") if "/" in each.text]
    assert set(shown) < set(splits)
    assert shown[0] == "2/130"
    assert len(shown) >= 10
    check_labels(many)


def test_text_cannot_break_the_picture():
    odd = 'a <b> & "c" \x00\x1b\ud800 ]]>'
    panel = Panel(
        odd, odd, odd, lines=(Line(odd, [(0, 1)]),), bars=(Bars("two", [1]),), groups=(odd,),
        marks=(Mark(1, odd), Mark(0, odd, upright=True)),
    )  # fmt: skip
    text = picture(odd, odd, [panel])
    root = ElementTree.fromstring(text.encode())
    assert root.findtext(f"{SVG}title").startswith('a <b> & "c"')
    assert sum('<b> & "c"' in (each.text or "") for each in root.iter(f"{SVG}text")) >= 7


def test_the_picture_has_a_role_a_title_and_both_schemes():
    root = root_of(SQUARES, title="What it shows")
    assert root.get("role") == "img"
    assert root.findtext(f"{SVG}title") == "What it shows"
    light, dark = root.findtext(f"{SVG}style").split("@media (prefers-color-scheme: dark) {")
    for name in (".back", "text", ".grid", ".band", ".mark", ".halo", ".s0"):
        for part in (light, dark):
            assert re.search(rf"(?m)(^|\s){re.escape(name)} {{ \w+: #\w{{6}} }}", part), name


def test_the_same_input_gives_the_same_bytes_in_any_process():
    code = (
        "from duetjax.chart import *; print(picture('t', 's', [Panel('p', 'x', 'y', lines="
        "[Line(n, [(0, 1), (1, 2)]) for n in ('duet', 'static-split', 'aggregated')])]))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert b"static-split" in runs[0]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lines": ()}, "'Squares': nothing to draw"),
        ({"lines": (Line("one", []),)}, "nothing to draw"),
        ({"lines": (Line("one", [(1, None), (2, math.nan)]),)}, "nothing to draw"),
        ({"lines": (Line("one", [(1, 0), (2, -1)]),), "log_y": True}, "nothing to draw"),
        ({"lines": (), "marks": (Mark(1, "one"),)}, "nothing to draw"),
        ({"lines": (Line("one", [(0, math.inf)]),)}, "inf is not finite"),
        ({"lines": (Line("one", [(math.nan, 1)]),)}, "nan is not finite"),
        ({"lines": (Line("one", [(math.nan, 1)]),), "log_x": True}, "nan is not finite"),
        ({"marks": (Mark(math.inf, "one"),)}, "inf is not finite"),
        ({"marks": (Mark(math.nan, "one"),), "log_y": True}, "nan is not finite"),
        ({"lines": (Line("one", [(1, 1), (0, 1)]),)}, "'one' are not in ascending order"),
        ({"bars": (Bars("one", [1]),), "groups": ("a", "b")}, "each of 2 groups"),
        ({"groups": ("a", "b")}, "groups are at 0 to 1"),
        ({"lines": tuple(Line(f"{k}", [(0, 1)]) for k in range(9))}, "9 series"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        root_of(replace(SQUARES, **changes))


@pytest.mark.parametrize(("panels", "columns"), [((), 1), ((SQUARES,), 0)])
def test_no_panels_and_no_columns_are_refused(panels, columns):
    with pytest.raises(ValueError, match="no picture"):
        picture("", "", panels, columns)


WORDS = (
    "duet aggregated-slo prefill-first requests/s 99th percentile [ms] of launches disaggregated"
)


def words(draw, most):
    return " ".join(draw.choices(WORDS.split(), k=draw.randint(0, most)))


def some_panel(draw, names):
    log_x, log_y = draw.random() < 0.3, draw.random() < 0.3
    scale_x, scale_y = 10 ** draw.uniform(-4, 7), 10 ** draw.uniform(-4, 7)
    low = draw.choice((0.0, 0.0, -1.0))
    groups = [words(draw, 4) for _ in range(draw.randint(1, 20))] if draw.random() < 0.4 else []
    if groups:
        log_x, places = False, list(range(len(groups)))
    else:
        places = sorted(scale_x * draw.random() ** 3 for _ in range(draw.randint(1, 30)))

    def height():
        return draw.choice((None, *(scale_y * draw.uniform(low, 1) for _ in range(9))))

    lines = [
        Line(
            name,
            [*((x, height()) for x in places[:-1]), (places[-1], scale_y)],
            draw.random() < 0.3,
        )
        for name in names
    ]
    bars = [Bars(name, [height() for _ in groups]) for name in names] if groups else []
    marks = [
        Mark(draw.choice(places), words(draw, 3), upright=True)
        if draw.random() < 0.4
        else Mark(scale_y * draw.random(), words(draw, 3))
        for _ in range(draw.randint(0, 6))
    ]
    return Panel(
        words(draw, 12), words(draw, 9), words(draw, 9), lines, bars, groups, marks, log_x, log_y
    )


@pytest.mark.parametrize("seed", range(60))
def test_labels_of_any_picture_lie_within_it_and_not_on_each_other(seed):
    draw = random.Random(seed)
    names = [f"{index} {words(draw, draw.choice((2, 30)))}" for index in range(draw.randint(1, 8))]
    panels = [some_panel(draw, names) for _ in range(draw.randint(1, 5))]
    root = root_of(
        *panels, title=words(draw, 20), subtitle=words(draw, 60), columns=draw.randint(1, 3)
    )
    check_labels(root)
    shown = "".join(each.text or "" for each in root.findall(f"{SVG}text")).replace(" ", "")
    assert all(name.replace(" ", "") in shown for name in names)
    vertices = [
        vertex
        for group in root.iter(f"{SVG}g")
        if group.find(f"{SVG}title") is not None and of_class(group, "line")
        for piece in strokes_of(group)
        for vertex in piece
    ]
    assert vertices
    assert all(0 <= x <= 640 and 0 <= y <= 260 for x, y in vertices)

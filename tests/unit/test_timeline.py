"""`duetjax trace-plot`: what stands where in the picture of a trace."""

import json
import re
from xml.etree import ElementTree

import pytest
from test_trace_events import LAUNCHES, launch, life, window

from duetjax.cli import main
from duetjax.config import ConfigError
from duetjax.policy.launch import Lane
from duetjax.timeline import draw, read
from duetjax.trace_events import pieces

SVG = "{http://www.w3.org/2000/svg}"
WIDTH = 860


@pytest.fixture
def file(tmp_path):
    return written(tmp_path, window())


def written(folder, window):
    file = folder / "trace.json"
    file.write_bytes(b"".join(pieces(window)))
    return file


def panels_of(file, *part):
    """The parts of the picture: launches, cores, requests."""
    root = ElementTree.fromstring(draw(read(file, *part)))
    return [each for each in root.iter(f"{SVG}g") if each.get("class") == "panel"]


def bars_of(panel):
    """(style, left, width, what is said) of each."""
    found = []
    for group in panel.findall(f"{SVG}g"):
        for bar in group.findall(f"{SVG}rect"):
            sizes = (float(bar.get(name)) for name in ("x", "width"))
            found.append((group.get("class").split()[0], *sizes, bar.findtext(f"{SVG}title")))
    return found


def names_of(panel):
    return [each.text for each in panel.findall(f"{SVG}text")]


def ticks_of(panel):
    """Places of each request's tokens."""
    drawn = [each.get("d") for each in panel.iter(f"{SVG}path")]
    return [[float(x) for x in re.findall(r"M([\d.]+),", path)] for path in drawn]


def at(seconds):
    """Of a window of six seconds."""
    return pytest.approx(WIDTH * seconds / 6, abs=0.1)


def wide(seconds):
    return pytest.approx(WIDTH * seconds / 6 - 0.3, abs=0.1)


def test_a_launch_is_a_bar_of_its_lane_as_wide_as_it_took(file):
    launches, *_ = panels_of(file)
    assert names_of(launches) == ["decode lane", "prefill lane", "whole device"]
    said = [bar[3] for bar in bars_of(launches)]
    assert [bar[:3] for bar in bars_of(launches)] == [
        ("s0", at(1), wide(1)),
        ("s1", at(1), wide(3)),
        ("s2", at(0), wide(0.5)),
        ("s2", at(4), wide(1)),
    ]
    assert said[0] == (
        "6: decode, decode lane 40/92, split, k 4, 1 rows, 0 prompt tokens, 1000 ms, predicted 9 ms"
    )
    assert said[1].endswith("32 prompt tokens, 3000 ms")


def test_the_split_is_shown_while_there_is_one(file):
    _, cores, _ = panels_of(file)
    assert names_of(cores) == ["132", "0"]
    assert bars_of(cores) == [
        ("s0", at(1), wide(3), "decode: 40"),
        ("s1", at(1), wide(3), "prefill: 92"),
    ]
    below, above = (float(bar.get("height")) for bar in cores.iter(f"{SVG}rect"))
    assert below / above == pytest.approx(40 / 92, rel=0.02)


def test_a_request_shows_its_phases_and_its_tokens(file):
    *_, requests = panels_of(file)
    assert names_of(requests) == ["64 → 9", "64 → 2", "64 → 1", "64 → 0"]
    bars = bars_of(requests)
    assert [bar[:3] for bar in bars[1:4]] == [
        ("s3", at(0.25), wide(0.75)),
        ("s1", at(1), wide(3)),
        ("s0", at(4), wide(1)),
    ]
    assert [bar[3] for bar in bars[1:4]] == ["queue: 750 ms", "prefill: 3000 ms", "decode: 1000 ms"]
    old, new = ticks_of(requests)[:2]
    assert old == [at(seconds) for seconds in (0.5, 1.25, 1.5, 1.75, 2.0)]
    assert new == [at(4), at(5)]


def test_of_a_prompt_in_chunks_only_the_last_one_brings_a_token(tmp_path):
    launches = [launch(n, Lane.WHOLE, 101.0 + n, 102.0 + n, [], ["a"]) for n in range(3)]
    launches.append(launch(3, Lane.WHOLE, 104.0, 105.0, ["a"], k=2))
    file = written(tmp_path, window(launches, [life("a", 100.5, 104.0, 105.0, 3)]))
    launches, requests = panels_of(file)
    assert ticks_of(requests) == [[at(4), at(4.5), at(5)]]


def test_a_part_of_the_time_is_drawn_alone(file):
    launches, requests = panels_of(file, 4.0, 0.5)
    assert names_of(launches) == ["whole device"]
    assert bars_of(launches)[0][:3] == ("s2", 0.0, pytest.approx(WIDTH - 0.3))
    assert names_of(requests) == ["64 → 2", "64 → 1"]


def test_fine_launches_are_drawn_as_one_and_many_requests_are_a_choice(tmp_path):
    rows = [f"r{number}" for number in range(40)]
    launches = [
        launch(n, Lane.WHOLE, 100 + n / 5000, 100 + (n + 1) / 5000, rows[:5]) for n in range(30_000)
    ]
    lives = [life(name, 100 + n / 100, 101.0, 105.0, 50) for n, name in enumerate(rows)]
    file = written(tmp_path, window(launches, lives))
    svg = draw(read(file))
    assert len(svg) < 600_000
    panel, requests = panels_of(file)
    assert 400 < len(bars_of(panel)) < 2 * WIDTH
    assert sum(int(bar[3].split()[0]) for bar in bars_of(panel)) == 30_000
    assert len(names_of(requests)) == 16
    assert "the 16 that take most of the time" in svg


def test_the_same_trace_gives_the_same_picture_and_names_are_escaped(tmp_path):
    odd = window(LAUNCHES)
    file = written(tmp_path, odd)
    document = json.loads(file.read_text())
    document["otherData"]["model"] = "a<b>&c"
    file.write_text(json.dumps(document))
    assert draw(read(file)) == draw(read(file))
    title = ElementTree.fromstring(draw(read(file))).findtext(f"{SVG}title")
    assert title == "a<b>&c: 4 launches and 4 requests in 6 s"


# The command.


def test_the_picture_is_written_beside_the_trace_or_where_it_is_asked_for(file, capsys):
    assert main(["trace-plot", str(file)]) == 0
    beside = file.with_suffix(".svg")
    assert capsys.readouterr().out == f"wrote {beside}\n"
    other = file.with_name("other.svg")
    assert main(["trace-plot", str(file), "--out", str(other), "--start", "1"]) == 0
    assert ElementTree.parse(other).getroot().tag == f"{SVG}svg"
    assert other.read_text() != beside.read_text() == draw(read(file))


def test_where_it_cannot_be_written_is_said(file, capsys):
    assert main(["trace-plot", str(file), "--out", str(file.parent)]) == 1
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no trace of duetjax"),
        ("[]", "no trace of duetjax"),
        ('{"traceEvents": []}', "no trace of duetjax"),
        ('{"traceEvents": [{"ph": "X", "name": "a", "ts": 0, "dur": 1}]}', "no trace of duetjax"),
        ('{"traceEvents": [], "otherData": {"model": "m", "seconds": 1}}', "no launch from 0 s"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, text, fault):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read(file)


@pytest.mark.parametrize("part", [(-1.0,), (float("nan"),), (0.0, 0.0), (0.0, -1.0), (7.0,)])
def test_a_part_in_which_there_is_nothing_is_refused(file, part):
    with pytest.raises(ConfigError, match=r"--start|no launch"):
        read(file, *part)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "absent.json")

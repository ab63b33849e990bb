"""`duetjax explain`: numbers worked out by hand, the split that is chosen, what is refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from small_profiles import VALUES, small_hardware, small_model

from duetjax.cli import main
from duetjax.policy.launch import Program
from duetjax.policy.profiles import Basis, Cost, Origin, Reach
from duetjax.profile_files import Kind, read_model_profile, shipped, shipped_file

SVG = "{http://www.w3.org/2000/svg}"

BASES = {
    "contention_decode": Basis.ASSUMED,
    "contention_prefill": Basis.ASSUMED,
    "launch_us": Basis.MEASURED,
    "curve_cores": Basis.DERIVED,
    "curve_flops_per_s": Basis.DERIVED,
    "curve_bytes_per_s": Basis.DERIVED,
}
# One head of one value: attention costs nothing that two decimals show.
MODEL = small_model(
    dtype_bytes=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    hidden_size=1,
    costs={(Program.DECODE, 2): Cost(0, 12e6), (Program.PREFILL, 16): Cost(50e6, 0)},
)
# 10^9 FLOP/s a core; 10^9 bytes/s a core up to two of them.
HARDWARE = small_hardware(
    curve=(Reach(2, 2e9, 2e9), Reach(4, 4e9, 2e9)),
    contention_decode=1.0,
    contention_prefill=1.0,
    launch_us=0.0,
    origins={name: Origin(BASES.get(name, Basis.DATASHEET), "made up") for name in VALUES},
)
LOAD = ("--prefill", "8", "--decode", "2x20", "--max-num-batched-tokens", "16")
REAL = ("--model", "llama-3.1-8b", "--gpu", "h200-sxm", "--prefill", "4096", "--decode", "64x2048")


@pytest.fixture
def profiles(tmp_path):
    """Flags that name the small profiles, as files."""
    return small(tmp_path, HARDWARE)


def small(folder, hardware):
    named = {"--model-profile": MODEL, "--hardware-profile": hardware}
    for flag, profile in named.items():
        (folder / f"{flag}.json").write_text(json.dumps(profile.to_json()))
    return [text for flag in named for text in (flag, str(folder / f"{flag}.json"))]


def told(capsys, *arguments):
    assert main(["explain", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def refused(capsys, *arguments):
    assert main(["explain", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line.removeprefix("duetjax: error: ")


def rows(lines):
    """The table's cells by split, the mark left out; and the marked splits."""
    found, marked = {}, []
    for line in lines:
        if match := re.match(r" *(> *)?(\d+/\d+) (.*)", line):
            found[match[2]] = match[3].split()
            marked += [match[2]] if match[1] else []
    return found, marked


def test_a_launch_that_breaks_the_objective_is_split_as_worked_out_by_hand(profiles, capsys):
    # All times are 1.3 times the roofline's. Mixed: 50e6 / 4e9 s. Decode step: 12e6 / 1e9 s on one
    # core, half of it on more; prefill: 50e6 / 1e9 s on one core. 2/2: 32.5 / 7.8 = 4.2 steps, and
    # (4 x 2 + 8) tokens / 32.5 ms; 3/1: 65 / 7.8 = 8.3 steps, (9 x 2 + 8) / 70.2 ms.
    assert told(capsys, *profiles, *LOAD, "--tbt-slo-ms", 10) == [
        "small on card, 4 cores (SMs on a GPU)",
        "2 rows decode at 20 tokens; prompt tokens: 8 after 0",
        "mixed launch of 10 tokens on the whole device (program prefill 16): 16.25 ms, misses the"
        " objective of 10 ms",
        "",
        "  decode/prefill cores  decode step ms  prefill ms  prompt tokens  steps k  tokens/s"
        "  objective",
        "                 1/3             15.60       21.67              8        1       462"
        "     missed",
        "             >   2/2              7.80       32.50              8        4       492"
        "        met",
        "                 3/1              7.80       65.00              8        9       370"
        "        met",
        "",
        "duet: 2 cores decode, 1 step a launch, and 2 prefill, as decode meets 10 ms: 4 steps of"
        " 7.8 ms on 2 beside 8 prompt tokens in 32.5 ms on 2, 492.3 tokens/s",
        "predictions: the roofline's x 1.3, which is assumed until launches have been measured",
        "profiles: model derived (compiled for nothing); hardware measured (launch_us); datasheet"
        " (cores, core_step, min_decode_cores, min_prefill_cores, interconnect_bytes_per_s,"
        " memory_bytes, board_watts); derived (curve_cores, curve_flops_per_s, curve_bytes_per_s);"
        " assumed (contention_decode, contention_prefill)",
    ]


def test_a_launch_that_keeps_the_objective_is_not_split(profiles, capsys):
    lines = told(capsys, *profiles, *LOAD, "--tbt-slo-ms", 20)
    assert lines[2].endswith("16.25 ms, meets the objective of 20 ms")
    found, marked = rows(lines)
    assert marked == []
    assert found["2/2"] == ["7.80", "32.50", "8", "4", "492", "met"]
    assert lines[-3] == "duet: one mixed launch, as it keeps the objective; nothing is split"


def test_where_no_split_keeps_the_objective_the_largest_decode_share_is_marked(profiles, capsys):
    lines = told(capsys, *profiles, *LOAD, "--tbt-slo-ms", 5)
    found, marked = rows(lines)
    assert marked == ["3/1"]
    assert [cells[-1] for cells in found.values()] == ["missed"] * 3
    assert "decode meets 5 ms nowhere (7.8 ms on the whole device)" in lines[-3]


def test_where_only_the_whole_device_keeps_it_they_take_turns_and_no_split_is_marked(
    tmp_path, capsys
):
    profiles = small(tmp_path, replace(HARDWARE, contention_decode=1.5))
    lines = told(capsys, *profiles, *LOAD, "--tbt-slo-ms", 10)
    found, marked = rows(lines)
    assert marked == []
    assert found["2/2"][0] == "11.70"
    assert lines[-3].startswith("duet: decode and prefill in turn, as decode meets 10 ms on the")


def test_a_device_that_cannot_be_divided_says_so(tmp_path, capsys):
    profiles = small(tmp_path, replace(HARDWARE, min_decode_cores=4))
    lines = told(capsys, *profiles, *LOAD, "--tbt-slo-ms", 10)
    assert "card cannot be divided" in lines
    assert lines[-3].startswith("duet: mixed launches of 8 tokens, as no split has")


def test_flags_repeat_and_prompts_may_be_partly_cached(profiles, capsys):
    asked = ["--prefill", "6:32", "--prefill", "2", "--decode", "1x100", "--decode", "1x300"]
    lines = told(capsys, *profiles, *asked, "--max-num-batched-tokens", 16)
    assert lines[1] == "2 rows decode at 200 tokens; prompt tokens: 6 after 32, 2 after 0"


def test_more_rows_than_the_profile_has_are_extrapolated(profiles, capsys):
    lines = told(capsys, *profiles, "--prefill", "8", "--decode", "5x100", "--tbt-slo-ms", 9)
    assert rows(lines)[0]["2/2"][0] == "7.80"  # the profile knows one bucket: no slope


def test_the_paper_s_attention_takes_longer_where_rows_of_both_kinds_mix(capsys):
    """Decoding rows are bound by bytes, the prompt by FLOPs: each for itself is no overlap."""
    load = [*REAL[:4], "--prefill", "4096:8192", "--decode", "64x16000"]
    fused, paper = (
        float(re.search(r"([0-9.]+) ms, misses", told(capsys, *load, "--attention", way)[2])[1])
        for way in ("fused", "per-request")
    )
    assert paper > 1.05 * fused


def test_pages_in_fp8_are_read_in_half_the_time(tmp_path, capsys):
    # A decode step reads 32 rows x 10,000 tokens x one value, K and V: 640,000 bytes, and as much
    # again where a value takes two. At 10^9 bytes/s on one core and 2 x 10^9 on more, times 1.3.
    costs = {(Program.DECODE, 32): Cost(0, 1), (Program.PREFILL, 64): Cost(1, 0)}
    wide = replace(MODEL, dtype_bytes=2, costs=costs)
    file = tmp_path / "wide.json"
    file.write_text(json.dumps(wide.to_json()))
    curve = (Reach(2, 2e10, 2e9), Reach(4, 4e10, 2e9))
    load = [*small(tmp_path, replace(HARDWARE, curve=curve)), "--model-profile", file]
    load += ["--prefill", "8", "--decode", "32x10000", "--max-num-batched-tokens", 64]
    plain, fp8 = told(capsys, *load), told(capsys, *load, "--kv-cache-dtype", "fp8")
    assert [rows(lines)[0]["1/3"][0] for lines in (plain, fp8)] == ["1.66", "0.83"]
    assert [rows(lines)[0]["2/2"][0] for lines in (plain, fp8)] == ["0.83", "0.42"]
    assert (plain[0].split()[0], fp8[0].split()[0]) == ("small", "small-kv8")


def test_a_profile_of_fp8_pages_is_taken_at_its_word(tmp_path, capsys):
    shipped_one = read_model_profile(shipped_file(Kind.MODEL, REAL[1]))
    file = tmp_path / "fp8.json"
    file.write_text(json.dumps(replace(shipped_one, kv_dtype_bytes=1).to_json()))
    asked = told(capsys, *REAL, "--kv-cache-dtype", "fp8")
    assert told(capsys, "--model-profile", file, *REAL[2:]) == asked != told(capsys, *REAL)


def test_a_shipped_model_on_a_shipped_gpu_has_a_row_for_each_split(capsys):
    found, marked = rows(told(capsys, *REAL))
    assert len(found) == 15
    assert len(marked) == 1
    decode_ms = [float(cells[0]) for cells in found.values()]
    assert decode_ms == sorted(decode_ms, reverse=True)


@pytest.mark.parametrize("name", ["h200", "H200", "H200-SXM"])
def test_a_gpu_is_named_by_how_its_name_begins_in_any_case(name, capsys):
    assert told(capsys, *REAL, "--gpu", name) == told(capsys, *REAL)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model", "gpt-5"), ("'gpt-5'", "llama-3.1-8b", "duetjax compile --model")),
        (("--gpu", "h900"), ("--gpu 'h900': choose a100-sxm-80gb, cpu-2-cores, h100-sxm",)),
        (("--gpu", "h"), ("--gpu 'h': choose a100-sxm-80gb",)),
        (("--gpu", ""), ("--gpu '': choose a100-sxm-80gb",)),
        (("--prefill", "many"), ("--prefill 'many': write it like 4096:1024",)),
        (("--prefill", "0"), ("--prefill '0'",)),
        (("--prefill", "99999999999999999999"), ("each below 16777216",)),
        (("--prefill", "\u0663"), ("write it like",)),
        (("--decode", "64"), ("--decode '64': write it like 64x2048",)),
        (("--decode", "0x10"), ("--decode '0x10'",)),
        (("--decode", "9000x10"), ("--max-num-batched-tokens 8192: give more than the 9064",)),
        (("--max-num-batched-tokens", "64"), ("give more than the 64 rows",)),
        (("--max-num-batched-tokens", "1000000"), ("at most 65536",)),
        (("--tbt-slo-ms", "0"), ("--tbt-slo-ms 0: give milliseconds above 0",)),
        (("--tbt-slo-ms", "nan"), ("--tbt-slo-ms nan",)),
        (("--kv-cache-dtype", "fp4"), ("--kv-cache-dtype fp4: choose auto, fp8",)),
        (("--attention", "flash"), ("--attention 'flash': choose fused or per-request",)),
        (("--model-profile", "a.json"), ("--model-profile FILE, one of them",)),
        (("--hardware-profile", "a.json"), ("--hardware-profile FILE, one of them",)),
    ],
    ids=" ".join,
)
def test_what_cannot_be_explained_is_refused_in_one_line(arguments, named, capsys):
    line = refused(capsys, *REAL, *arguments)
    for text in named:
        assert text in line


def test_both_sides_must_be_given(capsys):
    assert "give both, such as --prefill" in refused(capsys, *REAL[:6])
    assert "give --model (" in refused(capsys, *REAL[4:])


def test_an_unknown_name_lists_every_shipped_profile(capsys):
    line = refused(capsys, *REAL, "--model", "x")
    assert ", ".join(shipped(Kind.MODEL)) in line


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (" " * 2**21, "too large"),
        ("{}", "kind must be 'hardware-profile'"),
    ],
    ids=["missing", "cut off", "deep", "large", "another kind"],
)
def test_a_profile_that_cannot_be_read_is_named(content, complaint, tmp_path, capsys):
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    line = refused(capsys, *REAL[:2], *REAL[4:], "--hardware-profile", file)
    assert line.startswith(f"{file}: ")
    assert complaint in line


def test_explaining_loads_no_jax():
    code = f"import sys; from duetjax.cli import main; main(['explain', *{REAL!r}])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}; print('jax' in sys.modules)"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_the_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["explain", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    flags = ("model", "gpu", "prefill", "decode", "tbt-slo-ms", "max-num-batched-tokens")
    files = ("hardware-profile", "model-profile", "picture")
    for flag in (*flags, *files, "attention", "kv-cache-dtype"):
        assert f"--{flag}" in text


def picture(capsys, folder, *arguments):
    file = folder / "picture.svg"
    told(capsys, *arguments, "--picture", file)
    return ElementTree.parse(file).getroot()


def texts(root):
    return ["".join(each.itertext()) for each in root.iter(f"{SVG}text")]


def marks(root, kind):
    """Where the marks of a series are, whose name begins like this."""
    groups = [each for each in root.iter(f"{SVG}g") if each.find(f"{SVG}title") is not None]
    (group,) = [each for each in groups if each.find(f"{SVG}title").text.startswith(kind)]
    (drawn,) = [each for each in group.iter(f"{SVG}path") if each.get("class") == "fill"]
    return [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+),([\d.]+)", drawn.get("d"))]


def test_the_picture_has_every_split_and_marks_the_chosen_one(profiles, tmp_path, capsys):
    root = picture(capsys, tmp_path, *profiles, *LOAD, "--tbt-slo-ms", 10)
    decode, prefill = marks(root, "decode"), marks(root, "prefill")
    assert len(decode) == len(prefill) == 3
    (band,) = [each for each in root.iter(f"{SVG}rect") if each.get("class") == "band"]
    left, width = float(band.get("x")), float(band.get("width"))
    inside = [left <= x <= left + width for x, _ in decode]
    assert inside == [False, True, False]
    assert "chosen: 2/2" in texts(root)


def test_the_picture_s_heights_are_the_times(profiles, tmp_path, capsys):
    root = picture(capsys, tmp_path, *profiles, *LOAD, "--tbt-slo-ms", 10)
    (slo,) = [each for each in root.iter(f"{SVG}line") if each.get("class") == "mark"]
    objective = float(slo.get("y1"))
    first, second, third = [y for _, y in marks(root, "decode")]
    assert first < objective < second == third  # 15.6, 10, 7.8 and 7.8 ms; down is less
    heights = [y for _, y in marks(root, "prefill")]
    assert heights[0] > heights[1] > heights[2]  # 21.67, 32.5 and 65 ms
    # Logarithmic: twice the time is as far up from 32.5 to 65 as from 7.8 to 15.6 ms.
    assert heights[1] - heights[2] == pytest.approx(second - first, abs=0.11)


def test_the_picture_has_a_title_and_axes_with_units(profiles, tmp_path, capsys):
    root = picture(capsys, tmp_path, *profiles, *LOAD, "--tbt-slo-ms", 10)
    assert root.find(f"{SVG}title").text == "small on card: 2 rows decode, 8 tokens prefill"
    found = texts(root)
    assert "time [ms], logarithmic" in found
    assert "cores that decode / cores that prefill (SMs on a GPU)" in found
    assert "objective: 10 ms a decode step" in found
    assert {"1/3", "2/2", "3/1", "20", "50"} <= set(found)


def test_the_picture_suits_light_and_dark_surroundings(profiles, tmp_path, capsys):
    root = picture(capsys, tmp_path, *profiles, *LOAD)
    light, dark = root.find(f"{SVG}style").text.split("@media (prefers-color-scheme: dark) {")
    for name in (".back", "text", ".grid", ".s0", ".s1", ".mark", ".halo", ".band"):
        assert re.search(rf"(?m)(^|\s){re.escape(name)} {{", light), name
        assert re.search(rf"(?m)(^|\s){re.escape(name)} {{", dark), name


def test_no_split_is_marked_where_none_is_chosen(profiles, tmp_path, capsys):
    root = picture(capsys, tmp_path, *profiles, *LOAD, "--tbt-slo-ms", 20)
    assert not [each for each in root.iter() if each.get("class") == "band"]
    assert not [text for text in texts(root) if "chosen" in text]


def test_names_in_a_profile_cannot_break_the_picture(tmp_path, capsys):
    profiles = small(tmp_path, replace(HARDWARE, name='<card> & "more"'))
    root = picture(capsys, tmp_path, *profiles, *LOAD)
    assert 'on <card> & "more":' in root.find(f"{SVG}title").text


def test_a_picture_that_cannot_be_drawn_or_written_is_refused(tmp_path, capsys):
    assert main(["explain", *REAL, "--picture", str(tmp_path)]) == 1
    assert f"--picture {tmp_path}: Is a directory" in capsys.readouterr().err
    profiles = small(tmp_path, replace(HARDWARE, min_decode_cores=4))
    assert main(["explain", *profiles, *LOAD, "--picture", str(tmp_path / "a.svg")]) == 1
    assert "card has no splits to draw" in capsys.readouterr().err

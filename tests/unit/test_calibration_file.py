"""Calibrations on disk: learned once, kept small, and never in an engine's way."""

import json
import logging
import os
import threading

import numpy as np
import pytest
from foresight_run import foresight, profiles, simulate, steadily

from duetjax import calibration_file
from duetjax.calibration_file import (
    FEWEST_LAUNCHES,
    MOST_FILES,
    SAVE_SECONDS,
    CalibrationFile,
    KeptForesight,
)
from duetjax.policy.durations import Step
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Lane, Program

MODEL, HARDWARE = "llama-3.1-8b", "h200-sxm"
STEP = Step(Lane.WHOLE, None, Program.DECODE, 8, 1, np.full(8, 100))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "calibrations"


@pytest.fixture
def file(folder):
    return CalibrationFile(folder, MODEL, HARDWARE)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def foresees(file):
    return Foresight(*profiles(), calibration=file.read())


def learned(file, clock=None, launches=64, factor=2.0):
    """A foresight that has seen so many launches take `factor` times the roofline."""
    kept = KeptForesight(foresees(file), file, clock or Clock())
    raw = kept.step_ms(STEP) / kept._foresight.calibration.factor(STEP.lane, STEP.program)
    for _ in range(launches):
        kept.observe(STEP, factor * raw)
    return kept


def factor_of(file):
    return file.read().factor(STEP.lane, STEP.program)


def test_what_was_learned_is_there_at_the_next_start(file):
    assert factor_of(file) == pytest.approx(1.3)
    learned(file).close()
    assert factor_of(file) == pytest.approx(2.0)
    again = CalibrationFile(file.path.parent, MODEL, HARDWARE)
    assert foresees(again).step_ms(STEP) == pytest.approx(foresees(file).step_ms(STEP))


def test_nothing_learned_writes_nothing(file, folder):
    KeptForesight(foresees(file), file).close()
    assert not folder.exists()


def test_closing_twice_writes_once(file):
    kept = learned(file)
    kept.close()
    file.path.unlink()
    kept.close()
    assert not file.path.exists()


def test_it_is_a_private_file_of_a_few_kilobytes_however_long_it_learned(file, folder):
    learned(file, launches=2000).close()
    assert [path.name for path in folder.iterdir()] == [file.path.name]
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert file.path.stat().st_size < 2**15


@pytest.mark.parametrize(
    ("model", "hardware"), [("other", HARDWARE), (MODEL, "other"), (f"{MODEL}-on", HARDWARE)]
)
def test_another_model_or_device_has_a_file_of_its_own(file, folder, model, hardware):
    learned(file).close()
    other = CalibrationFile(folder, model, hardware)
    assert other.path != file.path
    assert factor_of(other) == pytest.approx(1.3)


@pytest.mark.parametrize("name", ["../../etc", "a/b\0c", "x" * 5000, "", "\u4e2d\u6587", "."])
def test_a_hostile_name_stays_in_the_folder(folder, name):
    file = CalibrationFile(folder, name, name)
    learned_here = file.read()
    file.write(learned_here.to_json())
    assert [path.parent for path in folder.iterdir()] == [folder]
    assert file.path.is_file()


def foreign(text):
    return lambda path: path.write_bytes(text)


def of_another_device(path):
    document = CalibrationFile(path.parent, MODEL, "other").read().to_json()
    path.write_text(json.dumps(document))


def too_large(path):
    with path.open("wb") as out:
        out.truncate(2**21)


BROKEN = {
    "empty": foreign(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "not text": foreign(b"\xff\xfe\x00"),
    "null": foreign(b"null"),
    "deep": foreign(b"[" * 200_000),
    "NaN": lambda path: path.write_text(path.read_text().replace("2.0", "NaN", 1)),
    "out of bounds": lambda path: path.write_text(path.read_text().replace("2.0", "1e9", 1)),
    "another device": of_another_device,
    "another version": lambda path: path.write_text(
        path.read_text().replace('"version": 1', '"version": 99')
    ),
    "too large": too_large,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_or_foreign_file_is_refused_in_one_line_and_replaced(file, fault, caplog):
    learned(file).close()
    BROKEN[fault](file.path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert factor_of(file) == pytest.approx(1.3)
    [record] = caplog.records
    assert str(file.path) in record.getMessage()
    assert "\n" not in record.getMessage()
    assert len(record.getMessage()) < 1000
    if fault == "a folder":  # whose it is nobody knows; it stays
        return
    learned(file).close()
    caplog.clear()
    assert factor_of(file) == pytest.approx(2.0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("launches", "seconds", "is_saved"),
    [
        (FEWEST_LAUNCHES, SAVE_SECONDS, True),
        (FEWEST_LAUNCHES - 1, 9 * SAVE_SECONDS, False),
        (9 * FEWEST_LAUNCHES, SAVE_SECONDS - 1, False),
    ],
)
def test_while_serving_it_is_saved_after_so_many_launches_and_so_much_time(
    file, launches, seconds, is_saved
):
    clock = Clock()
    kept = learned(file, clock, launches - 1)
    clock.now = seconds
    kept.observe(STEP, 1.0)
    kept._wait()
    assert file.path.exists() is is_saved


def test_while_serving_it_is_saved_again_and_again_but_no_sooner(file):
    clock = Clock()
    kept = learned(file, clock, FEWEST_LAUNCHES - 1)
    for minutes in (1, 2):
        clock.now = minutes * SAVE_SECONDS
        kept.observe(STEP, 1.0)
        kept._wait()
        file.path.unlink()
        for _ in range(2 * FEWEST_LAUNCHES):
            kept.observe(STEP, 1.0)
        assert not file.path.exists()


def test_a_disk_that_does_not_answer_holds_nobody_up(file, monkeypatch):
    answers = threading.Event()
    writes = []

    def write(document):
        writes.append(document)
        answers.wait(60)

    monkeypatch.setattr(file, "write", write)
    monkeypatch.setattr(calibration_file, "_CLOSE_SECONDS", 0.01)
    clock = Clock()
    kept = learned(file, clock, launches=FEWEST_LAUNCHES)
    for minutes in range(1, 10):
        clock.now = minutes * SAVE_SECONDS
        for _ in range(FEWEST_LAUNCHES):
            kept.observe(STEP, 1.0)
    kept.close()
    answers.set()
    assert len(writes) == 1


@pytest.mark.parametrize("fault", ["full", "read-only", "in the way"])
def test_a_disk_that_takes_nothing_is_one_warning(file, folder, fault, monkeypatch, caplog):
    if fault == "in the way":
        folder.parent.write_text("a file")
    else:
        number = {"full": 28, "read-only": 30}[fault]

        def refuse(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync" if fault == "full" else "replace", refuse)
    kept = learned(file)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            kept.observe(STEP, 1.0)
            kept.close()
    [record] = caplog.records
    assert "every start learns it anew" in record.getMessage()
    assert not file.path.exists()
    if folder.exists():
        assert list(folder.iterdir()) == []


def test_a_failed_save_leaves_the_one_before_whole(file, monkeypatch):
    learned(file).close()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        learned(file, factor=3.0).close()
    assert factor_of(file) == pytest.approx(2.0)


def test_the_folder_keeps_the_ones_used_last_and_what_is_not_ours(file, folder):
    for number in range(MOST_FILES + 10):
        each = CalibrationFile(folder, f"model-{number}", HARDWARE)
        each.write(each.read().to_json())
        os.utime(each.path, (number, number))
    (folder / "notes.txt").write_text("mine")
    abandoned = folder / "a.x.part"
    abandoned.write_text("")
    os.utime(abandoned, (0, 0))
    learned(file).close()
    names = {path.name for path in folder.iterdir()}
    assert len(names) == MOST_FILES + 1
    assert names >= {file.path.name, "notes.txt"}
    assert {name for name in names if name.startswith("model-")} == {
        CalibrationFile(folder, f"model-{number}", HARDWARE).path.name
        for number in range(11, MOST_FILES + 10)
    }


def test_it_predicts_and_learns_as_what_it_keeps(file):
    plain, kept = foresight(), KeptForesight(foresight(), file)
    for _ in range(40):
        plain.observe(STEP, 30.0)
        kept.observe(STEP, 30.0)
    assert kept.step_ms(STEP) == plain.step_ms(STEP)
    assert kept.median_error == plain.median_error > 0
    assert kept.is_trusted is plain.is_trusted


def test_a_run_that_begins_where_another_ended_predicts_better_from_the_first_launch(file):
    first = KeptForesight(foresees(file), file)
    simulate("aggregated", steadily(2.2), foresees=first._foresight)
    first._unsaved = 1
    first.close()
    truth = 2.2 / 1.3
    fresh, taught = foresight().step_ms(STEP), foresees(file).step_ms(STEP)
    assert taught / fresh == pytest.approx(truth, rel=0.05)

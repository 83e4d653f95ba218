"""How durations and progress are said."""

from __future__ import annotations

import io
import logging
import re
import time

import pytest
from rich.console import Console

from medpsp.progress import FILE_ONLY, Bar, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.004, "0 s"),
        (0.814, "0.81 s"),
        (3.25, "3.2 s"),
        (9, "9 s"),
        (9.6, "10 s"),
        (45.2, "45 s"),
        (59.7, "1 min"),
        (90, "1 min 30 s"),
        (750, "12 min 30 s"),
        (3599.6, "1 h"),
        (3629, "1 h"),
        (3631, "1 h 1 min"),
        (33027, "9 h 10 min"),
        (90000, "25 h"),
    ],
)
def test_durations_as_people_say_them(seconds: float, text: str):
    assert duration(seconds) == text


def test_a_line_says_hours(caplog: pytest.LogCaptureFixture):
    """Five steps in 25 s, and 5995 are left: 8 h 20 min."""
    with caplog.at_level("INFO", "medpsp"), Bar("train", 6000, "steps") as bar:
        bar.began = time.monotonic() - 25
        bar.advance(5, note="rise loss 0.679")
        logging.getLogger("medpsp")
    (line,) = caplog.messages
    assert line.startswith("train 5/6000 steps, 0.2 steps/s, ETA 8 h 19 min, rise") or (
        line.startswith("train 5/6000 steps, 0.2 steps/s, ETA 8 h 20 min, rise")
    )


def test_one_within_another_says_nothing_where_it_is_short(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "medpsp"):
        with Bar("validate", 9, "slices", inner=True) as bar:
            bar.advance(9)
        assert not caplog.messages
        with Bar("validate", 9, "slices", inner=True) as bar:
            bar.last_line = time.monotonic() - 6
            bar.advance(8)
            bar.advance()
    (line,) = caplog.messages
    assert line.startswith("validate 8/9 slices, ")


def test_a_bar_on_a_terminal_leaves_its_lines_to_the_log_file(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with caplog.at_level("INFO", "medpsp"), Bar("train", 9, "steps") as bar:
        bar.last_line = time.monotonic() - 6
        bar.advance(8)
    assert [hasattr(record, FILE_ONLY) for record in caplog.records] == [True]


def test_a_bar_with_its_note_fits_80_columns(monkeypatch: pytest.MonkeyPatch):
    shown = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    wide = Console(file=shown, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr("medpsp.progress.Console", lambda **_: wide)
    with Bar("rank by noise", 6000, "layers") as bar:
        bar.resume_at(2000)
        bar.began -= 4000
        bar.advance(note="fall loss 0.196, validation Dice 0.035")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in shown.getvalue().split("\n")]
    (line,) = [line for line in lines if "2001/6000" in line]
    assert "2000/6000" in shown.getvalue()
    assert line.endswith("s") or "ETA" in line
    assert "  fall loss 0.196, validation Dice 0.035" in [item.rstrip() for item in lines]

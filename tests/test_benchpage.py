"""The page of comparisons says what the results say, and hides nothing that was missed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.bench import results
from tests.bench.page import KEPT, PAGE, page, rows_of
from tests.bench.results import Row, report

ROWS = (
    Row(label="good | x", value=2.5, least=2, ours="1.0 ms", theirs="2.5 ms"),
    Row(label="slow against SimpleITK", value=1.2, least=2),
    Row(label="large", value=3.0, most=2, unit="MiB"),
    Row(label="disturbed", value=0.1, least=2, disturbed=True),
    Row(label="absent", value=None, least=2, why="no such peer"),
    Row(label="shown", value=7.0),
)


def test_verdicts() -> None:
    found = [row.verdict for row in ROWS]
    assert found[:3] == ["ok", "MISSED", "MISSED"]
    assert found[3].startswith("DISTURBED")
    assert found[4:] == ["no such peer", ""]
    assert Row(label="nan", value=float("nan"), most=1).verdict == "MISSED"
    assert ROWS[2].text.split() == ["large", "3", "MiB", "<=", "2", "MISSED"]


def test_a_page_of_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    report("shards", "convert", ROWS, {"machine": "2 cores"}, ["ours 1.0 ms"])
    report("shards", "random", ROWS[:1], {})
    assert "slow against SimpleITK" in capsys.readouterr().out
    tree = json.loads((tmp_path / "shards.json").read_text())
    assert list(tree) == ["convert", "random"]
    assert [asdict(row) for row in rows_of(tree["convert"])] == [asdict(row) for row in ROWS]
    text = page(tmp_path)
    behind, rest = text.split("## From DICOM to shards")
    missed = [line for line in behind.splitlines() if line.startswith("| convert")]
    assert len(missed) == 2
    assert missed[0].startswith("| convert: slow against SimpleITK | 1.2 | >= 2 | SimpleITK")
    assert missed[1] == "| convert: large | 3 MiB | &lt;= 2 | not known |"
    assert "| good \\| x | 2.5 | 1.0 ms | 2.5 ms | >= 2 | ok |" in rest
    assert "| absent | - |  |  | >= 2 | no such peer |" in rest
    assert "Not run: `make bench-train`." in rest


def test_the_page_is_that_of_the_kept_results() -> None:
    assert PAGE.read_text() == page(KEPT)
    text = PAGE.read_text()
    assert "not known |" not in text.split("## From DICOM to shards")[0]
    assert "Not run:" not in text

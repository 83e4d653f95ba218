"""The page of comparisons says what the results say, and hides nothing that was missed."""

from __future__ import annotations

import json
import re
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.bench import results
from tests.bench.page import CHAPTERS, KEPT, PAGE, UNKNOWN, chapters, page, plain, reason, reasons
from tests.bench.results import ROOT, Missing, Row, paired, report, run_sections

PEERS = ("smp", "train", "export", "shards")
ROWS = (
    Row(label="good | x", value=2.5, least=2, ours="1.0 ms", theirs="2.5 ms", spread="2 to 3"),
    Row(label="slow_one", value=1.2, least=2),
    Row(label="large", value=3.0, most=2, unit="MiB"),
    Row(label="disturbed", value=0.1, least=2, disturbed=True),
    Row(label="absent", value=None, least=2, why="no such peer"),
    Row(label="shown", value=7.0, why="its masks are worse"),
    Row(label="none", value=0.0, most=0.0),
)


def test_verdicts() -> None:
    found = [row.verdict for row in ROWS]
    assert found[:3] == ["ok", "MISSED", "MISSED"]
    assert found[3].startswith("DISTURBED")
    assert found[4:] == ["no such peer", "its masks are worse", "ok"]
    assert Row(label="nan", value=float("nan"), most=1).verdict == "MISSED"
    assert ROWS[2].text.split() == ["large", "3", "MiB", "<=", "2", "MISSED"]


def test_ratios_are_those_of_rounds() -> None:
    slow = paired("x", [1.0, 2.0, 4.0], [3.0, 8.0, 8.0], least=2)
    assert (slow.value, slow.ours, slow.theirs) == (3.0, "2 ms", "8 ms")
    assert slow.spread == "2 to 4"
    assert paired("x", [1.0, 2.0, 4.0], [2.0, 2.0, 2.0], most=1).value == 1.0
    assert paired("x", [], [2.0], most=1).verdict == "not measured"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    report("shards", "convert", ROWS, {"slices": 3}, ["ours 1.0 ms"], tmp_path)
    report("shards", "random", ROWS[1:2], {}, folder=tmp_path)
    for backbone, value in (("resnet18", 2.5), ("convnext_tiny", 1.5)):
        row = Row(label="eager / int8", value=value, least=2)
        facts = {"threads": 1, "only": backbone, "machine": f"that of {backbone}"}
        report("export", f"latency {backbone} OS16, 1 thread", [row], facts, folder=tmp_path)
    return tmp_path


def test_a_file_holds_the_rows(folder: Path) -> None:
    found = chapters(folder)
    assert [section.name for section in found["shards"]] == ["convert"]
    assert [section.name for section in found["reading"]] == ["random"]
    assert tuple(found["shards"][0].rows) == ROWS


def test_a_page_of_what_was_found(folder: Path) -> None:
    text = page(chapters(folder), {"convert: slow*": "because | so"})
    lines = text.splitlines()
    assert "| [From DICOM to shards](#from-dicom-to-shards) |" in text
    assert any(line.endswith("| 6 | 2 | 2 | 2 |") for line in lines)  # wanted, met, missed, none
    lost = text.split("## Where we lose")[1].split("\n## ")[0]
    assert "| convert: slow\\_one **1.2** (≥\u00a02) | because \\| so |" in lost
    assert f"| convert: large **3 MiB** (≤\u00a02) | {UNKNOWN} |" in lost
    assert "good" not in lost
    assert "| good \\| x | 2.5 | 2 to 3 | 1.0 ms | 2.5 ms | ≥\u00a02 | ok |" in lines
    assert "| disturbed | 0.1 |  |  |  | ≥\u00a02 | DISTURBED |" in lines
    assert "| absent | - |  |  |  | ≥\u00a02 | no such peer |" in lines
    assert "### latency OS16, 1 thread" in lines
    assert "|  | resnet18 | convnext\\_tiny |" in lines
    assert "| eager / int8 | 2.5 (≥\u00a02) ok | 1.5 (≥\u00a02) **MISSED** |" in lines
    assert "- threads: 1" in lines
    assert "|  | figure | spread | ours | theirs | wanted |  |" in lines
    assert "|  | figure | wanted |  |" in lines  # nothing stands in the others
    assert "- only, resnet18: resnet18" in lines
    assert "- machine, convnext\\_tiny: that of convnext\\_tiny" in lines
    order = [text.index(f"\n## {title}\n") for title, _, _ in CHAPTERS.values()]
    assert order == sorted(order)
    assert text.index("## Where we lose") < order[0]
    assert text.count("Not run.") == 4


def test_a_section_that_fails_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise Missing("no such peer")

    def broken() -> None:
        raise ValueError("three")

    def works() -> None:
        report("train", "works", ROWS[:1], {}, folder=tmp_path)

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    run_sections("train", {"missing": missing, "works": works})
    with pytest.raises(SystemExit, match=r"^train: failed: broken$"):
        run_sections("train", {"broken": broken, "works": works})
    assert "ValueError: three" in capsys.readouterr().err
    tree = json.loads((tmp_path / "train.json").read_text())
    assert list(tree) == ["missing", "works", "broken"]
    assert tree["missing"]["facts"]["not measured"] == "no such peer"
    assert tree["broken"]["facts"]["not measured"] == "failed with ValueError"


def test_the_page_is_that_of_the_kept_results() -> None:
    assert PAGE.read_text() == page(chapters(KEPT), reasons()), "run python tests/bench/page.py"
    assert "Not run." not in PAGE.read_text()


def test_every_figure_stands_on_the_page() -> None:
    text = PAGE.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [row for sections in chapters(KEPT).values() for s in sections for row in s.rows]
    assert len(rows) > 300
    for row in rows:
        told = (line for line in lines if line.startswith(f"| {plain(row.label)} | "))
        assert any(row.shown in line for line in told), row


def test_every_figure_that_is_missed_has_a_reason() -> None:
    why, found = reasons(), chapters(KEPT)
    places = [
        (f"{section.name}: {row.label}", row)
        for sections in found.values()
        for section in sections
        for row in section.rows
    ]
    missed = [place for place, row in places if row.verdict == "MISSED"]
    assert missed
    assert [place for place in missed if reason(place, why) == UNKNOWN] == []
    told = {part for part in why if any(fnmatchcase(place, part) for place, _ in places)}
    assert set(why) - told == set(), "a reason for a figure that no bench has"


def test_the_page_can_be_read() -> None:
    widths = [
        len(re.findall(r"(?<!\\)\|", line)) - 1
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    assert len(widths) > 100
    assert max(widths) <= 7


def test_results_are_small_and_tell_no_place() -> None:
    for path in KEPT.iterdir():
        text = path.read_text()
        assert len(text) < 200_000
        assert re.findall(r"/(?:tmp|home|root|work|mnt|scratch)/", text) == []


def test_make_bench_goes_on_where_a_bench_fails(tmp_path: Path) -> None:
    """The recipes themselves, with a Python that fails for two of the benches."""
    log, fake = tmp_path / "log", tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase "$1" in *shards.py|*pooling.py) exit 3;; esac\n'
    )
    fake.chmod(0o755)
    (tmp_path / ".ci").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/hashes.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "tests" / "bench").mkdir(parents=True)
    for place in (".venv/bin", *(f".venv-bench/{name}" for name in PEERS)):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "tests" / "bench" / "peers.txt").touch()
    fake.rename(tmp_path / ".venv" / "bin" / "python")
    for ready in (".venv/.ready", ".venv-bench/shards/.ready"):
        (tmp_path / ready).touch()
    done = subprocess.run(
        ["make", "bench"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "bench-train: failed: pooling\n" in done.stdout
    assert "make bench: failed: bench-shards bench-train\n" in done.stdout
    ran = [Path(line.split()[0]).stem for line in log.read_text().splitlines()]
    trained = ("step", "train", "pooling", "augment", "feed", "ranks")
    assert ran == ["shards", *trained, "export", "page"]


def test_peers_of_the_shards_do_not_take_the_others_along() -> None:
    done = subprocess.run(
        [
            "make",
            "--no-print-directory",
            "-n",
            "-W",
            "tests/bench/peers.txt",
            ".venv-bench/shards/.ready",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    removed = [word for word in re.findall(r"rm -rf (\S+)", done.stdout) if "bench" in word]
    assert removed == [".venv-bench/shards"]

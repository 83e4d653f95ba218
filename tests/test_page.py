"""The page of a run and that of several: complete, closed, accessible, and never a traceback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from launch.chain import Told, tell
from launch.cli import app
from launch.comparepage import comparison_page, names_of
from launch.curves import read_curves
from launch.dossier import write_dossier
from launch.plot import BINS, Line, plot, thinned, ticks
from launch.rundir import RunDir
from launch.runfacts import facts_of
from launch.runpage import run_page, write_run_page
from medpsp.config import Config
from medpsp.configio import dump_yaml
from medpsp.errors import CheckpointError, ConfigError
from medpsp.train.board import Board
from shards.index import file_sha256, read_manifest
from tests.test_dossier import known

HOST = "canaryhost7"
STYLE = Path(__file__).resolve().parents[1] / "shards/report.css"
JOBS = """
import sys
from pathlib import Path
from launch.jobs import run_command
sys.exit(max(run_command(name, Path(sys.argv[1]))[0] for name in ("train", "evaluate")))
"""
"""The two jobs as the chain runs them; the first finds nothing left to do."""


@pytest.fixture(scope="module")
def whole(trained: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and evaluated by the chain, and exported; the page is its job's."""
    root = tmp_path_factory.mktemp("page") / "whole"
    shutil.copytree(trained.out, root, symlinks=True)
    run = RunDir.create(trained.model_copy(update={"out": root}))
    for path in run.tensorboard.iterdir():  # their names hold that of the machine
        words = path.name.split(".")
        path.rename(path.with_name(".".join([*words[:4], HOST, *words[-2:]])))
    done = subprocess.run(
        [sys.executable, "-c", JOBS, str(run.config)],
        env={"SLURMD_NODENAME": HOST, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(STYLE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"page: {run.page}" in done.stderr
    assert "Not exported yet" in run.page.read_text()
    facts = known()
    run.export.mkdir()
    run.fp32.write_bytes(b"a model")
    facts["files"][0]["sha256"] = file_sha256(run.fp32)
    facts["model"]["step"] = 20
    write_dossier(run.export, facts)
    write_run_page(root)
    return root


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunDir:
    """A copy that may be damaged."""
    root = tmp_path / "run"
    shutil.copytree(whole, root, symlinks=True)
    shards = (root / "shards").resolve()
    (root / "shards").unlink()
    shutil.copytree(shards, root / "shards")
    return RunDir(root)


def page_of(run: RunDir) -> tuple[str, list[str]]:
    """What `medpsp page` writes, and what it says beside the name of the file."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "page", str(run.root)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run.page}\n"
    return run.page.read_text(), done.stderr.splitlines()


def words_of(page: str) -> str:
    """Without tags and pictures, in single spaces."""
    return " ".join(re.sub("<[^>]*>", " ", page.partition("</style>")[2]).split())


# the whole --------------------------------------------------------------------------------------


def test_the_page_has_what_the_files_say(whole: Path) -> None:
    run, page = RunDir(whole), (whole / "run.html").read_text()
    words = words_of(page)
    scores = json.loads(run.evaluation.read_text())
    for of in scores["classes"].values():
        for key in ("dice", "dice_pooled", "iou"):
            value, low, high = (of[key][end] for end in ("value", "low", "high"))
            assert f"{value:.3f} {low:.3f} to {high:.3f}" in words
    manifest = read_manifest(whole / "shards")
    assert f"{manifest.data_id}" in words
    assert file_sha256(run.config) in words
    assert "20 of 20 steps" in words
    assert "only 1 20 0.003 cosine 100 %" in words
    assert "mobilenetv3_large_100, random weights" in words
    time = "[0-9.]+ (s|min( [0-9]+ s)?)"
    assert re.search(f"train done {time} {time} 0 evaluate done {time}", words)
    for text in ("starts 2", "restarts 1", "ranks 1", "images/s", "peak memory of the process"):
        assert text in words
    # the export: of the dossier
    assert "latency : int8 &lt;slower&gt; here" in words
    assert "int8 QDQ U8S8 liver &lt;left&gt; 0.9912 0.9125 0.9100 -0.0025" in words
    assert "differ by 3.1e-06 at most, over 1 shapes; 3 pixels" in words
    pictures = (whole / "evaluation.html").read_text().count("data:image/png")
    assert page.count("data:image/png") == pictures == 8
    assert "damaged" not in words
    assert "cannot be read" not in words


def test_the_same_folder_gives_the_same_bytes(whole: Path) -> None:
    before = (whole / "run.html").read_bytes()
    assert write_run_page(whole).read_bytes() == before


def test_no_machine_and_no_path_is_told(whole: Path, trained: Config) -> None:
    page = (whole / "run.html").read_text()
    places = (whole, trained.out, trained.data.archive, trained.data.key_file, Path.home())
    for text in (HOST, *map(str, places)):
        assert text not in page
    assert HOST in (whole / "jobs/train.json").read_text()  # it could have been
    config = page.partition("<pre>medpsp")[2]
    assert "burned_in: quarantine" in config
    assert "key_file" not in config


class Checked(HTMLParser):
    """What a closed and accessible page must be, as far as its text shows that."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.ids: list[str] = []
        self.named: list[str] = []
        self.links: list[str] = []
        self.levels: list[int] = []
        self.tables: list[list[str]] = []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {key: text or "" for key, text in attributes}
        assert name not in ("script", "link", "iframe", "object", "form", "base")
        assert not [key for key in given if key.startswith("on")]
        assert given.get("tabindex", "0") == "0"
        if name not in self.VOID:
            self.open.append((name, given))
        if "id" in given:
            self.ids.append(given["id"])
        self.named += given.get("aria-describedby", "").split()
        if name == "a":
            self.links.append(given["href"])
        if name == "img":
            assert given["src"].startswith("data:image/png;base64,")
            assert given["alt"].strip()
        if name == "svg":
            assert given.get("aria-hidden") or (given["role"] == "img" and given["aria-label"])
        if name == "table":
            self.tables.append([])
            assert "scroll" in self.open[-2][1].get("class", "") or given["class"] == "tally"
        if name == "th":
            self.tables[-1].append(given["scope"])
        if re.fullmatch("h[1-6]", name):
            self.levels.append(int(name[1]))
        if given.get("class") == "scroll":
            assert given["tabindex"] == "0"
            assert given["aria-label"]

    def handle_endtag(self, name: str) -> None:
        assert name == self.open.pop()[0], f"<{name}> is closed where another is open"

    def look(self, text: str, folder: Path) -> None:
        """Read all of it."""
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        assert set(self.named) <= set(self.ids)
        for link in self.links:
            assert link[1:] in self.ids if link.startswith("#") else (folder / link).is_file()
        assert self.levels[0] == 1
        assert self.levels.count(1) == 1
        assert all(b - a <= 1 for a, b in zip(self.levels, self.levels[1:], strict=False))
        assert all(self.tables)


def closed(text: str, folder: Path) -> Checked:
    plain = re.sub("data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"(?i)https?:|url\(|@import|src=\"(?!\")", plain)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert "default-src 'none'" in text
    found = Checked()
    found.look(text, folder)
    return found


def test_the_page_is_closed_and_accessible(whole: Path) -> None:
    found = closed((whole / "run.html").read_text(), whole)
    assert {"data", "splits", "curves", "scores", "cases", "export", "cost"} <= set(found.ids)
    assert {link for link in found.links if not link.startswith("#")} == {
        *("evaluation.html", "evaluation.csv", "export/dossier.html"),
    }
    closed((whole / "evaluation.html").read_text(), whole)


def test_colours_can_be_read_in_light_and_in_dark() -> None:
    def luminance(colour: str) -> float:
        text = colour.lstrip("#")
        text = "".join(c * 2 for c in text) if len(text) == 3 else text
        parts = [int(text[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        lines = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), lines, strict=True))

    def contrast(one: str, other: str) -> float:
        low, high = sorted(luminance(c) for c in (one, other))
        return (high + 0.05) / (low + 0.05)

    assert contrast("#000", "#fff") == pytest.approx(21)
    light, dark = (
        dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]+)", block))
        for block in re.findall(r":root \{([^}]*)\}", STYLE.read_text())
    )
    for colours in (light, dark):
        for name in ("text", "quiet", "fill", "mark"):
            for ground in ("ground", "card"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        lines = [value for name, value in colours.items() if re.fullmatch("c[0-9]", name)]
        assert len(lines) == len(set(lines)) == 8
        assert min(contrast(line, colours["card"]) for line in lines) >= 3


# what is missing --------------------------------------------------------------------------------


def test_a_run_of_nothing_yet_is_a_line_for_each_part(trained: Config, tmp_path: Path) -> None:
    run = RunDir.create(trained.model_copy(update={"out": tmp_path / "new"}))
    run.jobs.mkdir()  # begun, and no more
    page, said = page_of(run)
    assert said == []
    closed(page, run.root)
    for line in ("No shards yet", "Not trained yet", "No curves yet", "Not evaluated yet",
                 "No pictures", "Not exported yet", "No job was timed"):  # fmt: skip
        assert line in page
    assert "Worth a look" not in page


def without(run: RunDir, *places: str) -> str:
    for place in places:
        path = run.root / place
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return words_of(write_run_page(run.root).read_text())


def test_each_missing_part_leaves_the_others(run: RunDir) -> None:
    words = without(run, "export")
    assert "Export Not exported yet: medpsp export does that." in words
    assert "Expected calibration error" in words
    words = without(run, "evaluation.html")
    assert "Worst, median and best case No pictures" in words
    words = without(run, "evaluation.json")
    assert "Scores Not evaluated yet" in words
    assert re.search("Validation Dice .* lesion [0-9.]+ at step 20", words)
    words = without(run, "tensorboard", "jobs")
    assert "20 of 20 steps" in words  # the checkpoints know it
    assert "Nothing is known of the cost of training." in words
    words = without(run, "shards")
    assert "Data No shards yet" in words


def test_a_best_step_long_ago_is_worth_a_look(run: RunDir) -> None:
    """`train longer` would be wrong advice there."""
    for name, step in (("best", 40), ("step-00000120", 120)):
        meta = run.checkpoints / name / "meta.json"
        meta.parent.mkdir(exist_ok=True)
        told = json.loads((run.checkpoints / "best/meta.json").read_text())
        meta.write_text(json.dumps(told | {"step": step}))
    words = words_of(write_run_page(run.root).read_text())
    assert "Validation was best at step 40 of 120 that are done: no better since, so" in words


def test_training_that_goes_on_is_said(run: RunDir, trained: Config) -> None:
    tree = trained.model_dump(mode="json") | {"out": run.root}
    tree["train"]["stages"] = [{"name": "only", "steps": 50, "lr": 3e-3}]
    RunDir.create(Config.model_validate(tree))
    tell(run, "train", Told(state="running", job="7", node=HOST, restarts=2, began=1.0))
    words = words_of(write_run_page(run.root).read_text())
    assert "20 of 50 steps, best validation Dice" in words
    assert "not at its end yet, the job is running" in words
    assert re.search("train running – .+ 2 ", words)
    tree["train"]["stages"] = [{"name": "only", "epochs": 2, "lr": 3e-3}]
    RunDir.create(Config.model_validate(tree))
    assert "20 of 20 steps" in words_of(write_run_page(run.root).read_text())
    for path in run.checkpoints.glob("*/meta.json"):
        path.unlink()
    assert "20 of an unknown number of steps" in words_of(write_run_page(run.root).read_text())


@pytest.mark.usefixtures("own_handlers")
def test_a_job_by_hand_leaves_the_page_as_the_chain_does(run: RunDir, trained: Config) -> None:
    RunDir.create(trained.model_copy(update={"out": run.root}))
    marker = run.logs / "evaluate.failed"
    marker.write_text("no memory")
    tell(run, "evaluate", Told(state="failed", job="", node=HOST, restarts=0, code=1))
    assert "evaluate failed" in words_of(write_run_page(run.root).read_text())
    done = CliRunner().invoke(app, ["evaluate", str(run.config)], catch_exceptions=False)
    assert done.exit_code == 0
    words = words_of(run.page.read_text())
    assert "evaluate failed" not in words
    assert re.search("evaluate done [0-9.]+ s", words)
    assert not marker.exists()
    shutil.rmtree(run.checkpoints)
    with pytest.raises(CheckpointError):
        CliRunner().invoke(app, ["evaluate", str(run.config)], catch_exceptions=False)
    assert "evaluate failed: logs/evaluate.failed says why." in words_of(run.page.read_text())
    assert marker.read_text().strip()
    for path in (run.page, marker, run.jobs / "evaluate.json"):
        path.unlink()
    with pytest.raises(CheckpointError):  # where there is no page, none is made of a failure
        CliRunner().invoke(app, ["evaluate", str(run.config)], catch_exceptions=False)
    assert not run.page.exists()


def test_what_does_not_belong_together_is_said(run: RunDir, trained: Config) -> None:
    tree = trained.model_dump(mode="json") | {"out": run.root}
    tree["data"]["gaps"] = "fill"
    RunDir.create(Config.model_validate(tree))
    scores = json.loads(run.evaluation.read_text()) | {"step": 10}
    facts = json.loads(run.export_report.read_text())
    facts["model"]["weights"] = "of another network"
    run.export_report.write_text(json.dumps(facts))
    run.evaluation.write_text(json.dumps(scores))
    run.fp32.write_bytes(b"another model")
    meta = run.checkpoints / "best/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"content": "other", "step": 30}))
    tell(run, "export", Told(state="failed", job="", node=HOST, restarts=0, code=1, reason="/x"))
    words = words_of(write_run_page(run.root).read_text())
    for line in (
        "made with other data.gaps.",
        "shards have changed since the newest checkpoint",
        "The scores are of step 10, the best one is 30 now.",
        "The exported files are of step 20, the best one is 30 now.",
        "The scores are of other weights than the exported files.",
        "export/model.onnx: is not what the dossier was made of.",
        "export failed: logs/export.failed says why.",
        "export failed, code 1",
    ):
        assert line in words
    run.fp32.unlink()
    assert "export/model.onnx: is not there." in words_of(write_run_page(run.root).read_text())


# what is damaged --------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def written(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


def changed(**fields: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields)) and None


DAMAGED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "scores cut": ("evaluation.json", cut, r"evaluation\.json: damaged \(not JSON\); run `medpsp"),
    "scores of another kind": (
        "evaluation.json", written("[]"), r"evaluation\.json: damaged \(not JSON\)",
    ),
    "a score that is none": (
        "evaluation.json", changed(classes={"liver": {"dice": 1}}),
        r"evaluation\.json: damaged \(classes\.liver\.dice\)",
    ),
    "pictures": ("evaluation.html", flipped, r"evaluation\.html: is not what was written"),
    "dossier": ("export/dossier.json", cut, r"export/dossier\.json: damaged \(not JSON\)"),
    "a dossier without digests": (
        "export/dossier.json", changed(files=[{"name": "model.onnx"}]),
        r"export/dossier\.json: damaged \(files\.0\.variant\)",
    ),
    "dossier in bytes": (
        "export/dossier.json", lambda path: path.write_bytes(b"\xff\x00") and None,
        r"export/dossier\.json: damaged \(not JSON\)",
    ),
    "a job": ("jobs/train.json", written('{"state": 3}'), r"jobs/train\.json: damaged \(state\)"),
    "a checkpoint": (
        "checkpoints/best/meta.json", written("{}"), r"checkpoints/best/meta\.json: damaged",
    ),
    "manifest": ("shards/manifest.json", flipped, r"shards: manifest\.json .*`medpsp check"),
    "index": ("shards/index.parquet", cut, r"shards: index\.parquet cannot be read .*"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_it(
    name: str, run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    place, damage, line = DAMAGED[name]
    damage(run.root / place)
    caplog.set_level("WARNING", "medpsp")
    page = write_run_page(run.root).read_text()
    first = caplog.messages[0]
    assert re.match(line, first), first
    assert str(run.root) not in first
    assert first.replace("`", "") in words_of(page).replace("&#x27;", "'")
    closed(page, run.root)
    assert len({message.split(":")[0] for message in caplog.messages}) <= 2  # a link names it, too


def test_event_files_that_cannot_be_read(run: RunDir) -> None:
    before = facts_of(*_facts(run)).curves
    files = sorted(run.tensorboard.iterdir())
    cut(files[0])
    page, said = page_of(run)
    assert said == []  # as if the process had been killed: its points end there
    assert "No curves yet" in page or "Validation Dice" in page
    for path in files:
        path.write_bytes(b"no record of events" * 9)
    page, said = page_of(run)
    assert said == ["tensorboard: nothing can be read of the event files"]
    assert HOST not in page
    assert before


def _facts(run: RunDir) -> tuple[Config, RunDir]:
    from launch.runfacts import config_of

    return config_of(run.root)


def test_a_damaged_configuration_is_an_error_of_one_line(run: RunDir) -> None:
    cut(run.config)
    for place in (run.root, run.root / "shards"):
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", "page", str(place)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "config" in done.stderr


# curves -----------------------------------------------------------------------------------------


def test_curves_are_those_that_tensorboard_shows(tmp_path: Path) -> None:
    """Two ranks to step 8, killed; one goes on from step 5."""
    first = Board(tmp_path, 0)
    for step in range(8):
        first.scalars(step, {"train/loss": 1.0 / (1 + step), "perf/ranks": 2.0})
    first.close()
    second = Board(tmp_path, 5)
    for step in range(5, 7):
        second.scalars(step, {"train/loss": 9.0})
    second.close()
    found = read_curves(tmp_path, ranks=4)
    assert [step for step, _ in found.of("train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert [value for _, value in found.of("train/loss")][4:] == [pytest.approx(0.2), 9.0, 9.0]
    assert [start.ranks for start in found.starts] == [2, 4]
    assert all(start.seconds >= 0 for start in found.starts)
    assert found.last == 7
    anew = tmp_path / "anew"
    shutil.copytree(tmp_path, anew)
    third = Board(anew, 0)  # its checkpoints were deleted
    third.scalars(1, {"train/loss": 3.0, "perf/ranks": 1.0})
    third.close()
    assert [start.ranks for start in read_curves(anew, 4).starts] == [1]
    shutil.rmtree(anew)
    theirs = EventAccumulator(str(tmp_path))
    theirs.Reload()
    for tag in ("train/loss", "perf/ranks"):
        assert found.of(tag) == [(e.step, e.value) for e in theirs.Scalars(tag)]
    assert read_curves(tmp_path / "nothing", 1).starts == ()


def test_long_curves_keep_their_lowest_and_highest_points() -> None:
    points = [(step, 0.5) for step in range(1, 100_001)]
    points[777] = (778, 0.0)
    points[50_000] = (50_001, 7.0)
    kept = thinned(points)
    assert len(kept) <= 2 * BINS
    assert {(778, 0.0), (50_001, 7.0)} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:200]) == points[:200]


def test_ticks_are_round() -> None:
    assert ticks(1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.743) == pytest.approx([0, 0.2, 0.4, 0.6])
    assert ticks(400, 4) == pytest.approx([0, 100, 200, 300, 400])
    assert ticks(1e-3) == pytest.approx([0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    for top in (1e-9, 0.031, 3.0, 12345.0):
        assert 1 < len(ticks(top)) <= 6


def test_a_plot_by_hand() -> None:
    lines = [Line("a <b>", [(0, 0.0), (10, 1.0)]), Line("none", []), Line("one", [(10, 0.5)])]
    marks = [("warm", 0), ("much too near", 1), ("full", 5), ("beyond", 11)]
    text = plot("x", "A plot", lines, marks, top=1.0)
    # x is 40 to 332, y is 160 (value 0) to 20 (value 1)
    assert '<path d="M40.0 160.0L332.0 20.0" class="c0">' in text
    assert '<circle cx="332.0" cy="90.0" r="2.2" class="c1">' in text
    assert text.count('class="stage"') == 3
    assert "a &lt;b&gt;" in text
    assert "<b>" not in text
    assert ">warm<" in text
    assert ">full<" in text
    assert "much too near" not in text  # no room
    assert "0 at step 0, 1 at step 10; lowest 0 at 0, highest 1 at 10" in text
    assert '<td class="n">10</td><td class="n">1</td><td class="n">0.5</td>' in text
    assert "Nothing was written yet." in plot("x", "A plot", [Line("none", [])])
    short = plot("x", "A plot", [Line("zero", [(1, 0.0), (2, 0.0)])])
    assert re.findall(r'y="175.0" text-anchor="middle">(.)<', short) == ["0", "1", "2"]


# several runs -----------------------------------------------------------------------------------


def test_runs_side_by_side(whole: Path, run: RunDir, trained: Config, tmp_path: Path) -> None:
    tree = trained.model_dump(mode="json") | {"out": run.root, "seed": 5}
    tree["train"]["stages"][0]["lr"] = 0.004
    RunDir.create(Config.model_validate(tree))
    scores = json.loads(run.evaluation.read_text())
    for of in scores["classes"].values():
        of["dice"]["value"] = 0.999
    run.evaluation.write_text(json.dumps(scores))
    bare = RunDir.create(trained.model_copy(update={"out": tmp_path / "bare"}))
    bare.checkpoints.mkdir()
    words = ["compare", *map(str, (whole, run.root, bare.root)), "--html", str(tmp_path / "c.html")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "c.html").read_text()
    found = closed(page, tmp_path)
    assert {"runs", "scores", "curves", "settings"} <= set(found.ids)
    text = words_of(page)
    assert re.search("liver run test, 2 patients, step 20 0.999 .* liver whole test", text)
    assert "bare : Not evaluated yet: medpsp evaluate does that." in text
    assert "bare : No curves yet" in text
    settings = text.partition("What was set otherwise key run whole bare ")[2]
    assert settings.startswith("steps done 20 20 0 train.stages.only ")
    assert "lr 0.004" in settings
    assert "seed 5 0 0" in settings
    assert "train.steps" not in settings  # 20 in all of them, whatever the preset would make
    assert "of that the mean of the classes but the background" in text
    assert page.count('class="c1"') >= 2  # the second line of both plots
    assert str(tmp_path) not in page
    assert page == comparison_page([run.root, whole, bare.root])
    assert "Nothing but paths." in comparison_page([whole, whole])
    with pytest.raises(ConfigError, match="so it is no run of medpsp"):
        comparison_page([tmp_path])


def test_equal_names_are_told_apart() -> None:
    assert names_of([Path("/x/a"), Path("/x/b"), Path("/y/a")]) == ["a (1)", "b", "a (2)"]


def test_text_of_a_configuration_is_escaped(trained: Config, tmp_path: Path) -> None:
    tree = trained.model_dump(mode="json") | {"out": tmp_path / "<i>run"}
    tree["data"]["classes"] = ["background", "<script>x", "b", "c"]
    tree["export"]["intended_use"] = "</pre><script>"
    run = RunDir.create(Config.model_validate(tree))
    page = run_page(facts_of(*_facts(run)))
    assert "<script" not in page
    assert "&lt;script&gt;x" in page
    assert "<i>run" not in page
    closed(page, run.root)
    assert dump_yaml(_facts(run)[0]) == run.config.read_text()

"""The run folder and the shipped configurations."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.rundir import RunDir, data_folder, find_config, open_run, shipped_configs
from medpsp.config import Config
from medpsp.configio import load_config
from medpsp.errors import ConfigError, LaunchError

ROOT = Path(__file__).resolve().parent.parent


def config(out: Path, seed: int = 0) -> Config:
    data = {"archive": "archive", "classes": ["background", "organ"]}
    return Config.model_validate({"out": out, "seed": seed, "data": data})


def test_the_resolved_configuration_lies_in_the_run_and_reads_back_equal(tmp_path: Path):
    made = config(tmp_path / "deep" / "run", seed=7)
    run = RunDir.create(made)
    assert run.config == tmp_path / "deep/run/config.yaml"
    assert load_config(run.config) == made
    assert run.logs.is_dir()


def test_every_path_lies_below_the_out_folder(tmp_path: Path):
    run = RunDir(tmp_path)
    names = [n for n, v in vars(RunDir).items() if isinstance(v, property)]
    assert len(names) == len({getattr(run, n) for n in names}) == 13
    assert all(getattr(run, n).is_relative_to(tmp_path) for n in names)
    assert [f.name for f in fields(RunDir)] == ["root", "export_name"]


def test_a_run_that_was_moved_or_copied_is_not_taken_for_where_it_was(tmp_path: Path):
    first, other = RunDir.create(config(tmp_path / "run")), tmp_path / "copy"
    first.checkpoints.mkdir()
    (tmp_path / "link").symlink_to(first.root)
    assert open_run(str(tmp_path / "link/config.yaml"), ())[1] == first
    shutil.copytree(first.root, other)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"says out: {first.root}; give out={other} with it"):
            open_run(str(other / "config.yaml"), ())
        if first.root.exists():
            shutil.rmtree(first.root)
    assert open_run(str(other / "config.yaml"), (f"out={other}",))[1].root == other
    assert not first.root.exists()


def test_a_command_that_does_not_train_leaves_how_the_run_was_trained(tmp_path: Path):
    """Given the file of before again, without the words of training."""
    file = tmp_path / "my.yaml"
    file.write_text(
        f"{{out: {tmp_path / 'run'}, data: {{archive: a, classes: [background, organ]}}}}", "utf-8"
    )
    words = ("train.steps=1200", "train.ranks=2", "seed=5", "model.backbone=convnext_tiny")
    words = (*words, "loss.dice=0.4")
    trained, run = open_run(str(file), words)
    more = "data.crosswalk=../names.jsonl"
    assert load_config(run.config) == trained
    assert open_run(str(file), (more,), trains=False)[0].train.ranks == 1
    assert load_config(run.config).train.ranks == 1  # nothing is trained yet
    open_run(str(file), words)
    run.checkpoints.mkdir()
    open_run(str(file), (more,), trains=False)
    found = load_config(run.config)
    assert (found.train, found.model, found.seed) == (trained.train, trained.model, 5)
    assert found.loss == trained.loss
    assert found.data.crosswalk is not None
    open_run(str(file), ())
    assert load_config(run.config).train.ranks == 1
    run.config.write_text("of: another version", "utf-8")
    assert open_run(str(file), (), trains=False)[0] == load_config(run.config)


def test_an_equal_configuration_is_not_written_again(tmp_path: Path):
    run = RunDir.create(config(tmp_path))
    before = run.config.stat()
    RunDir.create(config(tmp_path))
    after = run.config.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_changed_configuration_never_shows_half_to_who_reads_it(tmp_path: Path):
    """Ranks start at once: one may read while another writes."""
    run = RunDir.create(config(tmp_path, seed=1))
    whole = run.config.read_text()
    with run.config.open() as reader:
        RunDir.create(config(tmp_path, seed=2))
        assert reader.read() == whole  # the old file, to its end
    assert load_config(run.config).seed == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "logs"]


def test_an_out_folder_that_cannot_be_made_is_an_error_with_the_reason(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"^out .*/file/run: cannot be written \(Not a dir"):
        RunDir.create(config(tmp_path / "file" / "run"))


def test_log_lines_are_appended_to_the_file_of_the_command(tmp_path: Path):
    run = RunDir.create(config(tmp_path))
    logger = logging.getLogger("medpsp")
    before = list(logger.handlers)
    try:
        run.log_to("shards")
        logger.warning("forty slices")
        assert (run.logs / "shards.log").read_text().endswith(" forty slices\n")
    finally:
        for handler in set(logger.handlers) - set(before):
            logger.removeHandler(handler)
            handler.close()


def test_shipped_configurations_are_found_by_name_and_are_valid():
    names = shipped_configs()
    assert "demo" in names
    assert names == sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
    assert find_config("demo") == ROOT / "configs" / "demo.yaml"
    assert data_folder("slurm") == ROOT / "slurm"


def test_a_path_is_taken_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("a file of that name\n")
    assert find_config("demo") == Path("demo")


def test_an_unknown_configuration_names_the_near_miss_or_all(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^config 'dmeo': .*did you mean 'demo'\?"):
        find_config("dmeo")
    with pytest.raises(ConfigError, match=r"shipped: .*demo"):
        find_config(str(tmp_path / "nothing.yaml"))
    with pytest.raises(ConfigError, match="no such file"):
        find_config(str(tmp_path))  # a folder


def test_missing_shipped_files_say_how_to_get_them():
    with pytest.raises(LaunchError, match="nonsense: shipped files not found"):
        data_folder("nonsense")


def test_a_command_that_failed_takes_away_what_it_made(tmp_path: Path):
    """In a process of its own: a lock goes with its process."""
    code = (
        "import sys; from pathlib import Path; from launch.rundir import RunDir, open_run\n"
        "from launch.traces import remove_traces\n"
        "file, out, extra, line = sys.argv[1:]\n"
        "_, run = open_run(file, (f'out={out}',)); run.log_to('train')\n"
        "extra and (run.root / extra).parent.mkdir(exist_ok=True)\n"
        "extra and (run.root / extra).write_text('')\n"
        "remove_traces(line.format(run=run.root))"
    )
    file, out = tmp_path / "c.yaml", tmp_path / "runs/deep/run"
    file.write_text("data: {archive: a, classes: [x, y]}\n")

    def fails(extra: str, line: str = "failed") -> None:
        command = [sys.executable, "-c", code, str(file), str(out), extra, line]
        subprocess.run(command, check=True)

    for extra in ("", "logs/train.failed", "jobs/train.json"):
        fails(extra)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml"], extra
    (tmp_path / "runs").mkdir()
    fails("")
    assert list((tmp_path / "runs").iterdir()) == []  # it was there before
    for extra, line in (("shards/plan", "failed"), ("notes.txt", "failed"), ("", "see {run}/logs")):
        fails(extra, line)
        assert (out / "logs/train.log").is_file()
        assert not extra or (out / extra).is_file()
        fails("")
        assert (out / "config.yaml").is_file()  # of an earlier command
        shutil.rmtree(out)


@pytest.mark.parametrize("command", ["page", "compare"])
def test_a_folder_in_which_no_run_has_begun_is_refused(tmp_path: Path, command: str):
    run = RunDir.create(config(tmp_path / "run"))
    done = CliRunner().invoke(app, [command, str(run.root)])
    assert isinstance(done.exception, ConfigError)
    assert "no run has begun there" in str(done.exception)
    assert not run.page.exists()
    run.checkpoints.mkdir()
    assert CliRunner().invoke(app, [command, str(run.root)]).exit_code == 0


def test_open_run_applies_overrides_before_it_makes_the_folder(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {archive: a, classes: [x, y]}\n")
    made, run = open_run(str(file), (f"out={tmp_path / 'run'}", "seed=3"))
    assert (made.seed, run.root) == (3, tmp_path / "run")
    with pytest.raises(ConfigError):
        open_run(str(file), (f"out={tmp_path / 'other'}", "seed=-1"))
    assert not os.path.exists(tmp_path / "other")

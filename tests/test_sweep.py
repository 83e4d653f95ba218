"""Sweeps, tables of runs, and what scaling is calculated from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from launch.chain import Told, depends_on, tell, told_by
from launch.cli import app
from launch.compare import (
    COLUMNS,
    compare,
    comparison_table,
    comparison_text,
    scored_alike,
    show_comparison,
)
from launch.plan import JobSpec, plan_jobs
from launch.rundir import RunDir, open_run
from launch.scale import bottleneck, calculated_table, efficiency, measured_table, rate
from launch.sweep import members, open_members, own_part, scale_members, shared_part, write_table
from medpsp.config import Config
from medpsp.configio import load_config
from medpsp.errors import ConfigError, LaunchError


def config(out: Path) -> Config:
    return Config.model_validate(
        {"out": out, "data": {"archive": out / "archive", "classes": ["background", "organ"]}}
    )


def test_members_are_all_combinations():
    found = members(["model.backbone=resnet18,timm/test_resnet", "train.size=[64, 64],[32, 96]"])
    assert [name for name, _ in found] == [
        "backbone=resnet18_size=-64-64-",
        "backbone=resnet18_size=-32-96-",
        "backbone=timm-test_resnet_size=-64-64-",
        "backbone=timm-test_resnet_size=-32-96-",
    ]
    assert found[1][1] == ("model.backbone=resnet18", "train.size=[32, 96]")


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ([], "nothing to vary"),
        (["seed"], "expected KEY=A,B"),
        (["seed="], "expected KEY=A,B"),
        (["seed=[1"], "expected KEY=A,B"),
        (["data.colour=grey,keep"], "all members share shards"),
        (["data={colour: grey}"], "all members share shards"),
        (["seed=2024-13-45"], "expected KEY=A,B"),
        (["seed=1,1"], "two members have the same values"),
        (["seed=" + ",".join(map(str, range(1001)))], "1001 members, at most 1000"),
    ],
)
def test_what_makes_no_sweep_is_one_line(over: list[str], words: str):
    with pytest.raises(ConfigError, match=words) as caught:
        members(over)
    assert "\n" not in str(caught.value)


def test_members_share_the_shards_and_nothing_else(tmp_path: Path):
    base = RunDir.create(config(tmp_path / "base"))
    (base.root / "shards").mkdir()
    (base.root / "shards/manifest.json").write_text("x")
    with pytest.raises(ConfigError, match="unknown backbone 'nonsense'"):
        open_members((str(base.config), ()), base, members(["model.backbone=resnet18,nonsense"]))
    assert not (base.root / "sweep").exists()
    opened = open_members((str(base.config), ()), base, members(["seed=1,2"]))
    again = open_members((str(base.config), ()), base, members(["seed=1,2"]))
    assert [run for _, run in opened] == [run for _, run in again]
    assert [member.seed for member, _ in opened] == [1, 2]
    assert (opened[0][1].root / "shards/manifest.json").read_text() == "x"
    assert opened[0][0].data == config(tmp_path / "base").data


def test_a_sweep_leaves_what_its_base_says_of_its_own_training(tmp_path: Path):
    base = RunDir.create(config(tmp_path / "base"))
    (base.checkpoints / "step-00000001").mkdir(parents=True)
    before = base.config.read_bytes()
    given = str(base.config), ("train.batch_size=2",)
    _, folder = open_run(*given, trains=False)
    (member,) = open_members(given, folder, members(["seed=1"]))
    assert base.config.read_bytes() == before
    assert (member[0].train.batch_size, member[0].seed) == (2, 1)
    assert load_config(member[1].config) == member[0]

    def refuse(planned: Config) -> None:
        if planned.seed == 2:  # the first one is not written either
            raise ConfigError("not this one")

    other = given[0], ("train.batch_size=4",)
    with pytest.raises(ConfigError, match="not this one"):
        open_members(other, folder, members(["seed=1,2"]), refuse=refuse)
    assert load_config(member[1].config) == member[0]


def test_scale_times_what_the_command_asks_for_in_a_folder_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = RunDir.create(config(tmp_path / "base"))
    (base.checkpoints / "step-00000001").mkdir(parents=True)
    before, timed = base.config.read_bytes(), list[Config]()

    def submit(_: object, run: RunDir) -> None:
        timed.append(load_config(run.config))

    monkeypatch.setattr("launch.local.submit_plan", submit)
    words = ["model.backbone=convnext_tiny", "train.batch_size=6"]
    done = CliRunner().invoke(app, ["scale", str(base.config), *words, "--ranks", "2"])
    assert "nothing was measured" in str(done.exception)
    (one,) = timed
    assert (one.model.backbone, one.train.batch_size) == ("convnext_tiny", 12)
    assert base.config.read_bytes() == before


def test_members_have_to_fit_a_cluster_and_their_base_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, sent = RunDir.create(config(tmp_path / "base")), list[str]()
    profile = tmp_path / "site.yaml"
    profile.write_text("ranks_per_node: 2\n")

    def submit(plan: tuple[JobSpec, ...], *_: object) -> None:
        sent.extend(job.name for job in plan)
        raise LaunchError("nothing is sent")

    monkeypatch.setattr("launch.submit.submit_cluster", submit)
    words = ["sweep", str(base.config), "train.ranks=3", "train.batch_size=12"]
    words += ["--cluster", str(profile), "--over"]
    done = CliRunner().invoke(app, [*words, "train.ranks=3,4"])
    assert "train.ranks 3: the profile has 2 on a node" in str(done.exception)
    assert not (base.root / "sweep").exists()
    done = CliRunner().invoke(app, [*words, "train.ranks=2,4"])
    assert "nothing is sent" in str(done.exception)
    assert sent == ["plan", "convert", "publish", "check"]


def test_a_member_waits_for_shards_that_are_being_made(tmp_path: Path):
    chosen = config(tmp_path)
    plan, run = plan_jobs(chosen), RunDir(tmp_path)
    assert [job.name for job in shared_part(plan)] == ["shards", "check"]
    own = own_part(plan, chosen, run, ["shards", "check"])
    assert [(job.name, job.after) for job in own] == [
        ("train", ("check",)),
        ("evaluate", ("train",)),
        ("export", ("evaluate",)),
    ]
    assert own_part(plan, chosen, run)[0].after == ()
    done = Told(state="done", job="", node="a", restarts=0, digest=depends_on(chosen, "train"))
    tell(run, "train", done)
    (run.checkpoints / "best").mkdir(parents=True)
    assert [job.name for job in own_part(plan, chosen, run)] == ["evaluate", "export"]


def scores(dice: float) -> dict[str, Any]:
    """An ``evaluation.json`` of one class."""

    def of(value: float | None) -> dict[str, float | None]:
        return {"value": value, "low": None, "high": None}

    same = dict.fromkeys(("dice", "dice_pooled", "dice_constant_mask", "iou"), of(dice))
    states = dict.fromkeys(("present", "missed", "invented", "absent"), 0)
    organ = {**same, "hd95_mm": of(None), "nsd": of(0.5), **states}
    return {
        **{"split": "test", "patients": 3, "cases": 3, "slices": 12, "step": 7},
        **{"classes": {"organ": organ}, "calibration": {"ece": of(0.1)}, "settings": {"nsd_mm": 2}},
    }


def scored(root: Path, dice: float | None) -> Path:
    run = RunDir.create(config(root))
    if dice is not None:
        run.evaluation.write_text(json.dumps(scores(dice)))
    return run.root


def test_a_narrow_terminal_cuts_no_figure(capsys: pytest.CaptureFixture[str]):
    """A pipe counts as one of 80 columns."""
    name = "mobilenetv3_large_100"
    figures = ("0", "6000", "0.932", "131.938", "0.813", "0.997", "refused")
    Console(width=80).print(comparison_table([(f"backbone={name}", name, *figures)]))
    said = capsys.readouterr().out
    assert all(f" {figure}" in said for figure in figures)
    assert "…" not in said


def test_where_a_table_has_no_room_each_run_has_lines_of_its_own(
    capsys: pytest.CaptureFixture[str],
):
    rows = [(n, "mobilenetv3_large_100", "0", "6", *["0.9"] * 5) for n in ("a" * 30, "b" * 24)]
    for width, table in ((80, True), (60, False), (20, False)):
        show_comparison(rows, Console(width=width))
        said = capsys.readouterr().out
        assert ("┃" in said) == table
        assert max(map(len, said.splitlines())) <= width
        assert table or "".join(said.split()).count("backbonemobilenetv3_large_100") == 2


def test_the_best_run_comes_first(tmp_path: Path):
    roots = [scored(tmp_path / n, dice) for n, dice in (("a", 0.5), ("b", None), ("c", 0.75))]
    rows = compare(roots)
    assert [row[0] for row in rows] == ["c", "a", "b"]
    assert rows[0] == ("c", "resnet18", "0", "7", "0.750", "-", "0.500", "-", "-")
    assert comparison_text(rows).splitlines()[0] == f"| {' | '.join(COLUMNS)} |"
    with pytest.raises(ConfigError, match="so it is no run of medpsp"):
        compare([tmp_path])
    for root in (roots[0], roots[2]):
        found = RunDir(root).evaluation
        found.write_text(json.dumps({**json.loads(found.read_text()), "held_out": ["one"]}))
    assert scored_alike(roots)
    found = RunDir(roots[0]).evaluation
    found.write_text(json.dumps({**json.loads(found.read_text()), "held_out": ["another"]}))
    assert not scored_alike(roots)
    assert scored_alike(roots[:2])  # the second is not scored
    known = json.loads(found.read_text())
    known.pop("held_out")  # by an earlier version
    found.write_text(json.dumps(known))
    assert scored_alike(roots)
    (tmp_path / "base/sweep").mkdir(parents=True)
    for root in roots:
        root.rename(tmp_path / "base/sweep" / root.name)
    assert write_table(tmp_path / "base").read_text() == comparison_text(rows)


def found(ranks: int, step: float, data: float = 0.0, reduce: float = 0.0) -> dict[str, Any]:
    return {
        "backbone": "resnet18",
        "ranks": ranks,
        "batch": 8 * ranks,
        "step_s": step,
        "data_s": data,
        "reduce_s": reduce,
        "gradient_bytes": 50_000_000,
    }


def test_a_member_that_fails_leaves_the_others_their_turn(made: Config, tmp_path: Path):
    """Also one whose job finds the configuration wrong, which ends a run."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "shards").symlink_to(made.shards)
    tree = made.model_dump(mode="json")
    base = Config.model_validate({**tree, "out": out})
    run = RunDir.create(base)
    for name in ("shards", "check"):
        told = Told(state="done", job="", node="", restarts=0, digest=depends_on(base, name))
        tell(run, name, told)
    over = ("--over", "model.backbone=timm/no_such,timm/nor_this")
    done = CliRunner().invoke(app, ["sweep", str(run.config), *over])
    assert isinstance(done.exception, ConfigError), done.output
    assert str(done.exception).startswith("backbone=timm-no_such: train: ")
    for name in ("no_such", "nor_this"):
        member = told_by(RunDir(out / "sweep" / f"backbone=timm-{name}"), "train")
        assert member
        assert (member.state, member.code) == ("failed", 2)
    assert "nor_this" in (out / "sweep/table.md").read_text()


def test_scaling_by_hand():
    assert rate(found(2, 0.3, data=0.1)) == pytest.approx(40)
    assert bottleneck(found(1, 0.8, data=0.2)) == "data"
    assert bottleneck(found(2, 1.0, reduce=0.3)) == "all-reduce"
    assert bottleneck(found(2, 1.0, reduce=0.1)) == "compute"
    # 8 GPUs: 2 x 7/8 x 50 MB over 1 GB/s is 87.5 ms beside a step of 100
    assert efficiency(found(1, 0.1), 8, 1.0) == pytest.approx(0.1 / 0.1875)
    assert efficiency(found(1, 0.1), 512, 1e6) > 0.99
    some = [found(2, 0.125, reduce=0.02), found(1, 0.1)]
    assert [c for c in measured_table(some).columns[3].cells] == ["100%", "80%"]
    assert "2 (n - 1) / n" in str(calculated_table(some, 12.5).caption)


def test_pieces_of_training_for_scale(tmp_path: Path):
    base = config(tmp_path)
    found = scale_members(base, "1,4", "all")
    assert len(found) == 8
    name, words = scale_members(base, "4", "")[0]
    assert name == "resnet18_4"
    assert f"train.batch_size={4 * base.train.batch_size}" in words
    with pytest.raises(ConfigError, match="expected numbers above 0"):
        scale_members(base, "1,x", "")

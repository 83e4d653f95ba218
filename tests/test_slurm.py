"""The chain on a real SLURM of several nodes: whole, and through the faults of a cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch.chain import Chain, Submitted, write_chain
from launch.phantom import CLASSES, Phantom, write_archive
from launch.rundir import RunDir
from medpsp.config import Config
from medpsp.configio import dump_yaml
from medpsp.identity import create_key
from tests.slurmlab import HAVE, HINT, Cluster, cluster

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24
PROFILE = {
    "cpu": {"partition": "cpu", "cpus": 1, "memory_gb": 0.5, "minutes": 10},
    "gpu": {"partition": "gpu", "cpus": 1, "memory_gb": 0.5, "minutes": 10, "gpus": 1},
    "parts": 2,
    "parallel": 2,
    "setup": [f"export PYTHONPATH={ROOT} CUDA_VISIBLE_DEVICES="],
    "signal_seconds": 30,
}
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="nodes of the lab take root")


@pytest.fixture(scope="module")
def lab(need: Callable[..., None]) -> Iterator[Cluster]:
    need("slurm", HAVE, HINT)
    with cluster("--cpu", "1", "--gpu", "3") as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archive and configuration, without a run."""
    root = tmp_path_factory.mktemp("slurm")
    write_archive(root / "archive", 8, Phantom(shape=(4, 48, 48)))
    create_key(root / "key", "key of the tests 58")
    tree = {
        "out": str(root / "local"),
        "data": {
            "archive": str(root / "archive/dicom"),
            "labels": str(root / "archive/masks"),
            "classes": list(CLASSES),
            "key_file": str(root / "key"),
            "modalities": ["CT"],
            "shard_slices": 6,
            "max_reject_fraction": 0.2,
            "index": str(root / "index"),
        },
        "model": {"backbone": "timm/test_resnet", "psp_channels": 16, "decoder_channels": 16},
        "train": {
            "size": [48, 48],
            "batch_size": 4,
            "ranks": 2,
            "threads": 1,
            "eval_every": 1000,
            "save_every": 4,
            "log_every": 4,
            "stages": [{"name": "a", "steps": STEPS, "lr": 1e-3}],
        },
        "export": {"int8_min_dice": 0, "calibration_slices": 4},
    }
    (root / "c.yaml").write_text(dump_yaml(Config.model_validate(tree)))
    (root / "site.yaml").write_text(yaml.safe_dump(PROFILE))
    return root


def medpsp(lab: Cluster, *words: str, ok: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        env={**lab.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def weights(run: Path) -> dict[str, Any]:
    path = run / "checkpoints" / f"step-{STEPS:08d}" / "state.pt"
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found["model"]


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def local(lab: Cluster, base: Path) -> Path:
    """The same without SLURM: shards, and two ranks by torchrun."""
    for command in ("shards", "train"):
        medpsp(lab, command, str(base / "c.yaml"), "train.ranks=2")
    return base / "local"


def shards(run: Path) -> dict[str, bytes]:
    root = run / "shards"
    files = [path for path in root.rglob("*") if path.is_file() and path.name != "report.html"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_the_whole_chain(lab: Cluster, base: Path, local: Path) -> None:
    """Two nodes of one rank each: the same shards and weights as on one machine."""
    out = base / "chain"
    words = [str(base / "c.yaml"), f"out={out}", f"data.index={base}/index2"]
    said = medpsp(lab, "run", *words, "--cluster", str(base / "site.yaml"), "--wait")
    assert re.search(r"train \d+: COMPLETED gpu\[?\d", said)
    assert shards(out) == shards(local)
    assert_same(weights(out), weights(local))
    assert (out / "export/model.int8.onnx").exists()
    assert "every job is done" in medpsp(lab, "run", *words, "--cluster", str(base / "site.yaml"))
    table = medpsp(lab, "status", str(out))
    assert "COMPLETED" in table
    assert "tensorboard --logdir" in table
    assert "train: 24 steps" in medpsp(lab, "logs", str(out), "train")


def training(lab: Cluster, base: Path, local: Path, name: str, **profile: Any) -> tuple[Path, str]:
    """A run whose shards are there already, submitted; its folder and the id of its job."""
    out = base / name
    out.mkdir()
    (out / "shards").symlink_to(local / "shards")
    site = base / f"{name}.yaml"
    site.write_text(yaml.safe_dump({**PROFILE, **profile}))
    words = [str(base / "c.yaml"), f"out={out}", "train.stages=[{name: a, steps: 24, lr: 1e-3}]"]
    medpsp(lab, "run", *words, "--cluster", str(site), "--from", "train")
    jobs = json.loads((out / "jobs/chain.json").read_text())["jobs"]
    return out, jobs[0]["id"]


def at_step(out: Path, step: int) -> bool:
    return any(
        int(path.name.split("-")[1]) >= step for path in (out / "checkpoints").glob("step-*")
    )


def ended_well(lab: Cluster, out: Path, local: Path) -> str:
    said = medpsp(lab, "status", str(out), "--watch")
    assert_same(weights(out), weights(local))
    return said


@pytest.mark.parametrize("how", ["USR2", "requeue", "rank", "node", "controller"])
def test_faults_cost_no_weight(lab: Cluster, base: Path, local: Path, how: str) -> None:
    out, number = training(lab, base, local, how)
    lab.until(lambda: at_step(out, 4), 120, "a checkpoint")
    if how == "USR2":
        lab.run("scancel", "--signal=USR2", number)
    elif how == "requeue":
        lab.run("scontrol", "requeue", number)
    elif how == "rank":
        kill_rank(number, 1)
    elif how == "node":
        node = json.loads((out / "jobs/train.json").read_text())["node"]
        lab.lab("fail", node)
        lab.until(lambda: "down" in lab.run("sinfo", "-h", "-n", node, "-o", "%T"), 60, "down")
        lab.lab("heal", node)
    else:
        lab.lab("fail", "controller")
        lab.lab("heal", "controller")
    ended_well(lab, out, local)


def kill_rank(number: str, rank: int) -> None:
    """SIGKILL to a rank of a job."""
    wanted = (b"SLURM_JOB_ID=" + number.encode(), b"SLURM_PROCID=%d" % rank)
    killed = 0
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found = path.read_bytes().split(b"\0")
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if b"submitit" in command and all(word in found for word in wanted):
            os.kill(int(path.parent.name), signal.SIGKILL)
            killed += 1
    assert killed


def test_a_node_without_the_shared_folder_is_left_out_at_the_next_try(
    lab: Cluster, base: Path, local: Path
) -> None:
    out, number = training(lab, base, local, "share")
    lab.until(lambda: at_step(out, 4), 120, "a checkpoint")
    nodes = lab.run("squeue", "-h", "-j", number, "-o", "%N").strip()
    names = lab.run("scontrol", "show", "hostnames", nodes).split()
    lab.inside(names[1], "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(out / "jobs"))
    try:
        kill_rank(number, 1)
        ended_well(lab, out, local)
    finally:
        lab.inside(names[1], "umount", str(out / "jobs"))
    again = lab.run("scontrol", "show", "job", "-o", number)
    assert f"ExcNodeList={names[1]} " in again


def test_a_sweep_over_backbones_ends_in_a_table(lab: Cluster, base: Path, local: Path) -> None:
    out = base / "many"
    out.mkdir()
    words = [str(base / "c.yaml"), f"out={out}", f"data.index={base}/index3"]
    over = ["--over", "model.backbone=timm/test_resnet,timm/test_convnext", "--over", "seed=3"]
    site = ["--cluster", str(base / "site.yaml")]
    medpsp(lab, "sweep", *words, "train.ranks=1", *over, *site, "--wait")
    table = (out / "sweep/table.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in table[2:]] != []
    assert {line.split(" | ")[1] for line in table[2:]} == {
        "timm/test_resnet",
        "timm/test_convnext",
    }
    assert all(" | 24 | " in line for line in table[2:])
    assert "nothing was left" in medpsp(lab, "cancel", str(out))


def test_scale_at_one_and_two_ranks(lab: Cluster, base: Path, local: Path) -> None:
    words = [str(base / "c.yaml"), f"out={local}", "--cluster", str(base / "site.yaml")]
    said = medpsp(lab, "scale", *words, "--ranks", "1,2")
    assert "CALCULATED, not measured" in said
    rows = [line for line in said.splitlines() if "timm/test_resnet" in line]
    assert len(rows) == 3  # two measured, one calculated
    found = json.loads((local / "scale/timm-test_resnet_2/scale.json").read_text())
    assert (found["ranks"], found["batch"]) == (2, 4)
    assert found["reduce_s"] > 0


def test_ray_on_two_nodes_of_an_allocation_makes_the_same_shards(
    lab: Cluster, base: Path, local: Path
) -> None:
    out = base / "ray"
    tree = yaml.safe_load((base / "c.yaml").read_text()) | {"out": str(out)}
    tree["data"] |= {"index": None}
    (base / "ray.yaml").write_text(yaml.safe_dump(tree))
    said = lab.run(
        *("srun", "-p", "gpu", "-N2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=0"),
        *(f"--export=ALL,PYTHONPATH={ROOT}", sys.executable, "-m", "launch.nodes"),
        *(str(out), "shards", str(base / "ray.yaml")),
        seconds=300,
    )
    assert "32 slices" in said
    assert shards(out) == shards(local)


def test_an_array_of_500_is_watched_and_cancelled(lab: Cluster, base: Path) -> None:
    """Elements that do nothing; most of them never start."""
    number = lab.run(
        *("sbatch", "--parsable", "-p", "cpu", "--array=0-499%2", "-o", "/dev/null"),
        *("--wrap", "sleep 0.2"),
    ).strip()
    run = RunDir(base / "array")
    job = Submitted(name="convert", id=number, after=(), parts=500)
    write_chain(run, Chain(cluster="generic", at=time.time(), jobs=(job,)))
    lab.until(lambda: "COMPLETED" in medpsp(lab, "status", str(run.root)), 60, "the first")
    began = time.monotonic()
    assert "PENDING" in medpsp(lab, "status", str(run.root))
    assert "cancelled: convert" in medpsp(lab, "cancel", str(run.root))
    lab.until(lambda: not lab.run("squeue", "-h", "-j", number).strip(), 60, "the end")
    said = medpsp(lab, "status", str(run.root))
    assert "CANCELLED" in said
    assert "PENDING" not in said
    assert time.monotonic() - began < 60


def test_a_shard_job_that_fails_for_good_ends_the_chain(lab: Cluster, base: Path) -> None:
    out = base / "broken"
    words = [str(base / "c.yaml"), f"out={out}", f"data.labels={base}/nowhere"]
    medpsp(lab, "run", *words, "--cluster", str(base / "site.yaml"))
    lab.until(
        lambda: "RUNNING" not in (t := medpsp(lab, "status", str(out))) and "PENDING" not in t, 90
    )
    table = medpsp(lab, "status", str(out))
    assert "FAILED" in table
    assert table.count("CANCELLED") >= 5
    assert "no such folder" in " ".join(table.split())

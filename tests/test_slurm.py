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
from unittest import mock

import pytest
import torch
import yaml

from launch.chain import Chain, Submitted, read_chain, write_chain
from launch.phantom import CLASSES, Phantom, write_archive
from launch.rundir import RunDir
from launch.slurmstate import _sacct
from medpsp.config import Config
from medpsp.configio import dump_yaml
from medpsp.identity import create_key
from tests.slurmlab import HAVE, HAVE_ACCOUNTING, HINT, HINT_ACCOUNTING, Cluster, cluster

ROOT = Path(__file__).resolve().parents[1]
STEPS = 240
PROFILE = {
    "cpu": {"partition": "cpu", "cpus": 1, "memory_gb": 0.5, "minutes": 10},
    "gpu": {"partition": "gpu", "cpus": 1, "memory_gb": 0.5, "minutes": 10, "gpus": 1},
    "parts": 2,
    "parallel": 2,
    "setup": [f"export PYTHONPATH={ROOT} CUDA_VISIBLE_DEVICES="],
    "signal_seconds": 30,
    "retries": 20,
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
            "log_every": 40,
            "stages": [{"name": "a", "steps": STEPS, "lr": 1e-3}],
        },
        "export": {
            "variants": ["cpu"],
            "calibration_slices": 4,
            "allow": dict.fromkeys(("cpu_dice", "cpu_drop", "latency"), "a few steps of training"),
        },
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
    site = ("--cluster", str(base / "site.yaml"))
    told = medpsp(lab, "doctor", *words, *site, ok=False)  # the lab's jobs have less than it asks
    assert re.search(r"SLURM +ok +partitions cpu\* \(1 nodes\), gpu \(3 nodes\)", told)
    assert re.search(r"profile memory +problem +1\.\d GB for 1 shard tasks, .* asks for 0\.5", told)
    assert "problems: 1, " in told
    said = medpsp(lab, "run", *words, "--cluster", str(base / "site.yaml"), "--wait")
    assert re.search(r"train \d+: COMPLETED gpu\[?\d", said)
    assert shards(out) == shards(local)
    assert_same(weights(out), weights(local))
    assert (out / "export/model.int8.onnx").exists()
    assert "every job is done" in medpsp(lab, "run", *words, "--cluster", str(base / "site.yaml"))
    table = medpsp(lab, "status", str(out))
    assert "COMPLETED" in table
    assert "tensorboard --logdir" in table
    assert f"train: {STEPS} steps" in medpsp(lab, "logs", str(out), "train")


def task(job: str, number: int, part: int | None = None) -> int:
    """The process of a task of a job: not srun, nor what the task forked."""
    key = b"SLURM_JOB_ID=" if part is None else b"SLURM_ARRAY_JOB_ID="
    wanted = {key + job.encode(), b"SLURM_PROCID=%d" % number}
    if part is not None:
        wanted.add(b"SLURM_ARRAY_TASK_ID=%d" % part)
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            told = (path / "environ").read_bytes().split(b"\0")
            command = (path / "cmdline").read_bytes()
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        mine = b"submitit.core._submit" in command and not command.startswith(b"srun")
        if mine and wanted <= {*told}:
            found[path.name] = parent
    (only,) = [int(name) for name, parent in found.items() if parent not in found]
    return only


def training(lab: Cluster, base: Path, local: Path, name: str, *words: str) -> Training:
    """A run whose shards are there already, submitted."""
    out = base / name
    out.mkdir()
    (out / "shards").symlink_to(local / "shards")
    given = [str(base / "c.yaml"), f"out={out}", *words]
    medpsp(lab, "run", *given, "--cluster", str(base / "site.yaml"), "--from", "train")
    return Training(lab, out)


class Training:
    """A job of two ranks on two nodes, somewhere in its steps."""

    def __init__(self, lab: Cluster, out: Path) -> None:
        self.lab, self.out = lab, out

    @property
    def id(self) -> str:
        jobs = json.loads((self.out / "jobs/chain.json").read_text())["jobs"]
        assert [job["name"] for job in jobs] == ["train", "evaluate", "export"]
        return str(jobs[0]["id"])

    @property
    def restarts(self) -> int:
        try:
            tree = json.loads((self.out / "jobs/train.json").read_text())
        except FileNotFoundError:
            return -1
        assert tree["state"] != "done", "the fault came too late"
        return int(tree["restarts"])

    @property
    def step(self) -> int:
        folders = (self.out / "checkpoints").glob("step-*")
        return max((int(path.name.split("-")[1]) for path in folders), default=0)

    def goes_on(self, restarts: int) -> None:
        """Until its try number ``restarts`` has saved something."""
        self.lab.until(lambda: self.restarts >= restarts, 180, f"try {restarts}")
        at = self.step
        self.lab.until(lambda: self.step > at, 120, "a checkpoint")

    def rank(self, number: int) -> int:
        """Its process."""
        return task(self.id, number)

    def nodes(self) -> list[str]:
        inside = self.lab.run("squeue", "-h", "-j", self.id, "-o", "%N").strip()
        return self.lab.run("scontrol", "show", "hostnames", inside).split()

    def ends_well(self, local: Path) -> str:
        said = medpsp(self.lab, "status", str(self.out), "--watch")
        assert_same(weights(self.out), weights(local))
        return said


def reach_time_limit(run: Training) -> None:
    """Its limit becomes one minute, and it stands still until SLURM says that the end is near."""
    for number in (run.rank(0), run.rank(1)):
        os.kill(number, signal.SIGSTOP)  # SLURM sends SIGCONT before its signal
    run.lab.run("scontrol", "update", f"JobId={run.id}", "TimeLimit=1")
    asked = ("squeue", "-h", "-j", run.id, "-o", "%T")
    run.lab.until(lambda: "PENDING" in run.lab.run(*asked), 120, "another try")
    run.lab.run("scontrol", "update", f"JobId={run.id}", "TimeLimit=10")


def test_faults_one_after_the_other_cost_no_weight(lab: Cluster, base: Path, local: Path) -> None:
    run = training(lab, base, local, "faults")

    def lose_a_node() -> None:
        lab.lab("fail", node := run.nodes()[0])
        lab.until(lambda: "down" in lab.run("sinfo", "-h", "-n", node, "-o", "%T"), 180, "down")
        lab.lab("heal", node)

    faults: list[Callable[[], Any]] = [
        lambda: lab.run("scancel", "--signal=USR2", run.id),
        lambda: lab.run("scontrol", "requeue", run.id),
        lambda: os.kill(run.rank(1), signal.SIGKILL),
        lambda: reach_time_limit(run),
        lose_a_node,
    ]
    for count, fault in enumerate(faults):
        run.goes_on(count)
        fault()
    run.goes_on(len(faults))
    lab.lab("fail", "controller")
    lab.lab("heal", "controller")
    run.goes_on(len(faults))  # of which it knew nothing
    lab.lab("fail", node := run.nodes()[1])  # for good
    try:
        run.ends_well(local)
    finally:
        lab.lab("heal", node)
    log = (run.out / "logs/train.log").read_text()
    assert log.count("stopped by SIGUSR2 after step") == 2
    told = json.loads((run.out / "jobs/train.json").read_text())
    assert told["restarts"] == len(faults) + 1


def test_zero_1_is_cancelled_resumed_and_leaves_out_a_node_without_the_shared_folder(
    lab: Cluster, base: Path, local: Path
) -> None:
    words = ["train.engine=zero1"]
    alone = base / "zero-alone"
    alone.mkdir()
    (alone / "shards").symlink_to(local / "shards")
    run = training(lab, base, local, "zero", *words)
    run.goes_on(0)
    again = [str(base / "c.yaml"), f"out={run.out}", "--cluster", str(base / "site.yaml")]
    assert "train, evaluate, export still waits or runs" in medpsp(lab, "run", *again, ok=False)
    assert "cancelled: train" in medpsp(lab, "cancel", str(run.out))
    lab.until(lambda: not lab.run("squeue", "-h", "-o", "%i").strip(), 60, "the end")
    assert "CANCELLED" in medpsp(lab, "status", str(run.out))
    medpsp(lab, "resume", str(run.out))
    run.goes_on(0)
    bad = run.nodes()[1]
    lab.inside(bad, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(run.out / "jobs"))
    try:
        os.kill(run.rank(1), signal.SIGKILL)
        medpsp(lab, "train", str(base / "c.yaml"), f"out={alone}", *words)
        run.ends_well(alone)
    finally:
        lab.inside(bad, "umount", str(run.out / "jobs"))
    assert f"ExcNodeList={bad} " in lab.run("scontrol", "show", "job", "-o", run.id)


def test_with_accounting_two_ranks_on_a_node_and_a_part_that_is_killed_once(
    need: Callable[..., None], base: Path, local: Path
) -> None:
    need("slurm", HAVE_ACCOUNTING, HINT_ACCOUNTING)
    out = base / "accounted"
    site = base / "accounted.yaml"
    site.write_text(yaml.safe_dump({**PROFILE, "ranks_per_node": 2}))
    words = [str(base / "c.yaml"), f"out={out}", f"data.index={base}/index4"]
    with cluster("--cpu", "1", "--gpu", "2", "--accounting") as lab:
        medpsp(lab, "run", *words, "--cluster", str(site))
        part = lab.until(lambda: part_that_runs(out), 120, "a part that converts")
        os.kill(part, signal.SIGKILL)
        said = medpsp(lab, "status", str(out), "--watch")
        table = medpsp(lab, "status", str(out))
        asked = ("sacct", "-X", "-n", "-P", "--name=medpsp-train", "-o", "State,ExitCode")
        assert lab.run(*asked).strip() == "COMPLETED|0:0"
        with mock.patch.dict(os.environ, lab.environment):
            jobs = [job.id for job in read_chain(RunDir(out)).jobs]
            assert {state.state for state in _sacct(jobs).values()} == {"COMPLETED"}
    assert re.search(r"train \d+: COMPLETED gpu\d$", said, re.MULTILINE)
    assert table.count("COMPLETED") == 8
    told = [json.loads(path.read_text()) for path in (out / "jobs").glob("convert.*.json")]
    assert {part["restarts"] for part in told} == {0, 1}
    assert told[0]["job"] == told[1]["job"]
    assert shards(out) == shards(local)
    assert_same(weights(out), weights(local))


def part_that_runs(out: Path) -> int | None:
    """The task of the last part once it says that it runs: its id is that of the whole array."""
    try:
        told = json.loads((out / "jobs/convert.2of2.json").read_text())
    except FileNotFoundError:
        return None
    return task(told["job"], 0, part=1)


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
    assert all(f" | {STEPS} | " in line for line in table[2:])
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
    lab.run(
        *("srun", "-p", "gpu", "-N2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=0"),
        *(f"--export=ALL,PYTHONPATH={ROOT}", sys.executable, "-m", "launch.nodes"),
        *(str(out), "shards", str(base / "ray.yaml")),
        seconds=300,
    )
    assert "32 slices" in (out / "logs/shards.log").read_text()
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
    assert time.monotonic() - began < 300


def test_a_shard_job_that_fails_for_good_ends_the_chain(lab: Cluster, base: Path) -> None:
    out = base / "broken"
    words = [str(base / "c.yaml"), f"out={out}", f"data.labels={base}/nowhere"]
    medpsp(lab, "run", *words, "--cluster", str(base / "site.yaml"))
    jobs = json.loads((out / "jobs/chain.json").read_text())["jobs"]
    plan = next(job["id"] for job in jobs if job["name"] == "plan")
    asked = ("scontrol", "show", "job", "-o", plan)
    lab.until(lambda: "JobState=FAILED" in lab.run(*asked), 120, "SLURM's decision")

    def told() -> bool:
        table = medpsp(lab, "status", str(out))
        known = "FAILED" in table and table.count("CANCELLED") == len(jobs) - 2
        return known and f"plan: data.labels {base}/nowhere: no such folder" in table

    lab.until(told, 180, "status to say so")  # all but plan, and the preflight, which needs no data

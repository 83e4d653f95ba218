"""The lab: a real SLURM that comes up, loses nodes, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurmlab import HAVE, HINT, LAB, cluster

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces take root")


@pytest.fixture(autouse=True)
def slurm(need: Callable[..., None]) -> None:
    need("slurm", HAVE, HINT)


def marks(root: Path) -> list[str]:
    """Processes that say they are of a lab, but for zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MEDPSP_LAB={root}".encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


def links() -> str:
    return subprocess.run(["ip", "link"], capture_output=True, text=True, check=False).stdout


@root_only
def test_nodes_with_namespaces_fail_and_heal_and_leave_nothing() -> None:
    with cluster("--cpu", "1", "--gpu", "2") as lab:
        assert lab.lab("env") == f"export SLURM_CONF={lab.environment['SLURM_CONF']}\n"
        said = lab.run("srun", "-p", "gpu", "-N2", "--gres=gpu:1", "sh", "-c", TASK)
        assert sorted(said.split()) == ["gpu0:0", "gpu1:0"]
        lab.lab("fail", "gpu1")
        lab.until(lambda: "down" in lab.run("sinfo", "-h", "-n", "gpu1", "-o", "%T"), 120, "down")
        lab.lab("heal", "gpu1")
        assert lab.run("srun", "-p", "gpu", "-w", "gpu1", "hostname").strip() == "gpu1"
        lab.lab("fail", "controller")
        lab.lab("heal", "controller")
        assert lab.run("srun", "hostname").strip() == "cpu0"
        root, bridge = lab.root, json.loads((lab.root / "lab.json").read_text())["bridge"]
        assert f" {bridge}: " in links()
    assert marks(root) == []
    assert not root.exists()
    assert f" {bridge}" not in links()
    assert str(root) not in Path("/proc/mounts").read_text()


def test_nodes_beside_each_other() -> None:
    """What a user without rights gets: jobs still running at the end, too."""
    with cluster("--ports", "--cpu", "1", "--gpu", "1") as lab:
        said = lab.run(
            "srun", "-p", "gpu", "--gres=gpu:2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"
        )
        assert said.strip() == "0,1"
        code = (
            "from launch.slurmstate import partitions as p; print([(q.name, q.up) for q in p(9)])"
        )
        found = lab.run(sys.executable, "-c", code)
        assert "('cpu', True)" in found
        assert "('gpu', True)" in found
        lab.run("sbatch", "-o", "/dev/null", "--wrap", "sleep 1000")
        lab.until(lambda: "R" in lab.run("squeue", "-h", "-o", "%t"), 120, "the job")
        root = lab.root
    assert marks(root) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["down"], "no lab there that can be read; `up` makes one"),
        (["up", "--cpu", "0", "--gpu", "0"], "expected 1 to 200 nodes together"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, str(LAB), *words, "--force", "--root", str(tmp_path / "l")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "l" / "lab.json").exists()


TASK = "echo $(hostname):$CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize("what", ["blank", "other"])
def test_places_that_will_not_do(tmp_path: Path, what: str) -> None:
    root = tmp_path / ("a b" if what == "blank" else "a")
    root.mkdir()
    if what == "other":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        os.chown(root, 12345, -1)
    done = subprocess.run(
        [sys.executable, str(LAB), "up", "--force", "--root", str(root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    told = {"blank": "slurm.conf takes no blanks", "other": "of another user"}
    assert told[what] in done.stderr
    assert not list(root.iterdir())

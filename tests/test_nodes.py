"""One Ray over the nodes of an allocation: two of them on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from medpsp.config import Config
from medpsp.errors import ConfigError
from shards.build import build_shards
from tests.killing import contents, family, wait_for, written

Make = Callable[..., Config]


def node(config: Config, number: int) -> psutil.Popen:
    log = (config.out / f"node{number}.log").open("wb")
    return psutil.Popen(
        [sys.executable, "-m", "launch.nodes", str(config.out), "shards", str(written(config))],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={
            **os.environ,
            "SLURM_JOB_ID": "77",
            "SLURM_NODEID": str(number),
            "SLURM_CPUS_PER_TASK": "1",
        },
    )


def test_two_nodes_share_a_conversion_and_leave_nothing_behind(
    archive: Path, made: Config, make_config: Make, tmp_path: Path
):
    config = make_config(archive, tmp_path / "out")
    config.out.mkdir()
    nodes = [node(config, 0)]
    try:
        meeting = config.out / ".ray-77-0.json"
        wait_for(meeting.exists, "the head")
        assert meeting.stat().st_mode & 0o777 == 0o600
        nodes.append(node(config, 1))
        helper = lambda: [  # noqa: E731
            p for p in family(nodes[1].pid) if "raylet" in p.name()
        ]
        everything = []
        wait_for(lambda: bool(helper()) or nodes[0].poll() is not None, "the second node")
        everything = [p for n in nodes for p in family(n.pid)]
        assert [n.wait(400) for n in nodes] == [0, 0], (config.out / "node0.log").read_text()
        _, alive = psutil.wait_procs(everything, timeout=60)
        assert [" ".join(p.cmdline()) for p in alive] == []
        assert not meeting.exists()
        found, report = contents(config.shards), "report.html"  # written by the command alone
        assert found.pop(report)
        assert found == {k: v for k, v in contents(made.shards).items() if k != report}
    finally:
        for process in [p for n in nodes for p in family(n.pid)]:
            process.kill()


def test_a_cluster_that_is_not_there_is_one_line(archive: Path, make_config: Make, tmp_path: Path):
    """In a process of its own: this one may have a Ray already."""
    config = make_config(archive, tmp_path / "out", ray_address="127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "shards", str(written(config))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "data.ray_address 127.0.0.1:9: no Ray cluster answers there" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_little_memory_for_one_task_is_said_before_anything_starts(
    archive: Path, make_config: Make, tmp_path: Path
):
    config = make_config(archive, tmp_path / "out", memory_mib=1000)
    with pytest.raises(
        ConfigError, match=r"data\.memory_mib 1000: one shard task takes up to 1472"
    ):
        build_shards(config)

"""Threads are started for the cores that are ours, not for those of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medpsp import machine

ROOT = Path(__file__).resolve().parent.parent

RANK = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.cpu_count = lambda: 64
import torch
from medpsp.train.ranks import process_group
from medpsp.types import World
with process_group(World(), threads=0, seconds=60):
    print(torch.get_num_threads())
"""
SESSION = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.cpu_count = lambda: 64
from medpsp.deploy.session import thread_count
print(thread_count(0), thread_count(3))
"""


@pytest.mark.parametrize(("code", "told"), [(RANK, "1"), (SESSION, "1 3")])
def test_one_core_of_many_gets_one_thread(code: str, told: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "SLURM_"))}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == told.split()


def test_threads_are_bound_where_each_has_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    from medpsp.deploy.session import own_cores

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 2, 3})
    assert [own_cores(n) for n in (0, 1, 2, 3, 4)] == ["", "", "", "4;8", ""]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert own_cores(1) == ""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert own_cores(2) == ""


def test_half_a_core_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed, threads in ((0.5, 1), (2.9, 2), (8.0, 8)):
        monkeypatch.setattr(machine, "cores_allowed", lambda allowed=allowed: allowed)
        assert machine.whole_cores() == threads


def test_where_the_kernel_tells_no_affinity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cores_allowed(tmp_path) == os.cpu_count()

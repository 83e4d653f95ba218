"""A SLURM cluster of this machine for a test; see slurm/lab."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LAB = Path(__file__).resolve().parents[1] / "slurm" / "lab"
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
HINT = "apt install --no-install-recommends slurmctld slurmd slurm-client munge"
HINT_ACCOUNTING = "apt install --no-install-recommends slurmdbd mariadb-server"
HAVE = all(shutil.which(name, path=PATH) for name in ("slurmctld", "slurmd", "sbatch", "munged"))
HAVE_ACCOUNTING = all(shutil.which(name, path=PATH) for name in ("slurmdbd", "mariadbd"))


class Cluster:
    """One that is up.

    Attributes:
        environment: For clients and whatever submits.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        conf = root / "etc/slurm.conf"
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(conf)}

    def lab(self, *words: str) -> str:
        return lab(*words, "--root", str(self.root))

    def run(self, *command: str, seconds: float = 60) -> str:
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def inside(self, node: str, *command: str) -> None:
        """Run in the namespaces of a node."""
        tree = json.loads((self.root / "lab.json").read_text())
        outer = tree["processes"][node][0]
        inner = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0]
        subprocess.run(["nsenter", "-t", inner, "-m", "-u", "-p", "--", *command], check=True)

    def until(self, ready: Callable[[], Any], seconds: float, what: str = "") -> Any:
        end = time.monotonic() + seconds
        while not (found := ready()):
            assert time.monotonic() < end, f"waited in vain for {what or ready}"
            time.sleep(0.3)
        return found


def lab(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(LAB), *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def cluster(*words: str) -> Iterator[Cluster]:
    """Up for as long as this lasts."""
    folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    root = folder / "l"
    try:
        with open(Path(tempfile.gettempdir()) / f"medpsp-labs-{os.geteuid()}", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two that come up at once may take one network
            lab("up", "--force", "--root", str(root), *words)
        yield Cluster(root)
    finally:
        if (root / "lab.json").exists():
            lab("down", "--root", str(root))
        shutil.rmtree(folder, ignore_errors=True)

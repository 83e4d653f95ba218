"""Daemons of a lab: started in the foreground, known by pid and start time, ended by no other."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from layout import Lab

MARK = "MEDPSP_LAB"
"""In the environment of everything that a lab starts: its folder."""
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_", "PMI")
"""A lab inside an allocation must not take these for its own."""
POLL_S = 0.05


class LabError(Exception):
    """One line for the user."""


def environment(lab: Lab) -> dict[str, str]:
    """Of daemons and clients."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    return {**kept, "SLURM_CONF": str(lab.conf), MARK: str(lab.root)}


def start(lab: Lab, name: str, command: list[str]) -> Lab:
    """Start a daemon; the lab that knows it."""
    with lab.log(f"{name}.out").open("ab") as out:
        process = subprocess.Popen(
            command,
            env=environment(lab),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    began = start_time(process.pid)
    known = replace(lab, processes={**lab.processes, name: (process.pid, began or 0)})
    known.save()
    return known


def run(lab: Lab, *command: str, seconds: float = 20) -> str:
    """A client's output.

    Raises:
        LabError: It fails or takes too long.
    """
    try:
        done = subprocess.run(
            command,
            env=environment(lab),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"{command[0]}: no answer within {seconds:.0f} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise LabError(f"{' '.join(command[:3])}: {said[-1] if said else done.returncode}")
    return done.stdout


def wait_for(what: str, ready: Callable[[], object], seconds: float) -> None:
    """Poll until something is true.

    Raises:
        LabError: It is not, in time.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(LabError, OSError):
            if ready():
                return
        time.sleep(POLL_S)
    raise LabError(f"{what}: not ready within {seconds:.0f} s")


def start_time(pid: int) -> int | None:
    """Clock ticks since boot at which a process began; None for none, or for a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rsplit(")", 1)[1].split()
    return None if fields[0] in "ZX" else int(fields[19])


def alive(lab: Lab, name: str) -> bool:
    """Whether a daemon is the process that was started, and runs."""
    pid, began = lab.processes.get(name, (0, 0))
    return pid > 0 and start_time(pid) == began


def children(pid: int) -> list[int]:
    """Direct ones."""
    with suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def stop(lab: Lab, name: str, number: signal.Signals, seconds: float = 5) -> None:
    """Signal a daemon, and kill it where it does not end."""
    if not alive(lab, name):
        return
    pid = lab.processes[name][0]
    for each in (number, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(pid, each)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            _reap(pid)
            if not alive(lab, name):
                return
            time.sleep(POLL_S)


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def leftovers(lab: Lab) -> Iterator[int]:
    """Processes of a lab and on its nodes, by what their environment says.

    Never the user's own: the shell of an salloc is in a job, too, but on no node.
    """
    daemon, job = f"{MARK}={lab.root}".encode(), f"SLURM_CONF={lab.conf}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            found = (entry / "environ").read_bytes().split(b"\0")
            on_node = job in found and any(one.startswith(b"SLURMD_NODENAME=") for one in found)
            if (daemon in found or on_node) and start_time(int(entry.name)):
                yield int(entry.name)

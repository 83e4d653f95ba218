"""One Ray over all nodes of a SLURM allocation, for one command: ``srun python -m launch.nodes``.

    srun --ntasks-per-node=1 python -m launch.nodes runs/a shards configs/a.yaml

runs ``medpsp shards configs/a.yaml data.ray_address=<head>`` on the first node, while the others
lend their cores to it. Only processes that were started here are ended, so other Ray of the same
user lives on. Ray asks for a token of this job: who may not read the run folder cannot join.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.cluster import free_port, own_address
from launch.meeting import wait_for_json, write_json
from medpsp.errors import LaunchError
from medpsp.machine import whole_cores
from medpsp.progress import duration

OBJECT_STORE = 100 * 2**20
"""Bytes of Ray in shared memory, as `shards.build` asks for them."""
START_S = 120.0
"""Time for the head to come up; shared file systems show a new file late."""
_POLL_S = 0.2


def main(arguments: list[str]) -> int:
    """Take part in the cluster of this job.

    Args:
        arguments: Folder that all nodes see, then command and configuration of ``medpsp``.

    Returns:
        Exit code of the command on the first node, 0 on the others.
    """
    if len(arguments) < 3:
        raise LaunchError("launch.nodes: expected a shared folder, a command, a configuration")
    job, again = (os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT"))
    meeting = Path(arguments[0]) / f".ray-{job}-{again}.json"  # a head before may have been killed
    if os.environ.get("SLURM_NODEID", "0") != "0":
        return _lend(meeting)
    address, token = f"{own_address()}:{free_port()}", secrets.token_hex(32)
    with _ray(token, "--head", f"--port={address.rsplit(':', 1)[1]}", _node_ip(address)) as head:
        _wait_for(head, address)
        write_json(meeting, [address, token], mode=0o600)
        try:
            command = [sys.executable, "-m", "launch.cli", *arguments[1:]]
            return subprocess.call(
                [*command, f"data.ray_address={address}"], env=_environment(token)
            )
        finally:
            meeting.unlink()


def _lend(meeting: Path) -> int:
    """Join the head's cluster until it says that it is done."""
    why = f"ray: no {meeting} within {duration(START_S)}; did the first node start?"
    address, token = wait_for_json(meeting, START_S, why)
    with _ray(token, f"--address={address}") as node:
        while meeting.exists():
            if node.poll() is not None:
                raise LaunchError(f"ray: the node ended with {node.returncode} before the command")
            time.sleep(_POLL_S)
    return 0


@contextmanager
def _ray(token: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """``ray start`` with the cores of this task; ended with everything it started."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or str(whole_cores())
    folder = tempfile.mkdtemp(prefix="ray-")  # short: a socket's path has at most 107 bytes
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--block"]
    limits = [f"--num-cpus={cores}", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE}"]
    node = subprocess.Popen(
        [*command, *limits, "--disable-usage-stats"],
        env=_environment(token) | {"RAY_TMPDIR": folder},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield node
    finally:
        node.send_signal(signal.SIGTERM)  # it ends what it started
        try:
            node.wait(30)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _environment(token: str) -> dict[str, str]:
    return os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _wait_for(head: subprocess.Popen[bytes], address: str) -> None:
    host, port = address.rsplit(":", 1)
    until = time.monotonic() + START_S
    while time.monotonic() < until and head.poll() is None:
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(_POLL_S)
    raise LaunchError(f"ray: the head did not come up within {duration(START_S)}")


def _node_ip(address: str) -> str:
    return f"--node-ip-address={address.rsplit(':', 1)[0]}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LaunchError as error:
        sys.exit(f"medpsp: {error}")

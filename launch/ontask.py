"""What runs in each task of a SLURM job: who this rank is, then the job, then its exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import free_port, own_address
from launch.meeting import wait_for_json, write_json
from launch.rundir import RunDir
from medpsp.errors import EXIT_AGAIN, EXIT_CONFIG, ConfigError, MedpspError
from medpsp.progress import duration

MEET_S = 600.0
"""For all ranks to start: nodes boot, containers load."""


@dataclass(frozen=True)
class Task:
    """A job, or a part of one; pickled by name and values, so it holds no state.

    Attributes:
        name: Key of `launch.jobs.JOBS`.
        config: Resolved configuration of the run.
        part: Which part of an array, from 1.
        parts: Of how many.
        ranks: Whether its tasks are ranks that meet.
    """

    name: str
    config: Path
    part: int = 1
    parts: int = 1
    ranks: bool = False

    def __call__(self) -> None:
        """Run; ends the process with the exit code of the job.

        Who is asked to end before its job listens, or by a job that does not, ends at once and
        gets another try: what is on disk is whole at any moment. submitit would ignore SIGTERM.
        """
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda *_: os._exit(EXIT_AGAIN))
        from launch.jobs import run_command
        from medpsp.configio import load_config

        try:
            if self.ranks:
                jobs = RunDir(load_config(self.config).out).jobs
                os.environ.update(meet(jobs, os.environ))
            code, reason = run_command(self.name, self.config, (self.part, self.parts))
        except MedpspError as error:
            code = EXIT_CONFIG if isinstance(error, ConfigError) else 1
            reason = str(error)
        except OSError as error:  # a folder of the run is full or gone
            code, reason = 1, f"{error.strerror}: {error.filename}"
        if reason:
            sys.stderr.write(f"medpsp: {reason}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of a peer that is gone must not keep the node


def meet(folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """RANK and its like from SLURM's variables; rank 0 says in a file where it listens.

    So names need not resolve, and the port is one that was free a moment ago.

    Args:
        folder: That all nodes see.
        env: Of the task.

    Raises:
        LaunchError: Rank 0 does not say so in time.
    """
    rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
    restart, step = env.get("SLURM_RESTART_COUNT", "0"), env.get("SLURM_STEP_ID", "0")
    path = folder / f".meet-{env['SLURM_JOB_ID']}-{restart}-{step}.json"
    if rank == 0:
        write_json(path, [own_address(), free_port()])
    why = f"ranks: {path} did not appear within {duration(MEET_S)}; is {folder} on all nodes?"
    address, port = wait_for_json(path, MEET_S, why)
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES", "1"))
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(size // nodes),
        "MASTER_ADDR": str(address),
        "MASTER_PORT": str(port),
    }

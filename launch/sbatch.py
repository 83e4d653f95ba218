"""What sbatch is told for a job: options and text as values; submitit writes the script."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

from launch.plan import JobSpec
from launch.profile import Profile
from launch.rundir import RunDir
from medpsp.errors import ConfigError
from medpsp.progress import duration

TEARDOWN = r"""
code=$?
CLEAN
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt RETRIES ]; then
  id="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
  id="${id:-$SLURM_JOB_ID}"
  bad=$(timeout 60 srun --nodes="$SLURM_JOB_NUM_NODES" EACH sh -c 'PROBE' 2>/dev/null | sort -u)
  facts=$(scontrol show job -o "$id")
  case "$facts" in *" JobState=RUNNING "*) ;; *) exit "$code" ;; esac
  trap "" TERM
  if scontrol requeue "$id"; then
    old=$(echo "$facts" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' | grep -v null)
    out=$(echo "$bad"; [ -z "$old" ] || scontrol show hostnames "$old")
    left=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,alloc,mix,comp -o %N |
      sort -u | grep -cvxF "$out")
    if [ -n "$bad" ] && [ "$left" -ge "$SLURM_JOB_NUM_NODES" ]; then
      bad=$(echo "$bad" | paste -sd,)
      scontrol update JobId="$id" ExcNodeList="${old:+$old,}$bad" &&
        echo "medpsp: left out at the next try: $bad"
    fi
    sleep 60
  fi
fi
exit "$code"
""".strip()
"""After srun. A wrong configuration (2) stays wrong; anything else gets another try, on which the
job goes on from what is on disk, unless it was cancelled meanwhile. Nodes that fail the probe are
left out then, if enough others are there: SLURM takes that for a job that it has just queued again,
and ends this script afterwards. The code says little of the nodes: srun returns the highest of all
tasks, and those that it ends because another one failed leave with 75. The last element of an array
has the array's own id, which would stand for all of it."""
_EACH_NODE = '--overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
PROBE = (
    'touch "$MEDPSP_JOBS/.probe-$SLURMD_NODENAME" && rm "$MEDPSP_JOBS/.probe-$SLURMD_NODENAME" '
    '&& [ "$(df -Pk "$MEDPSP_SCRATCH" | awk "NR==2 {print \\$4}")" -gt 102400 ] '
    '&& { [ -z "$CUDA_VISIBLE_DEVICES" ] || ! command -v nvidia-smi || nvidia-smi -L; } '
    '>/dev/null || echo "$SLURMD_NODENAME"'
)
"""Says the name of a node that cannot write the shared folder, has no room or has lost a GPU."""


def check_folder(folder: Path) -> None:
    """Refuse a run folder that a script for sbatch cannot name.

    Raises:
        ConfigError: It holds a line break, or what SLURM puts something in place of.
    """
    text = str(folder)
    if bad := [mark for mark in ("\n", "\r", "%", "\\") if mark in text]:
        raise ConfigError(
            f"out {text!r}: {bad[0]!r} in the name cannot be given to sbatch; take another folder"
        )


def parameters(job: JobSpec, profile: Profile, ids: dict[str, str], run: RunDir) -> dict[str, Any]:
    """Options for submitit's executor.

    Args:
        job: What to run.
        profile: Of the cluster.
        ids: Job id of each job before.
        run: Its folder.
    """
    kind = profile.kind(job.gpu)
    found: dict[str, Any] = {
        "job_name": f"medpsp-{job.name}",
        "nodes": job.nodes,
        "ntasks_per_node": job.tasks,
        "cpus_per_task": job.cores,
        "time": job.minutes,
        "signal_delay_s": min(profile.signal_seconds, job.minutes * 15),  # a quarter at most
        "setup": _setup(profile, run),
        "teardown": _teardown(profile),
        "srun_args": [
            f"--cpus-per-task={job.cores}",  # since 22.05 srun does not take it from sbatch
            "--kill-on-bad-exit=1",
            *profile.srun,
        ],
        "array_parallelism": profile.parallel,
        "wckey": None,
        "stderr_to_stdout": True,
        "additional_parameters": {
            "requeue": True,
            "kill-on-invalid-dep": "yes",
            **{option: value or True for option, value in profile.extra.items()},
        },
    }
    if job.after:
        kind_of_wait = "afterany" if job.anyway else "afterok"
        found["dependency"] = ":".join([kind_of_wait, *(ids[before] for before in job.after)])
    more = found["additional_parameters"]
    if kind.memory_gb is not None:
        more["mem"] = f"{math.ceil(kind.memory_gb * 1024)}M" if kind.memory_gb else "0"
    if kind.gres:
        found["gres"] = kind.gres
    elif kind.gpus:
        found["gpus_per_node"] = kind.gpus * job.tasks
    chosen = {
        "partition": kind.partition,
        "constraint": kind.constraint,
        "account": profile.account,
        "qos": profile.qos,
        "exclude": profile.exclude,
        "mail_user": profile.mail_user,
        "mail_type": profile.mail_type,
    }
    found |= {key: value for key, value in chosen.items() if value}
    if profile.reservation:
        more["reservation"] = profile.reservation
    return found


def text(job: JobSpec, profile: Profile, run: RunDir, python: str) -> str:
    """The script of a job as submitit will write it; names in place of the ids before.

    Args:
        job: What to run.
        profile: Of the cluster.
        run: Its folder.
        python: Command that starts Python.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    folder = run.logs.absolute() / "jobs" / "%j"
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    given = parameters(job, profile, {name: f"<{name}>" for name in job.after}, run)
    if job.parts > 1:
        given["map_count"] = job.parts
    script: str = _make_sbatch_string(command=command, folder=folder, **given)
    return script


def _setup(profile: Profile, run: RunDir) -> list[str]:
    lines = [
        *profile.setup,
        "set +e",  # or a failing job would end the script before what follows it
        "command -v scontrol >/dev/null && export MEDPSP_REQUEUE=1",
        'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"',
        f"export MEDPSP_JOBS={shlex.quote(str(run.jobs.absolute()))}",
        f'export MEDPSP_SCRATCH="{profile.scratch or "/tmp"}"',
        'export MEDPSP_SCRATCH="${MEDPSP_SCRATCH:-/tmp}"',
    ]
    if profile.scratch:
        lines += [
            'export TMPDIR="$MEDPSP_SCRATCH/medpsp-$SLURM_JOB_ID"',
            f'srun {_EACH_NODE} mkdir -p "$TMPDIR"',
        ]
    return lines


def _teardown(profile: Profile) -> list[str]:
    clean = f'srun {_EACH_NODE} rm -rf "$TMPDIR"' if profile.scratch else ""
    script = (
        TEARDOWN.replace("RETRIES", str(profile.retries))
        .replace("EACH", _EACH_NODE)
        .replace("PROBE", PROBE)
    )
    return [line for line in script.replace("CLEAN", clean).splitlines() if line]


def describe_scripts(plan: tuple[JobSpec, ...], profile: Profile, run: RunDir) -> str:
    """The graph, and the script of every job, as they would be submitted.

    Raises:
        ConfigError: As of `check_folder`.
    """
    check_folder(run.root.absolute())
    python = profile.python or shlex.quote(sys.executable)
    graph = [
        f"{job.name:9} {_shape(job)}{', after ' + ', '.join(job.after) if job.after else ''}"
        for job in plan
    ]
    scripts = [f"== {job.name}\n{text(job, profile, run, python)}" for job in plan]
    return "\n".join([*graph, "", *scripts])


def _shape(job: JobSpec) -> str:
    tasks = f"{job.nodes} x {job.tasks} tasks of " if job.nodes * job.tasks > 1 else ""
    array = f"{job.parts} parts of " if job.parts > 1 else ""
    where = "gpu" if job.gpu else "cpu"
    return f"{array}{tasks}{job.cores} cores ({where}), {duration(60 * job.minutes)}"

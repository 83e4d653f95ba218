"""What a run folder says of its jobs: which were submitted, and what each says of itself.

``jobs/chain.json`` is written by the process that submits, ``jobs/NAME.json`` by the job's first
rank. Both are whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

from launch.meeting import write_json
from launch.plan import JobSpec, those
from launch.rundir import RunDir
from medpsp import trainconfig
from medpsp.config import Config
from medpsp.errors import EXIT_AGAIN, LaunchError, ShardError

SHARD_MAKERS = ("shards", "plan", "convert", "publish")
SHARD_JOBS = ("preflight", *SHARD_MAKERS, "check")
MAKERS = (*SHARD_MAKERS, "train")
"""Jobs that later ones are made from."""
HOW = {
    "data": {"workers", "index", "memory_mib", "ray_address", "crosswalk"},
    "train": set(trainconfig.HOW),
}
"""Settings of how a job works, which leave what it makes as it is."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """One job of the chain as SLURM knows it."""

    name: str
    id: str
    after: tuple[str, ...]
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Chain:
    """All of them.

    Attributes:
        cluster: Profile by name or path.
        at: Seconds since 1970.
        jobs: In order.
        slurm: ClusterName of the SLURM whose job ids they are; empty where it did not say.
        planned: Names of all that were to be submitted: a process may be killed half-way.
    """

    cluster: str
    at: float
    jobs: tuple[Submitted, ...]
    slurm: str = ""
    planned: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a job says of itself.

    Attributes:
        state: running, done, again (queued once more) or failed.
        job: Its id; of an element, that of the array.
        node: Of its first rank.
        restarts: How often it was queued again.
        began: Seconds since 1970; of this try.
        ended: 0 while it runs.
        code: Exit code.
        reason: The one line.
        digest: Of the configuration that it depends on.
        files: Digest of the files that it is made from; empty where it is not known.
        process: That told it: its number, and the space on its node that the number is of.
    """

    state: str
    job: str
    node: str
    restarts: int
    began: float = field(default_factory=time.time)
    ended: float = 0.0
    code: int = 0
    reason: str = ""
    digest: str = ""
    files: str = ""
    process: str = ""

    @classmethod
    def begun(cls, env: Mapping[str, str], digest: str, files: str = "") -> Told:
        """A job that begins now."""
        return cls(
            state="running",
            digest=digest,
            files=files,
            process=f"{os.getpid()} {processes_here()}",
            job=env.get("SLURM_ARRAY_JOB_ID") or env.get("SLURM_JOB_ID", ""),
            node=env.get("SLURMD_NODENAME") or os.uname().nodename,
            restarts=int(env.get("SLURM_RESTART_COUNT") or 0),
        )

    def ended_with(self, code: int, reason: str) -> Told:
        """The same, at its end."""
        state = {0: "done", EXIT_AGAIN: "again"}.get(code, "failed")
        return replace(self, state=state, ended=time.time(), code=code, reason=reason)


def processes_here() -> str:
    """The space that numbers of processes are of: a container has its own; empty if not known."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def depends_on(config: Config, name: str) -> str:
    """Digest of the settings that a job and those before it are made from."""
    sections = {"data": True}
    later = {"train": ("model", "loss", "train", "seed"), "evaluate": ("evaluate",)}
    for job in ("train", "evaluate", "export"):
        if name in SHARD_JOBS:
            break
        sections |= dict.fromkeys(later.get(job, (job,)), True)
        if name == job:
            break
    tree = config.model_dump(mode="json", include=set(sections), exclude=HOW)
    if "export" in tree:
        tree["export"]["allow"] = {}  # what let it pass, it was not made from
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def made_from(config: Config, name: str) -> str:
    """Digest of the files that a job is made from: the shards, and what was trained on them.

    Empty where it needs none, or one is not there: weights may go once they are exported.
    """
    from shards.index import INDEX, SHARDS, read_manifest

    if name in ("preflight", *SHARD_MAKERS):
        return ""
    try:
        made = read_manifest(config.shards)
        # not all of it: who made them, and what was left out, change no slice
        parts = [made.data_id, made.tables[INDEX], made.tables[SHARDS]]
        if name in ("evaluate", "export"):
            best = RunDir(config.out).checkpoints / "best" / "meta.json"  # with that of tensors
            parts.append(hashlib.sha256(best.read_bytes()).hexdigest())
    except (OSError, ShardError, KeyError):
        return ""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def unfinished(plan: tuple[JobSpec, ...], config: Config, run: RunDir) -> tuple[JobSpec, ...]:
    """The plan from the first job on that did not end well with this configuration, or was made
    from other files than are there now; a check makes nothing, so it alone takes none with it."""
    undone = [
        job.name for job in plan if job.name != "preflight" and not _is_done(job, config, run)
    ]
    names = [job.name for job in plan]
    first = next((names.index(name) for name in undone if name != "check"), len(plan))
    kept = {*names[first:], *undone}
    if "train" in kept:
        kept.add("preflight")
    return those(plan, kept)


def _is_done(job: JobSpec, config: Config, run: RunDir) -> bool:
    exports = list(run.export.glob("*.onnx"))
    made = {
        "train": [run.checkpoints / "best", *exports],  # weights may go once they are exported
        "evaluate": [run.evaluation],
        "export": exports,
    }
    if job.name in made and not any(path.exists() for path in made[job.name]):
        return False
    wanted, files = depends_on(config, job.name), made_from(config, job.name)
    for part in range(job.parts):
        told = told_by(run, label_of(job.name, part + 1, job.parts))
        if told is None or told.state != "done" or told.digest != wanted:
            return False
        if told.files and files and told.files != files:
            return False
    return True


def label_of(name: str, part: int, parts: int) -> str:
    """A job, or an element of an array, in names of files."""
    return name if parts == 1 else f"{name}.{part}of{parts}"


def write_chain(run: RunDir, chain: Chain) -> None:
    """Keep what was submitted."""
    write_json(run.chain, asdict(chain))


def read_chain(run: RunDir) -> Chain:
    """What was submitted last.

    Raises:
        LaunchError: Nothing was, or the file is damaged.
    """
    path = run.chain
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        jobs = tuple(Submitted(**{**job, "after": tuple(job["after"])}) for job in tree["jobs"])
        return Chain(
            cluster=tree["cluster"],
            at=tree["at"],
            jobs=jobs,
            slurm=tree.get("slurm", ""),
            planned=tuple(tree.get("planned", ())),
        )
    except FileNotFoundError:
        raise LaunchError(
            f"run {run.root}: nothing was submitted to a cluster; `medpsp run CONFIG --cluster "
            "PROFILE` does"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{path}: damaged ({type(error).__name__}); submit again") from None


def chain_of(run: RunDir) -> Chain | None:
    """What was submitted last; None where nothing is known of it."""
    try:
        return read_chain(run)
    except LaunchError:
        return None


def write_planned(run: RunDir, names: list[str]) -> None:
    """Keep which jobs are begun on this machine."""
    write_json(run.planned, names)


def planned_here(run: RunDir) -> list[str]:
    """Those of the last time; none where nothing is known of it."""
    try:
        names = json.loads(run.planned.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def tell(run: RunDir, name: str, told: Told) -> None:
    """Say what a job is at.

    Raises:
        OSError: It cannot be written; then what it said before, which is not so any more, is gone.
    """
    place = run.jobs / f"{name}.json"
    try:
        write_json(place, asdict(told))
    except OSError:
        with suppress(OSError):
            place.unlink(missing_ok=True)
        raise


def told_by(run: RunDir, name: str) -> Told | None:
    """What a job said last; None where it never ran."""
    try:
        return Told(**json.loads((run.jobs / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def has_failed(run: RunDir, name: str, told: Told) -> bool:
    """Whether another rank of this very try has said that it failed; it knows why.

    Only in a job of the chain: in an allocation of one's own commands follow one another.
    """
    found, chain = told_by(run, name), chain_of(run)
    if found is None or chain is None or told.job not in {job.id for job in chain.jobs}:
        return False
    return found.state == "failed" and (found.job, found.restarts) == (told.job, told.restarts)

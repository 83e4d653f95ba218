"""What SLURM says of jobs: from sacct, else scontrol, else squeue. Never from a job's own files.

And of its partitions.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from medpsp.errors import LaunchError

ASK_S = 30.0
ENDED = frozenset(
    "COMPLETED FAILED CANCELLED TIMEOUT OUT_OF_MEMORY NODE_FAIL BOOT_FAIL DEADLINE PREEMPTED "
    "REVOKED".split()
)
GONE = "GONE"
"""SLURM knows nothing of it any more."""


@dataclass(kw_only=True)
class JobState:
    """A job, or all elements of an array.

    Attributes:
        counts: SLURM's state to number of elements.
        nodes: Where they run or ran.
        reason: Why it waits, or why it ended so, in SLURM's words.
        restarts: Most of any element.
    """

    counts: Counter[str] = field(default_factory=Counter)
    nodes: set[str] = field(default_factory=set)
    reason: str = ""
    restarts: int = 0

    @property
    def state(self) -> str:
        """The one that matters: running before waiting before the worst end."""
        order = ("RUNNING", "COMPLETING", "REQUEUED", "PENDING")
        for name in (*order, *sorted(set(self.counts) - {*order, "COMPLETED"})):
            if self.counts[name]:
                return name
        return "COMPLETED" if self.counts else GONE

    @property
    def ended(self) -> bool:
        """Whether nothing of it will run any more, as far as SLURM knows."""
        return all(name in ENDED or name == GONE for name in self.counts)


def job_states(ids: Iterable[str]) -> dict[str, JobState]:
    """What SLURM says of jobs, by id.

    Raises:
        LaunchError: No SLURM answers.
    """
    wanted = list(dict.fromkeys(ids))
    found: dict[str, JobState] = {}
    said = ""
    for ask in (_sacct, _scontrol, _squeue):
        missing = [number for number in wanted if number not in found]
        if not missing:
            break
        try:
            found |= {n: s for n, s in ask(missing).items() if n in missing}
        except LaunchError as error:
            said = str(error)
            continue
        said = said if ask is not _squeue else ""
    if said and any(number not in found for number in wanted):  # not asked is not gone
        raise LaunchError(said)
    if waiting := [number for number, state in found.items() if state.counts["PENDING"]]:
        with suppress(LaunchError):  # sacct has a reason of some time ago
            for number, state in _squeue(waiting).items():
                found[number].reason = state.reason or found[number].reason
    return {number: found.get(number, JobState()) for number in wanted}


def cluster_name() -> str:
    """ClusterName of the SLURM that answers here; empty where none does."""
    try:
        found = re.search(r"^ClusterName\s*=\s*(\S+)", _ask("scontrol", "show", "config"), re.M)
    except LaunchError:
        return ""
    return found[1] if found else ""


def require_cluster(chain_slurm: str, where: object) -> None:
    """Refuse to ask one SLURM for job ids of another.

    Args:
        chain_slurm: ClusterName that gave them; empty where it is not known.
        where: The run, for the message.

    Raises:
        LaunchError: Another one answers here.
    """
    here = cluster_name() if chain_slurm else ""
    if here and here != chain_slurm:
        raise LaunchError(
            f"run {where}: submitted to the SLURM cluster {chain_slurm}, and this machine talks to "
            f"{here}; ask from a machine of {chain_slurm}, or remove jobs/chain.json there if that "
            "cluster is no more"
        )


def cancel_jobs(ids: Iterable[str]) -> None:
    """End jobs that still wait or run.

    Raises:
        LaunchError: SLURM refuses.
    """
    if wanted := list(ids):
        _ask("scancel", *wanted)


def _sacct(ids: list[str]) -> dict[str, JobState]:
    fields = "JobID,State,NodeList,ExitCode,Reason"  # no Restarts before SLURM 23
    text = _ask("sacct", "-X", "-n", "-P", "-j", ",".join(ids), "-o", fields)
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        name, state, nodes, code, reason = (line.split("|") + [""] * 5)[:5]
        job = found.setdefault(name.split("_")[0], JobState())
        # the last reason to wait, which stays after the end; of a cancelled job it is why
        _add(job, name, state, nodes, reason if state.startswith("CANCELLED") else "")
        if code not in ("", "0:0") and not job.reason:
            job.reason = f"exit code {code}"
    return found


def _scontrol(ids: list[str]) -> dict[str, JobState]:
    found: dict[str, JobState] = {}
    for number in ids:
        try:
            text = _ask("scontrol", "show", "job", "-o", number)
        except LaunchError as error:
            if "Invalid job id" in str(error):
                continue
            raise
        job = found.setdefault(number, JobState())
        for line in text.splitlines():
            told = re.findall(r"(?:^| )(\w+(?:/\w+)?)=(\S*)", line)
            fact = dict(reversed(told))  # names of folders come last, and may look like facts
            task = fact.get("ArrayTaskId", "")
            _add(
                job,
                f"{number}_[{task}]",
                fact.get("JobState", ""),
                fact.get("NodeList", ""),
                fact.get("Reason", ""),
            )
            job.restarts = max(job.restarts, int(fact.get("Restarts", "0")))
            code = fact.get("ExitCode", "0:0")
            if code != "0:0" and not job.reason:
                job.reason = f"exit code {code}"
    return found


def _squeue(ids: list[str]) -> dict[str, JobState]:
    found: dict[str, JobState] = {}
    try:
        text = _ask("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%N|%r", "-j", ",".join(ids))
    except LaunchError as error:
        if "Invalid job id" in str(error):  # of a single one that it forgot
            return found
        raise
    for line in text.splitlines():
        name, state, nodes, reason = line.split("|", 3)
        _add(found.setdefault(name.split("_")[0], JobState()), name, state, nodes, reason)
    return found


def _add(job: JobState, name: str, state: str, nodes: str, reason: str) -> None:
    word = state.split(" ", maxsplit=1)[0].rstrip("+")  # "CANCELLED by 0"
    job.counts[word] += elements(name)
    if nodes not in ("", "(null)", "None assigned"):
        job.nodes.add(nodes)
    if reason not in ("", "None", "(null)") and not job.reason:
        job.reason = reason


def elements(name: str) -> int:
    """How many elements a job id stands for: ``12_[3-5,9%4]`` is 4 of them."""
    inside = re.search(r"\[([0-9,\-:]*)", name)
    if not inside or not inside[1]:
        return 1
    count = 0
    for piece in inside[1].split(","):
        first, _, last = piece.partition("-")
        end, _, step = last.partition(":")
        count += 1 if not last else (int(end) - int(first)) // int(step or 1) + 1
    return count


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition.

    Attributes:
        minutes: Longest job; None for no limit.
        default: Where jobs go that name none.
        up: It takes jobs and starts them.
        nodes: How many it has.
    """

    name: str
    minutes: int | None
    default: bool
    up: bool
    nodes: int


def partitions(seconds: float) -> list[Partition]:
    """All that this user may see.

    Args:
        seconds: That SLURM has to answer.

    Raises:
        LaunchError: No SLURM answers in time.
    """
    found = []
    for line in _ask("scontrol", "-o", "show", "partition", seconds=seconds).splitlines():
        fact = dict(re.findall(r"(?:^| )(\w+)=(\S*)", line))
        if name := fact.get("PartitionName"):
            found.append(
                Partition(
                    name=name,
                    minutes=_minutes(fact.get("MaxTime", "")),
                    default=fact.get("Default") == "YES",
                    up=fact.get("State") == "UP",
                    nodes=int(fact.get("TotalNodes", "0")),
                )
            )
    return found


def _minutes(text: str) -> int | None:
    """Of ``days-hours:minutes:seconds``; None for UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, minutes, _ = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes


def _ask(*command: str, seconds: float = ASK_S) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise LaunchError(f"{command[0]}: not found; is this a SLURM cluster?") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command[0]}: no answer within {seconds:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise LaunchError(f"{command[0]}: {lines[-1] if lines else done.returncode}")
    return done.stdout

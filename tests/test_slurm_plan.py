"""The chain for SLURM as values: profiles, jobs, options of sbatch, what SLURM's words mean."""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from launch import jobs, slurmstate, status, submit, train
from launch.chain import (
    Chain,
    Submitted,
    Told,
    depends_on,
    label_of,
    read_chain,
    tell,
    told_by,
    unfinished,
    write_chain,
)
from launch.guards import refuse_beside_jobs, require_idle
from launch.localstate import Row
from launch.plan import JobSpec, plan_cluster, starting_at
from launch.preflight import faults
from launch.profile import Profile, load_profile, shipped_profiles
from launch.rundir import RunDir
from launch.sbatch import check_folder, describe_scripts, parameters
from medpsp.config import Config
from medpsp.errors import ConfigError, Interrupted, LaunchError
from medpsp.train.memory import checkpoint_bytes, checkpoints_kept

GOLDEN = Path(__file__).parent / "golden" / "slurm.txt"
ORDER = ["preflight", "plan", "convert", "publish", "check", "train", "evaluate", "export"]


def config(**more: Any) -> Config:
    tree = {
        "out": "runs/a",
        "data": {"archive": "archive", "classes": ["background", "organ"], "index": "runs/a/index"},
        "train": {"ranks": 4},
    }
    return Config.model_validate({**tree, **more})


def test_ranks_are_spread_over_nodes():
    plan = {job.name: job for job in plan_cluster(config(), Profile(ranks_per_node=2, parts=3))}
    assert list(plan) == ORDER
    assert (plan["train"].nodes, plan["train"].tasks) == (2, 2)
    assert (plan["preflight"].nodes, plan["preflight"].tasks) == (2, 2)
    assert plan["convert"].parts == 3
    assert plan["train"].after == ("check", "preflight")
    assert [job.name for job in plan.values() if job.gpu] == ["preflight", "train", "evaluate"]
    alone = plan_cluster(config(train={"ranks": 1}), Profile(ranks_per_node=8))
    assert {(job.nodes, job.tasks) for job in alone} == {(1, 1)}
    with pytest.raises(ConfigError, match="leaves a node half empty"):
        plan_cluster(config(), Profile(ranks_per_node=3))


def test_a_chain_that_starts_later_waits_for_nothing_before():
    plan = starting_at(plan_cluster(config(), Profile()), "train")
    assert [job.name for job in plan] == ["train", "evaluate", "export"]
    assert [job.after for job in plan] == [(), ("train",), ("evaluate",)]
    whole = plan_cluster(config(), Profile())
    assert starting_at(whole, "shards")[0].name == "plan"
    with pytest.raises(ConfigError, match="no such job; there are preflight, plan, convert"):
        starting_at(whole, "nonsense")


def test_what_is_done_with_this_configuration_is_left_out(tmp_path: Path):
    run, chosen = RunDir(tmp_path), config()
    plan = plan_cluster(chosen, Profile(parts=2))
    assert unfinished(plan, chosen, run) == plan
    for job in plan:
        for part in range(job.parts):
            told = Told(
                state="done", job="1", node="a", restarts=0, digest=depends_on(chosen, job.name)
            )
            tell(run, label_of(job.name, part + 1, job.parts), told)
    made = tmp_path / "export" / "model.onnx", tmp_path / "evaluation.json"
    for path in made:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert unfinished(plan, chosen, run) == ()
    assert unfinished(plan, config(export={"allow": {"cpu_drop": "a few steps"}}), run) == ()
    # another rate: the network is trained anew, after a look at the nodes, on the same shards
    other = config(train={"ranks": 4, "weight_decay": 0.1})
    again = unfinished(plan_cluster(other, Profile(parts=2)), other, run)
    assert [job.name for job in again] == ["preflight", "train", "evaluate", "export"]
    assert again[1].after == ("preflight",)
    more = config(data={**chosen.data.model_dump(), "unlabelled": "keep"})
    assert [j.name for j in unfinished(plan, more, run)] == ORDER


def test_the_scripts_are_the_golden_ones(monkeypatch: pytest.MonkeyPatch):
    profile = Profile.model_validate(
        {
            "cpu": {"partition": "cpu", "cpus": 2, "memory_gb": 1.5, "minutes": 60},
            "gpu": {"partition": "gpu", "cpus": 4, "memory_gb": 0, "minutes": 120, "gpus": 1},
            "ranks_per_node": 2,
            "parts": 3,
            "account": "radiology",
            "exclude": "node[07,12]",
            "reservation": "night",
            "setup": ["module load cuda"],
            "python": "apptainer exec --nv medpsp.sif python3",
            "scratch": "/local",
            "extra": {"nice": "10", "exclusive": ""},
        }
    )
    monkeypatch.chdir("/")
    found = describe_scripts(plan_cluster(config(), profile), profile, RunDir(Path("/runs/a b")))
    assert found + "\n" == GOLDEN.read_text(encoding="utf-8")


def test_minutes_are_of_jobs():
    with pytest.raises(
        ConfigError, match=r"minutes\.trian of the profile: no such job; there are pre"
    ):
        plan_cluster(config(), Profile(minutes={"trian": 5}))


def test_the_shipped_profiles_load():
    assert shipped_profiles() == ["container", "generic", "small"]
    for name in shipped_profiles():
        assert plan_cluster(config(), load_profile(name))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cpus: 3", "cpus: Extra inputs are not permitted; legal: cpu, gpu"),
        ("retries: -1", "retries: Input should be greater than or equal to 0"),
        ('account: "a\\nb"', "account: holds a line break"),
        ('setup: ["a\\nb"]', "setup: holds a line break"),
        ("[1", "not YAML"),
    ],
)
def test_a_profile_that_is_wrong_is_one_line(tmp_path: Path, text: str, words: str):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_profile(str(tmp_path / "p.yaml"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_profile_that_is_not_there_gets_a_hint():
    with pytest.raises(ConfigError, match=r"no such file .* did you mean 'generic'"):
        load_profile("generc")


@pytest.mark.parametrize("name", ["a\nb", "a%jb", "a\\b"])
def test_folders_that_a_script_cannot_name_are_refused(name: str):
    with pytest.raises(
        ConfigError, match="cannot be given to sbatch; take another folder"
    ) as caught:
        check_folder(Path("/runs") / name)
    assert "\n" not in str(caught.value)
    check_folder(Path('/runs/it\'s a "folder" $HOME ; rm'))
    with pytest.raises(ConfigError, match="cannot be given to sbatch"):  # by --dry-run, too
        describe_scripts((), Profile(), RunDir(Path("/runs") / name))


def test_a_job_waits_for_those_before_it_and_tries_again():
    plan = {job.name: job for job in plan_cluster(config(), Profile(retries=7))}
    ids = {"check": "12", "preflight": "13"}
    found = parameters(plan["train"], Profile(retries=7), ids, RunDir(Path("/runs/a b")))
    assert found["dependency"] == "afterok:12:13"
    assert "-lt 7 ]" in "\n".join(found["teardown"])
    assert found["additional_parameters"]["requeue"] is True
    assert found["signal_delay_s"] == 120
    short = Profile.model_validate({"cpu": {"memory_gb": 1e-6, "minutes": 2}})
    job = plan_cluster(config(), short)[1]
    found = parameters(job, short, ids, RunDir(Path("/runs/a")))
    assert found["signal_delay_s"] == 30  # or it would be asked to end as it begins
    assert found["additional_parameters"]["mem"] == "1M"  # 0 would be all that a node has


# SLURM's words

SACCT = """\
12|COMPLETED|cpu0|0:0|None
13_0|FAILED|cpu0|1:0|NonZeroExitCode
13_[1-3%2]|PENDING|None assigned|0:0|Resources
14|CANCELLED by 0|None assigned|0:0|Dependency
"""
SCONTROL = (
    "JobId=15 JobName=x UserId=root(0) JobState=RUNNING Reason=None Dependency=(null) "
    "Restarts=3 ExitCode=0:0 NodeList=gpu[0-1] Command=/a\n"
)
ARRAY = (
    "JobId=16 ArrayJobId=16 ArrayTaskId=0-499%16 JobState=PENDING Reason=Priority Restarts=0 "
    "ExitCode=0:0 NodeList=(null)\n"
    "JobId=17 ArrayJobId=16 ArrayTaskId=7 JobState=FAILED Reason=NonZeroExitCode Restarts=0 "
    "ExitCode=3:0 NodeList=cpu0\n"
)


def test_states_come_from_the_first_that_knows(monkeypatch: pytest.MonkeyPatch):
    def ask(*command: str) -> str:
        if command[0] == "sacct":
            return SACCT
        if command[0] == "scontrol" and command[-1] in ("15", "16"):
            return {"15": SCONTROL, "16": ARRAY}[command[-1]]
        if command[0] == "scontrol":
            raise LaunchError("scontrol: slurm_load_jobs error: Invalid job id specified")
        return "18|COMPLETED|cpu0|None\n"

    monkeypatch.setattr(slurmstate, "_ask", ask)
    found = slurmstate.job_states(["12", "13", "14", "15", "16", "18", "19"])
    assert (found["12"].state, found["12"].ended) == ("COMPLETED", True)
    assert dict(found["13"].counts) == {"FAILED": 1, "PENDING": 3}
    assert (found["13"].state, found["13"].ended) == ("PENDING", False)
    assert (found["14"].state, found["14"].reason) == ("CANCELLED", "Dependency")
    assert (found["15"].state, found["15"].nodes, found["15"].restarts) == (
        "RUNNING",
        {"gpu[0-1]"},
        3,
    )
    assert dict(found["16"].counts) == {"PENDING": 500, "FAILED": 1}
    assert found["18"].state == "COMPLETED"
    assert (found["19"].state, found["19"].ended) == (slurmstate.GONE, True)


def test_without_accounting_the_others_are_asked(monkeypatch: pytest.MonkeyPatch):
    def ask(*command: str) -> str:
        if command[0] == "sacct":
            raise LaunchError("sacct: Slurm accounting storage is disabled")
        if command[0] == "scontrol":
            raise LaunchError("scontrol: not found; is this a SLURM cluster?")
        return "20_3|RUNNING|cpu0|None\n20_4|PENDING||Resources\n"

    monkeypatch.setattr(slurmstate, "_ask", ask)
    found = slurmstate.job_states(["20"])
    assert dict(found["20"].counts) == {"RUNNING": 1, "PENDING": 1}


def test_a_job_that_could_not_be_asked_for_is_not_gone(monkeypatch: pytest.MonkeyPatch):
    def ask(*command: str) -> str:
        if command[0] == "sacct":
            return SACCT
        raise LaunchError(f"{command[0]}: Unable to contact slurm controller")

    monkeypatch.setattr(slurmstate, "_ask", ask)
    assert slurmstate.job_states(["12", "14"])["12"].ended
    with pytest.raises(LaunchError, match="Unable to contact"):  # 15: a moment ago, not yet there
        slurmstate.job_states(["12", "15"])


def test_why_a_job_waits_is_what_squeue_says_now(monkeypatch: pytest.MonkeyPatch):
    def ask(*command: str) -> str:
        if command[0] == "sacct":  # the last reason but Priority and Resources, even of ended ones
            return "12|FAILED|cpu0|137:0|Dependency\n13|PENDING||0:0|Dependency\n"
        assert command[-1] == "13"
        return "13|PENDING||QOSMaxWallDurationPerJobLimit\n"

    monkeypatch.setattr(slurmstate, "_ask", ask)
    found = slurmstate.job_states(["12", "13"])
    assert found["12"].reason == "exit code 137:0"
    assert found["13"].reason == "QOSMaxWallDurationPerJobLimit"


@pytest.mark.parametrize(
    ("reason", "never"),
    [
        ("PartitionTimeLimit", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("JobHeldAdmin", True),
        ("launch failed requeued held", True),
        ("Resources", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("Dependency", False),
        ("BeginTime", False),
    ],
)
def test_reasons_that_do_not_go_by_themselves(reason: str, never: bool):
    assert bool(status.NEVER.search(reason)) == never


def test_no_slurm_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="not found; is this a SLURM cluster"):
        slurmstate.job_states(["1"])


@pytest.mark.parametrize(
    ("name", "count"), [("12", 1), ("12_3", 1), ("12_[3-5,9%4]", 4), ("12_[0-8:4]", 3), ("1_[]", 1)]
)
def test_elements_of_an_array(name: str, count: int):
    assert slurmstate.elements(name) == count


def test_a_single_job_that_slurm_forgot_is_no_error(monkeypatch: pytest.MonkeyPatch):
    def ask(*command: str) -> str:
        raise LaunchError(f"{command[0]}: slurm_load_jobs error: Invalid job id specified")

    monkeypatch.setattr(slurmstate, "_ask", ask)
    assert slurmstate.job_states(["7"])["7"].state == slurmstate.GONE


def test_a_folder_whose_name_looks_like_a_state_is_none(monkeypatch: pytest.MonkeyPatch):
    text = "JobId=7 JobState=PENDING Restarts=1 WorkDir=/x JobState=COMPLETED Restarts=z/y\n"

    def ask(*command: str) -> str:
        if command[0] != "scontrol":
            raise LaunchError("no accounting")
        return text

    monkeypatch.setattr(slurmstate, "_ask", ask)
    found = slurmstate.job_states(["7"])["7"]
    assert (found.state, found.restarts) == ("PENDING", 1)


@pytest.mark.parametrize(
    ("counts", "told", "wanted"),
    [
        ({"COMPLETED": 1, "FAILED": 1}, "done failed", ("1 COMPLETED, 1 FAILED", True, False)),
        ({"COMPLETED": 1, "RUNNING": 1}, "done running", ("1 COMPLETED, 1 RUNNING", False, False)),
        ({"COMPLETED": 2}, "done done", ("COMPLETED", True, True)),
        ({}, "done done", ("done", True, True)),
        ({}, "failed done", ("failed", True, False)),
        ({}, "running done", (slurmstate.GONE, True, False)),
    ],
)
def test_an_array_has_ended_when_all_its_parts_have(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counts: dict[str, int],
    told: str,
    wanted: tuple[str, bool, bool],
):
    run = RunDir(tmp_path)
    job = Submitted(name="convert", id="7", after=(), parts=2)
    write_chain(run, Chain(cluster="generic", at=0.0, jobs=(job,)))
    for part, word in enumerate(told.split()):
        tell(run, f"convert.{part + 1}of2", Told(state=word, job="7", node="a", restarts=0))
    found = slurmstate.JobState(counts=Counter(counts))
    monkeypatch.setattr(status, "job_states", lambda ids: {"7": found})
    (row,) = status.status_of(run)
    assert (row.state, row.ended, row.well) == wanted


def test_no_second_chain_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunDir(tmp_path)
    require_idle(run)
    job = Submitted(name="train", id="7", after=())
    write_chain(run, Chain(cluster="generic", at=0.0, jobs=(job,)))
    for word in ("PENDING", "COMPLETED"):
        found = slurmstate.JobState(counts=Counter({word: 1}))
        monkeypatch.setattr(slurmstate, "job_states", lambda ids, found=found: {"7": found})
        if word == "PENDING":
            with pytest.raises(ConfigError, match="train still waits or runs; `medpsp cancel"):
                require_idle(run)
        else:
            require_idle(run)


def submitted(run: RunDir, slurm: str = "") -> None:
    job = Submitted(name="train", id="7", after=())
    write_chain(run, Chain(cluster="generic", at=0.0, jobs=(job,), slurm=slurm))


def test_job_ids_of_another_cluster_are_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = RunDir(tmp_path)
    submitted(run, "west")
    said = {"scontrol show config": "Configuration data\nClusterName             = east\n"}
    monkeypatch.setattr(slurmstate, "_ask", lambda *words: said[" ".join(words)])
    told = "submitted to the SLURM cluster west, and this machine talks to east"
    with pytest.raises(LaunchError, match=told):
        status.status_of(run)
    with pytest.raises(LaunchError, match=told):
        require_idle(run)


def test_a_command_here_keeps_off_a_folder_where_jobs_are_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    chosen = config(out=str(tmp_path))
    submitted(RunDir(tmp_path))
    found = slurmstate.JobState(counts=Counter({"RUNNING": 1}))
    with monkeypatch.context() as patched:
        patched.setattr(slurmstate, "job_states", lambda ids: {"7": found})
        for number in ("", "8"):  # in an allocation of one's own, too
            patched.setenv("SLURM_JOB_ID", number)
            with pytest.raises(ConfigError, match="train still waits or runs"):
                refuse_beside_jobs(chosen)
        patched.setenv("SLURM_JOB_ID", "7")
        refuse_beside_jobs(chosen)
    monkeypatch.setenv("PATH", "/nowhere")  # a laptop that has the folder, and no SLURM
    monkeypatch.setattr(logging.getLogger("medpsp"), "propagate", False)
    monkeypatch.setattr(logging.getLogger("medpsp"), "handlers", [caplog.handler])
    refuse_beside_jobs(chosen)
    assert "may be at work" in caplog.text


@pytest.mark.parametrize(
    ("reason", "other", "ends"),
    [
        ("PartitionNodeLimit", "Dependency", False),
        ("PartitionNodeLimit", "Priority", True),
        ("Resources", "Dependency", True),
        ("launch failed requeued held", "Dependency", True),  # of one part, while others run
    ],
)
def test_what_can_never_start_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, other: str, ends: bool
):
    two = tuple(
        Submitted(name=name, id=n, after=()) for name, n in (("train", "7"), ("export", "8"))
    )
    write_chain(RunDir(tmp_path), Chain(cluster="generic", at=0.0, jobs=two))
    states = [*(["PENDING"] * 3), "COMPLETED"]

    def next_state(ids: object) -> dict[str, slurmstate.JobState]:
        counts = Counter({states.pop(0): 1})
        if reason.startswith("launch") and "PENDING" in counts:
            counts["RUNNING"] = 3
        why = {"7": reason, "8": other}
        return {n: slurmstate.JobState(counts=counts, reason=why[n]) for n in why}

    monkeypatch.setattr(status, "job_states", next_state)
    monkeypatch.setattr(status, "SILENT_S", 0.0)
    if ends:
        rows = status.follow(lambda: [RunDir(tmp_path)], 0.01, lambda rows: None)
        assert all(row.well for row in rows)
    else:
        with pytest.raises(LaunchError, match=r"train: cannot start \(PartitionNodeLimit\), job 7"):
            status.follow(lambda: [RunDir(tmp_path)], 0.01, lambda rows: None)


def test_of_several_ranks_the_one_that_failed_first_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, logger = RunDir.create(config(out=str(tmp_path))), logging.getLogger("medpsp")
    for name in ("handlers", "propagate", "level"):  # a job sets them for its process
        monkeypatch.setattr(logger, name, [] if name == "handlers" else getattr(logger, name))
    for module in (sys, threading):
        monkeypatch.setattr(module, "excepthook", module.excepthook)
    submitted(run)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)

    def fails(rank: str, error: Exception) -> None:
        def job(config: Config) -> None:
            raise error

        monkeypatch.setenv("RANK", rank)
        monkeypatch.setitem(jobs.JOBS, "train", job)
        jobs.run_command("train", run.config)

    fails("1", LaunchError("no room on the GPU"))
    said = told_by(run, "train")
    assert said
    assert (said.state, said.job, said.restarts) == ("failed", "7", 1)
    for late in (RuntimeError("Connection reset by peer"), Interrupted("asked to end")):
        fails("2", late)
        assert told_by(run, "train") == said
    assert (run.logs / "train.failed").read_text() == "no room on the GPU\n"
    train._say(run, "asked to end before its first step", 75)  # nor does the watch of a rank
    assert told_by(run, "train") == said
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    train._say(run, "rank 0 hangs", 76)
    found = told_by(run, "train")
    assert found
    assert (found.state, found.reason, found.restarts) == ("failed", "rank 0 hangs", 2)


def test_without_slurm_a_submission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match=r"preflight: not submitted: .*srun"):
        submit.submit_cluster(
            plan_cluster(config(), Profile()), Profile(), "generic", RunDir(tmp_path)
        )
    assert not (tmp_path / "jobs/chain.json").exists()


def test_a_failed_submission_leaves_what_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, plan = RunDir(tmp_path), plan_cluster(config(), Profile())
    submitted(run)
    before, cancelled = read_chain(run), []

    def send(spec: JobSpec, *rest: object) -> str:
        if spec.name == "publish":
            raise LaunchError("publish: not submitted: no")
        return {"preflight": "1", "plan": "2", "convert": "3"}[spec.name]

    monkeypatch.setattr(submit, "_send", send)
    monkeypatch.setattr(submit, "cluster_name", lambda: "")
    monkeypatch.setattr(submit, "cancel_jobs", cancelled.extend)
    with pytest.raises(LaunchError, match=r"publish: not submitted: no$"):
        submit.submit_cluster(plan, Profile(), "generic", run)
    assert cancelled == ["1", "2", "3"]
    assert read_chain(run) == before

    def silent(ids: object) -> None:
        raise LaunchError("scancel: Unable to contact slurm controller")

    monkeypatch.setattr(submit, "cancel_jobs", silent)
    with pytest.raises(LaunchError, match=r"no; 1, 2, 3 were submitted .* cannot be cancelled now"):
        submit.submit_cluster(plan, Profile(), "generic", run)
    chain = read_chain(run)
    assert [job.id for job in chain.jobs] == ["1", "2", "3"]  # `cancel` finds them
    assert list(chain.planned) == ORDER  # and `resume` what was to follow


def test_preflight_asks_for_the_room_that_the_checkpoints_of_the_run_take() -> None:
    gib = 2**30
    one = {"node": "a", "time": 100.0, "free": 2 * gib, "scontrol": True}
    assert faults([one], need=2 * gib) == []
    (line,) = faults([one], need=3 * gib)
    assert line == ("preflight: node a: 2.0 GiB free in out, training may need 3.0; make room")
    late = {**one, "node": "b", "time": 106.0, "scontrol": False}
    lines = faults([one, late], need=gib)
    assert [line.split("; ")[0].split(", so")[0] for line in lines] == [
        "preflight: node b: no scontrol",
        "preflight: clocks differ by 6 s",
    ]
    config = Config.model_validate({"out": "out", "data": {"archive": "a", "classes": ["a", "b"]}})
    assert (len(config.train.stages), config.train.ema) == (3, 0.0)
    assert checkpoint_bytes(nn.Linear(10, 9, bias=False), config.train) == 90 * 4 * 3
    assert checkpoints_kept(config.train) == 6


def test_members_that_begin_while_a_sweep_here_is_watched_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between two of them nothing runs, but the command that begins them does."""
    one, two = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    begun, shown = [[one], [one], [one, two], [one, two]], list[int]()
    working = [True, True, True, False, False]
    text = dict.fromkeys(("id", "nodes", "at", "note", "waits"), "")
    done = Row(name="train", state="done", restarts=0, ended=True, well=True, **text)
    monkeypatch.setattr(status, "status_of", lambda run: [done])
    monkeypatch.setattr(status, "at_work", lambda run, unknown: working.pop(0))
    rows = status.follow(
        lambda: begun[min(len(shown), 3)], 0.01, lambda found: shown.append(len(found))
    )
    assert shown[:2] == [1, 1]
    assert shown[-1] == len(rows) == 2

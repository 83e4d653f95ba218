"""Which checks there are: steps as values, in the order in which their rows show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from launch.doctor.packages import EXTRAS, NEED_TORCH, importable, version_of
from launch.doctor.rows import Verdict
from launch.doctor.steps import Step

if TYPE_CHECKING:
    from launch.profile import Profile
    from medpsp.config import Config

FOLDER_S, DECODERS_S, TORCH_S, IMPORT_S = 8.0, 30.0, 30.0, 60.0
RAY_S = 15.0
"""`shards.preflight` waits 10 for an address."""
SLOW = "is the environment on a slow or dead network file system? `import {}` by hand shows more"
DEAD = "is its file system there? A dead server holds whoever touches it, `df -h`, too"
CRASH = "pip install --force-reinstall '{}'; if it stays, libraries of LD_LIBRARY_PATH do not fit"
STUCK = "NCCL_DEBUG=INFO shows more; where there is a GPU, restart the machine"


def steps_for(config: Config | None, profile: Profile | None) -> list[Step]:
    """All checks of this machine, and those of a configuration and a site profile.

    Args:
        config: Where one is named.
        profile: Where one is named.
    """
    steps = [*_light(config, profile), *_folders(config)]
    if config:
        steps += _sources(config)
    steps += _slurm(config, profile)
    steps += _imports()
    steps.append(_step("GPU", "gpu:driver_row", "light"))
    if version_of("torch"):
        steps += _with_torch(config, profile)
    return steps


def readable(path: str) -> Step:
    """Whether a file answers that this process is about to read."""
    return _folder(path, "read_row", "file", path=path)


def _step(what: str, call: str, lane: str, **arguments: Any) -> Step:
    call = f"launch.doctor.{call}"
    return Step(what=what, call=call, arguments=arguments, lane=lane, silence=DEAD)


def _light(config: Config | None, profile: Profile | None) -> Iterator[Step]:
    """What asks nobody but the kernel."""
    train = config.train if config else None
    needed = ["shards", "train", "export"] if config else []
    needed += ["cluster"] if profile else []
    yield _step("Python", "packages:python_row", "light")
    yield _step("packages", "packages:package_rows", "light", needed=needed)
    yield _step("tested versions", "packages:tested_row", "light")
    yield _step("launch", "packages:launch_row", "light")
    threads = train.threads * train.ranks if train else 0
    yield _step("cores", "machine:cores_row", "light", threads=threads)
    for what, call in (
        ("memory", "memory_row"),
        ("threads", "threads_row"),
        ("open files", "files_row"),
        ("processes", "tasks_row"),
        ("locked memory", "locked_row"),
        ("file size", "written_row"),
        ("clock", "clock_row"),
    ):
        yield _step(what, f"machine:{call}", "light")
    yield _step("interfaces", "gpu:interface_rows", "light")


def _folder(what: str, call: str, lane: str, **arguments: Any) -> Step:
    """It may lie on a file system that does not answer."""
    return Step(
        what=what,
        call=f"launch.doctor.places:{call}",
        arguments=arguments,
        lane=lane,
        seconds=FOLDER_S,
        silence=DEAD,
    )


def _folders(config: Config | None) -> Iterator[Step]:
    """What is written, and the decoders, which write their objects."""
    yield _folder("run folder", "run_row", "run", out=str(config.out) if config else "runs")
    yield _folder("temporary files", "temp_row", "disks")
    yield _folder("shared memory", "shm_row", "disks")
    if find_spec("ray"):
        yield _folder("Ray", "ray_row", "disks")
    yield Step(
        what="decoders",
        call="launch.doctor.decoders:decoder_rows",
        lane="decoders",
        seconds=DECODERS_S,
        crash=CRASH.format("imagecodecs"),
        silence=SLOW.format("imagecodecs"),
    )


def _sources(config: Config) -> Iterator[Step]:
    """What is read, and whether it fits together."""
    data, tree = config.data, json.loads(config.model_dump_json())
    for name, path in (("archive", data.archive), ("labels", data.labels)):
        if path:
            yield _folder(f"data.{name}", "source_row", "sources", name=name, path=str(path))
    key = str(data.key_file) if data.key_file else None
    yield _folder("data.key_file", "key_row", "sources", path=key)
    if not version_of("zarr"):  # the row of its extra says so
        return
    yield replace(_step("places", "asked:places_row", "sources", config=tree), needs="data.labels")
    workers = _step("data.workers", "asked:memory_row", "sources", config=tree)
    yield replace(workers, seconds=RAY_S, silence="set data.ray_address to a cluster that answers")


def _slurm(config: Config | None, profile: Profile | None) -> Iterator[Step]:
    minutes = {"cpu": profile.cpu.minutes, "gpu": profile.gpu.minutes} if profile else {}
    if config and profile:
        from launch.plan import plan_cluster

        jobs = plan_cluster(config, profile)
        minutes = {k: max(j.minutes for j in jobs if j.gpu == (k == "gpu")) for k in minutes}
    site = profile.model_dump(mode="json") if profile else None
    yield Step(
        what="SLURM",
        call="launch.doctor.slurm:slurm_rows",
        arguments={"profile": site, "minutes": minutes},
        lane="SLURM",
        missed=Verdict.problem if profile else Verdict.note,
        silence="`scontrol ping` says more",
    )
    if config and site and version_of("zarr"):
        tree = json.loads(config.model_dump_json())
        yield _step("profile memory", "asked:profile_memory_row", "light", config=tree, site=site)


def _imports() -> Iterator[Step]:
    """Each package that medpsp stands on; those that import torch behind it."""
    for name, module in importable(["", *EXTRAS]).items():
        behind = name in NEED_TORCH
        yield Step(
            what="imports",
            label=name,
            call="launch.doctor.packages:import_row",
            arguments={"name": name, "module": module},
            lane="torch" if behind or name == "torch" else "imports",
            seconds=IMPORT_S,
            crash=CRASH.format(name),
            silence=SLOW.format(module),
            needs="torch" if behind else "",
        )


def _with_torch(config: Config | None, profile: Profile | None) -> Iterator[Step]:
    """What is checked with torch, in the process that has imported it."""
    calls: list[tuple[str, str, dict[str, Any]]] = [("gloo", "gpu:gloo_row", {})]
    ranks, precision = 0, ""
    if config:
        tree = json.loads(config.model_dump_json())
        deepspeed = version_of("deepspeed")
        calls.append(("room", "asked:room_row", {"config": tree}))
        engine = {"config": tree, "deepspeed": deepspeed}
        calls.append(("train.engine", "asked:engine_rows", engine))
        precision = config.train.precision
        ranks = 0 if profile else config.train.ranks
    # last, since a driver that hangs or crashes takes its process with it
    calls.append(("GPU and torch", "gpu:torch_row", {"ranks": ranks, "precision": precision}))
    calls.append(("NCCL", "gpu:nccl_row", {}))
    for what, call, arguments in calls:
        yield Step(
            what=what,
            call=f"launch.doctor.{call}",
            arguments=arguments,
            lane="torch",
            needs="torch",
            seconds=TORCH_S,
            crash=CRASH.format("torch"),
            silence=STUCK,
        )

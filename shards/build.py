"""An archive to shards: plan, one Ray task a shard, publish. The only file with Ray.

Each step leaves what the next one needs on disk, so that they can be commands of their own and the
second can be many, each for a range of the shards.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medpsp.config import Config
from medpsp.dataconfig import DataConfig
from medpsp.errors import ConfigError, ShardError, Unreachable
from medpsp.identity import load_key
from medpsp.progress import Bar
from medpsp.words import many
from shards.bucket import (
    clear_partials,
    clear_stale,
    create_bucket,
    require_no_dead_links,
    require_no_spare_links,
)
from shards.commit import committed
from shards.gather import gather
from shards.index import MANIFEST, REPORT, Manifest
from shards.partstore import locked
from shards.planfile import Plan, ShardEntry, make_plan, meaning
from shards.planstate import open_plan, write_plan
from shards.preflight import no_cluster, no_ray, require_means, require_places, task_error
from shards.publish import publish, write_crosswalk
from shards.reach import require_reach, unread
from shards.settings import WriteSettings, write_settings
from shards.write import write_shard

log = logging.getLogger("medpsp")
_RETRIES = 3
Approve = Callable[[Plan], None]


def build_shards(config: Config, approve: Approve = lambda plan: None) -> Manifest:
    """Convert the archive of ``config.data``; a second run repeats only what is missing.

    Args:
        config: What to convert, and where to.
        approve: See the plan before anything is changed; it may raise.

    Raises:
        ArchiveError: Archive missing, empty, or without usable slices for training and
            validation.
        ConfigError: A split would be empty, the labels folder is missing, or something would be
            written where it must not be.
        ShardError: A shard could not be written.
    """
    plan = plan_shards(config, approve)
    _convert(config, plan, range(len(plan.shards)))
    return publish(config, load_key(config.data.key_file), plan)


def plan_shards(config: Config, approve: Approve = lambda plan: None) -> Plan:
    """First step: scan the archive, lay its slices out, write what readers need to find shards.

    Args:
        config, approve: As `build_shards`.

    Raises:
        ArchiveError, ConfigError, ShardError: As `build_shards`.
    """
    data, root = config.data, config.shards
    require_places(data, root)
    require_means(data)
    key = load_key(data.key_file)
    with locked(data.index):
        return _plan(data, key, root, approve)


def _plan(data: DataConfig, key: bytes, root: Path, approve: Approve) -> Plan:
    gathered = gather(data, key)
    root.mkdir(parents=True, exist_ok=True)
    require_no_dead_links(root)
    plan = make_plan(gathered, data, key, root)
    missed = require_reach(plan, unread(plan), root, write_settings(data).text)
    require_no_spare_links(root, plan.slots)
    approve(plan)
    if data.crosswalk:
        write_crosswalk(plan, data, key)
    _withdraw(root)
    clear_stale(root, plan.shards)
    for bucket, slots in plan.slots.items():
        create_bucket(root, bucket, slots, write_settings(data))
    write_plan(plan, data, key, root, missed)
    return plan


def _withdraw(root: Path) -> None:
    """Neither manifest nor report while shards change below them."""
    for name in (MANIFEST, REPORT):
        (root / name).unlink(missing_ok=True)


def convert_part(config: Config, part: int, parts: int) -> int:
    """Second step: write one of several equal ranges of the planned shards.

    Args:
        config: With ``data.index``, where `plan_shards` left the plan.
        part: Counted from 1.
        parts: Number of ranges; as many processes or machines may be at work.

    Returns:
        Number of shards in the range.

    Raises:
        ShardError: No plan of this configuration, or a shard could not be written.
    """
    plan = open_plan(config.data, load_key(config.data.key_file), config.shards)
    total = len(plan.shards)
    places = range((part - 1) * total // parts, part * total // parts)
    _convert(config, plan, places)
    return len(places)


def publish_shards(config: Config) -> Manifest:
    """Last step: join what all ranges wrote in one manifest.

    Raises:
        ShardError: No plan of this configuration, or a shard is not there yet.
        ArchiveError: As `build_shards`.
    """
    key = load_key(config.data.key_file)
    root = config.shards
    plan = open_plan(config.data, key, root)
    require_no_dead_links(root)
    require_no_spare_links(root, plan.slots)
    text = write_settings(config.data).text
    missing = [
        e.name for e in plan.shards if not committed(root, e.name, e.digest(text), final=True)
    ]
    if missing:
        raise ShardError(
            f"{len(missing)} of {len(plan.shards)} shards are not written, the first: {missing[0]};"
            " run `medpsp shards` with `--step convert` for every part first"
        )
    clear_stale(root, plan.shards)  # half-written files of parts that were killed
    return publish(config, key, plan)


def _convert(config: Config, plan: Plan, places: range) -> None:
    """Write the shards of a range that are not there."""
    settings, root = write_settings(config.data), config.shards
    require_no_dead_links(root)
    entries = (plan.shards[place] for place in places)
    missing = [
        entry.name
        for entry in entries
        if not committed(root, entry.name, entry.digest(settings.text))
    ]
    with Bar("shards", len(places), "shards") as bar:
        bar.resume_at(len(places) - len(missing))
        if missing:
            _withdraw(root)
            wanted = set(missing)
            queue = (e for place in places if (e := plan.shards[place]).name in wanted)
            layout = meaning(config.data, load_key(config.data.key_file))
            work = _Work(plan, queue, (root.absolute(), settings, layout))
            try:
                with _ray(config.data) as (ray, memory):
                    task = ray.remote(num_cpus=1, memory=memory, max_retries=_RETRIES)(_write)
                    _run(ray, task, work, bar)
            finally:
                work.sweep()


class _Work:
    """Shards still to be written, each with the arguments of its task."""

    def __init__(
        self,
        plan: Plan,
        queue: Iterator[ShardEntry],
        means: tuple[Path, WriteSettings, dict[str, str]],
    ) -> None:
        self._plan, self._queue, self._means = plan, queue, means
        self.running: dict[Any, ShardEntry] = {}

    def start(self, task: Any) -> bool:
        """Start the next shard; False after the last."""
        entry = next(self._queue, None)
        if entry is None:
            return False
        root, *rest = self._means
        result = task.remote(root, self._plan.load(entry), *rest)
        self.running[result] = entry
        return True

    def sweep(self) -> None:
        """Remove what tasks that were ended have half written: on a full disk it is in the way."""
        for entry in self.running.values():
            clear_partials(self._means[0], entry)


def _write(*arguments: Any) -> int:
    """A shard task: its slices and their numbers go to disk, only how many are left out to us."""
    return len(write_shard(*arguments).refused)


def _run(ray: Any, task: Any, work: _Work, bar: Bar) -> None:
    """Keep two tasks for each core in flight: records of the others stay on disk."""
    running, refused, waiting = work.running, 0, list[ShardError]()
    while True:
        cores = int(ray.cluster_resources().get("CPU", 1))  # a cluster may grow and shrink
        while len(running) < 2 * cores and work.start(task):
            pass
        if not running:
            break
        ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        if _heard:
            raise SystemExit(128 + _heard[0])
        if not ready:
            continue
        try:
            refused += ray.get(ready[0])
        except ray.exceptions.RayError as error:
            found = task_error(running[ready[0]].name, error)
            if not isinstance(found, Unreachable):
                raise found from None
            waiting.append(found)  # the other shards need not wait for its sources
        del running[ready[0]]
        bar.advance(note=f"{many(refused, 'slice')} skipped or quarantined" if refused else "")
    if waiting:
        raise ShardError(f"{waiting[0]}; shards that wait for such: {len(waiting)}")


_heard: list[int] = []
"""Signals that came while Ray was at work."""


def _hear_sigterm() -> Any:
    """Let SIGTERM, by which schedulers end a job, only be noted; what handled it before."""
    _heard.clear()
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda number, frame: _heard.append(number))


@contextmanager
def _ray(data: DataConfig) -> Iterator[tuple[Any, int]]:
    """Ray, and the memory of a shard task in bytes; one that runs in this process is used as it is.

    Raises:
        ConfigError: No task would ever find enough memory, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    need, budget = require_means(data)
    started = not ray.is_initialized()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if started and data.ray_address:
        try:
            ray.init(address=data.ray_address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise no_cluster(data, error) from None
    elif started:
        try:
            ray.init(
                address="local",
                num_cpus=data.workers,
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                _memory=budget * 2**20,
                **quiet,
            )
        except Exception as error:  # noqa: BLE001 - where its node does not come up it raises that
            raise no_ray(error) from None
    before = _hear_sigterm()  # Ray's own handler prints a stack and leaves with 15
    try:
        room = max((n["Resources"].get("memory", 0) for n in ray.nodes() if n["Alive"]), default=0)
        if room < need * 2**20:
            raise ConfigError(
                f"data.ray_address: a shard task takes up to {need} MiB, the largest machine of "
                f"the cluster offers {room / 2**20:.0f}; lower data.decode_memory_mib"
            )
        yield ray, need * 2**20
    finally:
        if started:
            ray.shutdown()
        if before is not None:
            signal.signal(signal.SIGTERM, before)

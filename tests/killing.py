"""Conversions in processes of their own that are killed while they work."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from medpsp.config import Config
from shards.commit import PASSING, read_commit

WAIT_S = 120.0
State = dict[str, tuple[int, int]]
"""Path to (inode, time of writing)."""


def wait_for(condition: Callable[[], bool], what: str, seconds: float = WAIT_S) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.005)


def written(config: Config) -> Path:
    """The configuration as a file."""
    path = config.out / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@contextmanager
def command(config: Config, *arguments: str) -> Iterator[psutil.Popen]:
    """`medpsp shards` at work; nothing that it started outlives the block."""
    text = written(config)
    log = (config.out / "command.log").open("ab")
    process = psutil.Popen(
        [sys.executable, "-m", "launch.cli", "shards", str(text), *arguments],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        everything = family(process.pid)
        if process.poll() is None:
            process.kill()
        process.wait()
        log.close()
        _, alive = psutil.wait_procs(everything, timeout=120)
        for one in alive:
            one.kill()


def convert(config: Config, *arguments: str) -> None:
    """Run it to its end, which must be a good one."""
    with command(config, *arguments) as process:
        code = process.wait(600)
    assert code == 0, (config.out / "command.log").read_text()[-2000:]


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def workers(pid: int) -> list[psutil.Process]:
    """Shard tasks of a conversion and the children that decode for them."""
    found = []
    for process in family(pid)[1:]:
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if words.startswith("ray::_write") or "shards.encode" in words:
            found.append(process)
    return found


def state(root: Path, pattern: str) -> State:
    return {
        path.relative_to(root).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.glob(pattern)
        if path.is_file() and not path.name.startswith(".")
    }


def contents(root: Path) -> dict[str, bytes]:
    """All bytes below a folder of shards."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


@dataclass
class Harm:
    """Kills conversions of one configuration.

    Attributes:
        drivers, tasks: Kills so far of the command itself, and of what works for it.
        repeated: Committed shards that were written again.
        retried: Those of them that lacked slices for a failure that may pass: a child that was
            killed twice over the same masks or slice. To write them again is what a rerun is for.
        left: Tasks that outlived their driver by more than 30 s. (Ray's own agents may: they wait
            for an answer of a server that is gone, and end then.)
    """

    config: Config
    rng: random.Random
    drivers: int = 0
    tasks: int = 0
    repeated: int = 0
    retried: int = 0
    left: int = 0
    _known: State = field(default_factory=dict)
    _lacking: set[tuple[str, int]] = field(default_factory=set)

    def look(self) -> None:
        """Compare what is committed with what was."""
        root = self.config.shards
        commits = state(root, "commits/*.json")
        for name, mark in self._known.items():
            if commits.get(name) != mark:
                again = (name, mark[1]) in self._lacking
                self.retried += again
                self.repeated += not again
        self._known = commits
        for name, (_, when) in commits.items():
            found = read_commit(root, Path(name).stem)
            if found and any(row["code"] in PASSING for row in found.refused):
                self._lacking.add((name, when))

    def _begun(self, process: psutil.Popen, commits: int) -> bool:
        """Whether tasks are at work and so many shards committed, or all is over."""
        found = len(state(self.config.shards, "commits/*.json"))
        return process.poll() is not None or (found >= commits and bool(workers(process.pid)))

    def run(self, kills: int) -> None:
        """One conversion, killed ``kills`` times, the last time for good."""
        root = self.config.shards
        with command(self.config) as process:
            for number in range(kills):
                last = number == kills - 1
                enough = len(state(root, "commits/*.json")) + self.rng.choice((0, 0, 1))
                wait_for(lambda n=enough: self._begun(process, n), "a shard task")
                time.sleep(self.rng.uniform(0, 0.25))  # anywhere in its work
                if process.poll() is not None:
                    return
                at_work = workers(process.pid)
                if last:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    self.drivers += 1
                    _, alive = psutil.wait_procs(at_work, timeout=120)
                    self.left += len(alive)
                elif victims := workers(process.pid):
                    try:
                        self.rng.choice(victims).kill()
                        self.tasks += 1
                    except psutil.NoSuchProcess:
                        pass
                self.look()

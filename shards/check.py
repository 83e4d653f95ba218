"""Are the shards what they were when they were written? Every byte is read, once.

What there should be comes from the manifest and the shard table, where those are damaged from the
commits. Memory holds one shard at a time for each process, and numbers of every slice for `leaks`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from medpsp.errors import ShardError
from shards.checkshard import ShardTask, check_shard
from shards.commit import COMMITS
from shards.index import (
    INDEX,
    MANIFEST,
    OBJECTS,
    REPORT,
    SHARDS,
    Manifest,
    file_sha256,
    read_manifest,
)
from shards.inventory import surplus_files
from shards.leaks import find_leaks
from shards.problem import Problem
from shards.scanfile import Array, read_array
from shards.sealed import SealError, is_sealed_page
from shards.slots import PLAN
from shards.stream import IndexRuns, ShardRecord, shard_key, shard_records

TABLES = (INDEX, OBJECTS, PLAN, SHARDS)
_ALONE = 4096
"""Up to so many slices one process is done before others have started."""

Advance = Callable[[int], None]


def check_shards(
    root: Path, *, workers: int = 1, quick: bool = False, advance: Advance = lambda count: None
) -> Iterator[Problem]:
    """Verify seals and digests, decode every slice, compare with its rows, look for leaks.

    Args:
        root: Folder of the shards.
        workers: Processes.
        quick: Leave the bytes of the shard files alone.
        advance: Called with the number of slices that are done.

    Yields:
        Problems, in the same order every time.

    Raises:
        ShardError: No manifest, or one of another format; a process died.
    """
    check = _Check(root)
    yield from check.tables()
    yield from check.shards(workers, quick, advance)
    yield from surplus_files(root, check.names, {MANIFEST, REPORT, *TABLES})
    if INDEX not in check.bad:
        yield from find_leaks(root)


@dataclass(slots=True)
class _Check:
    """What is known of a folder of shards.

    Attributes:
        bad: Files that cannot be trusted.
        names: Of all shards.
    """

    root: Path
    manifest: Manifest | None = None
    bad: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    def tables(self) -> Iterator[Problem]:
        """Manifest, report, tables and zarr.json files."""
        try:
            self.manifest = read_manifest(self.root)
            digests: dict[str, str] = self.manifest.tables
        except SealError:
            yield Problem(kind="damaged", path=MANIFEST, text="is not what was written")
            digests = {}
        report = self.root / REPORT
        if report.is_file() and not is_sealed_page(report.read_bytes()):
            yield Problem(kind="damaged", path=REPORT, text="is not what was written")
        for name in sorted({*TABLES, *digests}):
            if problem := self._table(name, digests.get(name)):
                self.bad.add(name)
                yield problem
        yield from self._counts()

    def _table(self, name: str, sha256: str | None) -> Problem | None:
        path = self.root / name
        if not path.is_file():
            return Problem(kind="missing", path=name, text="missing")
        if sha256 is None:  # its digest is lost, so only what cannot be read is found
            try:
                pq.ParquetFile(path)
            except (OSError, pa.ArrowException) as error:
                return Problem(
                    kind="damaged", path=name, text=f"cannot be read ({type(error).__name__})"
                )
        elif file_sha256(path) != sha256:
            return Problem(kind="damaged", path=name, text="SHA-256 differs from the manifest")
        return None

    def _counts(self) -> Iterator[Problem]:
        """Whether the tables are as long as the manifest says."""
        if self.manifest is None:
            return
        objects = sum(self.manifest.counts.values())
        for name, rows in ((INDEX, self.manifest.slices), (OBJECTS, objects)):
            if name in self.bad:
                continue
            found = pq.ParquetFile(self.root / name).metadata.num_rows
            if found != rows:
                text = f"has {found} rows, the manifest says {rows}"
                yield Problem(kind="rows", path=name, text=text)

    def shards(self, workers: int, quick: bool, advance: Advance) -> Iterator[Problem]:
        """Every shard, several processes at a time."""
        problems: list[Problem] = []
        tasks = self._tasks(quick, problems)
        slices = self.manifest.slices if self.manifest else 0
        results = _serial(tasks) if workers == 1 or slices <= _ALONE else _pooled(tasks, workers)
        for found, count in results:
            yield from found
            advance(count)
        yield from problems
        if self.manifest is not None and len(self.names) != self.manifest.shards:
            text = f"has {len(self.names)} shards, the manifest says {self.manifest.shards}"
            yield Problem(kind="rows", path=SHARDS, text=text)

    def _tasks(self, quick: bool, problems: list[Problem]) -> Iterator[ShardTask]:
        """Shards joined with their rows, both in the order of (bucket, slot)."""
        arrays = _Arrays(self)
        runs = None
        if INDEX not in self.bad:
            runs = IndexRuns(self.root, arrays.slots, problems)
        for record in self._records(problems):
            self.names.add(record.name)
            rows = None
            if runs is not None and arrays.slots(record.bucket):
                rows = runs.take(record.key)
            yield ShardTask(
                root=self.root,
                name=record.name,
                bucket=record.bucket,
                number=record.number,
                files=record.files,
                slices=record.slices,
                rows=rows,
                arrays=arrays.of(record.bucket),
                quick=quick,
            )
        if runs is not None:
            runs.finish()

    def _records(self, problems: list[Problem]) -> Iterator[ShardRecord]:
        if SHARDS not in self.bad:
            yield from shard_records(self.root, problems)
            return
        folder = self.root / COMMITS
        names = [p.stem for p in folder.glob("*.json")] if folder.is_dir() else []
        for key in sorted(key for name in names if (key := shard_key(name))):
            yield ShardRecord(key=key, files=None, slices=0)


class _Arrays:
    """Arrays of the buckets whose zarr.json files can be trusted."""

    def __init__(self, check: _Check) -> None:
        self._check = check
        self._known: dict[str, tuple[Array | None, Array | None]] = {}

    def of(self, bucket: str) -> tuple[Array | None, Array | None]:
        if bucket not in self._known:
            image, label = (self._read(f"{bucket}/{name}") for name in ("image", "label"))
            self._known[bucket] = image, label
        return self._known[bucket]

    def slots(self, bucket: str) -> int:
        """Slots of a shard; 0 where it is unknown."""
        return next((array.slots for array in self.of(bucket) if array), 0)

    def _read(self, path: str) -> Array | None:
        manifest, label = self._check.manifest, path.endswith("label")
        if f"{path}/zarr.json" in self._check.bad or (label and manifest is None):
            return None
        classes = len(manifest.classes) if label and manifest else 0
        return read_array(self._check.root / path, classes)


Result = tuple[list[Problem], int]


def _serial(tasks: Iterator[ShardTask]) -> Iterator[Result]:
    for task in tasks:
        yield check_shard(task), task.slices


def _pooled(tasks: Iterator[ShardTask], workers: int) -> Iterator[Result]:
    """In the order of the tasks, with a few of them under way."""
    waiting: deque[tuple[Future[list[Problem]], ShardTask]] = deque()
    try:
        # spawn: pyarrow keeps threads, which survive no fork
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for task in tasks:
                waiting.append((pool.submit(check_shard, task), task))
                if len(waiting) > 2 * workers:
                    future, done = waiting.popleft()
                    yield future.result(), done.slices
            for future, done in waiting:
                yield future.result(), done.slices
    except BrokenProcessPool:
        raise ShardError(
            "check: a process of it died, perhaps for want of memory; lower data.workers"
        ) from None

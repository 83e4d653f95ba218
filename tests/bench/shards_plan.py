"""Planner and index at scale: a catalogue of made-up rows, planned, laid out and published.

No file of the archive is there and no pixel is decoded: what a scan would have found is written as
partitions of the catalogue, what shard tasks would have committed as commits (neither is counted).
Counted are reading the catalogue, grouping, layout, the private plan, and index, tables, manifest.

    python tests/bench/shards_plan.py [--rows 10000000] [--dir FOLDER] [--no-publish]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow as pa

from medpsp.config import Config
from medpsp.dicom.sandbox import SandboxPool
from medpsp.identity import create_key, load_key
from medpsp.types import SliceRef, Window
from shards.bucket import clear_stale, create_bucket
from shards.catalog import PART_ROWS, SCANNER, Catalog
from shards.commit import Commit, columns_of, write_commit
from shards.encode import Encoded
from shards.gather import gather_dicom
from shards.headers import FILE, STAMP, RowBuffer, RowReader
from shards.partition import SCHEMA, write_part
from shards.partstore import FolderStore
from shards.planfile import Plan, make_plan
from shards.planstate import plan_folder, write_plan
from shards.publish import publish
from shards.settings import write_settings
from shards.write import slice_row
from tests.bench.shards_memory import Watch

PER_SERIES, SERIES_A_PATIENT = 200, 3
DHASH = "0123456789abcdef" * 4


def refs(series: int) -> list[SliceRef]:
    """Frames as a scan of a CT archive gives them."""
    study = series // SERIES_A_PATIENT
    return [
        SliceRef(
            path="",
            file_id="",
            patient_id=f"MRN{study:08d}",
            series_uid=f"1.2.840.113619.2.55.3.{series:010d}",
            study_uid=f"1.2.840.113619.2.54.3.{study:010d}",
            sop_uid=f"1.2.840.113619.2.53.3.{series:010d}.{place}",
            frame_of_reference=f"1.2.840.113619.2.56.3.{study:010d}",
            modality="CT",
            rows=512,
            columns=512,
            dtype="int16",
            photometric="MONOCHROME2",
            position=(-169.0, -169.0, 2.5 * place - 250),
            orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
            pixel_spacing=(0.66, 0.66),
            spacing_source="patient",
            window=Window(center=40.0, width=400.0, function="LINEAR"),
            study_date="20240101",
            series_split_key="AXIAL|HU|1.2|None",
            contrast_key=("", "", "B30F", "120"),
            collision_key=("", "", "", "1", ""),
            times=("20240101120000", f"202401011200{place % 60:02d}"),
            manufacturer="GE",
            body_part="ABDOMEN",
        )
        for place in range(PER_SERIES)
    ]


def table_of(number: int) -> pa.Table:
    """The rows of one series, ``<patient>/<series>/<slice>.dcm``."""
    buffer = RowBuffer()
    names = []
    for place, ref in enumerate(refs(number)):
        buffer.add_frames(place, [ref])
        names.append(f"{number // 1000:05d}/{number:08d}/{place:04d}.dcm".encode())
    packed = buffer.take()
    begins, at = [], 0
    text = packed.text.tobytes()
    columns: dict[str, Any] = {FILE: pa.array(names, pa.binary())}
    columns |= {
        name: pa.array([place] * len(names), pa.int64()) for place, name in enumerate(STAMP)
    }
    for field, sizes in zip(list(SCHEMA)[4:-1], packed.lengths, strict=True):
        begins = []
        for size in sizes.tolist():
            begins.append(text[at : at + size])
            at += size
        columns[field.name] = pa.array(begins, pa.binary()).cast(field.type)
    columns["frame"] = pa.array(packed.frame)
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def catalogue(config: Config, key: bytes, rows: int) -> Catalog:
    """A catalogue of so many rows in ``data.index``."""
    data = config.data
    assert data.index is not None
    store = FolderStore(data.index / "catalog", "bench")
    store.parts()
    parts, waiting, count = [], [], 0
    for number in range(rows // PER_SERIES):
        waiting.append(table_of(number))
        count += PER_SERIES
        if count >= PART_ROWS or number == rows // PER_SERIES - 1:
            part, written = write_part(pa.concat_tables(waiting))
            store.put(part, written)
            parts.append(part)
            waiting, count = [], 0
    store.commit(parts)
    from functools import partial

    from shards.headers import file_id

    root = os.path.join(data.archive, "")
    return Catalog(store, parts, RowReader(root, partial(file_id, key)))


def commits(config: Config, plan: Plan) -> Iterator[None]:
    """What shard tasks would have committed."""
    settings = write_settings(config.data)
    last: tuple[int, Any] = (-1, None)
    for entry in plan.shards:
        rows = []
        for part in entry.parts:
            if last[0] != part.record:
                last = part.record, plan.gathered.planned.load(part.record)
            for number in range(part.start, part.stop):
                found = Encoded(number, [], [262144, 0, 0], True, 0.0, number, DHASH, [])
                slot = part.slot + number - part.start
                rows.append(slice_row((entry.bucket, slot), last[1], found, (), settings))
        name = f"{entry.bucket}/image/c/{entry.number}/0/0"
        commit = Commit(
            name=entry.name,
            digest=entry.digest(settings.text),
            layout={},
            series=[],
            files={name: ("0" * 64, 1)},
            columns=columns_of(rows),
            refused=[],
            values={},
        )
        write_commit(config.shards, commit)
        yield


class Clock:
    """Seconds of the steps, and the peak of memory so far."""

    def __init__(self, rows: int, watch: Watch) -> None:
        self.rows, self.watch, self.total = rows, watch, 0.0

    def time(self, name: str, step: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = step()
        seconds = time.perf_counter() - began
        self.total += seconds
        peak = self.watch.driver + self.watch.rest + self.watch.tasks
        print(
            f"{name:44} {seconds:8.1f} s {seconds / self.rows * 1e6:7.1f} us a row, peak "
            f"{peak:.0f} MiB ({self.watch.driver:.0f} in this process)",
            flush=True,
        )
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--no-publish", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.dir) as folder:
        root = Path(folder)
        (root / "archive").mkdir()
        create_key(root / "key", "key of the bench 7")
        tree = {
            "archive": root / "archive",
            "classes": ["background", "a"],
            "unlabelled": "keep",
            "key_file": root / "key",
            "index": root / "index",
            "workers": 2,
        }
        config = Config.model_validate({"out": root / "out", "data": tree})
        data, key = config.data, load_key(config.data.key_file)
        config.shards.mkdir(parents=True)
        began = time.perf_counter()
        found = catalogue(config, key, chosen.rows)
        size = sum(f.stat().st_size for f in (root / "index").rglob("*.parquet"))
        seconds = time.perf_counter() - began
        print(f"catalogue of {found.objects} objects: {size / 1e6:.0f} MB, made in {seconds:.0f} s")
        watch = Watch(os.getpid())
        watch.start()
        clock = Clock(found.objects, watch)
        with SandboxPool(1, module=SCANNER) as pool:
            gathered = clock.time(
                "read, group, label, split", lambda: gather_dicom(found, data, key, pool)
            )
        plan = clock.time("lay out", lambda: make_plan(gathered, data, key, config.shards))

        def write() -> None:
            clear_stale(config.shards, plan.shards)
            for bucket, slots in plan.slots.items():
                create_bucket(config.shards, bucket, slots, write_settings(data))
            plan_folder(data)
            write_plan(plan, data, key, config.shards)

        clock.time("clear, write the plan", write)
        if not chosen.no_publish:
            watch.over.set()
            watch.join()
            began = time.perf_counter()
            for _ in commits(config, plan):
                pass
            seconds = time.perf_counter() - began
            print(f"{len(plan.shards)} commits, made in {seconds:.0f} s", flush=True)
            clock.watch = watch = Watch(os.getpid())
            watch.start()
            manifest = clock.time("index, tables, manifest", lambda: publish(config, key, plan))
            index = (config.shards / "index.parquet").stat().st_size
            print(f"{manifest.slices} slices, index {index / 1e6:.0f} MB")
        print(f"in all {clock.total:.0f} s, {clock.total / 60:.1f} minutes")


if __name__ == "__main__":
    main()

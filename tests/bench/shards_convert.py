"""Conversion: DICOM files to a committed shard, against the peers and against the floor."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from medpsp.dicom.passthrough import SYNTAXES as KEPT
from shards.bucket import create_bucket
from shards.codec import image_codec
from shards.layout import PlannedSeries, bucket_of, plan_shards
from shards.write import write_shard
from tests.bench.results import Missing, Row
from tests.bench.shards_data import SIDE, Data, labels_of, planned, settings, stored
from tests.bench.shards_rounds import PEERS, Cells, Peer, Target, Work, below, measure, report

PROFILES = ("default", "fast", "dense")
PARTS = {"image": "*/image/c/**/*", "label": "*/label/c/**/*", "commit": "commits/*"}
"""Of a store, where they lie."""
PLUGINS = {"jpegls": "pyjpegls", "jpeglossless": "gdcm", "rle": "pylibjpeg"}
"""Of pydicom's plugins the fastest, where it would take another by itself."""
_stamps = count()


def ours(item: PlannedSeries, profile: str, root: Path) -> Work:
    """`write_shard` of a whole series, without Ray; the child's masks are read anew each time."""
    rules = settings(profile)
    bucket = bucket_of(item.series)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    create_bucket(root, bucket, len(item.series.slices) + rules.shard_slices, rules)

    def run() -> None:
        fresh = replace(item, stamp=str(next(_stamps)))
        for plan in plan_shards([fresh], rules.shard_slices):
            commit = write_shard(root, plan, rules)
            if commit.refused:
                raise Missing(f"{len(commit.refused)} refused: {commit.refused[0]['code']}")

    return run


def floor(files: list[Path], profile: str, out: Path) -> Work:
    """Read whole files, encode their pixels by the same codec, hash and write what comes out."""
    places = [stored(file) for file in files]
    codec = image_codec(profile, "int16")
    buffer = bytearray(max(file.stat().st_size for file in files))

    def run() -> None:
        sha = hashlib.sha256()
        with out.open("wb", buffering=0) as stream:
            for file, (offset, length) in zip(files, places, strict=True):
                with file.open("rb", buffering=0) as source:
                    source.readinto(buffer)
                values = np.frombuffer(buffer, "<i2", length // 2, offset).reshape(SIDE, SIDE)
                chunk = codec.encode(values)
                sha.update(chunk)
                stream.write(chunk)
            os.fsync(stream.fileno())

    return run


@dataclass(frozen=True)
class Session:
    """What the sections share."""

    data: Data
    scratch: Path
    peer: Peer
    rounds: int
    timed: int

    def series(self, syntax: str) -> list[Path]:
        """The files of the first series, as many as a round takes."""
        return self.data.files(syntax, self.peer)[0][: self.timed]


def linked(files: list[Path], folder: Path) -> Path:
    """A folder of just these files, for peers that take a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        os.link(file, folder / file.name)
    return folder


def convert(session: Session) -> None:
    """Section: native CT, then the compressed syntaxes, then sizes of the profiles."""
    _native(session)
    _compressed(session)


def _native(session: Session) -> None:
    files, peer, scratch = session.series("native"), session.peer, session.scratch
    item = planned(files)
    mask = labels_of(item.series, scratch / f"mask{len(files)}.nii.gz")
    labelled = replace(item, series=replace(item.series, masks=(mask,), mask_kind="nifti"))
    names, folder = [str(f) for f in files], str(linked(files, scratch / "native"))
    out = str(scratch / "peer")
    works: dict[str, Work] = {}
    for profile in PROFILES:
        works[f"ours {profile}"] = ours(item, profile, scratch / f"ours-{profile}")
        works[f"floor {profile}"] = floor(files, profile, scratch / "floor")
    works |= {
        "ours default, labels": ours(labelled, "default", scratch / "ours-labels"),
        "pydicom + zarr defaults": peer.work("pydicom_zarr", files=names, out=out),
        "MONAI PydicomReader, read only": peer.work("monai", folder=folder),
        "SimpleITK, read only": peer.work("simpleitk", files=names),
        "SimpleITK, folder to files and read": peer.work("simpleitk", files=[], folder=folder),
        "dcm2niix .nii.gz (-z i)": peer.work("dcm2niix", folder=folder, out=out, gz="i"),
        "dcm2niix .nii (-z n)": peer.work("dcm2niix", folder=folder, out=out, gz="n"),
    }
    cells = measure(works, len(files), session.rounds)
    zarr = "pydicom + zarr defaults"
    goals: dict[str, float | None] = {
        zarr: 4.5,
        "MONAI PydicomReader, read only": 4.5,
        "SimpleITK, read only": 2,
        "SimpleITK, folder to files and read": 2,
        "dcm2niix .nii.gz (-z i)": 4,
    }
    targets = [
        Target(ours="ours default", theirs=name, least=least) for name, least in goals.items()
    ]
    raw = "dcm2niix .nii (-z n)"
    targets += [
        Target(ours="ours fast", theirs=raw, least=1),
        Target(
            ours="ours default, labels",
            theirs=zarr,
            least=1,
        ),
    ]
    targets += [Target(ours=f"ours {p}", theirs=f"floor {p}", most=1.15) for p in PROFILES]
    report("convert native", cells, targets, {**_facts(files), **_peak()})


def _facts(files: list[Path]) -> dict[str, Any]:
    codec = image_codec("default", "int16")
    sample = files[:: max(1, len(files) // 20)]
    sizes = []
    for file in sample:
        offset, length = stored(file)
        values = np.fromfile(file, "<i2", length // 2, offset=offset).reshape(SIDE, SIDE)
        sizes.append(len(codec.encode(values)))
    return {
        "slices a round": len(files),
        "bytes a file": round(sum(f.stat().st_size for f in files) / len(files)),
        "ratio of blosc zstd-1 shuffle": round(SIDE * SIDE * 2 * len(sample) / sum(sizes), 2),
    }


def _peak() -> dict[str, int]:
    """MiB that the largest child of this process ever held: the one that decodes and encodes."""
    peaks = [0]
    for pid in below(os.getpid()):
        status = Path(f"/proc/{pid}/status").read_text()
        if str(PEERS) not in Path(f"/proc/{pid}/cmdline").read_text():
            peaks += [int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")]
    return {"peak MiB of the child of a shard task": max(peaks) // 1024}


def _compressed(session: Session) -> None:
    goals = {"jpegls": 2.0, "rle": 3.0, "jpeglossless": 3.0}
    for syntax, least in goals.items():
        try:
            files = session.series(syntax)
        except Missing as error:
            report(f"convert {syntax}", {}, [], {"not measured": str(error)})
            continue
        item, names = planned(files), [str(f) for f in files]
        peer, out = session.peer, str(session.scratch / "peer")
        fastest = f"pydicom ({PLUGINS[syntax]}) + zarr defaults"
        works: dict[str, Work] = {
            "ours default": ours(item, "default", session.scratch / "ours-default"),
            fastest: peer.work("pydicom_zarr", files=names, out=out, plugin=PLUGINS[syntax]),
            "pydicom as it comes + zarr defaults": peer.work("pydicom_zarr", files=names, out=out),
        }
        targets = [
            Target(ours="ours default", theirs=fastest, least=least),
            Target(
                ours="ours default",
                theirs="pydicom as it comes + zarr defaults",
                least=1,
            ),
        ]
        if syntax in KEPT:
            works["ours, bytes kept"] = ours(item, syntax, session.scratch / f"ours-{syntax}")
            targets.append(
                Target(
                    ours="ours, bytes kept",
                    theirs=fastest,
                    least=1,
                )
            )
        cells: Cells = measure(works, len(files), session.rounds)
        size = round(sum(f.stat().st_size for f in files) / len(files))
        facts = {"slices a round": len(files), "bytes a file": size}
        report(f"convert {syntax}", cells, targets, facts)


def sizes(session: Session) -> None:
    """Section: bytes on disk of every profile against native pixels, and what writing costs."""
    files = session.series("native")
    item, native = planned(files), SIDE * SIDE * 2
    profiles = ("default", "fast", "dense", "jpegls", "htj2k")
    roots = {profile: session.scratch / f"size-{profile}" for profile in profiles}
    works = {f"ours {profile}": ours(item, profile, root) for profile, root in roots.items()}
    cells = measure(works, len(files), session.rounds)
    facts: dict[str, Any] = {"native pixels": f"{native} bytes a slice"}
    rows = []
    for profile, root in roots.items():
        size = {
            part: sum(p.stat().st_size for p in root.glob(pattern) if p.is_file()) / len(files)
            for part, pattern in PARTS.items()
        }
        ratio = native / size["image"] if size["image"] else None
        rows.append(Row(label=f"{profile}: native pixels / image", value=ratio))
        rows += [
            Row(label=f"{profile}: {part}", value=round(count), unit="bytes a slice")
            for part, count in size.items()
        ]
    report("sizes", cells, [], facts, rows)

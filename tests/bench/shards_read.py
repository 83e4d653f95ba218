"""Reading: headers of an archive, and single slices of shards in random order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from pydicom import dcmread

from medpsp.dataconfig import DataConfig
from medpsp.dicom.read import read_headers
from medpsp.dicom.sandbox import SandboxPool
from medpsp.types import Place, ReadPolicy
from shards.bucket import create_bucket, shard_files
from shards.codec import LABEL, Codec, checked, image_codec
from shards.shardfile import ShardWriter, read_shard_index
from tests.bench.results import Missing
from tests.bench.shards_convert import Session, linked
from tests.bench.shards_data import SIDE, settings, stored
from tests.bench.shards_rounds import Target, Work, entry, measure, report

BUCKET = f"{SIDE}x{SIDE}_int16"
SHARD = 128
STORED = 512
"""Slices of a store that is read at random."""
FFCV = "published for one thread: 7286/s, not measured here"


def headers(session: Session) -> None:
    """Section: header scan against pydicom's stop_before_pixels."""
    files = list(chain.from_iterable(session.data.files("native", session.peer)))
    policy = ReadPolicy()
    works: dict[str, Work] = {
        "pydicom stop_before_pixels": _each(files, lambda f: dcmread(f, stop_before_pixels=True)),
        "ours read_headers": _each(files, lambda f: read_headers(Place(str(f)), "0", policy)),
        "ours scan_header": _scan_header(files, policy),
    }
    whole = "ours, whole scan to the catalogue"
    with SandboxPool(1, module="shards.scanner") as pool:
        works[whole] = _catalogue(linked_all(files, session.scratch / "archive"), pool)
        cells = measure(works, len(files), session.rounds)
    theirs = "pydicom stop_before_pixels"
    targets = [
        Target(ours=whole, theirs=theirs, least=10),
        Target(ours="ours scan_header", theirs=theirs, least=10),
        Target(ours="ours read_headers", theirs=theirs, least=1),
    ]
    report("headers", cells, targets, {"files": len(files)})


def linked_all(files: list[Path], folder: Path) -> Path:
    """An archive of these files and no others, their folders kept."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in {file.parent for file in files}:
        linked([f for f in files if f.parent == parent], folder / parent.name)
    return folder


def _each(files: list[Path], function: Callable[[Path], object]) -> Work:
    def run() -> None:
        for file in files:
            function(file)

    return run


def _scan_header(files: list[Path], policy: ReadPolicy) -> Work:
    def run() -> None:
        scan = entry("medpsp.dicom.read", "scan_header")
        for file in files:
            if scan(str(file), "0", policy) is None:
                raise Missing("scan_header left a file of the bench to the ordinary way")

    return run


def _catalogue(archive: Path, pool: SandboxPool) -> Work:
    data = DataConfig(archive=archive, classes=("background", "a"), workers=1)

    def run() -> None:
        entry("shards.catalog", "Catalog").scan(data, b"k" * 32, pool, lambda *_: None)

    return run


class Store:
    """The same slices in shards of one profile.

    Attributes:
        root: Folder of the shards.
        chunks: (shard file, offset, bytes) of every image.
    """

    def __init__(self, root: Path, profile: str, values: NDArray[np.int16]) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self.root, self.codec, self.values = root, image_codec(profile, "int16"), values
        shards = -(-len(values) // SHARD)
        create_bucket(root, BUCKET, shards * SHARD, settings(profile, SHARD))
        self.chunks: list[tuple[int, int, int]] = []
        self.bytes = 0
        for number in range(shards):
            paths = [root / path for path in shard_files(BUCKET, number)]
            writers = [ShardWriter(path, SHARD) for path in paths]
            for slot, value in enumerate(values[number * SHARD : (number + 1) * SHARD]):
                label = (value > 1100).astype(np.uint8)
                label[::2] = 0
                writers[0].append(slot, self.codec.encode(value))
                writers[1].append(slot, LABEL.encode(label))
            self.bytes += writers[0].commit()[1]
            writers[1].commit()
            handle = os.open(paths[0], os.O_RDONLY)
            index = read_shard_index(handle, SHARD)
            used = len(values[number * SHARD : (number + 1) * SHARD])
            self.chunks += [(handle, int(o), int(n)) for o, n in index[:used]]

    def zarr(self, order: list[int]) -> Work:
        """zarr-python's ``z[i]``."""
        array = zarr.open_array(self.root / BUCKET / "image", mode="r")

        def run() -> None:
            for number in order:
                array[number]

        return run

    def ours(self, order: list[int]) -> Work:
        """The product's reader, images only, into one buffer."""
        out = np.empty((SIDE, SIDE), np.int16)

        def run() -> None:
            read = image_reader(self.root)
            for number in order:
                read(number, out)
            if not np.array_equal(out, self.values[order[-1]]):
                raise ValueError("the reader gave back other values")

        return run

    def loop(self, order: list[int]) -> Work:
        """pread, CRC32C and decode, and nothing else: what a reader cannot beat."""
        out = np.empty((SIDE, SIDE), np.int16)

        def run() -> None:
            for number in order:
                handle, offset, size = self.chunks[number]
                self.codec.decode_payload(checked(os.pread(handle, size, offset)), out)

        return run

    def decode(self, order: list[int]) -> Work:
        """Decoding of chunks that lie in memory, no CRC32C."""
        out = np.empty((SIDE, SIDE), np.int16)
        payloads = {n: checked(os.pread(h, s, o)) for n in order for h, o, s in [self.chunks[n]]}
        return _decode(self.codec, [payloads[n] for n in order], out)


def _decode(codec: Codec, payloads: list[NDArray[np.uint8]], out: NDArray[np.int16]) -> Work:
    def run() -> None:
        for payload in payloads:
            codec.decode_payload(payload, out)

    return run


def image_reader(root: Path) -> Callable[[int, NDArray[np.int16]], object]:
    """Slot and buffer to `ShardReader`, opened now.

    Raises:
        Missing: The reader of the tree reads through zarr-python.
    """
    reader: Any = entry("shards.reader", "ShardReader")(root)
    if not hasattr(reader, "read_into"):
        raise Missing("the tree has no ShardReader.read_into")
    return lambda slot, out: reader.read_into(BUCKET, slot, out, None)


def slices(session: Session) -> NDArray[np.int16]:
    """(N, H, W) native slices."""
    files = list(chain.from_iterable(session.data.files("native", session.peer)))[:STORED]
    values = []
    for file in files:
        offset, length = stored(file)
        one = np.fromfile(file, "<i2", length // 2, offset=offset)
        values.append(one.reshape(SIDE, SIDE) - np.int16(1024))
    return np.stack(values)


def random_slices(session: Session) -> None:
    """Section: single slices in random order, one thread, files in the page cache."""
    values, scratch = slices(session), session.scratch
    order = np.random.default_rng(0).permutation(len(values))[: session.timed].tolist()
    facts: dict[str, Any] = {"slices stored": len(values), "slices a round": len(order)}
    facts["MB, raw"] = round(values.nbytes / 1e6, 1)
    works: dict[str, Work] = {}
    for name, profile in (("zstd", "default"), ("lz4", "fast")):
        store = Store(scratch / f"store-{profile}", profile, values)
        facts[f"MB, ours {name}"] = round(store.bytes / 1e6, 1)
        works |= {
            f"zarr z[i], {name}": store.zarr(order),
            f"ours {name}": store.ours(order),
            f"pread + crc + decode, {name}": store.loop(order),
            f"bare decode, {name}": store.decode(order),
        }
    works |= _peer_stores(session, values, order, facts)
    cells = measure(works, len(order), session.rounds)
    targets = [
        _target("zstd", "zarr z[i], zstd", least=4),
        _target("lz4", "zarr z[i], lz4", least=14),
        _target("zstd", "bare decode, zstd", most=1.15),
        _target("zstd", "pread + crc + decode, zstd", most=1.15),
        _target("lz4", "pread + crc + decode, lz4", most=1.15),
        _target("lz4", "MDS raw", least=1),
        _target("lz4", "ffcv, 1 thread", least=1),
        _target("lz4", "blosc2 as nnU-Net, handle kept", least=1),
        _target("lz4", "blosc2 int16, handle kept", least=1),
    ]
    report("random", cells, targets, facts)


def _target(name: str, theirs: str, **goal: float) -> Target:
    return Target(ours=f"ours {name}", theirs=theirs, **goal)


def _peer_stores(
    session: Session, values: NDArray[np.int16], order: list[int], facts: dict[str, Any]
) -> dict[str, Work]:
    peer, scratch = session.peer, session.scratch
    array = str(scratch / "slices.npy")
    np.save(array, values)
    places = {kind: str(scratch / f"{kind}.b2nd") for kind in ("nnunet", "int16")}
    mds = str(scratch / "mds")
    try:
        facts["MB, MDS raw"] = round(peer.ask("mds_write", array=array, out=mds)["bytes"] / 1e6, 1)
    except Missing as error:
        facts["MB, MDS raw"] = str(error)
    for kind, place in places.items():
        try:
            size = peer.ask("blosc2_write", array=array, out=place, kind=kind)["bytes"] / 1e6
            facts[f"MB, blosc2 {kind}"] = round(size, 1)
        except Missing as error:
            facts[f"MB, blosc2 {kind}"] = str(error)

    def ffcv() -> float | None:
        try:
            peer.ask("ffcv")
        except Missing as error:
            raise Missing(f"{error}; {FFCV}") from None
        raise Missing(f"installed, but this bench has no work for it; {FFCV}")

    def blosc2(kind: str, keep: bool) -> Work:
        return peer.work("blosc2_read", path=places[kind], order=order, keep=keep)

    return {
        "MDS raw": peer.work("mds_read", folder=mds, order=order),
        "ffcv, 1 thread": ffcv,
        "blosc2 as nnU-Net, opened each time": blosc2("nnunet", False),
        "blosc2 as nnU-Net, handle kept": blosc2("nnunet", True),
        "blosc2 int16, handle kept": blosc2("int16", True),
    }

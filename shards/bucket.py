"""A bucket on disk: its zarr.json files, the places of its shards, and what no plan owns.

zarr is imported where it is needed: shard tasks do without it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from medpsp.dicom.walk import leads_nowhere
from medpsp.errors import ShardError
from medpsp.types import IGNORE
from shards.codec import LABEL, Codec, image_codec
from shards.commit import COMMITS, commit_name, committed_names
from shards.index import write_bytes_durably
from shards.layout import BUCKET, FORMAT, bucket_parts
from shards.settings import WriteSettings

if TYPE_CHECKING:
    from zarr.abc.codec import ArrayBytesCodec
    from zarr.storage import MemoryStore

_MARK = "medpsp.format"


class Named(Protocol):
    """A shard of a plan, as far as its files go."""

    @property
    def bucket(self) -> str:
        """Name of its bucket."""

    @property
    def number(self) -> int:
        """Within the bucket."""

    @property
    def name(self) -> str:
        """Of the shard."""


def create_bucket(root: Path, bucket: str, slots: int, settings: WriteSettings) -> None:
    """Write the zarr.json files of a bucket of ``slots`` slots; shards that lie there stay."""
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync
    from zarr.storage import MemoryStore

    store = MemoryStore()  # on disk, zarr empties the folder of an array before it makes one
    zarr.open_group(store, mode="a", attributes={_MARK: FORMAT})
    zarr.open_group(store, path=bucket, mode="a")
    rows, columns, dtype = bucket_parts(bucket)
    shape = (rows, columns, 3) if dtype == "uint8" else (rows, columns)  # uint8 is RGB
    sizes = (slots, settings.shard_slices)
    _create(store, f"{bucket}/image", (dtype, image_codec(settings.profile, dtype)), shape, sizes)
    _create(store, f"{bucket}/label", ("uint8", LABEL), (rows, columns), sizes)
    for key in metadata_files(bucket):
        buffer = sync(store.get(key, default_buffer_prototype()))
        if buffer is None:
            raise OSError(f"zarr wrote no {key}")
        write_bytes_durably(root / key, buffer.to_bytes())


def _create(
    store: MemoryStore,
    path: str,
    kind: tuple[str, Codec],
    frame: tuple[int, ...],
    sizes: tuple[int, int],
) -> None:
    import zarr
    from zarr.codecs import BloscCodec, BloscShuffle, BytesCodec, Crc32cCodec

    from shards.zarrcodec import FrameCodec

    (slots, shard_slices), (dtype, codec) = sizes, kind
    blosc = BloscCodec(
        cname=codec.cname,  # type: ignore[arg-type]
        clevel=codec.level,
        typesize=codec.typesize,
        shuffle=BloscShuffle[codec.shuffle],
    )
    plain = codec.kind == "blosc"
    serializer: ArrayBytesCodec = BytesCodec() if plain else FrameCodec(codec.kind)
    zarr.create_array(
        store,
        name=path,
        shape=(slots, *frame),
        dtype=dtype,
        chunks=(1, *frame),
        shards=(shard_slices, *frame),
        serializer=serializer,
        compressors=[blosc, Crc32cCodec()] if plain else [Crc32cCodec()],
        fill_value=IGNORE if path.endswith("label") else 0,
        zarr_format=3,
        dimension_names=("slice", "row", "column", "channel")[: 1 + len(frame)],
    )


def is_marked(root: Path) -> bool:
    """Whether the group at a folder is one that `create_bucket` made."""
    path = root / "zarr.json"
    try:
        tree = json.loads(path.read_bytes()) if path.is_file() else {}
        return _MARK in tree["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def metadata_files(bucket: str) -> tuple[str, ...]:
    """Paths of the zarr.json files that a reader of one bucket needs."""
    folders = ("", f"{bucket}/", f"{bucket}/image/", f"{bucket}/label/")
    return tuple(f"{folder}zarr.json" for folder in folders)


def shard_files(bucket: str, number: int) -> tuple[str, str]:
    """Paths of a shard's image and label, relative to the root: one number for each axis."""
    axes = 3 if bucket_parts(bucket)[2] == "uint8" else 2
    return f"{bucket}/image/c/{number}" + "/0" * axes, f"{bucket}/label/c/{number}/0/0"


def require_no_spare_links(root: Path, buckets: Container[str]) -> None:
    """What lies behind a link cannot be told to be ours.

    Args:
        root: Folder of the shards.
        buckets: That a plan needs; their arrays may lie on another disk.

    Raises:
        ShardError: A bucket that goes is a link, or holds one.
    """
    for bucket in [path for path in root.iterdir() if BUCKET.fullmatch(path.name)]:
        if bucket.name in buckets:
            continue
        for path in [p for name in _LINKED if (p := Path(f"{bucket}{name}")).is_symlink()]:
            raise ShardError(
                f"out: {path} is a link, and no slice goes there any more; delete what it leads "
                "to, if it is nothing else, and the link"
            )


def require_no_dead_links(root: Path) -> None:
    """What is written behind a link to nowhere must not be taken for missing.

    Raises:
        ShardError: The commits, or a part of a bucket, are such a link.
    """
    buckets = [path for path in root.iterdir() if BUCKET.fullmatch(path.name)]
    places = [Path(f"{bucket}{name}") for bucket in buckets for name in _LINKED]
    for path in [root / COMMITS, *places]:
        if leads_nowhere(path, root):
            raise ShardError(f"out: {path} is a link to nowhere; is its disk mounted?")


def clear_stale(root: Path, plans: Iterable[Named]) -> None:
    """Delete what earlier runs left: shards of no plan, their commits, half-written files.

    A patient taken out of the archive is gone from the shards after the next run. Only files of the
    names that ours have go, and folders that are empty then.
    """
    keep: set[str] = set()
    buckets: set[str] = set()
    for plan in plans:
        buckets.add(plan.bucket)
        keep.update([*shard_files(plan.bucket, plan.number), commit_name(plan.name)])
    for path in files_below(root):
        name = path.relative_to(root).as_posix()
        if is_partial(name) or (_OURS.fullmatch(name) and name not in keep):
            path.unlink()
    for folder in [f for f in root.iterdir() if BUCKET.fullmatch(f.name) and f.is_dir()]:
        if folder.name not in buckets:
            for path in [root / name for name in metadata_files(folder.name)[1:]]:
                if path.is_file():
                    path.unlink()
            for place, _, _ in os.walk(folder, topdown=False):
                with suppress(OSError):  # it holds what is not ours
                    os.rmdir(place)


def written_names(root: Path) -> set[str]:
    """Of shards of which a commit is there, or a file."""
    names = set(committed_names(root))
    for path in files_below(root):
        name = path.relative_to(root).as_posix()
        if _OURS.fullmatch(name) and not name.startswith(COMMITS):
            bucket, _, _, number, *_ = name.split("/")
            names.add(f"{bucket}-{number}")
    return names


def is_partial(name: str) -> bool:
    """Whether a path relative to the root is that of a file that we began to write."""
    return _PARTIAL.fullmatch(name) is not None


_LINKED = ("", "/image", "/label", "/image/c", "/label/c")
"""Places of a bucket that may be links: arrays may lie on another disk."""
_CHUNKS = rf"{BUCKET.pattern}/(?:image|label)/c/\d+/0"
_PARTIAL = re.compile(
    rf"(?:(?:{COMMITS}|{BUCKET.pattern}|{BUCKET.pattern}/(?:image|label)|{_CHUNKS}(?:/0)?)/)?"
    r"\.[^/]+\.[0-9a-f]+\.partial",
    re.DOTALL,
)
_OURS = re.compile(rf"{_CHUNKS}/0(?:/0)?|{COMMITS}/{BUCKET.pattern}-\d+\.json")
_MAY_BE_LINKS = re.compile(rf"{BUCKET.pattern}(?:{'|'.join(_LINKED)})|{COMMITS}")


def files_below(root: Path, folder: Path | None = None) -> Iterator[Path]:
    """Files in the folder of the shards, and links to folders.

    Arrays may lie on another disk: links in their places are followed, no others.
    """
    for place, folders, files in os.walk(folder or root):
        folders.sort()
        yield from (Path(place, name) for name in sorted(files))
        for path in [Path(place, name) for name in folders]:
            if not path.is_symlink():
                continue
            if _MAY_BE_LINKS.fullmatch(path.relative_to(root).as_posix()):
                yield from files_below(root, path)
            else:
                yield path


def clear_partials(root: Path, shard: Named) -> None:
    """Delete the half-written files of one shard; nobody may be at work on it."""
    for name in shard_files(shard.bucket, shard.number):
        path = root / name
        for partial in list(path.parent.glob(f".{path.name}.*.partial")):
            partial.unlink()

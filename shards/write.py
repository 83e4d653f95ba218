"""One shard from source files to disk, in one process: decode, label, encode, commit.

The shard is encoded in memory by zarr itself, so that any Zarr v3 reader opens it, and put in
place by us with fsync and rename, which zarr's LocalStore does not do.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from medpsp.dicom.labels import map_labels, read_nifti_mask
from medpsp.dicom.read import read_pixels
from medpsp.dicom.scan import refusal
from medpsp.dicom.voc import read_image, read_mask
from medpsp.errors import DicomError, LabelError, SourceError
from medpsp.intensity import needs_series_values, series_window
from medpsp.types import IGNORE, ScanRow, Series, SliceRef, Window
from shards.index import SliceRow, file_sha256, write_bytes_durably
from shards.layout import Part, ShardPlan

COMMITS = "commits"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteSettings:
    """What decides the bytes of a shard besides its sources."""

    source: str
    classes: int
    label_map: tuple[tuple[int, int], ...]
    window: Window | None
    shard_slices: int

    @property
    def text(self) -> str:
        """Stable text of all fields, for the plan's digest."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What one written shard holds; stored beside it and small enough to travel."""

    name: str
    digest: str
    files: dict[str, str]  # path relative to the root -> sha256
    rows: tuple[dict[str, Any], ...]
    refused: tuple[dict[str, Any], ...]


def create_bucket(root: Path, plan: ShardPlan, slots: int, shard_slices: int) -> None:
    """Write the zarr.json files of a bucket of ``slots`` slots; shards that lie there stay."""
    store = MemoryStore()  # on disk, zarr empties the folder of an array before it makes one
    zarr.open_group(store, mode="a")
    zarr.open_group(store, path=plan.bucket, mode="a")
    for name in ("image", "label"):
        _create(store, f"{plan.bucket}/{name}", name, plan, (slots, shard_slices))
    for key in metadata_files(plan.bucket):
        write_bytes_durably(root / key, _stored(store, key))


def metadata_files(bucket: str) -> tuple[str, ...]:
    """Paths of the zarr.json files that a reader of one bucket needs."""
    folders = ("", f"{bucket}/", f"{bucket}/image/", f"{bucket}/label/")
    return tuple(f"{folder}zarr.json" for folder in folders)


def clear_stale(root: Path, plans: Iterable[ShardPlan]) -> None:
    """Delete what earlier runs left: shards of no plan, their commits, half-written files.

    A patient taken out of the archive is gone from the shards after the next run.
    """
    keep = {root / name for plan in plans for name in (*_files(plan), _commit_name(plan))}
    buckets = {plan.bucket for plan in plans}
    for folder in root.glob("*x*_*"):
        if folder.name not in buckets:
            shutil.rmtree(folder)
    for pattern in (f"{COMMITS}/*", "*x*_*/*/c/*/0/*", "**/.*.partial"):
        for path in list(root.glob(pattern)):
            if path not in keep and path.is_file():
                path.unlink()


def _create(
    store: MemoryStore, path: str, name: str, plan: ShardPlan, sizes: tuple[int, int]
) -> zarr.Array[Any]:
    slots, shard_slices = sizes
    frame = (plan.rows, plan.columns)
    image = name == "image"
    dtype = plan.dtype if image else "uint8"
    # level above 1 buys under 1 % on CT noise; labels are runs, where shuffling only costs
    blosc = BloscCodec(
        cname="zstd",
        clevel=1 if image else 3,
        typesize=np.dtype(dtype).itemsize,
        shuffle=BloscShuffle.shuffle if image else BloscShuffle.noshuffle,
    )
    return zarr.create_array(
        store,
        name=path,
        shape=(slots, *frame),
        dtype=dtype,
        chunks=(1, *frame),
        shards=(shard_slices, *frame),
        compressors=[blosc, Crc32cCodec()],
        fill_value=0 if image else IGNORE,
        overwrite=True,
        zarr_format=3,
        config={"write_empty_chunks": True},  # so that a missing chunk is always a fault
        dimension_names=("slice", "row", "column"),
    )


def read_commit(root: Path, plan: ShardPlan, digest: str) -> Commit | None:
    """The commit of a shard that was written before from the same plan, files whole; else None."""
    try:
        tree = json.loads((root / _commit_name(plan)).read_text(encoding="utf-8"))
        commit = Commit(**{**tree, "rows": tuple(tree["rows"]), "refused": tuple(tree["refused"])})
        if commit.digest != digest:
            return None
        whole = all(file_sha256(root / name) == sha for name, sha in commit.files.items())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return commit if whole else None


def write_shard(root: Path, plan: ShardPlan, settings: WriteSettings) -> Commit:
    """Decode, label, encode and commit one shard; a bad source becomes a row, not an error.

    Raises:
        OSError: The shard cannot be written (disk full, no permission).
    """
    frame = (plan.rows, plan.columns)
    images = np.zeros((plan.count, *frame), dtype=plan.dtype)
    labels = np.full((plan.count, *frame), IGNORE, dtype=np.uint8)
    rows: list[SliceRow] = []
    refused: list[ScanRow] = []
    for part in plan.parts:
        for number, image, label in _read_part(part, settings, refused):
            slot = part.slot + number - part.start
            images[slot - plan.first], labels[slot - plan.first] = image, label[0]
            rows.append(_row(plan, part, (number, slot), label, settings))
    digest = plan.digest(settings.text)
    files: dict[str, str] = {}
    for relative, name, block in zip(
        _files(plan), ("image", "label"), (images, labels), strict=True
    ):
        data = _encode(plan, name, block, settings.shard_slices)
        write_bytes_durably(root / relative, data)
        files[relative] = hashlib.sha256(data).hexdigest()
    commit = Commit(
        name=plan.name,
        digest=digest,
        files=files,
        rows=tuple(asdict(row) for row in rows),
        refused=tuple(asdict(row) for row in refused),
    )
    write_bytes_durably(root / _commit_name(plan), json.dumps(asdict(commit)).encode())
    return commit


def _files(plan: ShardPlan) -> tuple[str, str]:
    image, label = (f"{plan.bucket}/{name}/c/{plan.number}/0/0" for name in ("image", "label"))
    return image, label


def _commit_name(plan: ShardPlan) -> str:
    return f"{COMMITS}/{plan.name}.json"


def _encode(plan: ShardPlan, name: str, block: NDArray[Any], shard_slices: int) -> bytes:
    store = MemoryStore()
    array = _create(store, name, name, plan, (len(block), shard_slices))
    array[:] = block
    return _stored(store, f"{name}/c/0/0/0")


def _stored(store: MemoryStore, key: str) -> bytes:
    buffer = sync(store.get(key, default_buffer_prototype()))
    if buffer is None:
        raise OSError(f"zarr wrote no {key}")
    return buffer.to_bytes()


_Label = tuple[NDArray[np.uint8], bool, Window]


def _read_part(
    part: Part, settings: WriteSettings, refused: list[ScanRow]
) -> Iterator[tuple[int, NDArray[Any], _Label]]:
    """Yield (number in series, image, (label, labelled, window)) of every readable slice."""
    series = part.planned.series
    wanted = range(part.start, part.stop)
    try:
        volume = _series_labels(series, settings)
    except LabelError as error:
        refused.extend(refusal(series.slices[i].file_id, error.code, error.detail) for i in wanted)
        return
    whole = needs_series_values(series.first.modality, settings.window)
    images: dict[int, NDArray[Any]] = {}
    for number in range(len(series.slices)) if whole else wanted:
        ref = series.slices[number]
        try:
            images[number] = _read_image(ref, settings.source, series.first.dtype)
        except SourceError as error:
            if number in wanted:
                refused.append(refusal(ref.file_id, error.code, error.detail))
    stack = np.stack(list(images.values())) if whole and images else np.zeros(0)
    window = series_window(series.first.modality, settings.window, stack)
    for number in wanted:
        if number not in images:
            continue
        try:
            label, labelled = _slice_label(series, number, volume, settings)
        except LabelError as error:
            refused.append(refusal(series.slices[number].file_id, error.code, error.detail))
            continue
        yield number, images[number], (label, labelled, window)


def _read_image(ref: SliceRef, source: str, dtype: str) -> NDArray[Any]:
    image = read_pixels(ref) if source == "dicom" else read_image(Path(ref.path))
    if image.shape != (ref.rows, ref.columns) or image.dtype != dtype:  # numpy would cut it to fit
        raise DicomError(
            "PIX_UNLIKE_SERIES",
            f"{image.shape} {image.dtype}, its series is {(ref.rows, ref.columns)} {dtype}",
        )
    return image


def _series_labels(series: Series, settings: WriteSettings) -> NDArray[np.uint8] | None:
    """(N, H, W) classes from the one NIfTI of a series; None for PNG masks and no mask."""
    if series.affine is None or not series.masks:
        return None
    shape = (len(series.slices), series.first.rows, series.first.columns)
    values = read_nifti_mask(Path(series.masks[0]), np.array(series.affine), shape)
    return map_labels(values, dict(settings.label_map), settings.classes)


def _slice_label(
    series: Series, number: int, volume: NDArray[np.uint8] | None, settings: WriteSettings
) -> tuple[NDArray[np.uint8], bool]:
    shape = (series.first.rows, series.first.columns)
    if volume is not None:
        return volume[number], True
    if not series.masks:
        return np.full(shape, IGNORE, dtype=np.uint8), False
    values = read_mask(Path(series.masks[number]), shape)
    return map_labels(values, dict(settings.label_map), settings.classes), True


def _row(
    plan: ShardPlan, part: Part, place: tuple[int, int], label: _Label, settings: WriteSettings
) -> SliceRow:
    (number, slot), (mask, labelled, window) = place, label
    planned, series = part.planned, part.planned.series
    ref = series.slices[number]
    counts = np.bincount(mask.ravel(), minlength=256)
    nan = float("nan")
    affine = series.affine or ()
    step = float(np.linalg.norm([row[2] for row in affine[:3]])) if affine else nan
    spacing = (*(ref.pixel_spacing or (nan, nan)), step)
    return SliceRow(
        bucket=plan.bucket,
        slot=slot,
        patient=planned.patient,
        series=planned.name,
        slice_index=number,
        modality=ref.modality,
        photometric=ref.photometric,
        z_mm=series.z_mm[number] if series.z_mm else nan,
        spacing=spacing,
        affine=tuple(v for row in affine for v in row),
        window_center=window.center,
        window_width=window.width,
        voi_center=ref.window.center if ref.window else nan,
        voi_width=ref.window.width if ref.window else nan,
        split=planned.split,
        order=planned.order,
        labelled=labelled,
        histogram=(*(int(c) for c in counts[: settings.classes]), int(counts[IGNORE])),
        file_id=ref.file_id,
    )

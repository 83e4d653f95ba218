"""Shards to a folder in the layout of PASCAL VOC, with a table of what a PNG cannot hold.

``medpsp.dicom.voc`` reads such a folder back as ``data.source: voc``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medpsp.config import Config
from medpsp.dataconfig import VocConfig
from medpsp.errors import ConfigError
from medpsp.intensity import to_unit
from medpsp.progress import Bar
from medpsp.types import Window
from shards.index import Manifest, SliceRow, read_index, read_manifest
from shards.reader import ShardReader

TABLE, CLASSES, README = "slices.csv", "classes.txt", "README.txt"
PLACES = VocConfig(patient_pattern="^([0-9a-f]+)_")
"""Folder names, and the pattern that finds the patient in a name."""

INT16_OFFSET = -32768
"""Modality value of a stored 0 in a PNG of 16 bits, which knows no sign."""

LEVEL = 4
"""Of deflate. A 512 x 512 CT slice of 16 bits: 208 kB in 18 ms; level 6 208 kB in 53 ms, level 1
225 kB in 11 ms (Pillow 13)."""

_LISTS = {"train": ("train",), "val": ("val",), "test": ("test",), "trainval": ("train", "val")}
_README = """\
Slices of medpsp shards in the layout of PASCAL VOC: {images} images, {masks} with a mask.
Every name is <patient>_<series>_<place in the series>, all pseudonyms.

{places.images}/<name>.png
    {bits}
{places.masks}/<name>.png
    palette PNG: class index (line of classes.txt, from 0), 255 = ignore
{places.lists}/<split>.txt  names with a mask, by the split of their patient
slices.csv  one line a slice, also of those without a mask (labelled 0), which are in no list

In slices.csv, modality value = stored value * scale + offset. affine_rc (row r, column c of 4 x 4)
leads from (column, row, slice_index) to mm in the patient, DICOM LPS. What is unknown is empty, and
so are scale and offset for a SIGMOID window, which no straight line undoes.

To read it back:
data:
  source: voc
  archive: <this folder>
  classes: {classes}
  window: null
  voc: {{patient_pattern: "{places.patient_pattern}"}}
"""
_BITS = {
    8: "8 bits, 0..255 is the window, MONOCHROME1 inverted; RGB as it was",
    16: "16 bits, modality value + 32768; floating point: 0..65535 is the window, what lies\n"
    "    outside is cut; MONOCHROME1 is not inverted; RGB of 8 bits as it was. Reading back, an\n"
    "    image gets a window of its own unless data.window is set, with 32768 added to its center",
}


class Coding(NamedTuple):
    """How a PNG holds a slice: modality value = stored value * scale + offset; NaN for SIGMOID."""

    bits: int
    scale: float
    offset: float


def voc_palette() -> NDArray[np.uint8]:
    """(256, 3) RGB of the classes, as the VOC development kit paints them; 255 is its void.

    The bits of the index go in turn to red, green and blue, from the highest bit down.
    """
    index = np.arange(256)[:, None]
    colours = np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        colours |= (index >> (3 * bit + np.arange(3)) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def coded(
    image: NDArray[Any], row: SliceRow, bits: int
) -> tuple[NDArray[np.uint8] | NDArray[np.uint16], Coding]:
    """What a PNG stores of one slice, and how to get back.

    Args:
        image: (H, W) modality values, or (H, W, 3) RGB, which stays as it is.
        row: Of the index; gives the window and whether low values are bright.
        bits: 8: what the network sees, 0..1 as 0..255. 16: int16 exact, moved by 32768; float32
            within the window, taken as LINEAR_EXACT, as 0..65535; neither is inverted.

    Returns:
        Unsigned integers of the shape of the image, and their meaning.
    """
    if image.ndim == 3:
        return image, Coding(8, 1.0, 0.0)
    if bits == 16 and image.dtype == np.int16:
        moved = image.astype(np.int32) - INT16_OFFSET
        return moved.astype(np.uint16), Coding(16, 1.0, float(INT16_OFFSET))
    window = row.window if bits == 8 else replace(row.window, function="LINEAR_EXACT")
    inverted = row.inverted and bits == 8
    top = 2**bits - 1
    stored = np.rint(to_unit(image, window, inverted) * top)
    return stored.astype(np.uint8 if bits == 8 else np.uint16), _coding(window, bits, inverted)


def _coding(window: Window, bits: int, inverted: bool) -> Coding:
    if window.function == "SIGMOID":  # no straight line leads back
        return Coding(bits, math.nan, math.nan)
    low = window.center - window.width / 2  # is black for LINEAR, too
    span = window.width - (window.function == "LINEAR")
    scale = span / (2**bits - 1)
    return Coding(bits, -scale, low + span) if inverted else Coding(bits, scale, low)


def slice_names(rows: Sequence[SliceRow]) -> tuple[str, ...]:
    """One unique name a slice: patient, series, place in the series; ``_2`` ... where that repeats.

    It repeats only where two series cannot be told apart by their UIDs.
    """
    seen: Counter[str] = Counter()
    names = []
    for row in rows:
        name = f"{row.patient}_{row.series}_{row.slice_index:04d}"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return tuple(names)


def export_voc(config: Config, out: Path, bits: int = 8) -> tuple[int, int]:
    """Write the shards of a configuration as a VOC folder: whole or not at all.

    The bytes depend on the shards and on the version of Pillow alone.

    Args:
        config: Says where the shards are, and ``data.workers`` how many threads encode.
        out: Made; may exist if it is empty. Until the end all is in ``<out>.partial`` beside it.
        bits: 8 or 16; see `coded`.

    Returns:
        Number of images, and of masks.

    Raises:
        ConfigError: Other ``bits``, or ``out`` is taken or lies where it must not.
        ShardError: No shards, or a slice is damaged.
        OSError: Cannot be written, for example a full disk; nothing is left behind.
    """
    if bits not in _BITS:
        raise ConfigError(f"--bits {bits}: expected 8 or 16")
    manifest, rows = read_manifest(config.shards), read_index(config.shards)
    out = out.resolve()
    _require_free(config, out)
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"voc {partial}: left by an export that was stopped, or one is at work; delete it, or "
            "take another folder"
        ) from None
    try:
        named = sorted(zip(slice_names(rows), rows, strict=True), key=lambda pair: pair[0])
        codings = _write_images(config, partial, named, bits)
        _write_lists(partial, named)
        _write_table(partial / TABLE, named, codings)
        _write_readme(partial, manifest, rows, bits)
        partial.replace(out)
    except OSError as error:  # a failed write does not say where
        raise OSError(error.errno, error.strerror, str(out)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(rows), sum(row.labelled for row in rows)


def _require_free(config: Config, out: Path) -> None:
    """Nothing of the user's is overwritten; nothing of ours is scanned, or deleted as stale."""
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"voc {out}: not empty; take another folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"voc {out}: a file, expected a folder to make")
    for name, place in (("the shards", config.shards), ("data.archive", config.data.archive)):
        if out.is_relative_to(place.resolve()):
            raise ConfigError(f"voc {out}: lies inside {name}; take a folder outside it")


def _write_images(
    config: Config, out: Path, named: Sequence[tuple[str, SliceRow]], bits: int
) -> list[Coding]:
    (out / PLACES.images).mkdir()
    (out / PLACES.masks).mkdir()
    reader, palette = ShardReader(config.shards), voc_palette().tobytes()

    def write(pair: tuple[str, SliceRow]) -> Coding:
        name, row = pair
        image, label = reader.read(row.bucket, row.slot)
        values, coding = coded(image, row, bits)
        (out / PLACES.images / f"{name}.png").write_bytes(_png(values))
        if row.labelled:
            (out / PLACES.masks / f"{name}.png").write_bytes(_png(label, palette))
        return coding

    codings = []
    with Bar("voc", len(named), "slices") as bar, ThreadPoolExecutor(config.data.workers) as pool:
        try:
            for coding in pool.map(write, named):
                codings.append(coding)
                bar.advance()
        finally:  # after an error or Ctrl-C, do not write the rest first
            pool.shutdown(cancel_futures=True)
    return codings


def _png(values: NDArray[Any], palette: bytes = b"") -> bytes:
    """A PNG without any text or time: uint8 (H, W) or (H, W, 3), uint16 (H, W), or a palette."""
    image = Image.fromarray(values)
    if palette:
        image.putpalette(palette)  # turns mode L into P
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=LEVEL)
    return buffer.getvalue()


def _write_lists(out: Path, named: Sequence[tuple[str, SliceRow]]) -> None:
    """As in VOC, a list holds names with a mask; `scan_voc` skips what is in no list."""
    folder = out / PLACES.lists
    folder.mkdir(parents=True)
    for list_name, splits in _LISTS.items():
        lines = [f"{name}\n" for name, row in named if row.labelled and row.split in splits]
        (folder / f"{list_name}.txt").write_text("".join(lines), encoding="utf-8")


def _write_table(
    path: Path, named: Sequence[tuple[str, SliceRow]], codings: Sequence[Coding]
) -> None:
    records = [_record(name, row, c) for (name, row), c in zip(named, codings, strict=True)]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(records)


def _record(name: str, row: SliceRow, coding: Coding) -> dict[str, object]:
    affine = row.affine or (float("nan"),) * 16
    fields: dict[str, object] = {
        "name": name,
        "series": row.series,
        "patient": row.patient,
        "file_id": row.file_id,
        "frame": row.frame,
        "slice_index": row.slice_index,
        "modality": row.modality,
        "photometric": row.photometric,
        "z_mm": row.z_mm,
        "spacing_row_mm": row.spacing[0],  # between rows
        "spacing_column_mm": row.spacing[1],
        "spacing_slice_mm": row.spacing[2],
        "spacing_source": row.spacing_source,
        **{f"affine_{i // 4}{i % 4}": value for i, value in enumerate(affine)},
        "window_center": row.window_center,
        "window_width": row.window_width,
        "window_function": row.window.function,
        "bits": coding.bits,
        "scale": coding.scale,
        "offset": coding.offset,
        "split": row.split,
        "labelled": int(row.labelled),
        "flags": " ".join(row.flags),
    }
    return {
        key: "" if isinstance(value, float) and math.isnan(value) else value
        for key, value in fields.items()
    }


def _write_readme(out: Path, manifest: Manifest, rows: Sequence[SliceRow], bits: int) -> None:
    (out / CLASSES).write_text("\n".join((*manifest.classes, "")), encoding="utf-8")
    text = _README.format(
        images=len(rows),
        masks=sum(row.labelled for row in rows),
        places=PLACES,
        bits=_BITS[bits],
        classes=json.dumps(manifest.classes, ensure_ascii=False),  # is YAML, too
    )
    (out / README).write_text(text, encoding="utf-8")

"""VOC-style archives: a folder of images, a folder of masks of the same names, split lists."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Container
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from medpsp.dataconfig import VocConfig
from medpsp.dicom.codes import refusal
from medpsp.dicom.labels import integral
from medpsp.dicom.walk import leads_nowhere, system_said
from medpsp.errors import ArchiveError, ConfigError, DicomError, LabelError
from medpsp.types import SPLITS, PixelDtype, Place, ScanRow, Series, SliceRef, Split

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_PILLOW_RAISES = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    ValueError,
    SyntaxError,  # what Pillow calls a broken PNG
)
_Groups = dict[tuple[str, int, int, str, str], list[tuple[SliceRef, Place]]]
Read = Callable[[Path], NDArray[np.generic]]


def scan_voc(
    root: Path,
    voc: VocConfig,
    file_id: Callable[[str], str],
    *,
    grey: bool = False,
    read: Read | None = None,
) -> tuple[list[Series], list[ScanRow]]:
    """Pair images and masks by stem and group them by patient, size and kind of pixel.

    A 16-bit image is a series of its own: its window comes from the series, and `predict`, which
    knows no patients, has to find the same one.

    A stem listed in ``train.txt``, ``val.txt`` or ``test.txt`` puts its patient in that split; a
    patient in two lists is an error, since its images would leak across the split.

    Args:
        root: Folder of the archive.
        voc: Names of what lies below it.
        file_id: Turns the path of an image, relative to ``root``, into its name in every message.
        grey: Colour will be taken as its brightness, int16.
        read: `read_image`, or what runs it in a process that may die.

    Raises:
        ArchiveError: Image or mask folder missing, empty, or with two images of one stem.
        ConfigError: ``patient_pattern`` is no expression with one group, a split list is no
            text, or a patient is in two lists.
    """
    images, masks = _by_stem(root / voc.images), _by_stem(root / voc.masks)
    try:
        pattern = re.compile(voc.patient_pattern)
    except re.error as error:
        raise ConfigError(f"data.voc.patient_pattern: not a regular expression ({error})") from None
    if pattern.groups < 1:
        raise ConfigError("data.voc.patient_pattern: needs one group, for example ^(p[0-9]+)-")
    listed = _read_lists(root / voc.lists, root, images)
    groups: _Groups = defaultdict(list)
    splits: dict[str, set[Split]] = defaultdict(set)
    rows: list[ScanRow] = []
    for stem, path in sorted(images.items()):
        name = file_id(path.relative_to(root).as_posix())
        match = pattern.search(stem)
        try:
            if match is None or not match.group(1):
                raise DicomError("NAME_NO_PATIENT", "name does not fit data.voc.patient_pattern")
            if listed and stem not in listed:
                raise DicomError("NOT_LISTED", "in none of the split lists")
            ref = _image_ref(path, name, match.group(1), None if grey else read or read_image)
            if stem in masks:
                _require_reach(masks[stem])
        except DicomError as error:
            rows.append(refusal(name, error.code, error.detail))
            continue
        if stem in listed:
            splits[ref.patient_id] |= listed[stem]
        key = (ref.patient_id, ref.rows, ref.columns, ref.dtype, ref.series_uid)
        groups[key].append((ref, Place(str(masks.get(stem, "")))))
    return _series(groups, splits), rows


def _series(groups: _Groups, splits: dict[str, set[Split]]) -> list[Series]:
    for patient_splits in splits.values():
        if len(patient_splits) > 1:
            raise ConfigError(
                f"split lists: one patient is in {sorted(patient_splits)}; "
                "check data.voc.patient_pattern, or delete the lists to split by keyed hash"
            )
    return [
        Series(
            slices=tuple(ref for ref, _ in group),
            affine=None,
            z_mm=(),
            masks=tuple(mask for _, mask in group),
            mask_kind="png",
            split=next(iter(splits[key[0]])) if splits[key[0]] else None,
        )
        for key, group in sorted(groups.items())
    ]


def read_image(path: Path) -> NDArray[np.generic]:
    """Read an image: grey is (H, W) int16 (8-bit) or float32 (16-bit, float), RGB (H, W, 3) uint8.

    Palettes and other colour spaces become RGB; an image whose three channels are equal is grey (a
    common way of exporting). Where it is transparent it lies on black, the 0 that stands for
    outside everywhere here; what an opaque alpha channel holds is lost.

    Raises:
        DicomError: IMAGE_UNREADABLE, FILE_UNREADABLE, or BITS_UNSUPPORTED for colour of 16 bits, of
            which Pillow would keep 8 without a word.
    """
    try:
        with Image.open(path) as image:
            values = np.asarray(image if _is_grey(image) else _rgb(image))
    except DicomError:  # a ValueError, too
        raise
    except _PILLOW_RAISES as error:
        if why := system_said(error):
            raise DicomError("FILE_UNREADABLE", why) from None
        raise DicomError("IMAGE_UNREADABLE", f"not decodable ({type(error).__name__})") from None
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            return values
        values = values[..., 0]
    return values.astype(np.int16 if values.dtype in (np.uint8, np.bool_) else np.float32)


def _rgb(image: Image.Image) -> Image.Image:
    for tile in getattr(image, "tile", ()):
        raw_mode = tile[3] if isinstance(tile[3], str) else str(tile[3][0])
        if raw_mode.endswith((";16B", ";16L", ";16N")):
            raise DicomError("BITS_UNSUPPORTED", "16 bits a channel of colour, expected 8")
    if not image.has_transparency_data:
        return image.convert("RGB")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")


def read_mask(path: Path, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Read a mask of class values: palette or grey PNG, or RGB with equal channels.

    Raises:
        LabelError: MASK_MISSING, MASK_UNREADABLE, MASK_NOT_INTEGRAL, MASK_GRID_MISMATCH,
            FILE_UNREADABLE.
    """
    if not path.is_file():
        raise LabelError("MASK_MISSING", "no mask of the same name as the image")
    try:
        with Image.open(path) as image:
            # mode P gives the palette index, which is the class
            keep = image.mode == "P" or _is_grey(image)
            values = np.asarray(image if keep else image.convert("RGB"))
    except _PILLOW_RAISES as error:
        if why := system_said(error):
            raise LabelError("FILE_UNREADABLE", f"the mask: {why}") from None
        raise LabelError("MASK_UNREADABLE", f"not decodable ({type(error).__name__})") from None
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise LabelError("MASK_UNREADABLE", "colour mask, expected class values or a palette")
        values = values[..., 0]
    if values.shape != shape:
        raise LabelError("MASK_GRID_MISMATCH", f"mask {values.shape}, image {shape}")
    return integral(values)


def _image_ref(path: Path, name: str, patient: str, read: Read | None) -> SliceRef:
    try:
        with Image.open(path) as image:
            columns, rows = image.size
            dtype: PixelDtype = "float32" if image.mode.startswith(("I", "F")) else "int16"
            grey = _is_grey(image)
            frames = int(getattr(image, "n_frames", 1))
    except _PILLOW_RAISES as error:
        if why := system_said(error):
            raise DicomError("FILE_UNREADABLE", why) from None
        raise DicomError("IMAGE_UNREADABLE", f"no image ({type(error).__name__})") from None
    if frames != 1:
        raise DicomError("MULTIFRAME_UNSUPPORTED", f"{frames} frames, expected 1")
    if read and not grey and read(path).ndim == 3:  # only the pixels tell whether channels differ
        dtype = "uint8"
    alone = f"/{name}" if dtype == "float32" else ""
    return SliceRef(
        path=str(path),
        file_id=name,
        patient_id=patient,
        series_uid=f"{patient}/{rows}x{columns}/{dtype}{alone}",
        modality="OT" if dtype == "float32" else "IMAGE8",
        rows=rows,
        columns=columns,
        dtype=dtype,
        photometric="RGB" if dtype == "uint8" else "MONOCHROME2",
    )


def _require_reach(mask: Path) -> None:
    """A mask that cannot be read now may be read another time: its image must not go without."""
    try:
        mask.stat()
    except OSError as error:
        raise DicomError("FILE_UNREADABLE", f"the mask: {error.strerror}") from None


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ArchiveError(f"VOC archive: no folder {folder}; set data.voc.images and .masks")
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in SUFFIXES and (path.is_symlink() or path.is_file())
    ]
    found = {p.stem: p for p in paths}
    if not found:
        raise ArchiveError(f"VOC archive: {folder} holds no image ({', '.join(SUFFIXES)})")
    if len(found) < len(paths):
        raise ArchiveError(
            f"VOC archive: {folder} holds {len(paths) - len(found)} images whose name differs "
            "from another's in the suffix only; keep one of each"
        )
    return found


def _is_grey(image: Image.Image) -> bool:
    return len(image.getbands()) == 1 and image.mode != "P"


def _read_lists(folder: Path, root: Path, stems: Container[str]) -> dict[str, set[Split]]:
    """Splits of the names that are listed; of a line the first word, or all of one with blanks."""
    listed: dict[str, set[Split]] = defaultdict(set)
    for split in SPLITS:
        path = folder / f"{split}.txt"
        if leads_nowhere(path, root) or leads_nowhere(folder, root):
            raise ConfigError(f"split list {path}: a link to nowhere; is its disk mounted?")
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")
            except ValueError:
                raise ConfigError(f"split list {path}: not UTF-8 text") from None
            for line in lines:
                if name := line.strip():
                    listed[name if name in stems else name.split()[0]].add(split)
    return listed

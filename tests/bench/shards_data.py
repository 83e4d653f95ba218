"""CT slices to measure with: the header and the anatomy of pydicom's CT_small, grown to 512 x 512.

Every slice is warped in its own way, gets noise as of a reconstruction and a circular field of
view, so that it compresses about as a real one does. They are synthetic: ratios of real scans vary
with kernel and dose.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1, JPEGLSLossless, generate_uid

from medpsp.dicom.names import NameRule
from medpsp.dicom.read import read_headers
from medpsp.dicom.series import group_series
from medpsp.types import Place, ReadPolicy, Series
from shards.layout import PlannedSeries
from shards.settings import WriteSettings
from tests.bench.results import Missing
from tests.bench.shards_rounds import Peer

SIDE, PER_SERIES = 512, 200
NOISE, BLUR = 14.0, 0.8
"""Standard deviation in counts, and of its correlation in pixels."""
SYNTAXES = ("native", "jpegls", "jpeglossless", "rle")


@dataclass(frozen=True)
class Data:
    """A folder of series, ``<syntax>/s<n>/<slice>.dcm``; made as far as asked for."""

    folder: Path
    slices: int
    compressed: int

    def files(self, syntax: str, peer: Peer) -> list[list[Path]]:
        """Files of every series in order of their place; made if they are not there."""
        count = self.slices if syntax == "native" else self.compressed
        folder = self.folder / syntax
        mark = self.folder / f"{syntax}.json"
        if not mark.exists() or json.loads(mark.read_text()) < count:
            makers: dict[str, Callable[[Path, Path], None]] = {
                "jpegls": lambda old, new: _encapsulated(old, new, JPEGLSLossless, _jpegls),
                "jpeglossless": lambda old, new: _encapsulated(old, new, JPEGLosslessSV1, _sv1),
            }
            if syntax == "native":
                _make_native(folder, count)
            else:
                native = [f for s in self.files("native", peer) for f in s][:count]
                if len(native) < count:
                    raise Missing(f"{len(native)} native slices, {count} wanted")
                new = [folder / f.parent.name / f.name for f in native]
                for path in new:
                    path.parent.mkdir(parents=True, exist_ok=True)
                if syntax == "rle":
                    peer.ask("rle", source=[str(f) for f in native], out=[str(f) for f in new])
                else:
                    for old, path in zip(native, new, strict=True):
                        makers[syntax](old, path)
            mark.write_text(json.dumps(count))
        series = [sorted(path.glob("*.dcm")) for path in sorted(folder.glob("s*"))]
        left, found = count, []
        for members in series:
            found.append(members[:left])
            left -= len(found[-1])
        return [members for members in found if members]


def _make_native(folder: Path, count: int) -> None:
    ds = dcmread(get_testdata_file("CT_small.dcm"))
    small = ds.pixel_array.astype(np.float32)
    base = cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    for number in range(count):
        series, place = divmod(number, PER_SERIES)
        values = _slice(base, series, place)
        _fill(ds, series, place, values)
        path = folder / f"s{series}" / f"{place:04d}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path)


def _slice(base: NDArray[np.float32], series: int, place: int) -> NDArray[np.int16]:
    rng = np.random.default_rng([series, place])
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    phase = series + place / 25
    x = columns + 12 * np.sin(rows / 60 + phase) + series
    y = rows + 12 * np.sin(columns / 75 - phase)
    warped = cv2.remap(
        base, x, y.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    noise = cv2.GaussianBlur(rng.normal(0, 1, base.shape).astype(np.float32), (0, 0), BLUR)
    noise *= NOISE / noise.std()
    inside = np.hypot(rows - SIDE / 2, columns - SIDE / 2) < SIDE / 2
    return np.where(inside, np.clip(np.rint(warped + noise), 0, 4095), 0).astype(np.int16)


def _fill(ds: Dataset, series: int, place: int, values: NDArray[np.int16]) -> None:
    uids = (f"study {series}", f"series {series}", f"slice {series} {place}")
    study, own, sop = (generate_uid(entropy_srcs=[text])[:48] for text in uids)
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = study, own, sop
    ds.file_meta.MediaStorageSOPInstanceUID = sop
    ds.PatientID, ds.PatientName = f"BENCH{series:04d}", f"Bench^{series:04d}"
    ds.InstanceNumber = place + 1
    ds.ImagePositionPatient = [-169.0, -169.0, 2.5 * place - 250]
    ds.SliceLocation = 2.5 * place - 250
    ds.PixelSpacing = [0.66, 0.66]
    ds.Rows = ds.Columns = SIDE
    ds.BitsStored, ds.HighBit = 16, 15
    ds.PixelData = values.tobytes()


def _encapsulated(
    old: Path, new: Path, syntax: str, encode: Callable[[NDArray[np.uint16]], bytes]
) -> None:
    ds = dcmread(old)
    values = np.frombuffer(ds.PixelData, "<u2").reshape(SIDE, SIDE)  # all are >= 0
    ds.PixelData = encapsulate([encode(values)])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(new)


def _jpegls(values: NDArray[np.uint16]) -> bytes:
    return bytes(imagecodecs.jpegls_encode(values))


def _sv1(values: NDArray[np.uint16]) -> bytes:
    return bytes(imagecodecs.jpeg_encode(values, lossless=True, predictor=1, bitspersample=16))


def labels_of(series: Series, out: Path) -> Place:
    """A NIfTI mask on the grid of a series: three ellipsoids that fill a seventh of it."""
    import nibabel

    if not out.exists():
        count = len(series.slices)
        x, y, z = np.ogrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j, -1 : 1 : count * 1j]
        mask = np.zeros((SIDE, SIDE, count), np.uint8)
        for number, (at, radius) in enumerate(((-0.4, 0.5), (0.3, 0.45), (0.1, 0.2)), 1):
            mask[((x - at) ** 2 + (y - at / 2) ** 2 + z**2 / 4) < radius**2] = number
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.array(series.affine)
        nibabel.save(nibabel.Nifti1Image(mask, affine), out)
    return Place(str(out))


def planned(files: list[Path], stamp: str = "") -> PlannedSeries:
    """The series of files of one series, as the planner hands it to a shard task."""
    policy = ReadPolicy()
    refs = []
    for number, file in enumerate(files):
        refs += read_headers(Place(str(file)), f"{number:016x}", policy)
    series, refused = group_series(refs, policy, lambda _: False)
    if len(series) != 1 or refused:
        raise Missing(f"{len(series)} series and {len(refused)} refused of the bench's own data")
    return PlannedSeries(
        series=series[0], patient="p", name="s", split="train", order=0.5, stamp=stamp
    )


def settings(profile: str = "default", shard_slices: int = 128) -> WriteSettings:
    """Of a conversion of CT with four classes."""
    return WriteSettings(
        source="dicom",
        labels=NameRule(classes=("background", "a", "b", "c")),
        label_map=(),
        mask_geometry="affine",
        mask_resample="never",
        window=None,
        header_window=False,
        padding="background",
        shard_slices=shard_slices,
        profile=profile,
    )


def stored(file: Path) -> tuple[int, int]:
    """Offset and length of native pixels in a file."""
    element = dcmread(file)["PixelData"]
    return int(element.file_tell or 0), len(element.value)

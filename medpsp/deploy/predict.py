"""DICOM in, masks out, with onnxruntime alone: no torch, ray or zarr is imported here."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medpsp.deploy.answers import USUAL, Answers, Format, Prediction, Target
from medpsp.deploy.folders import alone
from medpsp.deploy.modelfile import ModelFile
from medpsp.deploy.stream import Frame, Seen, Segmented, count_values, needs_counts, segment
from medpsp.dicom import nifti
from medpsp.dicom.codes import code_of, is_no_dicom, refusal, told_series
from medpsp.dicom.read import Pixels
from medpsp.dicom.sandbox import Sandbox, SandboxPool, or_error
from medpsp.dicom.scan import scan_folder
from medpsp.dicom.values import luma
from medpsp.dicom.voc import SUFFIXES
from medpsp.errors import ArchiveError, ConfigError, DicomError, NoArchive, SourceError
from medpsp.intensity import ValueCounts, overlay
from medpsp.machine import whole_cores
from medpsp.types import Place, ScanRow, Series
from medpsp.words import ends_of, many

DECODERS, AHEAD = 4, 2
"""Children that decode, at most, and slices that each may be ahead."""


class Predictor:
    """A model file at work.

    Args:
        path: ONNX file written by `medpsp export`.
        threads: CPU threads, and at most that many decoders; 0 for all.
        formats: What to write.

    Raises:
        ModelFileError: Not an ONNX file, or not one of ours.
    """

    def __init__(self, path: Path, threads: int = 0, formats: tuple[Format, ...] = USUAL) -> None:
        self.model, self.formats = ModelFile(path, threads), formats
        self.decoders = min(DECODERS, threads or whole_cores())

    def source(
        self, source: Path, out: Path, advance: Callable[[str], None] = lambda name: None
    ) -> tuple[list[Prediction], list[ScanRow]]:
        """Segment what a path names: a folder, a DICOM file, a zip or tar of them, or a NIfTI.

        Raises:
            ConfigError: As `folder`.
            ArchiveError: As `folder`.
        """
        if not source.exists():
            raise NoArchive(
                f"{source}: no such folder or file; give a DICOM file, a folder or a zip of such, "
                "or a NIfTI"
            )
        if source.is_dir():
            return self.folder(source, out, advance)
        with alone(out):
            return self._source(source, out, advance)

    def _source(
        self, source: Path, out: Path, advance: Callable[[str], None]
    ) -> tuple[list[Prediction], list[ScanRow]]:
        if source.name.lower().endswith(nifti.SUFFIXES):
            return self._nifti(source, out, advance)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / source.name).symlink_to(source.resolve())
            return self._all(Path(folder), out, advance, source)

    def folder(
        self, source: Path, out: Path, advance: Callable[[str], None] = lambda name: None
    ) -> tuple[list[Prediction], list[ScanRow]]:
        """Segment every series below a folder.

        Writes, as the formats say, ``<name>.dcm`` (DICOM SEG), ``<name>.nii.gz`` on the grid of the
        series (0 where it has no slice), ``<name>/<slice>.png`` overlays and ``<name>.png``, some
        of them with a legend, ``<name>.gif`` and meshes; for images without geometry
        ``<name>/<number>.mask.png`` in place of the volume; for a folder of plain images ``<file
        name>.mask.png`` and ``<file name>.overlay.png``.

        Raises:
            ConfigError: ``out`` holds something already, or lies inside the source.
            ArchiveError: Folder missing or empty, or nothing in it can be segmented.
        """
        if out.resolve().is_relative_to(source.resolve()):
            raise ConfigError(
                f"{out}: lies inside {source}; take a folder outside it for the masks"
            )
        with alone(out):
            return self._all(source, out, advance, source)

    def _all(
        self, source: Path, out: Path, advance: Callable[[str], None], named: Path
    ) -> tuple[list[Prediction], list[ScanRow]]:
        with SandboxPool(self.decoders) as pool:
            scan = scan_folder(source, self.model.policy, str, pool)
            predictions: list[Prediction] = []
            rows = scan.rows
            for number, series in enumerate(scan.series):
                name = f"series-{number:03d}"
                try:
                    predictions.append(self._series(pool, series, out, name, rows))
                except SourceError as error:
                    rows += [
                        refusal(ref.file_id, error.code, f"{name}: {error.detail}", ref.frame)
                        for ref in series.slices
                    ]
                advance(name)
            if not scan.series:
                predictions = self._images(pool, source, out, rows)
        if not predictions:
            raise ArchiveError(f"{named}: {self._nothing(rows)}")
        return predictions, rows

    def _nothing(self, rows: list[ScanRow]) -> str:
        """What there was in place of something to segment."""
        files, codes = many(len(rows), "file"), sorted({row.code for row in rows})
        what = f"nothing to segment among {files} ({', '.join(codes)})"
        if whole := list(told_series(rows)):
            what += f"; {whole[0]}"
        if all(is_no_dicom(code) and code_of(code).status == "skipped" for code in codes):
            what = f"nothing DICOM in it, {files}: {ends_of(row.file_id for row in rows)}"
        return f"{what}; the model takes {', '.join(self.model.modalities)}"

    def _series(
        self, pool: SandboxPool, series: Series, out: Path, name: str, rows: list[ScanRow]
    ) -> Prediction:
        first, began = series.first, time.perf_counter()
        seen = Seen(
            modality=first.modality,
            inverted=first.photometric == "MONOCHROME1",
            headers=[ref.window for ref in series.slices],
            colour=first.channels == 3,
        )
        refused: list[ScanRow] = []
        counts = ValueCounts()
        if needs_counts(self.model, seen):
            counts = count_values(_frames(pool, series, name, []))
        target = Target(name=name, shape=series.shape, affine=series.affine, dicom=series)
        found = segment(self.model, _frames(pool, series, name, refused), seen, counts)
        made, left = self._written(out, target, found, began)
        rows += [*refused, *(_remark(first.file_id, one, name) for one in left)]
        return made

    def _written(
        self, out: Path, target: Target, found: Iterator[Segmented], began: float
    ) -> tuple[Prediction, list[DicomError]]:
        with Answers(out, target, self.model, self.formats) as answers:
            for item in found:
                answers.add(item)
        made = Prediction(
            name=target.name,
            slices=answers.slices,
            files=answers.files,
            pixels=answers.pixels,
            volumes=answers.volumes,
            modality=target.dicom.first.modality if target.dicom else "",
            seconds=time.perf_counter() - began,
        )
        return made, [*answers.holes, *answers.refused]

    def _nifti(
        self, source: Path, out: Path, advance: Callable[[str], None]
    ) -> tuple[list[Prediction], list[ScanRow]]:
        name, began, modalities = "series-000", time.perf_counter(), self.model.modalities
        if self.formats == ("seg",):
            raise ConfigError(f"{source}: no SEG of a NIfTI, which names no images; take nifti")
        if len(modalities) != 1:
            raise ConfigError(
                f"{source}: a NIfTI does not say what made it, and the model takes "
                f"{', '.join(modalities)}; give the DICOM files"
            )
        if self.model.axes is None or self.model.header_window:
            what = "windows of headers" if self.model.axes else "images without patient geometry"
            raise ConfigError(f"{source}: the model was trained on {what}; give the DICOM files")
        try:
            volume = nifti.open_nifti(source)
            if not volume.placed:
                raise DicomError(
                    "NIFTI_UNPLACED",
                    "neither qform nor sform says which side is left; give the DICOM files, or set "
                    "one of them",
                )
            slices: Callable[[], Iterable[NDArray[Any]]] = volume.slices
            affine, shape = volume.affine, volume.shape
            if nifti.axes_of(np.array(affine)) != self.model.axes:
                values, moved = nifti.turned(volume, self.model.axes)
                slices, shape = values.__iter__, values.shape
                affine = tuple(tuple(float(v) for v in row) for row in moved)
            seen, counts = Seen(modality=modalities[0]), ValueCounts()
            if needs_counts(self.model, seen):
                counts = count_values(_plain_frames(slices()))
            target = Target(name=name, shape=shape, affine=affine)
            found = segment(self.model, _plain_frames(slices()), seen, counts)
            made, left = self._written(out, target, found, began)
        except SourceError as error:
            raise ArchiveError(f"{source}: {error.code}, {error.detail}") from None
        advance(name)
        return [made], [_remark(name, one, name) for one in left]

    def _images(
        self, pool: SandboxPool, source: Path, out: Path, rows: list[ScanRow]
    ) -> list[Prediction]:
        predictions = []
        paths = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        names = {path.name for path in paths}
        rows[:] = [row for row in rows if row.file_id not in names]  # no DICOM, but not skipped
        read = or_error(lambda box, path: box.image(Place(str(path))))
        for path, found in pool.map(read, paths, AHEAD):
            try:
                if isinstance(found, SourceError):
                    raise found
                grey = found.ndim == 3 and self.model.policy.colour == "grey"
                values = luma(found) if grey else found
                modality = "OT" if values.dtype == np.float32 else "IMAGE8"
                if modality not in self.model.modalities:
                    raise DicomError("MODALITY_SKIPPED", "the model is for other modalities")
                seen = Seen(modality=modality, colour=values.ndim == 3)
                frame, counts = Frame(0, 0, Pixels(values, None)), ValueCounts()
                if needs_counts(self.model, seen):
                    counts = count_values([frame])
                (item,) = segment(self.model, [frame], seen, counts)
            except SourceError as error:
                rows.append(refusal(path.name, error.code, error.detail))
                continue
            files = (out / f"{path.name}.mask.png", out / f"{path.name}.overlay.png")
            Image.fromarray(item.mask).save(files[0])
            Image.fromarray(overlay(item.unit, item.mask)).save(files[1])
            counted = np.bincount(item.mask.ravel(), minlength=len(self.model.classes))
            pixels = tuple(counted.tolist())
            predictions.append(Prediction(name=path.name, slices=1, files=files, pixels=pixels))
        return predictions


def _remark(file_id: str, error: SourceError, name: str) -> ScanRow:
    detail = f"{name}: {error.detail}"
    return ScanRow(file_id=file_id, status="kept", code=error.code, detail=detail)


def _frames(
    pool: SandboxPool, series: Series, name: str, refused: list[ScanRow]
) -> Iterator[Frame]:
    """Decoded slices, a few ahead.

    Images without geometry stand alone: those that fail are left out, as long as one is left.

    Raises:
        SourceError: A slice of a volume cannot be decoded, or no image at all.
    """
    error: SourceError | None = None
    good = 0
    found = pool.map(or_error(Sandbox.frame), series.slices, AHEAD)
    for number, (ref, pixels) in enumerate(found):
        if isinstance(pixels, Pixels):
            good += 1
            yield Frame(number, series.grid_index[number], pixels)
            continue
        if series.affine is not None:
            which = f"slice {number + 1} of {len(series.slices)}, and no volume lacks one"
            raise type(pixels)(pixels.code, f"{which}: {pixels.detail}")
        error = error or pixels
        refused.append(refusal(ref.file_id, pixels.code, f"{name}: {pixels.detail}", ref.frame))
    if error and not good:
        raise error


def _plain_frames(slices: Iterable[NDArray[Any]]) -> Iterator[Frame]:
    for number, values in enumerate(slices):
        yield Frame(number, number, Pixels(values, None))

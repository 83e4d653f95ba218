"""DICOM in, masks out, with onnxruntime alone: no torch, ray or zarr is imported here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from medpsp.deploy.picture import write_sheet
from medpsp.dicom.nifti import write_nifti_mask
from medpsp.dicom.read import read_pixels
from medpsp.dicom.scan import refusal, scan_folder
from medpsp.dicom.voc import SUFFIXES, read_image
from medpsp.errors import ArchiveError, ConfigError, DicomError, ModelFileError, SourceError
from medpsp.intensity import overlay, series_window, to_unit
from medpsp.types import ScanRow, Series, Window

BATCH = 4


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Files written for one series.

    Attributes:
        name: ``series-000`` and so on, in the order of the scan: free of identities.
        pixels: (K,) pixels of each class.
    """

    name: str
    slices: int
    files: tuple[Path, ...]
    pixels: tuple[int, ...]


class Predictor:
    """A model file with the window and the classes that it carries.

    Args:
        path: ONNX file written by `medpsp export`.
        threads: CPU threads; 0 for all.

    Raises:
        ModelFileError: Not an ONNX file, or not one of ours.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        if not path.is_file():
            raise ModelFileError(f"model {path}: no such file; give the .onnx of `medpsp export`")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - ORT's errors share no base but Exception
            raise ModelFileError(
                f"model {path}: onnxruntime cannot load it ({type(error).__name__})"
            ) from None
        text = self.session.get_modelmeta().custom_metadata_map.get("medpsp")
        if text is None:
            raise ModelFileError(
                f"model {path}: an ONNX file, but not from `medpsp export` (no 'medpsp' metadata)"
            )
        try:
            meta: dict[str, Any] = json.loads(text)
            self.classes: tuple[str, ...] = tuple(meta["classes"])
            self.modalities: tuple[str, ...] = tuple(meta["modalities"])
            window = meta["window"]
            self.window = Window(**window) if window else None
        except (ValueError, KeyError, TypeError) as error:
            raise ModelFileError(
                f"model {path}: its metadata is damaged ({type(error).__name__})"
            ) from None
        if fault := self._misfit():
            raise ModelFileError(f"model {path}: metadata and graph do not fit: {fault}")

    def _misfit(self) -> str:
        """Why masks would be named or windowed wrongly; empty where they would not."""
        if self.window and not self.window.width > 0:
            return f"window width {self.window.width}, expected above 0"
        inputs = self.session.get_inputs()
        if [i.name for i in inputs] != ["image"] or inputs[0].shape[1:2] != [1]:
            return "the input is not image (N, 1, H, W)"
        probe = np.zeros((1, 1, 32, 32), dtype=np.float32)
        found = self.session.run(None, {"image": probe})[0].shape
        wanted = (1, len(self.classes), 32, 32)
        return "" if found == wanted else f"output {found}, expected {wanted}"

    def mask(self, unit: NDArray[np.float32]) -> NDArray[np.uint8]:
        """(N, H, W) in [0, 1] to (N, H, W) class indices."""
        parts = []
        for start in range(0, len(unit), BATCH):
            logits = self.session.run(None, {"image": unit[start : start + BATCH, None]})[0]
            parts.append(logits.argmax(1).astype(np.uint8))
        return np.concatenate(parts)

    def read_series(self, series: Series) -> NDArray[np.float32]:
        """(N, H, W) of a series as the network sees it.

        Raises:
            SourceError: A slice cannot be decoded; a volume with a hole is not segmented.
        """
        values = np.stack([read_pixels(ref) for ref in series.slices])
        window = series_window(series.first.modality, self.window, values)
        inverted = series.first.photometric == "MONOCHROME1"
        return to_unit(values, window, inverted).astype(np.float32, copy=False)

    def folder(
        self, source: Path, out: Path, advance: Callable[[str], None] = lambda name: None
    ) -> tuple[list[Prediction], list[ScanRow]]:
        """Segment every series below a folder.

        Writes ``<name>.nii.gz`` on the grid of the series, ``<name>/<slice>.png`` overlays and
        ``<name>.png``, some of them with a legend;
        for a folder of plain images ``<file name>.mask.png`` and ``<file name>.overlay.png``.

        Raises:
            ConfigError: ``out`` holds something already, or lies inside the source.
            ArchiveError: Folder missing or empty, or nothing in it can be segmented.
        """
        if out.resolve().is_relative_to(source.resolve()):
            raise ConfigError(
                f"{out}: lies inside {source}; take a folder outside it for the masks"
            )
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(
                f"{out}: not empty; masks of other patients would stand among the new"
            )
        series, rows = scan_folder(source, self.modalities, str)
        predictions: list[Prediction] = []
        for number, item in enumerate(series):
            name = f"series-{number:03d}"
            try:
                predictions.append(self._series(item, out, name))
            except SourceError as error:
                rows.extend(
                    ScanRow(
                        file_id=r.file_id,
                        status="quarantined",
                        code=error.code,
                        detail=f"{name}: {error.detail}",
                    )
                    for r in item.slices
                )
            advance(name)
        if not series:
            predictions = self._images(source, out, rows)
        if not predictions:
            codes = sorted({row.code for row in rows})
            raise ArchiveError(
                f"{source}: nothing to segment among {len(rows)} files ({', '.join(codes)}); the "
                f"model takes {', '.join(self.modalities)}"
            )
        return predictions, rows

    def _series(self, series: Series, out: Path, name: str) -> Prediction:
        unit = self.read_series(series)
        mask = self.mask(unit)
        out.mkdir(parents=True, exist_ok=True)
        volume = out / f"{name}.nii.gz"
        write_nifti_mask(volume, mask, np.array(series.affine))
        sheet = out / f"{name}.png"
        write_sheet(sheet, unit, mask, self.classes)
        files = [volume, sheet]
        for index, (image, labels) in enumerate(zip(unit, mask, strict=True)):
            path = out / name / f"{index:04d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(overlay(image, labels)).save(path)
            files.append(path)
        return self._prediction(name, mask, files)

    def _images(self, source: Path, out: Path, rows: list[ScanRow]) -> list[Prediction]:
        predictions = []
        paths = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        names = {path.name for path in paths}
        rows[:] = [row for row in rows if row.file_id not in names]  # no DICOM, but not skipped
        for path in paths:
            try:
                values = read_image(path)[None]
                modality = "IMAGE8" if values.dtype == np.int16 else "OT"
                if modality not in self.modalities:
                    raise DicomError("MODALITY_SKIPPED", "the model is for other modalities")
            except SourceError as error:
                rows.append(refusal(path.name, error.code, error.detail))
                continue
            window = series_window(modality, self.window, values)
            unit = to_unit(values, window).astype(np.float32, copy=False)
            mask = self.mask(unit)
            out.mkdir(parents=True, exist_ok=True)
            files = [out / f"{path.name}.mask.png", out / f"{path.name}.overlay.png"]
            Image.fromarray(mask[0]).save(files[0])
            Image.fromarray(overlay(unit[0], mask[0])).save(files[1])
            predictions.append(self._prediction(path.name, mask, files))
        return predictions

    def _prediction(self, name: str, mask: NDArray[np.uint8], files: list[Path]) -> Prediction:
        pixels = np.bincount(mask.ravel(), minlength=len(self.classes))
        return Prediction(
            name=name, slices=len(mask), files=tuple(files), pixels=tuple(int(p) for p in pixels)
        )

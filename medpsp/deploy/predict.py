"""DICOM in, masks out, with onnxruntime alone: no torch, ray or zarr is imported here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medpsp.channels import channels_first, neighbours, stacked, window_channels
from medpsp.deploy.picture import write_sheet
from medpsp.deploy.session import INPUT, class_masks, open_session
from medpsp.dicom.codes import refusal
from medpsp.dicom.load import Refused, read_series
from medpsp.dicom.nifti import write_nifti_mask
from medpsp.dicom.read import Pixels
from medpsp.dicom.sandbox import SandboxPool, or_error
from medpsp.dicom.scan import scan_folder
from medpsp.dicom.values import luma
from medpsp.dicom.voc import SUFFIXES
from medpsp.errors import ArchiveError, ConfigError, DicomError, ModelFileError, SourceError
from medpsp.intensity import ValueCounts, needs_series_values, overlay, series_window, to_unit
from medpsp.tiles import Tiling
from medpsp.types import FloatArray, Place, ReadPolicy, ScanRow, Series, Window

BATCH, DECODERS = 4, 4
"""Slices at once through the network; children that decode, at most."""

Show = Callable[..., FloatArray]
"""Number of a slice to (H, W) or (H, W, 3) in [0, 1]: whole series in float would fill a device.
A second number is of the slice whose window it is seen through, if not its own."""
Windows = Sequence[Window | None]


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
        threads: CPU threads, and at most that many decoders; 0 for all.

    Raises:
        ModelFileError: Not an ONNX file, or not one of ours.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        if not path.is_file():
            raise ModelFileError(f"model {path}: no such file; give the .onnx of `medpsp export`")
        self.decoders = min(DECODERS, threads or os.cpu_count() or 1)
        try:
            self.session = open_session(path, threads)
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
            if isinstance(meta, dict) and meta and "tile" not in meta:
                raise ModelFileError(f"model {path}: of an earlier version; export it again")
            self.classes: tuple[str, ...] = tuple(meta["classes"])
            self.modalities: tuple[str, ...] = tuple(meta["modalities"])
            window = meta["window"]
            self.window = Window(**window) if window else None
            self.header_window = bool(meta.get("header_window", False))
            self.colours = int(meta.get("in_channels", 1))
            self.windows = tuple(Window(**window) for window in meta.get("windows", ()))
            self.context = int(meta.get("context", 0))
            self.channels = (len(self.windows) or self.colours) * (2 * self.context + 1)
            self.tiling = Tiling(tuple(meta["tile"]["size"]), float(meta["tile"]["overlap"]))
            self.policy = ReadPolicy(modalities=self.modalities, **meta.get("policy", {}))
        except ModelFileError:  # a ValueError, too
            raise
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
        inputs, channels = self.session.get_inputs(), self.channels
        fits = self.colours in (1, 3) and inputs[0].shape[1:2] == [channels]
        if [i.name for i in inputs] != [INPUT] or not fits:
            return f"the input is not image (N, {channels}, H, W)"
        probe = np.zeros((1, channels, 32, 32), dtype=np.float32)
        found = self.session.run(None, {INPUT: probe})[0].shape
        wanted = (1, len(self.classes), 32, 32)
        return "" if found == wanted else f"output {found}, expected {wanted}"

    def mask(self, inputs: Show, count: int) -> NDArray[np.uint8]:
        """(N, H, W) class indices of ``count`` slices, as `inputs` gives them."""
        parts = []
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            batch = np.stack([inputs(number) for number in numbers])
            parts.append(class_masks(self.session, batch, self.tiling))
        return np.concatenate(parts)

    def show(
        self, pixels: Pixels, modality: str, inverted: bool = False, headers: Windows = ()
    ) -> Show:
        """How the network sees the slices of one series.

        Args:
            pixels: (N, H, W) modality values or (N, H, W, 3) RGB, and their padding.
            modality: Decides the window where the model carries none.
            inverted: True for MONOCHROME1.
            headers: The window of each slice's header, for models that are shown those.

        Raises:
            DicomError: COLOUR_FOR_GREY_MODEL.
        """
        values = pixels.values
        channels = values.shape[3] if values.ndim == 4 else 1
        if channels > self.colours:
            raise DicomError("COLOUR_FOR_GREY_MODEL", "trained with model.in_channels 1")
        valid = None if pixels.padding is None else ~pixels.padding
        counts = ValueCounts()
        if needs_series_values(modality, self.window, channels):
            counts.add(values, valid)
        window = series_window(modality, self.window, counts, channels)
        own = headers if self.header_window and channels == 1 else ()
        windows = [header or window for header in own] or [window] * len(values)
        return lambda n, through=None: to_unit(
            values[n], windows[n if through is None else through], inverted
        )

    def inputs(
        self,
        show: Show,
        values: NDArray[Any],
        inverted: bool = False,
        grid: Sequence[int] | None = None,
    ) -> Show:
        """Number of a slice to (C, H, W), as training had it.

        Args:
            show: Of the same slices.
            values: (N, H, W) modality values or (N, H, W, 3) RGB.
            inverted: True for MONOCHROME1.
            grid: Place of each slice on the grid of its series; None for one after another.
        """
        places = {place: number for number, place in enumerate(grid or range(len(values)))}
        of = list(places)
        grey = values.ndim == 3
        repeats = self.colours if grey and self.context else 1

        def one(number: int) -> FloatArray:
            units: list[FloatArray] = []
            for near in neighbours(places, of[number], self.context):
                if self.windows and grey:
                    units += window_channels(values[near], self.windows, inverted)
                else:
                    units += [show(near, number)] * repeats
            return channels_first(stacked(units), self.channels)

        return one

    def folder(
        self, source: Path, out: Path, advance: Callable[[str], None] = lambda name: None
    ) -> tuple[list[Prediction], list[ScanRow]]:
        """Segment every series below a folder.

        Writes ``<name>.nii.gz`` on the grid of the series (0 where it has no slice),
        ``<name>/<slice>.png`` overlays and ``<name>.png``, some of them with a legend; for images
        without geometry ``<name>/<number>.mask.png`` in place of the volume; for a folder of
        plain images ``<file name>.mask.png`` and ``<file name>.overlay.png``.

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
        with SandboxPool(self.decoders) as pool:
            scan = scan_folder(source, self.policy, str, pool)
            predictions: list[Prediction] = []
            rows = scan.rows
            for number, series in enumerate(scan.series):
                name = f"series-{number:03d}"
                try:
                    pixels, readable, refused = read_series(pool, series)
                    predictions.append(self._series(pixels, readable, out, name))
                    rows += _refusals(refused, name)
                except SourceError as error:
                    rows += _refusals([(ref, error) for ref in series.slices], name)
                advance(name)
            if not scan.series:
                predictions = self._images(pool, source, out, rows)
        if not predictions:
            codes = sorted({row.code for row in rows})
            raise ArchiveError(
                f"{source}: nothing to segment among {len(rows)} files ({', '.join(codes)}); the "
                f"model takes {', '.join(self.modalities)}"
            )
        return predictions, rows

    def _series(self, pixels: Pixels, series: Series, out: Path, name: str) -> Prediction:
        first, headers = series.first, [ref.window for ref in series.slices]
        show = self.show(pixels, first.modality, first.photometric == "MONOCHROME1", headers)
        inverted, places = first.photometric == "MONOCHROME1", series.grid_index
        mask = self.mask(self.inputs(show, pixels.values, inverted, places), len(series.slices))
        folder, grid, files = out / name, series.grid_index, []
        folder.mkdir(parents=True)
        if series.affine is not None:
            volume = np.zeros(series.shape, dtype=np.uint8)
            volume[list(grid)] = mask
            files.append(out / f"{name}.nii.gz")
            write_nifti_mask(files[0], volume, np.array(series.affine))
        else:
            for place, labels in zip(grid, mask, strict=True):
                files.append(folder / f"{place:04d}.mask.png")
                Image.fromarray(labels).save(files[-1])
        files.append(out / f"{name}.png")
        write_sheet(files[-1], show, mask, self.classes, grid)
        for number, place in enumerate(grid):
            files.append(folder / f"{place:04d}.png")
            Image.fromarray(overlay(show(number), mask[number])).save(files[-1])
        return self._prediction(name, mask, files)

    def _images(
        self, pool: SandboxPool, source: Path, out: Path, rows: list[ScanRow]
    ) -> list[Prediction]:
        predictions = []
        paths = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        names = {path.name for path in paths}
        rows[:] = [row for row in rows if row.file_id not in names]  # no DICOM, but not skipped
        read = or_error(lambda box, path: box.image(Place(str(path))))
        for path, found in pool.map(read, paths):
            try:
                if isinstance(found, SourceError):
                    raise found
                grey = found.ndim == 3 and self.policy.colour == "grey"
                values = (luma(found) if grey else found)[None]
                modality = "OT" if values.dtype == np.float32 else "IMAGE8"
                if modality not in self.modalities:
                    raise DicomError("MODALITY_SKIPPED", "the model is for other modalities")
                show = self.show(Pixels(values, None), modality)
            except SourceError as error:
                rows.append(refusal(path.name, error.code, error.detail))
                continue
            mask = self.mask(self.inputs(show, values), 1)
            out.mkdir(parents=True, exist_ok=True)
            files = [out / f"{path.name}.mask.png", out / f"{path.name}.overlay.png"]
            Image.fromarray(mask[0]).save(files[0])
            Image.fromarray(overlay(show(0), mask[0])).save(files[1])
            predictions.append(self._prediction(path.name, mask, files))
        return predictions

    def _prediction(self, name: str, mask: NDArray[np.uint8], files: list[Path]) -> Prediction:
        pixels = np.bincount(mask.ravel(), minlength=len(self.classes))
        return Prediction(
            name=name, slices=len(mask), files=tuple(files), pixels=tuple(int(p) for p in pixels)
        )


def _refusals(refused: Refused, name: str) -> list[ScanRow]:
    return [
        refusal(ref.file_id, error.code, f"{name}: {error.detail}", ref.frame)
        for ref, error in refused
    ]

"""What is written of a series, while its slices come one by one."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

import numpy as np
from PIL import Image

from medpsp.deploy.gif import GifWriter
from medpsp.deploy.mesh import volumes_ml, write_meshes
from medpsp.deploy.modelfile import ModelFile
from medpsp.deploy.packed import PackedMask
from medpsp.deploy.picture import Sheet
from medpsp.deploy.segobject import ModelFacts, write_seg
from medpsp.deploy.stream import Segmented
from medpsp.dicom.nifti import MaskWriter
from medpsp.errors import DicomError
from medpsp.intensity import overlay
from medpsp.types import Series

Format = Literal["seg", "nifti", "png", "gif", "mesh"]
FORMATS: tuple[Format, ...] = get_args(Format)
HOLES = {
    "MISSING_SLICES": "slices are missing in or beside it; files and ml are of those there",
    "UNEVEN_SPACING": "cut where the distance of its slices changes; files and ml are of this part",
}
USUAL: tuple[Format, ...] = ("seg", "nifti", "png")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Files written for one series.

    Attributes:
        name: ``series-000`` and so on, in the order of the scan: free of identities.
        slices: Answered.
        files: Those of the whole series first.
        pixels: (K,) pixels of each class.
        volumes: (K,) ml; None without geometry.
        modality: Of DICOM.
        seconds: Wall time from the first slice's decoding to the last file.
    """

    name: str
    slices: int
    files: tuple[Path, ...]
    pixels: tuple[int, ...]
    volumes: tuple[float, ...] | None = None
    modality: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """Of what series the answers are.

    Attributes:
        name: Of the files: free of identities.
        shape: (N, H, W) of its grid.
        affine: (4, 4) index (column, row, slice) to mm LPS; None without geometry.
        dicom: The slices, where they are DICOM.
    """

    name: str
    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...] | None = None
    dicom: Series | None = None

    @property
    def title(self) -> str:
        """Name and, of DICOM, modality, which is one of those that a model takes."""
        return f"{self.name}, {self.dicom.first.modality}" if self.dicom else self.name


class Answers:
    """Files of one series: all of them are there at the end, or none.

    Memory is that of a few slices; a SEG and meshes need the mask, packed, and meshes a surface.

    Args:
        out: Folder.
        target: Of what.
        model: Classes and terms.
        formats: What to write. Without geometry NIfTI becomes a PNG of class ids for each slice.

    Attributes:
        refused: Why there is no SEG or mesh, where that is not all that was asked for.
    """

    def __init__(
        self, out: Path, target: Target, model: ModelFile, formats: tuple[Format, ...]
    ) -> None:
        self._out, self._target, self._model = out, target, model
        self._formats = formats
        self._work = out / f".partial-{target.name}"
        self._counts = np.zeros(len(model.classes), dtype=np.int64)
        self._numbers: list[int] = []
        self._places: list[int] = []
        self._sheet = Sheet(model.classes, target.title)
        self.refused: list[DicomError] = []
        self._stack = ExitStack()
        self._nifti: MaskWriter | None = None
        self._gif: GifWriter | None = None
        whole = "mesh" in formats or ("seg" in formats and target.dicom is not None)
        self._volume = PackedMask(target.shape) if whole else None

    def __enter__(self) -> Answers:
        name, target, formats = self._target.name, self._target, self._formats
        self._work.mkdir(parents=True)
        if "png" in formats or (target.affine is None and "nifti" in formats):
            (self._work / name).mkdir()
        if target.affine is not None and "nifti" in formats:
            path = self._work / f"{name}.nii.gz"
            writer = MaskWriter(path, target.shape, np.array(target.affine))
            self._nifti = self._stack.enter_context(writer)
        if "gif" in formats:
            gif = GifWriter(self._work / f"{name}.gif")
            self._gif = self._stack.enter_context(gif)
        return self

    def add(self, item: Segmented) -> None:
        """The next slice."""
        name, formats = self._target.name, self._formats
        self._numbers.append(item.number)
        self._places.append(item.place)
        self._counts += np.bincount(item.mask.ravel(), minlength=len(self._counts))
        if self._nifti:
            self._nifti.add(item.place, item.mask)
        elif "nifti" in formats:
            Image.fromarray(item.mask).save(self._work / name / f"{item.place:04d}.mask.png")
        if self._volume is not None:
            self._volume[item.place] = item.mask
        if "png" in formats or self._gif:
            drawn = overlay(item.unit, item.mask)
            if "png" in formats:
                self._sheet.add(item)
                Image.fromarray(drawn).save(self._work / name / f"{item.place:04d}.png")
            if self._gif:
                self._gif.add(drawn)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        try:
            self._stack.__exit__(kind, error, where)
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _finish(self) -> None:
        name = self._target.name
        if "png" in self._formats:
            self._sheet.save(self._work / f"{name}.png")
        for kind, write in (("seg", self._write_seg), ("mesh", self._write_meshes)):
            if kind not in self._formats:
                continue
            try:
                write()
            except DicomError as error:  # what else is asked for can be given
                self.refused.append(error)
        if self.refused and not any(path.is_file() for path in self._work.rglob("*")):
            raise self.refused[0]
        for path in sorted(self._work.iterdir()):
            path.rename(self._out / path.name)

    def _write_seg(self) -> None:
        series, model, volume = self._target.dicom, self._model, self._volume
        if series is None or volume is None:  # a NIfTI has no identity that a SEG could take
            raise DicomError("SEG_NOT_WRITTEN", "a SEG needs DICOM input, a NIfTI is none")
        facts = ModelFacts(
            name=model.path.stem,
            version=str(model.meta.get("tool", "medpsp")),
            digest=model.digest,
            classes=model.classes,
            codes=model.codes,
        )
        answered = replace(series, slices=tuple(series.slices[n] for n in self._numbers))
        mask = volume.chosen(self._places)
        write_seg(self._work / f"{self._target.name}.dcm", mask, answered, facts)

    def _write_meshes(self) -> None:
        name, affine, volume = self._target.name, self._target.affine, self._volume
        if affine is None or volume is None:
            raise DicomError("MESH_NOT_WRITTEN", "images without geometry")
        write_meshes(self._work / name, volume, np.array(affine), self._model.classes)

    @property
    def holes(self) -> list[DicomError]:
        """What is missing of the series that was sent, or lies in another answer."""
        flags = self._target.dicom.flags if self._target.dicom else ()
        return [DicomError(code, why) for code, why in HOLES.items() if code in flags]

    @property
    def pixels(self) -> tuple[int, ...]:
        """(K,) of each class."""
        return tuple(int(n) for n in self._counts)

    @property
    def slices(self) -> int:
        """How many were added."""
        return len(self._places)

    @property
    def volumes(self) -> tuple[float, ...] | None:
        """(K,) ml of each class; None without geometry."""
        if self._target.affine is None:
            return None
        return volumes_ml(self._counts, np.array(self._target.affine))

    @property
    def files(self) -> tuple[Path, ...]:
        """Written ones: NIfTI or masks, SEG, pictures and meshes of the series, then of slices."""
        name = self._target.name
        found = [*self._out.glob(f"{name}.*"), *(self._out / name).glob("*")]
        kinds = (
            ".nii.gz",
            ".mask.png",
            f"{name}.dcm",
            f"{name}.png",
            f"{name}.gif",
            ".glb",
            ".stl",
        )

        def kind(path: Path) -> int:
            ends = [number for number, end in enumerate(kinds) if path.name.endswith(end)]
            return ends[0] if ends else len(kinds)

        return tuple(sorted((p for p in found if p.is_file()), key=lambda p: (kind(p), p.name)))

"""The part of the configuration that says what to read. `config` holds the rest of the tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from medpsp.types import ReadPolicy, Window
from medpsp.words import ODD

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
DECODE_SECONDS, DECODE_MEMORY_MIB = 30, 1024
"""Limits of a decoder where no configuration says others: on a device, for one."""


class Node(BaseModel):
    """Frozen; every key is known, no number is infinite or a boolean, no text has a zero byte."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_number(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation in (int, float):  # pydantic reads yes as 1
            raise ValueError(f"expected a number, got {value}")
        if "\0" in str(value):
            raise ValueError("holds a zero byte")
        return value


class WindowConfig(Node):
    """A fixed window in modality units (HU for CT)."""

    center: float = Field(description="The middle grey.")
    width: Annotated[float, Field(gt=0)] = Field(description="From black to white.")


class SplitConfig(Node):
    """Shares of patients held out. A patient's place is a threshold of a keyed hash."""

    val: Fraction = Field(
        default=0.2, description="Scored while training; the best checkpoint is chosen on them."
    )
    test: Fraction = Field(
        default=0.2, description="Scored by `medpsp evaluate`; training never sees them."
    )

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> SplitConfig:
        if self.val + self.test >= 1:
            raise ValueError(f"val + test must stay below 1, got {self.val + self.test:g}")
        return self


class VocConfig(Node):
    """Folder names of a VOC-style archive, below ``data.archive``."""

    images: str = Field(default="JPEGImages", description="Folder of the images.")
    masks: str = Field(
        default="SegmentationClass", description="Folder of masks with the names of the images."
    )
    lists: str = Field(
        default="ImageSets/Segmentation",
        description="Folder of train.txt, val.txt and test.txt; without them the key splits.",
    )
    patient_pattern: str = Field(
        default="^(.+)$", description="Regular expression on the stem; group 1 is the patient."
    )


class DataConfig(Node):
    """What to read and how to turn it into shards."""

    source: Literal["dicom", "voc"] = Field(
        default="dicom", description="voc: pairs of images and masks in VOC folders."
    )
    archive: Path = Field(description="Folder that is read, with all below it; never written to.")
    labels: Path | None = Field(
        default=None, description="Root of the masks; none: unlabelled, or see label_format."
    )
    label_pattern: str = Field(
        default="{PatientID}.nii.gz",
        description="Mask of a series below `labels`; fields: PatientID, SeriesInstanceUID, "
        "Modality, folder (of the series, relative to the archive).",
    )
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=255)] = Field(
        description="Names by class index; the first is the background."
    )
    label_format: Literal["nifti", "seg", "rtstruct"] = Field(
        default="nifti",
        description="DICOM SEG and RTSTRUCT objects are looked for below `labels`, or in the "
        "archive where that is not set, and belong to a series by what they reference.",
    )
    label_map: dict[int, int] = Field(
        default={}, description="Mask value to class index; empty: the value is the index."
    )
    label_names: dict[str, str] = Field(
        default={},
        description="SegmentLabel or ROIName (shell pattern, case ignored) to class; empty: the "
        "class names themselves. A name that fits none is background.",
    )
    label_overlap: Literal["reject", "priority"] = Field(
        default="reject", description="priority: where segments overlap, the later class wins."
    )
    seg_threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Share from which a voxel of a FRACTIONAL segment counts."
    )
    mask_geometry: Literal["affine", "index"] = Field(
        default="affine",
        description="index: trust the index order of a NIfTI mask of equal shape, not its affine.",
    )
    mask_resample: Literal["never", "nearest"] = Field(
        default="never", description="nearest: take a NIfTI mask on another grid by nearest voxel."
    )
    unlabelled: Literal["skip", "keep"] = Field(
        default="skip", description="Series without a mask: left out, or kept with label 255."
    )
    modalities: tuple[str, ...] = Field(
        default=("CT", "MR"), description="Codes of Modality (0008,0060) to keep."
    )
    gaps: Literal["split", "fill", "reject"] = Field(
        default="split",
        description="A series with a hole or a change of spacing becomes several, stays one with "
        "marked holes, or is quarantined.",
    )
    burned_in: Literal["quarantine", "blank", "keep"] = Field(
        default="quarantine",
        description="Objects that may show a name in their pixels; blank: ultrasound keeps its "
        "image region, others are quarantined.",
    )
    non_volumes: Literal["skip", "keep"] = Field(
        default="skip", description="Localizers, secondary captures, dose sheets."
    )
    colour: Literal["keep", "grey"] = Field(
        default="keep", description="grey: the brightness of colour images (ITU-R BT.601)."
    )
    padding: Literal["background", "ignore"] = Field(
        default="background",
        description="ignore: background pixels that hold PixelPaddingValue get label 255.",
    )
    dates: Literal["none", "shift"] = Field(
        default="none",
        description="shift: the index holds study days, moved by a keyed offset per patient.",
    )
    decode_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        default=DECODE_SECONDS,
        description="CPU seconds for one object before its decoder is stopped.",
    )
    decode_memory_mib: Annotated[int, Field(ge=256)] = Field(
        default=DECODE_MEMORY_MIB, description="Memory of one decoder process, MiB."
    )
    window: WindowConfig | None = Field(
        default=None,
        description="None: 40/400 for CT, the full range for 8-bit images, else percentiles "
        "0.5-99.5 of the series.",
    )
    header_window: bool = Field(
        default=False,
        description="Each slice by Window Center and Width of its header and its VOI LUT Function; "
        "slices without them by `window`.",
    )
    split: SplitConfig = SplitConfig()
    voc: VocConfig = VocConfig()
    key_file: Path | None = Field(
        default=None,
        description="Key of the pseudonyms, mode 0600, made by `medpsp key new`; none: the "
        "environment variable MEDPSP_KEY.",
    )
    crosswalk: Path | None = Field(
        default=None,
        description="If set, pseudonym and real path of every object are written there, and of "
        "images those of patient and series and the split; mode 0600.",
    )
    profile: Literal["default", "fast", "dense", "jpegls", "htj2k"] = Field(
        default="default",
        description="Compression of the images, lossless all: zstd; fast: lz4, read several times "
        "as fast at a quarter more disk; dense: JPEG XL, read slowly; jpegls, htj2k: frames that "
        "are compressed so already keep their bytes, others are compressed so.",
    )
    shard_slices: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=128, description="Slices of one shard, which is one file of images."
    )
    workers: Annotated[int, Field(ge=1)] = Field(
        default=2, description="Processes that scan, convert and check at the same time."
    )
    index: Path | None = Field(
        default=None,
        description="Folder for the scan of the archive, mode 0700, outside shards and archive: "
        "the next run reads only new and changed files. It holds real identifiers. None: the scan "
        "is forgotten.",
    )
    memory_mib: Annotated[int, Field(ge=512)] | None = Field(
        default=None,
        description="Memory that the shard tasks of one machine may take together, MiB; fewer "
        "run at once where it is small. None: `workers` of them, whatever they need.",
    )
    ray_address: str | None = Field(
        default=None,
        description="Ray cluster to use, `auto` or host:port; its machines see the same folders. "
        "None: Ray is started on this machine for the run.",
    )
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05,
        description="Share of quarantined objects, among these and the kept ones, above which the "
        "command fails; all is written before.",
    )

    @property
    def fixed_window(self) -> Window | None:
        """The configured window, if it is one."""
        window = self.window
        return Window(center=window.center, width=window.width) if window else None

    @property
    def policy(self) -> ReadPolicy:
        """What the reader of an archive needs to know."""
        return ReadPolicy(
            modalities=self.modalities,
            gaps=self.gaps,
            burned_in=self.burned_in,
            non_volumes=self.non_volumes,
            colour=self.colour,
        )

    @model_validator(mode="after")
    def _map_into_classes(self) -> DataConfig:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must differ, got {', '.join(self.classes)}")
        if odd := [name for name in self.classes if not name.strip() or ODD.search(name)]:
            raise ValueError(
                f"classes: {odd[0]!r} is blank, or has a backslash or control character"
            )
        for name in self.modalities:
            if name != name.upper().strip() or not name:
                raise ValueError(f"modalities: '{name}', expected a DICOM code in capitals, as CT")
        try:
            self.label_pattern.format(PatientID="", SeriesInstanceUID="", Modality="", folder="")
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ValueError(
                f"label_pattern '{self.label_pattern}': fields are {{PatientID}}, "
                "{SeriesInstanceUID}, {Modality} and {folder}"
            ) from None
        if unknown := set(self.label_names.values()) - set(self.classes):
            raise ValueError(
                f"label_names leads to {', '.join(sorted(unknown))}; classes are "
                f"{', '.join(self.classes)}"
            )
        for value, index in self.label_map.items():
            if not (0 <= index < len(self.classes) or index == 255):
                raise ValueError(
                    f"label_map sends {value} to {index}; classes are 0..{len(self.classes) - 1} "
                    "and 255 is ignore"
                )
        return self

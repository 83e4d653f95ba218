"""Archives as hospitals have them, against the truth at world points: right, or told why not.

`pytest -s tests/test_traps.py` prints what became of each.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import radians, tan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
    RTPlanStorage,
    TwelveLeadECGWaveformStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from medpsp.types import ReadPolicy, Series, SliceRef
from tests.factory import grouped, set_raw
from tests.trapmaker import (
    POINTS,
    Archive,
    Edit,
    Volume,
    enhanced,
    header_of,
    judge,
    one,
    put,
    to_mr,
)

Build = Callable[[Archive], object]
KEEP, FILL, REJECT = (
    ReadPolicy(non_volumes="keep"),
    ReadPolicy(gaps="fill"),
    ReadPolicy(gaps="reject"),
)
HOLE, UNEVEN, SINGLE, NO_PLACE = (
    "MISSING_SLICES",
    "UNEVEN_SPACING",
    "SINGLE_SLICE",
    "GEOM_MISSING",
)


class Trap(NamedTuple):
    """How to set it, and what must come of it; ``fates`` are those of `judge`."""

    build: Build
    sizes: tuple[int, ...] = (20,)
    codes: tuple[tuple[str, int], ...] = ()
    flags: tuple[str, ...] = ()
    policy: ReadPolicy = ReadPolicy()
    fates: str = "right"


def turned(about_z: float, about_x: float) -> Volume:
    """A double oblique volume."""
    a, b = radians(about_z), radians(about_x)
    cos_a, sin_a, cos_b, sin_b = np.cos(a), np.sin(a), np.cos(b), np.sin(b)
    x = np.array([cos_a, sin_a, 0])
    y = np.array([-sin_a * cos_b, cos_a * cos_b, sin_b])
    return Volume(axes=(tuple(x), tuple(y)), step=tuple(2.5 * np.cross(x, y)))


AXIAL = Volume()
AGAIN = Volume(code=1)  # other values at the same places
MR = Volume(offset=0)
SAGITTAL = Volume(
    code=2, axes=((0, 1, 0), (0, 0, -1)), step=(-2.5, 0, 0), origin=(19, -20.13, -381.17)
)
SCOUT = Volume(
    code=3,
    shape=(1, 48, 64),
    axes=((1, 0, 0), (0, 0, -1)),
    step=(0, 1, 0),
    origin=(-18.8, 2.3, -388.3),
)


def each(volume: Volume, edit: Edit = lambda ds, k: None, *more: tuple[Volume, Edit]) -> Build:
    """Write volumes into one folder, every slice after its edit."""

    def build(archive: Archive) -> None:
        for item, change in ((volume, edit), *more):
            archive.add(item, change)

    return build


def then(build: Build, change: Build) -> Build:
    """Change what was written."""

    def both(archive: Archive) -> None:
        build(archive)
        change(archive)

    return both


def setting(slices: tuple[int, ...] = (), **elements: object) -> Edit:
    """Set elements, of all slices or of some; None removes one."""

    def edit(ds: Dataset, k: int) -> None:
        for keyword, value in elements.items():
            if slices and k not in slices:
                continue
            if value is None:
                del ds[keyword]
            else:
                setattr(ds, keyword, value)

    return edit


def syntax(uid: str) -> Edit:
    def edit(ds: Dataset, k: int) -> None:
        ds.file_meta.TransferSyntaxUID = uid
        put(ds, AXIAL.stored(k))

    return edit


def raw(change: Callable[[bytes], bytes], *slices: int) -> Build:
    """Change the bytes of files on disk; no numbers: of all."""

    def build(archive: Archive) -> None:
        for k in slices or range(20):
            path = archive.path(k)
            path.write_bytes(change(path.read_bytes()))

    return build


def without_meta(data: bytes) -> bytes:
    """Preamble and file meta cut off; the group length stands at 140."""
    return data[144 + int.from_bytes(data[140:144], "little") :]


def shuffled_numbers(ds: Dataset, k: int) -> None:
    ds.InstanceNumber, ds.SliceLocation = (k * 7) % 20 + 1, f"{(k * 11) % 20}"


def signed_with_garbage(ds: Dataset, k: int) -> None:
    ds.PixelRepresentation = 1
    garbage = np.random.default_rng(k).integers(0, 16, (48, 64)) << 12
    put(ds, (SIGNED.stored(k) & 0xFFF) | garbage)


SIGNED = Volume(lowest=-2000, offset=0)


def high_bits(ds: Dataset, k: int) -> None:
    ds.HighBit = 15
    put(ds, (AXIAL.stored(k) << 4) | 0xF)


ODD_BYTES = Volume(shape=(20, 47, 63), levels=251)


def eight_bits(ds: Dataset, k: int) -> None:
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    put(ds, ODD_BYTES.stored(k))


def modality_lut(ds: Dataset, k: int) -> None:
    del ds.RescaleSlope, ds.RescaleIntercept
    data = (2 * np.arange(4096)).astype("<u2").tobytes()
    ds.ModalityLUTSequence = one(LUTDescriptor=[4096, 0, 16], ModalityLUTType="HU", LUTData=data)
    ds.ModalityLUTSequence[0]["LUTData"].VR = "OW"


def float_pixels(ds: Dataset, k: int) -> None:
    ds.BitsAllocated, ds.RescaleIntercept = 32, "-1024"
    ds.FloatPixelData = (AXIAL.stored(k) + 0.25).astype("<f4").tobytes()
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation


def copies(archive: Archive) -> None:
    for k in (2, 9, 10):
        shutil.copy(archive.path(k), archive.root / f"copy{k}")


def damaged_copy(archive: Archive) -> None:
    (archive.root / "0").write_bytes(archive.path(7).read_bytes()[:-1000])


def rewritten(name: str, **elements: object) -> Build:
    """A second file for slice 7 with other elements."""

    def build(archive: Archive) -> None:
        ds = pydicom.dcmread(archive.path(7))
        setting(**elements)(ds, 7)
        archive.save(ds, name)

    return build


def strangers(archive: Archive) -> None:
    for number, uid in enumerate((BasicTextSRStorage, RTPlanStorage, TwelveLeadECGWaveformStorage)):
        ds = header_of(AXIAL)
        for keyword in ("Rows", "Columns", "BitsAllocated"):
            del ds[keyword]
        ds.SOPClassUID, ds.SOPInstanceUID = uid, generate_uid()
        archive.save(ds, f"a/object{number}")
    folder = Dataset()
    folder.file_meta = header_of(AXIAL).file_meta
    folder.SOPClassUID, folder.SOPInstanceUID = MediaStorageDirectoryStorage, generate_uid()
    folder.DirectoryRecordSequence = one(DirectoryRecordType="PATIENT", PatientID="TRAP")
    archive.save(folder, "DICOMDIR")
    (archive.root / "a" / "notes.txt").write_text("exported by hand, twice; see the other folder\n")
    (archive.root / "a" / "empty").touch()
    (archive.root / "a" / "noise").write_bytes(np.random.default_rng(0).bytes(600))


def odd_one(volume: Volume, edit: Edit = lambda ds, k: None) -> Build:
    """Slice 7 is replaced by one of its own kind at the same place."""

    def build(archive: Archive) -> None:
        archive.add(AXIAL)
        archive.remove(7)
        archive.add(volume, edit)

    return build


def frames(*order: int, volume: Volume = AXIAL) -> Build:
    return lambda archive: enhanced(archive, [volume], [(0, k) for k in order])


def two_by_time(archive: Archive) -> None:
    order = [(v, k) for k in range(20) for v in (1, 0)]

    def edit(item: Dataset, v: int, k: int) -> None:
        item.FrameContentSequence[0].TemporalPositionIndex = v + 1

    enhanced(archive, [AXIAL, AGAIN], order, edit)


def two_stacks(archive: Archive) -> None:
    def edit(item: Dataset, v: int, k: int) -> None:
        item.FrameContentSequence[0].StackID = str(v)

    above = Volume(code=1, origin=(-19.0, -17.0, -300.0))
    enhanced(archive, [AXIAL, above], [(v, k) for k in range(20) for v in (0, 1)], edit)


def frame_slopes(archive: Archive) -> None:
    def edit(item: Dataset, v: int, k: int) -> None:
        item.PixelValueTransformationSequence = one(
            RescaleSlope=PET.slope(k), RescaleIntercept=-1024, RescaleType="US"
        )

    order = [(0, int(k)) for k in np.random.default_rng(1).permutation(20)]
    enhanced(archive, [PET], order, edit, modality="MR")


PET = Volume(slopes=tuple(0.5 + 0.125 * k for k in range(20)))  # 1.0 for the fifth slice


def cine(archive: Archive) -> None:
    ds = header_of(MR)
    ds.Modality, ds.BurnedInAnnotation = "US", "NO"
    ds.SOPClassUID, ds.SOPInstanceUID = UltrasoundMultiFrameImageStorage, generate_uid()
    ds.NumberOfFrames = 20
    put(ds, np.stack([MR.stored(k) for k in range(20)]))
    archive.save(ds, "clip")
    archive.volumes.append(MR)
    archive.sources.update({(0, k): ("clip", k) for k in range(20)})


def packed(kind: str) -> Build:
    def build(archive: Archive) -> None:
        shutil.make_archive(str(archive.root / "export"), kind, archive.root / "a")
        shutil.rmtree(archive.root / "a")

    return build


def gzipped(archive: Archive) -> None:
    for k in range(20):
        archive.path(k).write_bytes(gzip.compress(archive.path(k).read_bytes()))


def split_key(**elements: object) -> tuple[Volume, Edit]:
    """The second volume of a series, told apart by elements."""
    return AGAIN, setting(**elements)


TRAPS: dict[str, Trap] = {
    "axial": Trap(each(AXIAL)),
    "sagittal": Trap(each(SAGITTAL)),
    "double oblique": Trap(each(turned(20, -35))),
    "rows run backwards": Trap(each(Volume(axes=((1, 0, 0), (0, -1, 0)), origin=(-19, 17, -423)))),
    "slice steps run backwards": Trap(each(Volume(step=(0, 0, -2.5)))),
    "RLE": Trap(each(AXIAL, lambda ds, k: ds.compress(RLELossless, generate_instance_uid=False))),
    "big endian": Trap(each(AXIAL, syntax(ExplicitVRBigEndian))),
    "implicit": Trap(each(AXIAL, syntax(ImplicitVRLittleEndian))),
    "deflated": Trap(each(AXIAL, syntax(DeflatedExplicitVRLittleEndian))),
    "slope differs by slice, once 1": Trap(each(PET, setting(Modality="PT"))),
    "fractional slope": Trap(each(Volume(slopes=(0.0625,)))),
    "InstanceNumber and SliceLocation lie": Trap(each(AXIAL, shuffled_numbers)),
    "no InstanceNumber": Trap(each(AXIAL, setting(InstanceNumber=None))),
    "empty InstanceNumber": Trap(each(AXIAL, setting(InstanceNumber=""))),
    "SpacingBetweenSlices below 0": Trap(each(AXIAL, setting(SpacingBetweenSlices="-2.5"))),
    "slices overlap": Trap(each(AXIAL, setting(SliceThickness="7.5", SpacingBetweenSlices="7.5"))),
    "positions in hundredths": Trap(
        each(
            turned(20, -35),
            lambda ds, k: setting(
                ImagePositionPatient=[f"{v:.2f}" for v in turned(20, -35).corner(k)]
            )(ds, k),
        )
    ),
    "spacing with more digits on one slice": Trap(
        each(AXIAL, setting((4, 5), PixelSpacing=["0.80000000000001", "0.59999999999999"]))
    ),
    "slice missing, split": Trap(
        then(each(AXIAL), lambda a: a.remove(7)), sizes=(12, 7), flags=(HOLE,)
    ),
    "slice missing, fill": Trap(
        then(each(AXIAL), lambda a: a.remove(7)), sizes=(19,), flags=(HOLE,), policy=FILL
    ),
    "four holes, fill": Trap(
        then(each(turned(10, 10)), lambda a: a.remove(1, 6, 7, 8, 12)),
        sizes=(15,),
        flags=(HOLE,),
        policy=FILL,
    ),
    "slice missing, reject": Trap(
        then(each(AXIAL), lambda a: a.remove(7)),
        sizes=(),
        codes=((HOLE, 19),),
        policy=REJECT,
        fates="coded",
    ),
    "upper half 1 mm higher": Trap(
        each(Volume(extra_mm=(0,) * 10 + (1,) * 10)), sizes=(10, 10), flags=(UNEVEN,)
    ),
    "upper half 1 mm higher, fill": Trap(
        each(Volume(extra_mm=(0,) * 10 + (1,) * 10)), sizes=(10, 10), flags=(UNEVEN,), policy=FILL
    ),
    "one slice 0.7 mm off": Trap(
        each(Volume(extra_mm=(0,) * 7 + (0.7,) + (0,) * 12)),
        sizes=(12, 7, 1),
        flags=(SINGLE, UNEVEN),
    ),
    "spacing changes": Trap(
        each(Volume(extra_mm=tuple(max(0, k - 8) * 1.5 for k in range(20)))),
        sizes=(12, 8),
        flags=(UNEVEN,),
    ),
    "no two distances are equal": Trap(
        each(Volume(extra_mm=tuple(0.05 * k * (k - 1) for k in range(20)))),
        sizes=(1,) * 20,
        flags=(SINGLE, UNEVEN),
    ),
    "gantry tilt": Trap(
        each(Volume(step=(0, -2.5 * tan(radians(15)), 2.5))), flags=("GANTRY_TILT",)
    ),
    "two series in one folder": Trap(
        each(AXIAL, setting(), split_key(SeriesInstanceUID=generate_uid(entropy_srcs=["2"]))),
        sizes=(20, 20),
    ),
    "two patients with one series UID": Trap(
        each(AXIAL, setting(), split_key(PatientID="OTHER")),
        sizes=(),
        codes=(("PATIENT_CONFLICT", 40),),
        fates="coded",
    ),
    "copied files": Trap(then(each(AXIAL), copies), codes=(("DUP_IDENTICAL", 3),)),
    "one UID, other pixels": Trap(
        then(each(AXIAL), rewritten("z", PixelData=bytes(2 * 48 * 64))),
        sizes=(12, 7),
        codes=(("DUP_CONFLICT", 2),),
        flags=(HOLE,),
        fates="coded right",
    ),
    "one UID, other position": Trap(
        then(each(AXIAL), rewritten("z", ImagePositionPatient=[0, 0, 0])),
        sizes=(12, 7),
        codes=(("DUP_CONFLICT", 2),),
        flags=(HOLE,),
        fates="coded right",
    ),
    "same image under a new UID": Trap(
        then(each(AXIAL), rewritten("z", SOPInstanceUID="1.2.3")), codes=(("DUP_IDENTICAL", 1),)
    ),
    "other image at one position": Trap(
        then(each(AXIAL), rewritten("z", SOPInstanceUID="1.2.3", PixelData=bytes(2 * 48 * 64))),
        sizes=(12, 7),
        codes=(("DUP_POSITION", 2),),
        flags=(HOLE,),
        fates="coded right",
    ),
    "file cut in its pixels": Trap(
        then(each(AXIAL), raw(lambda data: data[:-1000], 7)),  # its header still has a place
        codes=(("PIX_TRUNCATED", 1),),
        fates="coded right",
    ),
    "file cut in its header": Trap(
        then(each(AXIAL), raw(lambda data: data[:400], 0)),
        sizes=(19,),
        codes=(("HDR_TRUNCATED", 1),),
        fates="coded right",
    ),
    "copy that is cut short": Trap(then(each(AXIAL), damaged_copy), codes=(("DUP_CONFLICT", 1),)),
    "no preamble, no meta": Trap(then(each(AXIAL), raw(without_meta))),
    "no TransferSyntaxUID": Trap(
        then(each(AXIAL), raw(lambda d: d.replace(b"\2\0\x10\0UI", b"\2\0\x11\0UI", 1)))
    ),
    "mangled TransferSyntaxUID": Trap(
        then(
            each(AXIAL),
            raw(lambda d: d.replace(b"1.2.840.10008.1.2.1\0", b"1_2_840_10008_1_2_1\0")),
        )
    ),
    "pixels longer than needed": Trap(
        each(AXIAL, lambda ds, k: setting(PixelData=ds.PixelData + bytes(100))(ds, k))
    ),
    "strangers in the folder": Trap(
        then(each(AXIAL), strangers),
        codes=(("NOT_IMAGE", 3), ("DICOMDIR", 1), ("NOT_DICOM", 2), ("FILE_EMPTY", 1)),
    ),
    "localizer in the series": Trap(
        each(AXIAL, setting(), (SCOUT, setting(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))),
        codes=(("LOCALIZER", 1),),
        fates="coded right",
    ),
    "localizer in the series, kept": Trap(
        each(AXIAL, setting(), (SCOUT, setting(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))),
        sizes=(20, 1),
        flags=(SINGLE,),
        policy=KEEP,
    ),
    "two orientations in one series": Trap(
        each(AXIAL, setting(), (SAGITTAL, setting())), sizes=(20, 20)
    ),
    "two stations in one series": Trap(
        each(AXIAL, setting(), (Volume(code=1, origin=(-19, 33, -423.5)), setting())),
        sizes=(20, 20),
    ),
    "two echoes": Trap(
        each(AXIAL, setting(EchoTime="10"), split_key(EchoTime="20")), sizes=(20, 20)
    ),
    "two echoes, AcquisitionNumber differs by slice": Trap(
        each(
            AXIAL,
            lambda ds, k: setting(EchoTime="10", AcquisitionNumber=k)(ds, k),
            (AGAIN, lambda ds, k: setting(EchoTime="20", AcquisitionNumber=k + 50)(ds, k)),
        ),
        sizes=(20, 20),
    ),
    "AcquisitionNumber changes within a volume": Trap(
        each(AXIAL, setting((3, 4, 11, 19), AcquisitionNumber=2))
    ),
    "two times": Trap(
        each(
            AXIAL,
            setting(TemporalPositionIdentifier=1),
            split_key(TemporalPositionIdentifier=2),
        ),
        sizes=(20, 20),
    ),
    "two b-values": Trap(
        each(AXIAL, setting(DiffusionBValue=0.0), split_key(DiffusionBValue=1000.0)),
        sizes=(20, 20),
    ),
    "two kernels": Trap(
        each(AXIAL, setting(ConvolutionKernel="B30f"), split_key(ConvolutionKernel="B70f")),
        sizes=(20, 20),
    ),
    "magnitude and phase": Trap(
        each(
            AXIAL,
            setting(ImageType=["ORIGINAL", "PRIMARY", "M"]),
            split_key(ImageType=["ORIGINAL", "PRIMARY", "P"]),
        ),
        sizes=(20, 20),
    ),
    "two echoes that nothing tells apart": Trap(
        each(AXIAL, setting(), (AGAIN, setting())),
        sizes=(),
        codes=(("DUP_POSITION", 40),),
        fates="coded",
    ),
    "slice with another matrix": Trap(
        odd_one(Volume(code=1, shape=(1, 40, 60), origin=tuple(AXIAL.corner(7)))),
        sizes=(12, 7, 1),
        flags=(HOLE, SINGLE),
    ),
    "slice turned by 180 degrees": Trap(
        odd_one(
            Volume(
                code=1,
                shape=(1, 48, 64),
                axes=((-1, 0, 0), (0, -1, 0)),
                origin=tuple(AXIAL.affine[:3] @ (63, 47, 7, 1)),
            )
        ),
        sizes=(12, 7, 1),
        flags=(HOLE, SINGLE),
    ),
    "slice without a position": Trap(
        each(AXIAL, setting((7,), ImagePositionPatient=None)),
        sizes=(12, 7, 1),
        flags=(HOLE, NO_PLACE),
        fates="flat right",
    ),
    "no PixelSpacing": Trap(
        each(AXIAL, setting(PixelSpacing=None)), flags=(NO_PLACE,), fates="flat"
    ),
    "directions not orthogonal on one slice": Trap(
        each(AXIAL, setting((7,), ImageOrientationPatient=[1, 0, 0, 0.02, 1, 0])),
        sizes=(12, 7),
        codes=(("GEOM_BAD_IOP", 1),),
        flags=(HOLE,),
        fates="coded right",
    ),
    "PixelSpacing of 0 on one slice": Trap(
        each(AXIAL, setting((7,), PixelSpacing=[0, 0.6])),
        sizes=(12, 7),
        codes=(("GEOM_BAD_SPACING", 1),),
        flags=(HOLE,),
        fates="coded right",
    ),
    "position that is no number on one slice": Trap(
        each(AXIAL, lambda ds, k: k == 7 and set_raw(ds, "ImagePositionPatient", b"0\\0\\nan")),
        sizes=(12, 7),
        codes=(("GEOM_NONFINITE", 1),),
        flags=(HOLE,),
        fates="coded right",
    ),
    "12 bits signed under garbage": Trap(each(SIGNED, signed_with_garbage)),
    "HighBit 15 of BitsStored 12": Trap(each(AXIAL, high_bits)),
    "odd number of bytes": Trap(each(ODD_BYTES, eight_bits)),
    "modality LUT": Trap(each(Volume(slopes=(2,), offset=0), modality_lut)),
    "float pixels": Trap(each(Volume(offset=-1023.75), float_pixels)),
    "MONOCHROME1 keeps its values": Trap(
        each(AXIAL, setting(PhotometricInterpretation="MONOCHROME1"))
    ),
    "MR without rescale or window": Trap(each(MR, to_mr)),
    "enhanced CT": Trap(frames(*range(20))),
    "enhanced CT, frames in any order": Trap(frames(*(k * 7 % 20 for k in range(20)))),
    "enhanced CT, tilted, two frames missing": Trap(
        frames(
            *(k for k in range(19, -1, -1) if k not in (4, 5)),
            volume=Volume(step=(0, -2.5 * tan(radians(15)), 2.5)),
        ),
        sizes=(14, 4),
        flags=("GANTRY_TILT", HOLE),
    ),
    "enhanced MR, rescale by frame": Trap(frame_slopes),
    "enhanced CT, two times": Trap(two_by_time, sizes=(20, 20)),
    "enhanced CT, two stacks": Trap(two_stacks, sizes=(20, 20)),
    "ultrasound clip": Trap(cine, fates="flat"),
    "zip": Trap(then(each(AXIAL), packed("zip")), codes=(("ARCHIVE_OPENED", 1),)),
    "tar.gz": Trap(then(each(AXIAL), packed("gztar")), codes=(("ARCHIVE_OPENED", 1),)),
    "gzip": Trap(then(each(AXIAL), gzipped)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str, tmp_path: Path) -> None:
    trap, archive = TRAPS[name], Archive(tmp_path)
    trap.build(archive)
    verdict = judge(archive, trap.policy)
    told = ", ".join(f"{code} {count}" for code, count in sorted(verdict.codes.items()))
    points = ", ".join(f"{fate} {count}" for fate, count in sorted(verdict.points.items()))
    print(f"{name:48} {points:24} {verdict.sizes!s:14} {told} {' '.join(sorted(verdict.flags))}")
    assert " ".join(sorted(verdict.points)) == trap.fates
    assert verdict.points.total() == POINTS * len(archive.volumes)
    assert verdict.codes == dict(trap.codes)
    assert verdict.sizes == list(trap.sizes)
    assert verdict.flags == set(trap.flags)


def swapped_spacing(item: Series) -> Series:
    affine = np.array(item.affine)
    affine[:3, 0], affine[:3, 1] = affine[:3, 0] / 0.6 * 0.8, affine[:3, 1] / 0.8 * 0.6
    return replace(item, affine=tuple(map(tuple, affine.tolist())))


def averaged_spacing(item: Series) -> Series:
    affine = np.array(item.affine)
    affine[:3, 2] *= 20 / 19
    return replace(item, affine=tuple(map(tuple, affine.tolist())))


@pytest.mark.parametrize(
    "damage",
    [
        swapped_spacing,
        averaged_spacing,
        lambda item: replace(item, slices=item.slices[::-1]),
        lambda item: replace(item, slices=(item.slices[1], item.slices[0], *item.slices[2:])),
        lambda item: replace(item, slices=(item.slices[0], *item.slices[:-1])),
        lambda item: replace(item, slices=item.slices[:-1]),  # one lost without a word
        lambda item: replace(item, affine=None, slices=item.slices[:-1]),
    ],
)
def test_the_judge_sees_what_is_wrong(
    damage: Callable[[Series], Series], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Archive(tmp_path)
    archive.add(AXIAL)

    def damaged(refs: list[SliceRef], policy: ReadPolicy) -> object:
        series, refused = grouped(refs, policy)
        return [damage(item) for item in series], refused

    monkeypatch.setattr("tests.trapmaker.grouped", damaged)
    points = judge(archive, ReadPolicy()).points
    assert points["wrong"] + points["silent"] > 0


def test_there_are_enough() -> None:
    assert len(TRAPS) >= 32

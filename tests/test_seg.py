"""Segments land on the voxels that their frames cover, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from medpsp.dicom.labelref import KINDS, LabelRef, label_target, match_series
from medpsp.dicom.names import LabelVolume, NameRule, merge_labels
from medpsp.dicom.placement import Grid, grid_of
from medpsp.dicom.seg import read_segments
from medpsp.errors import LabelError
from medpsp.types import Series
from tests.labelled import (
    ORIENTATIONS,
    PLAIN,
    SHAPE,
    Affine,
    contour,
    frame_of,
    item,
    rtstruct,
    seg,
    series,
    turned,
)

RULE = NameRule(classes=("background", "liver", "lesion"))
PRIORITY = NameRule(classes=RULE.classes, overlap="priority")
GRID = Grid(shape=SHAPE, affine=PLAIN)
NAMES = {1: "Liver", 2: "Lesion"}
Pixels = NDArray[Any]


def oblique() -> Affine:
    affine = turned([3, -1, 2], 0.6) @ PLAIN
    affine[:3, 3] = [-80, 40, 900]
    return affine


def truth(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8)


def of(frames: Any) -> Callable[[int], Pixels]:
    return lambda number: np.asarray(frames[number])


def read(ds: Dataset, frames: Any, grid: Grid = GRID, rule: NameRule = RULE) -> LabelVolume:
    found = read_segments(ds, of(frames), grid, rule)
    assert found.values.shape == grid.shape
    assert found.values.dtype == np.uint8
    return found


def refused(ds: Dataset, frames: Any = (), grid: Grid = GRID, rule: NameRule = RULE) -> str:
    with pytest.raises(LabelError) as caught:
        read_segments(ds, of(frames), grid, rule)
    assert "CANARY" not in str(caught.value)
    return caught.value.code


def binary(values: Pixels, affine: Affine = PLAIN, **elements: Any) -> tuple[Dataset, list[Pixels]]:
    """One frame for each slice and segment; empty ones are left out."""
    pairs = [(k, n) for n in NAMES for k in range(len(values)) if (values[k] == n).any()]
    ds = seg(
        "BINARY",
        [frame_of(affine, k, n) for k, n in pairs],
        NAMES,
        affine,
        values.shape[1:],
        **elements,
    )
    return ds, [(values[k] == n).astype(np.uint8) for k, n in pairs]


@pytest.mark.parametrize("affine", [PLAIN, oblique()], ids=["axial", "oblique"])
def test_binary(affine: Affine) -> None:
    values = truth()
    values[2] = 0  # a slice without frames is background
    ds, frames = binary(values, affine)
    found = read(ds, frames, Grid(shape=SHAPE, affine=affine))
    assert (found.values == values).all()
    assert found.notes == {}


def test_bits_that_end_in_the_middle_of_a_byte() -> None:
    # 30 pixels a frame: the second frame starts at bit 6 of byte 3, PS3.5 8.1.1
    values = truth(1)
    ds, frames = binary(values)
    bits = np.concatenate([f.ravel() for f in frames])
    data = np.packbits(bits, bitorder="little").tobytes()
    elements = {
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 1,
        "BitsStored": 1,
        "HighBit": 0,
        "PixelRepresentation": 0,
        "PixelData": data + b"\0" * (len(data) % 2),
    }
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    assert len(frames[0].ravel()) % 8
    assert (read(ds, ds.pixel_array).values == values).all()


def test_frames_in_any_order() -> None:
    values = truth(2)
    ds, frames = binary(values)
    order = np.random.default_rng(0).permutation(len(frames))
    groups = list(ds.PerFrameFunctionalGroupsSequence)
    ds.PerFrameFunctionalGroupsSequence = [groups[i] for i in order]
    assert (read(ds, [frames[i] for i in order]).values == values).all()


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.5, [128, 200, 255]), (1.0, [255]), (0.001, [1, 127, 128, 200, 255])]
)
def test_fractional(threshold: float, kept: list[int]) -> None:
    values = np.zeros(SHAPE[1:], np.uint8)
    values[0] = [0, 1, 127, 128, 200, 255]
    ds = seg("FRACTIONAL", [frame_of(PLAIN, 1, 1)], {1: "liver"}, MaximumFractionalValue=255)
    rule = NameRule(classes=("background", "liver"), threshold=threshold)
    found = read(ds, [values], rule=rule).values
    assert (found[1] == np.isin(values, kept)).all()
    assert not found[[0, 2, 3]].any()


@pytest.mark.parametrize("maximum", [None, 0])
def test_fractional_without_a_maximum(maximum: int | None) -> None:
    ds = seg("FRACTIONAL", [frame_of(PLAIN, 1, 1)], {1: "liver"})
    ds.MaximumFractionalValue = maximum
    assert refused(ds) == "SEG_NO_MAXIMUM"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("padding", [None, 7])
def test_labelmap(dtype: type, padding: int | None) -> None:
    # segment numbers are any numbers; without PixelPaddingValue 0 is the background
    labels = {200: "lesion", 90: "spleen", 3: "LIVER"}
    values = np.array([0, 3, 200, 90], dtype)[np.arange(120).reshape(SHAPE) % 4]
    values[0, 0, :2] = padding or 0
    if padding is not None:
        values[values == 0] = padding
    ds = seg("LABELMAP", [frame_of(PLAIN, k, None) for k in range(4)], labels)
    if padding is not None:
        ds.PixelPaddingValue = padding
    found = read(ds, values)
    assert (found.values == (values == 3) + 2 * (values == 200)).all()
    assert found.notes == {"LABEL_NAME_UNMATCHED": 1}
    values[1, 1, 1] = 4
    assert refused(ds, values) == "SEG_SEGMENT_UNKNOWN"


def test_labelmap_whose_zero_is_a_segment() -> None:
    ds = seg("LABELMAP", [frame_of(PLAIN, 0, None)], {0: "liver", 1: "lesion"})
    values = np.ones(SHAPE[1:], np.uint8)
    values[0, 0] = 0
    found = read(ds, [values]).values[0]
    assert np.bincount(found.ravel()).tolist() == [0, 1, 29]


@pytest.mark.parametrize(("order", "flips"), ORIENTATIONS)
def test_each_of_48_orientations(order: tuple[int, ...], flips: tuple[int, ...]) -> None:
    """Frames may be cut along any axis of the series, and each axis may run the other way."""
    values, affine, index = truth(3), oblique(), np.eye(4)
    mask, index = values.transpose(2, 1, 0).transpose(order), index[:, [*order, 3]]
    for axis in flips:
        index[:, 3] += index[:, axis] * (mask.shape[axis] - 1)
        index[:, axis] *= -1
        mask = np.flip(mask, axis)
    ds, frames = binary(mask.transpose(2, 1, 0), affine @ index)
    assert (read(ds, frames, Grid(shape=SHAPE, affine=affine)).values == values).all()


def test_cropped_and_padded() -> None:
    values = np.zeros(SHAPE, np.uint8)
    values[1:3, 2:4, 1:5] = truth(4, (2, 2, 4))
    corner = PLAIN.copy()
    corner[:3, 3] = (PLAIN @ [1, 2, 1, 1])[:3]
    ds, frames = binary(values[1:3, 2:4, 1:5], corner)
    assert (read(ds, frames).values == values).all()
    padded = np.pad(truth(5), 1)
    corner[:3, 3] = (PLAIN @ [-1, -1, -1, 1])[:3]
    ds, frames = binary(padded, corner)
    assert (read(ds, frames).values == truth(5)).all()
    padded[0, 2, 2] = padded[3, 0, 0] = padded[3, 0, 1] = 1
    ds, frames = binary(padded, corner)
    with pytest.raises(LabelError, match="SEG_OUTSIDE_IMAGE: 3 labelled voxels"):
        read(ds, frames)


def test_part_of_a_split_series() -> None:
    values = truth(6)
    upper = PLAIN.copy()
    upper[2, 3] = 10
    ds, frames = binary(values)
    assert refused(ds, frames, Grid(shape=(2, 5, 6), affine=upper)) == "SEG_OUTSIDE_IMAGE"
    part = Grid(shape=(2, 5, 6), affine=upper, partial=True)
    assert (read(ds, frames, part).values == values[2:]).all()
    # frames of the other part are not on this one's planes, and are not asked for
    odd = [frame_of(PLAIN, 1.3, 1), frame_of(PLAIN, 2, 1)]
    pixels = [None, np.ones(SHAPE[1:], np.uint8)]
    assert read(seg("BINARY", odd, NAMES), pixels, part).values.sum() == 30


def test_other_grids_are_refused() -> None:
    values = np.ones((8, 12, 10), np.uint8)
    refusals = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        affine = turned(rng.normal(size=3), rng.uniform(0, 3)) @ np.diag(
            [*rng.uniform(0.5, 4, 3), 1]
        )
        shifted, scaled = affine.copy(), affine.copy()
        shifted[:3, 3] += 0.4 * affine[:3, rng.integers(3)] * rng.choice([-1, 1])
        scaled[:3, :3] *= rng.choice([1 / 1.05, 1.05])
        centre = np.eye(4)
        centre[:3, 3] = (affine @ [4.5, 5.5, 3.5, 1])[:3]
        # about an axis in the plane or along the normal, so that corners move by over 0.1 voxel
        rotation = centre @ turned(affine[:3, rng.integers(3)], 0.05) @ np.linalg.inv(centre)
        for wrong in (shifted, scaled, rotation @ affine):
            ds, frames = binary(values, wrong)
            code = refused(ds, frames, Grid(shape=values.shape, affine=affine))
            refusals += code == "SEG_GRID_MISMATCH"
    assert refusals == 90


def test_overlap() -> None:
    frames = np.zeros((2, *SHAPE[1:]), np.uint8)
    frames[0, :3], frames[1, 2:] = 1, 1
    groups = [frame_of(PLAIN, 0, 2), frame_of(PLAIN, 0, 1)]
    assert refused(seg("BINARY", groups, NAMES), frames) == "SEG_OVERLAP"
    for order in ([0, 1], [1, 0]):
        ds = seg("BINARY", [groups[i] for i in order], NAMES)
        found = read(ds, frames[order], rule=PRIORITY)
        assert found.values[0, :, 0].tolist() == [2, 2, 2, 1, 1]  # lesion is the later class
        assert found.notes == {"SEG_OVERLAP": 6}
    same = NameRule(classes=("background", "liver"), names=(("l*", "liver"),))
    assert read(seg("BINARY", groups, NAMES), frames, rule=same).values.sum() == 30


def test_a_frame_of_no_class_is_not_decoded() -> None:
    ds = seg("BINARY", [frame_of(PLAIN, 0, 1), frame_of(PLAIN, 0, 2)], {1: "spleen", 2: "lesion"})
    found = read(ds, [None, np.ones(SHAPE[1:], np.uint8)])
    assert (found.values[0] == 2).all()
    assert found.notes == {"LABEL_NAME_UNMATCHED": 1}


def test_an_empty_mask_is_told() -> None:
    ds = seg("BINARY", [frame_of(PLAIN, 0, 1)], NAMES)
    assert read(ds, np.zeros((1, *SHAPE[1:]), np.uint8)).notes == {"LABEL_EMPTY": 1}


def test_frames_without_a_position_go_by_reference() -> None:
    ds = seg("BINARY", [frame_of(PLAIN, 0, 1, "1.2.2")], NAMES)
    del ds.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    frame = np.zeros((1, *SHAPE[1:]), np.uint8)
    frame[0, 1, 2] = 1
    for grid in (grid_of(series()), grid_of(series(affine=None))):
        found = read(ds, frame, grid)
        assert found.values.nonzero() == ([2], [1], [2])
        assert found.notes == {"SEG_BY_REFERENCE": 1}
    assert refused(ds, frame, grid_of(series("1.5"))) == "SEG_OUTSIDE_IMAGE"
    other = grid_of(series(shape=(4, 6, 5)))
    assert refused(ds, frame, other) == "SEG_GEOMETRY"
    del ds.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence
    assert refused(ds, frame, grid_of(series())) == "SEG_GEOMETRY"


def test_frames_of_a_multi_frame_image() -> None:
    whole = series()
    refs = tuple(
        type(r)(**{**{f: getattr(r, f) for f in r.__slots__}, "sop_uid": "7", "frame": k})
        for k, r in enumerate(whole.slices)
    )
    grid = grid_of(Series(slices=refs, affine=None, z_mm=()))
    ds = seg("BINARY", [frame_of(PLAIN, 0, 1, "7")], NAMES)
    group = ds.PerFrameFunctionalGroupsSequence[0]
    frame = np.ones((1, *SHAPE[1:]), np.uint8)
    assert refused(ds, frame, grid) == "SEG_OUTSIDE_IMAGE"  # of which frame?
    group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = 4
    assert read(ds, frame, grid).values.any(axis=(1, 2)).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("sources", "notes"),
    [
        (["1.2.0", "1.2.1", "1.2.2", "1.2.3"], {}),
        (["1.2.0", "1.2.1", "1.2.2", "1.2.2"], {"SEG_REFERENCE_DISAGREES": 1}),
        (["5.0", "5.1", "5.2", "5.3"], {}),
        (["1.2.3", "1.2.2", "1.2.1", "1.2.0"], None),  # upside down
    ],
)
def test_references_are_checked(sources: list[str], notes: dict[str, int] | None) -> None:
    groups = [frame_of(PLAIN, k, 1, source) for k, source in enumerate(sources)]
    ds, frames, grid = (
        seg("BINARY", groups, NAMES),
        np.ones((4, *SHAPE[1:]), int),
        grid_of(series()),
    )
    if notes is None:
        assert refused(ds, frames, grid) == "SEG_REFERENCE_DISAGREES"
    else:
        assert read(ds, frames, grid).notes == notes


def test_per_frame_groups_go_before_shared_ones() -> None:
    ds, frames = binary(truth(7))
    shared = ds.SharedFunctionalGroupsSequence[0]
    for group in ds.PerFrameFunctionalGroupsSequence:
        group.PixelMeasuresSequence = shared.PixelMeasuresSequence
    shared.PixelMeasuresSequence = [item(PixelSpacing=[9, 9])]
    assert (read(ds, frames).values == truth(7)).all()


def change(keyword: str, value: Any) -> Callable[[Dataset], None]:
    return lambda ds: setattr(ds, keyword, value)


def in_frame(keyword: str, inner: str, value: Any) -> Callable[[Dataset], None]:
    return lambda ds: setattr(
        getattr(ds.PerFrameFunctionalGroupsSequence[0], keyword)[0], inner, value
    )


def in_shared(keyword: str, inner: str, value: Any) -> Callable[[Dataset], None]:
    return lambda ds: setattr(
        getattr(ds.SharedFunctionalGroupsSequence[0], keyword)[0], inner, value
    )


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (change("SegmentationType", None), "SEG_TYPE"),
        (change("SegmentationType", "CANARY"), "SEG_TYPE"),
        (change("TotalPixelMatrixRows", 1000), "SEG_TILED"),
        (change("NumberOfFrames", 2_000_000_000), "SEG_FRAMES"),
        (change("NumberOfFrames", None), "SEG_FRAMES"),
        (change("NumberOfFrames", -1), "SEG_FRAMES"),
        (change("Rows", 0), "SEG_FRAMES"),
        (change("Columns", None), "SEG_FRAMES"),
        (change("Columns", 7), "SEG_FRAMES"),  # frames of 6
        (change("PerFrameFunctionalGroupsSequence", []), "SEG_FRAMES"),
        (change("SegmentSequence", []), "LABEL_NO_CLASS"),
        (
            change("SegmentSequence", [item(SegmentNumber=9, SegmentLabel="liver")]),
            "SEG_SEGMENT_UNKNOWN",
        ),
        (
            change("SegmentSequence", [item(SegmentNumber=1, SegmentLabel=n) for n in "ab"]),
            "SEG_SEGMENT_CONFLICT",
        ),
        (
            in_frame("SegmentIdentificationSequence", "ReferencedSegmentNumber", 5),
            "SEG_SEGMENT_UNKNOWN",
        ),
        (in_frame("PlanePositionSequence", "ImagePositionPatient", [1, 2]), "SEG_UNREADABLE"),
        (
            in_frame("PlanePositionSequence", "ImagePositionPatient", [1, 2, "nan"]),
            "SEG_GEOMETRY",
        ),
        (in_frame("PlanePositionSequence", "ImagePositionPatient", [1, 2, 1e300]), "SEG_GEOMETRY"),
        (in_frame("PlanePositionSequence", "ImagePositionPatient", []), "SEG_GEOMETRY"),
        (in_shared("PlaneOrientationSequence", "ImageOrientationPatient", [0] * 6), "SEG_GEOMETRY"),
        (
            in_shared("PlaneOrientationSequence", "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),
            "SEG_GEOMETRY",
        ),
        (in_shared("PixelMeasuresSequence", "PixelSpacing", [0, 1]), "SEG_GEOMETRY"),
        (in_shared("PixelMeasuresSequence", "PixelSpacing", [-2, 3]), "SEG_GEOMETRY"),
    ],
)
def test_headers_that_say_no_place(edit: Callable[[Dataset], None], code: str) -> None:
    ds, frames = binary(truth())
    edit(ds)
    assert refused(ds, frames) == code


def test_damaged_objects_are_refused_or_read() -> None:
    codes = set()
    for seed in range(500):
        rng = np.random.default_rng(seed)
        ds, frames = binary(truth())
        here = ds
        while True:
            tags = list(here.keys())
            tag = tags[int(rng.integers(len(tags)))]
            inner = here[tag].value if here[tag].VR == "SQ" else []
            if not len(inner) or rng.random() < 0.2:
                break
            here = inner[int(rng.integers(len(inner)))]
        if rng.random() < 0.3:
            del here[tag]
        else:
            text = rng.choice(["CANARY", "-1", "nan", "1e300", "1\\2\\3", ""])
            here[tag] = pydicom.dataelem.DataElement(tag, "LO", text)
        try:
            read_segments(ds, of(frames), GRID, RULE)
            label_target(ds)
            codes.add("read")
        except LabelError as error:
            codes.add("value told" if "CANARY" in str(error) else error.code)
    assert {"read", "SEG_UNREADABLE", "SEG_GEOMETRY", "SEG_TYPE"} <= codes
    assert "value told" not in codes


# names


@pytest.mark.parametrize(
    ("name", "index"),
    [("liver", 1), ("  Liver\0", 1), ("LESION", 2), ("liver 2", None), ("", None), ("*", None)],
)
def test_class_names_themselves(name: str, index: int | None) -> None:
    assert RULE.class_of(name, 1) == index


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("GTV_1", 2),
        ("gtv", 2),
        ("Leber", 1),
        ("liver", None),  # patterns replace the class names
        ("body", 0),
        ("x" * 10_000 + "gtv", None),
    ],
)
def test_patterns(name: str, index: int | None) -> None:
    names = (("GTV*", "lesion"), ("leber", "liver"), ("BODY", "background"), ("g*", "liver"))
    assert NameRule(classes=RULE.classes, names=names, numbers=((1, 1),)).class_of(name, 1) == index


def test_segment_numbers() -> None:
    rule = NameRule(classes=RULE.classes, numbers=((1, 2), (5, 255)))
    assert [rule.class_of("liver", n) for n in (1, 5, 7)] == [2, 255, None]
    assert rule.class_of("liver") == 1  # of an RTSTRUCT
    ds = seg("BINARY", [frame_of(PLAIN, 0, 5)], {5: "anything"})
    found = read(ds, np.ones((1, *SHAPE[1:]), int), rule=rule)
    assert (found.values[0] == 255).all()


def test_several_objects_of_one_series() -> None:
    left, right = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    left[0, 0], right[0, 1] = 1, 2
    merged = merge_labels([LabelVolume(left, {"A": 1}), LabelVolume(right, {"A": 2, "B": 1})], RULE)
    assert merged.values[0, :2].tolist() == [[1] * 6, [2] * 6]
    assert merged.notes == {"A": 3, "B": 1}
    assert left.sum() == 6
    right[0, 0, 1] = 2
    with pytest.raises(LabelError, match="LABEL_OVERLAP: 1 voxels"):
        merge_labels([LabelVolume(left, {}), LabelVolume(right, {})], RULE)
    merged = merge_labels([LabelVolume(left, {}), LabelVolume(right, {})], PRIORITY)
    assert merged.values[0, 0].tolist() == [1, 2, 1, 1, 1, 1]
    assert merged.notes == {"LABEL_OVERLAP": 1}


def test_two_versions_of_one_region_are_not_united() -> None:
    one, two = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    one[0, 0], two[0, 3] = 1, 1  # 6 voxels each, at different places
    copy = LabelVolume(one.copy(), {})
    both = [LabelVolume(one, {}), copy, LabelVolume(two, {})]
    assert merge_labels(both[:2], RULE).values.sum() == 6
    with pytest.raises(LabelError, match="LABEL_SEVERAL: 3 objects draw one class"):
        merge_labels(both, RULE)
    merged = merge_labels(both, PRIORITY)
    assert merged.values.sum() == 12
    assert merged.notes == {"LABEL_SEVERAL": 1}


# which series


def referenced(uid: str, *images: str) -> dict[str, Any]:
    instances = [item(ReferencedSOPInstanceUID=image) for image in images]
    return {
        "ReferencedSeriesSequence": [
            item(SeriesInstanceUID=uid, ReferencedInstanceSequence=instances)
        ]
    }


def test_references_of_a_seg() -> None:
    ds = seg("BINARY", [frame_of(PLAIN, 1, 1, "1.2.1")], NAMES, **referenced("1.2", "1.2.0"))
    assert label_target(ds) == LabelRef(
        kind="seg",
        patient_id="patient",
        frames_of_reference=("1.2.9",),
        series_uids=("1.2",),
        sop_uids=("1.2.0", "1.2.1"),
        points=((0.0, 0.0, 5.0),),
    )


def test_references_of_an_rtstruct() -> None:
    images = [item(ReferencedSOPInstanceUID="1.2.0")]
    frame = item(
        FrameOfReferenceUID="1.7",
        RTReferencedStudySequence=[
            item(
                RTReferencedSeriesSequence=[
                    item(SeriesInstanceUID="1.2", ContourImageSequence=images)
                ]
            )
        ],
    )
    rings = [contour([(3, 2, z), (4, 2, z), (4, 6, z)]) for z in (0, 5)]
    ds = rtstruct({"liver": rings}, ReferencedFrameOfReferenceSequence=[frame])
    assert label_target(ds) == LabelRef(
        kind="rtstruct",
        patient_id="patient",
        frames_of_reference=("1.2.9", "1.7"),
        series_uids=("1.2",),
        sop_uids=("1.2.0",),
        points=((3.0, 2.0, 0.0), (3.0, 2.0, 5.0)),
    )


def test_few_points_of_many_contours() -> None:
    ds = rtstruct({"liver": [contour([(0, 0, z), (4, 0, z), (4, 4, z)]) for z in range(1000)]})
    points = label_target(ds).points
    assert len(points) == 250
    assert points[1] == (0.0, 0.0, 4.0)


def test_other_objects_are_no_labels() -> None:
    with pytest.raises(LabelError, match="LABEL_KIND"):
        label_target(item(SOPClassUID="1.2.840.10008.5.1.4.1.1.2", PatientName="CANARY"))
    assert set(KINDS.values()) == {"seg", "rtstruct"}


def ref(**fields: Any) -> LabelRef:
    base: dict[str, Any] = {
        "kind": "rtstruct",
        "patient_id": "patient",
        "frames_of_reference": ("1.2.9",),
        "points": ((3.0, 2.0, 0.0), (3.0, 2.0, 5.0)),
    }
    return LabelRef(**{**base, **fields})


def at_z(z: float, uid: str = "1.2", slices: int = 4, **fields: Any) -> Series:
    affine = PLAIN.copy()
    affine[2, 3] = z
    return series(uid, affine, (slices, 5, 6), **fields)


def code_of(ref: LabelRef, *found: Series) -> str:
    with pytest.raises(LabelError) as caught:
        match_series(ref, found)
    return caught.value.code


def test_by_series_and_by_image() -> None:
    both = [at_z(0, "1.2"), at_z(0, "1.3")]
    assert match_series(ref(series_uids=("1.3",)), both) == (1,)
    assert match_series(ref(sop_uids=("1.2.3",)), both) == (0,)
    # the images decide where both are given: a later phase of the same study, registered
    both_given = ref(series_uids=("1.3",), sop_uids=("1.2.3",))
    assert match_series(both_given, both) == (0,)
    # positions do not matter where a reference is clear; the reader tells what does not fit
    assert match_series(ref(series_uids=("1.3",)), [at_z(900, "1.3")]) == (0,)


def test_parts_and_echoes_of_one_series() -> None:
    gap = [at_z(0, slices=1), at_z(5, slices=3), at_z(60), at_z(0, "1.4")]
    assert match_series(ref(series_uids=("1.2",)), gap) == (0, 1)
    echoes = [at_z(0), at_z(0)]
    assert match_series(ref(series_uids=("1.2",)), echoes) == (0, 1)
    assert code_of(ref(series_uids=("1.2",)), at_z(60), at_z(90)) == "LABEL_UNMATCHED"


def test_by_position() -> None:
    mine, beside, between = at_z(0, "1.3"), at_z(100, "1.4"), at_z(2.5, "1.5")
    assert match_series(ref(), [beside, mine, between]) == (1,)
    assert match_series(ref(frames_of_reference=()), [mine]) == (0,)
    assert match_series(ref(), [at_z(0, frame_of_reference="")]) == (0,)
    assert code_of(ref(), mine, at_z(0, "1.4")) == "LABEL_AMBIGUOUS"
    assert code_of(ref(), beside, between) == "LABEL_UNMATCHED"
    assert code_of(ref(points=()), mine) == "LABEL_UNMATCHED"
    assert code_of(ref(patient_id="other"), mine) == "LABEL_UNMATCHED"
    assert code_of(ref(patient_id=""), at_z(0, patient_id="")) == "LABEL_UNMATCHED"
    assert code_of(ref(frames_of_reference=("1.1",)), mine) == "LABEL_UNMATCHED"
    assert code_of(ref()) == "LABEL_UNMATCHED"
    # the one that holds more wins: only half of the points lie on the first
    assert match_series(ref(), [at_z(5, "1.4"), mine]) == (1,)


def test_an_object_of_images_that_are_left_out_is_not_laid_on_others_by_position() -> None:
    mine, named = at_z(0, "1.3"), ref(series_uids=("1.9",))
    assert match_series(named, [mine]) == (0,)  # of a series that was never there
    with pytest.raises(LabelError) as caught:
        match_series(named, [mine], elsewhere=True)
    assert caught.value.code == "LABEL_OTHER_MODALITY"
    both = ref(series_uids=("1.9", "1.3"))
    assert match_series(both, [mine], elsewhere=True) == (0,)


def test_an_ambiguous_object_says_which_series_it_fits() -> None:
    pair = [at_z(0, "1.3", modality="MR"), at_z(0, "1.4")]
    with pytest.raises(LabelError, match=r"2 series fit equally well: CT b4, MR b3$"):
        match_series(ref(), pair, name_of=lambda item: "b" + item.first.series_uid[-1])


def test_two_referenced_series() -> None:
    named = ref(series_uids=("1.3", "1.4"))
    assert match_series(named, [at_z(0, "1.3"), at_z(2.5, "1.4")]) == (0,)
    assert code_of(named, at_z(0, "1.3"), at_z(0, "1.4")) == "LABEL_AMBIGUOUS"
    assert code_of(named, *[series(u, affine=None) for u in ("1.3", "1.4")]) == "LABEL_UNMATCHED"

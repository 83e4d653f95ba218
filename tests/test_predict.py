"""DICOM in, masks out, by a network whose answer a person can work out.

Its logits are straight lines of the input x: class 1 above 40.5 HU, class 2 above 160.5 HU in
the window 40/400, which shows h HU as x = (h + 160) / 400.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import pydicom
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from launch.ondevice import show
from launch.phantom import Phantom, draw, to_mr, write_series
from medpsp.deploy import predict
from medpsp.deploy.answers import Format
from medpsp.deploy.export import export_onnx
from medpsp.deploy.folders import alone
from medpsp.deploy.graph import DeployGraph
from medpsp.deploy.inputs import GraphInput, as_planes, window_rows
from medpsp.deploy.modelfile import ModelFile
from medpsp.deploy.predict import Predictor
from medpsp.deploy.session import class_masks, open_session
from medpsp.dicom.codes import refusal, told_rows
from medpsp.dicom.read import Pixels
from medpsp.dicom.sandbox import Sandbox
from medpsp.dicom.scan import Scan
from medpsp.errors import ArchiveError, ConfigError, DicomError, ModelFileError
from medpsp.intensity import CT_WINDOW, ValueCounts, overlay, percentile_window, to_unit
from medpsp.machine import whole_cores
from medpsp.tiles import Tiling
from medpsp.types import ReadPolicy, Series, SliceRef, Window

CLASSES = ["background", "organ", "bone"]
PLAIN: tuple[Format, ...] = ("nifti", "png")
LOW, HIGH = (40.5 + 160) / 400, (160.5 + 160) / 400
METADATA = {
    "classes": CLASSES,
    "modalities": ["CT", "IMAGE8"],
    "window": None,
    "tile": {"size": [32, 48], "overlap": 0.5},
    "input": GraphInput().to_json(),
}


def window_of(values: np.ndarray) -> Window:
    counts = ValueCounts()
    counts.add(values)
    return percentile_window(counts)


class Lines(nn.Module):
    """Logits 0, x - LOW and 2 x - LOW - HIGH: the largest changes at LOW and at HIGH."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.0, -LOW, -LOW - HIGH]))  # type: ignore[union-attr]

    def forward(self, image: Tensor) -> tuple[Tensor, None]:
        return self.conv(image), None


def expected(x: np.ndarray) -> np.ndarray:
    return (x > LOW).astype(np.uint8) + (x > HIGH)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "lines.onnx"
    export_onnx(DeployGraph(Lines(), GraphInput()), path, 18, METADATA)
    return path


def test_a_file_tells_what_held_out_patients_said_against_it(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ModelFile(model).doubts == {}
    assert caplog.messages == []
    name = METADATA["classes"][1]
    doubted = {**METADATA, "doubts": {name: "no better than a mask that ignores the image"}}
    path = with_metadata(model, tmp_path / "m.onnx", medpsp=json.dumps(doubted))
    ModelFile(path)
    told = f"model {path}: {name} was found no better than a mask that ignores the image"
    assert caplog.messages == [told]
    wrong = {**METADATA, "doubts": {"nothing": "of it"}}
    with pytest.raises(ModelFileError, match="its metadata is damaged"):
        ModelFile(with_metadata(model, tmp_path / "n.onnx", medpsp=json.dumps(wrong)))


def with_metadata(model: Path, path: Path, **properties: str) -> Path:
    """The same network with other metadata."""
    proto = onnx.load(model)
    del proto.metadata_props[:]
    for key, value in properties.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize(
    "how", [{}, {"oblique_deg": 10.0}, {"tilt_deg": 12.0, "spacing": (4.0, 2.0, 3.0)}]
)
def test_the_mask_lies_where_the_patient_lay(
    model: Path, tmp_path: Path, phantom: Phantom, how: dict[str, Any]
):
    """A voxel of the NIfTI at the place in mm that the DICOM header gives a pixel, bit-exact."""
    scan = replace(phantom, **how)
    hu, _ = draw(scan, 3)
    files = write_series(tmp_path / "in", "P", hu, scan)
    (prediction,), rows = Predictor(model, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    assert rows == []
    truth = expected((hu + 160) / 400)
    assert set(np.unique(truth)) == {0, 1, 2}
    assert prediction.pixels == tuple(int((truth == k).sum()) for k in range(3))
    image = nib.load(prediction.files[0])
    values = np.asarray(image.dataobj)
    assert values.dtype == np.uint8
    assert image.get_sform(coded=True)[1] == 1
    to_index = np.linalg.inv(image.affine)
    seen: set[int] = set()
    for path in files:
        ds = pydicom.dcmread(path)
        shown = expected((ds.pixel_array.astype(np.float64) - 1024 + 160) / 400)
        across, down = np.array(ds.ImageOrientationPatient, dtype=float).reshape(2, 3)
        for row, column in ((0, 0), (11, 37), (24, 20), (30, 31), (47, 47)):
            lps = np.array(ds.ImagePositionPatient, dtype=float)
            lps = lps + across * column * ds.PixelSpacing[1] + down * row * ds.PixelSpacing[0]
            index = to_index @ [-lps[0], -lps[1], lps[2], 1]  # NIfTI counts R, A, S
            place = tuple(round(v) for v in index[:3])
            np.testing.assert_allclose(index[:3], place, atol=1e-3)
            assert values[place] == shown[row, column]
            seen.add(int(values[place]))
    assert len(seen) > 1


def test_overlays_show_each_slice_with_its_classes_tinted(
    model: Path, tmp_path: Path, phantom: Phantom
):
    hu, _ = draw(phantom, 0)
    write_series(tmp_path / "in", "P", hu, phantom)
    (prediction,), _ = Predictor(model, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    assert prediction.files[0] == tmp_path / "out" / "series-000.nii.gz"
    assert all(f.is_file() for f in prediction.files)
    slices = sorted((tmp_path / "out" / "series-000").iterdir())
    assert [p.name for p in slices] == [f"{i:04d}.png" for i in range(4)]
    assert set(slices) < set(prediction.files)
    unit = to_unit(hu, CT_WINDOW)
    for index, path in enumerate(slices):
        with Image.open(path) as picture:
            drawn = np.asarray(picture)
        np.testing.assert_array_equal(drawn, overlay(unit[index], expected(unit[index])))


def test_several_series_get_a_mask_each_under_names_that_name_nobody(
    model: Path, tmp_path: Path, phantom: Phantom
):
    truth = Counter()
    for number, name in enumerate(("Doe^Jane", "Roe^Richard", "Poe^Edgar")):
        hu, _ = draw(phantom, number)
        write_series(tmp_path / "in" / name, name, hu, phantom)
        truth[tuple(np.bincount(expected((hu + 160) / 400).ravel()).tolist())] += 1
    named: list[str] = []
    predictions, rows = Predictor(model, formats=PLAIN).folder(
        tmp_path / "in", tmp_path / "out", named.append
    )
    assert rows == []
    assert named == ["series-000", "series-001", "series-002"]
    assert Counter(p.pixels for p in predictions) == truth
    assert all(p.slices == 4 for p in predictions)
    written = [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")]
    assert not [p for p in written if any(n in p for n in ("Doe", "Roe", "Poe"))]
    for path in (tmp_path / "out").rglob("*.nii.gz"):
        assert b"Doe" not in bytes(nib.load(path).header.binaryblock)


def test_a_damaged_slice_takes_its_series_out_and_no_other(
    model: Path, tmp_path: Path, phantom: Phantom
):
    hu, _ = draw(phantom, 0)
    write_series(tmp_path / "in" / "a", "A", hu, phantom)
    broken = write_series(tmp_path / "in" / "b", "B", hu, phantom)[1]
    broken.write_bytes(broken.read_bytes()[:-100])
    write_series(tmp_path / "in" / "c", "C", hu, phantom)
    (tmp_path / "in" / "notes.txt").write_text("hello " * 40)
    predictions, rows = Predictor(model, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in predictions] == ["series-000", "series-002"]
    assert Counter((row.status, row.code) for row in rows) == {
        ("quarantined", "PIX_TRUNCATED"): 4,
        ("skipped", "NOT_DICOM"): 1,
    }
    assert not list((tmp_path / "out").glob("series-001*"))


def test_one_slice_alone_is_a_volume_too(model: Path, tmp_path: Path, phantom: Phantom):
    hu, _ = draw(phantom, 0)
    write_series(tmp_path / "in", "P", hu[:1], phantom)
    (prediction,), _ = Predictor(model, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    image = nib.load(prediction.files[0])
    assert image.shape == (48, 48, 1)
    assert abs(np.linalg.det(image.affine)) > 0


def test_the_window_of_the_model_file_is_the_one_that_is_used(
    model: Path, tmp_path: Path, phantom: Phantom
):
    """Window 100/1000: h HU is x = (h + 400) / 1000, so class 1 begins at 101.25 HU."""
    other = {**METADATA, "window": {"center": 100, "width": 1000}}
    path = with_metadata(model, tmp_path / "m.onnx", medpsp=json.dumps(other))
    hu, _ = draw(phantom, 0)
    write_series(tmp_path / "in", "P", hu, phantom)
    (prediction,), _ = Predictor(path, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    assert prediction.pixels[0] == int((hu <= 101).sum())


def test_mr_is_shown_by_the_percentiles_of_its_series(
    model: Path, tmp_path: Path, phantom: Phantom
):
    path = with_metadata(
        model, tmp_path / "m.onnx", medpsp=json.dumps({**METADATA, "modalities": ["MR"]})
    )
    values = to_mr(draw(phantom, 0)[0], 0)
    write_series(tmp_path / "in", "P", values, replace(phantom, modality="MR"))
    (prediction,), _ = Predictor(path, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    truth = expected(to_unit(values, window_of(values)))
    np.testing.assert_array_equal(nib.load(prediction.files[0]).get_fdata(), truth.T)


def test_monochrome1_is_shown_with_low_values_bright(model: Path, tmp_path: Path, phantom: Phantom):
    hu, _ = draw(phantom, 0)
    for path in write_series(tmp_path / "in", "P", hu, phantom):
        ds = pydicom.dcmread(path)
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.save_as(path)
    (prediction,), _ = Predictor(model, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    unit = 1 - ((hu + 160) / 400).clip(0, 1)
    assert prediction.pixels == tuple(np.bincount(expected(unit).ravel()).tolist())


def test_a_folder_of_plain_images_gets_masks_and_overlays(model: Path, tmp_path: Path):
    source = tmp_path / "in"
    source.mkdir()
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(source / "ramp.png")
    Image.fromarray(np.full((16, 16, 3), (9, 8, 7), np.uint8)).save(source / "colour.jpg")
    (source / "broken.png").write_bytes(b"\x89PNG")
    (source / "notes.txt").write_text("hello " * 40)
    predictions, rows = Predictor(model, formats=PLAIN).folder(source, tmp_path / "out")
    assert [p.name for p in predictions] == ["ramp.png"]
    assert sorted((row.file_id, row.code) for row in rows) == [
        ("broken.png", "IMAGE_UNREADABLE"),
        ("colour.jpg", "COLOUR_FOR_GREY_MODEL"),
        ("notes.txt", "NOT_DICOM"),
    ]
    mask, drawn = predictions[0].files
    truth = expected(values / 255)  # the full range of 8 bits
    with Image.open(mask) as image:
        np.testing.assert_array_equal(np.asarray(image), truth)
    with Image.open(drawn) as image:
        assert image.size == (16, 16)
    assert predictions[0].pixels == tuple(np.bincount(truth.ravel()).tolist())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "ramp.png.mask.png",
        "ramp.png.overlay.png",
    ]


def test_deep_images_are_each_shown_by_their_own_percentiles(tmp_path: Path):
    """As in the shards, where each is a series of its own."""
    path, source = tmp_path / "m.onnx", tmp_path / "in"
    deep = GraphInput(dtype="float32")
    meta = {**METADATA, "modalities": ["OT"], "input": deep.to_json()}
    export_onnx(DeployGraph(Lines(), deep), path, 18, meta)
    source.mkdir()
    images = [np.arange(1, 401, dtype=np.uint16).reshape(20, 20) * scale for scale in (1, 100)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(source / f"{number}.png")
    predictions, _ = Predictor(path, formats=PLAIN).folder(source, tmp_path / "out")
    for image, prediction in zip(images, predictions, strict=True):
        values = image.astype(np.float32)
        truth = expected(to_unit(values, window_of(values)))
        assert prediction.pixels == tuple(np.bincount(truth.ravel()).tolist())
    assert predictions[0].pixels == predictions[1].pixels  # one pattern, two scales


# series as the scan may give them ---------------------------------------------------------------


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let `predict` find these series, whose slice n has the pixels of place n; None is damaged."""

    def give(series: list[Series], pixels: list[Any]) -> None:
        def frame(box: Sandbox, ref: SliceRef) -> Pixels:
            found = pixels[int(ref.file_id)]
            if found is None:
                raise DicomError("DEC_ERROR", "pixels not decodable")
            return found if isinstance(found, Pixels) else Pixels(found, None)

        scan = Scan(series=series, rows=[], labels=[], objects=len(pixels))
        monkeypatch.setattr(predict, "scan_folder", lambda *_: scan)
        monkeypatch.setattr(Sandbox, "frame", frame)

    return give


def series_of(
    shape: tuple[int, ...], modality: str = "US", first: int = 0, **fields: Any
) -> Series:
    count, rows, columns, *channels = shape
    slices = tuple(
        SliceRef(
            path="",
            file_id=f"{first + number}",
            patient_id="P",
            series_uid="1",
            modality=modality,
            rows=rows,
            columns=columns,
            dtype="uint8" if channels else "int16",
            photometric="RGB" if channels else "MONOCHROME2",
            frame=number,
            frames=count,
        )
        for number in range(count)
    )
    return Series(slices=slices, **{"affine": None, "z_mm": (), **fields})


def read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_images_without_geometry_get_masks_and_no_volume(model: Path, tmp_path: Path, scanned: Any):
    """Three CT images of which one is damaged: the others stand for themselves."""
    hu = np.array([[-200, 41, 161]], dtype=np.int16)
    scanned([series_of((3, 1, 3), "CT")], [hu, None, hu[:, ::-1]])
    (prediction,), rows = Predictor(model, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    folder = tmp_path / "out" / "series-000"
    assert prediction.files[:3] == (
        folder / "0000.mask.png",
        folder / "0002.mask.png",
        tmp_path / "out" / "series-000.png",
    )
    assert [p.name for p in prediction.files[3:]] == ["0000.png", "0002.png"]
    assert sorted(p for p in (tmp_path / "out").rglob("*.*")) == sorted(prediction.files)
    assert read_mask(prediction.files[0]).tolist() == [[0, 1, 2]]
    assert read_mask(prediction.files[1]).tolist() == [[2, 1, 0]]
    assert (prediction.slices, prediction.pixels) == (2, (2, 2, 2))
    assert [(r.file_id, r.frame, r.status, r.code) for r in rows] == [
        ("1", 1, "quarantined", "DEC_ERROR")
    ]


def test_more_threads_than_cores_are_not_started(model: Path):
    options = Predictor(model, 10**10).model.session.get_session_options()
    assert options.intra_op_num_threads == whole_cores()


def test_of_images_that_stand_alone_the_folder_is_told(
    model: Path, tmp_path: Path, scanned: Any, capsys: pytest.CaptureFixture[str]
):
    hu = np.array([[-200, 41, 161]], dtype=np.int16)
    scanned([series_of((3, 1, 3), "CT")], [hu, hu, hu])
    for formats in (PLAIN, ("nifti",)):
        out = tmp_path / formats[-1]
        predictor = Predictor(model, formats=formats)
        show(predictor, *predictor.folder(tmp_path / "in", out))
        first, *others = capsys.readouterr().out.splitlines()
        told = [first.split("  CT, 3 slices, ")[0], *(o.strip() for o in others if str(out) in o)]
        whole = [str(out / "series-000.png")] if "png" in formats else []
        assert told == [*whole, f"{out / 'series-000'}  3 slices"]


def test_without_geometry_there_is_no_mesh_and_it_is_said(
    model: Path, tmp_path: Path, scanned: Any
):
    scanned([series_of((2, 1, 3), "CT")], [np.array([[-200, 41, 161]], dtype=np.int16)] * 2)
    formats: tuple[Format, ...] = ("mesh", "gif")
    (made,), rows = Predictor(model, formats=formats).folder(tmp_path / "in", tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["series-000.gif"]
    assert made.files == (tmp_path / "a" / "series-000.gif",)
    assert [(row.status, row.code) for row in rows] == [("kept", "MESH_NOT_WRITTEN")]
    with pytest.raises(ArchiveError, match=r"MESH_NOT_WRITTEN"):
        Predictor(model, formats=("mesh",)).folder(tmp_path / "in", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_two_at_once_do_not_write_into_one_folder(model: Path, tmp_path: Path, phantom: Phantom):
    write_series(tmp_path / "in", "P", draw(phantom, 0)[0], phantom)
    out, predictor = tmp_path / "out", Predictor(model, formats=PLAIN)
    for source in (tmp_path / "in", next((tmp_path / "in").iterdir())):
        with alone(out), pytest.raises(ConfigError, match="another medpsp is at work there"):
            predictor.source(source, out)
        assert not list(out.iterdir())
    (made,), _ = predictor.source(tmp_path / "in", out)
    assert len(list((out / "series-000").iterdir())) == made.slices
    with pytest.raises(ConfigError, match="not empty"), alone(out):
        pass
    with pytest.raises(ZeroDivisionError), alone(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


def test_words_on_what_was_left_out():
    codes = ["MODALITY_SKIPPED", "SEG_NOT_WRITTEN", "DEC_ERROR", "MODALITY_SKIPPED"]
    rows = [refusal(str(number), code, "") for number, code in enumerate(codes)]
    rows[1] = replace(rows[1], status="kept")
    assert told_rows(rows) == (
        "not segmented: 1 DEC_ERROR, 2 MODALITY_SKIPPED; remarks: 1 SEG_NOT_WRITTEN"
    )
    assert told_rows(rows[1:2]) == "remarks: 1 SEG_NOT_WRITTEN"
    assert told_rows([]) == ""
    assert told_rows([refusal("z", "ARCHIVE_OPENED", "")]) == "remarks: 1 ARCHIVE_OPENED"


def test_a_series_of_images_of_which_none_is_readable_is_a_row_each(
    model: Path, tmp_path: Path, scanned: Any
):
    scanned([series_of((2, 1, 3), "CT")], [None, None])
    with pytest.raises(ArchiveError, match=r"among 2 files \(DEC_ERROR\)"):
        Predictor(model, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")


def test_a_volume_with_holes_keeps_its_grid(model: Path, tmp_path: Path, scanned: Any):
    """Slices at 0, 1 and 4 of a grid of 2 mm: the slice at 8 mm is the fifth."""
    affine = (
        (1.0, 0.0, 0.0, 5.0),
        (0.0, 1.0, 0.0, 6.0),
        (0.0, 0.0, 2.0, 7.0),
        (0.0, 0.0, 0.0, 1.0),
    )
    hu = np.array([[-200, 41, 161]], dtype=np.int16)
    series = series_of((3, 1, 3), "CT", affine=affine, z_mm=(0.0, 2.0, 8.0), grid=(0, 1, 4))
    scanned([series], [hu, hu[:, ::-1], hu])
    (prediction,), _ = Predictor(model, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    image = nib.load(prediction.files[0])
    masks = np.asarray(image.dataobj).T
    assert masks[:, 0].tolist() == [[0, 1, 2], [2, 1, 0], [0, 0, 0], [0, 0, 0], [0, 1, 2]]
    assert (image.affine @ [0, 0, 4, 1]).tolist() == [-5, -6, 15, 1]
    names = sorted(p.name for p in (tmp_path / "out" / "series-000").iterdir())
    assert names == ["0000.png", "0001.png", "0004.png"]
    assert (prediction.slices, prediction.pixels) == (3, (3, 3, 3))


def test_padding_takes_no_part_in_the_percentiles(model: Path, tmp_path: Path, scanned: Any):
    meta = json.dumps({**METADATA, "modalities": ["MR"]})
    path = with_metadata(model, tmp_path / "m.onnx", medpsp=meta)
    ramp = np.arange(1, 202, dtype=np.int16).reshape(3, 67)
    padded, padding = np.pad(ramp, ((0, 3), (0, 0)), constant_values=-2000), np.zeros((6, 67), bool)
    padding[3:] = True
    scanned([series_of((2, 6, 67), "MR")], [Pixels(padded, padding), np.zeros((6, 67), np.int16)])
    (prediction,), _ = Predictor(path, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    truth = expected(to_unit(padded, window_of(ramp)))
    np.testing.assert_array_equal(read_mask(prediction.files[0]), truth)


class Hue(nn.Module):
    """Class 1 where red is above green, class 2 where blue is above green by more than that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.0, -1.0, 1.0]])
            self.conv.weight.copy_(weight.reshape(3, 3, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.001, 0.0, 0.0]))  # type: ignore[union-attr]

    def forward(self, image: Tensor) -> tuple[Tensor, None]:
        return self.conv(image), None


COLOURS = GraphInput(colours=3)
COLOUR = {**METADATA, "modalities": ["US", "CT", "IMAGE8"], "input": COLOURS.to_json()}


@pytest.fixture(scope="module")
def hue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hue.onnx"
    export_onnx(DeployGraph(Hue(), COLOURS), path, 18, COLOUR)
    return path


RGB = np.array([[[9, 9, 9], [200, 30, 30], [30, 73, 255]]], dtype=np.uint8)


def test_colour_series_and_grey_ones_for_a_network_of_three_channels(
    hue: Path, tmp_path: Path, scanned: Any
):
    grey = np.array([[-200, 41, 161]], dtype=np.int16)  # repeated: no hue, no class
    both = [series_of((2, 1, 3, 3)), series_of((1, 1, 3), "CT", first=2)]
    scanned(both, [RGB, RGB[:, ::-1], grey])
    predictions, rows = Predictor(hue, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    assert not rows
    assert [read_mask(p.files[0]).tolist() for p in predictions] == [[[0, 1, 2]], [[0, 0, 0]]]
    assert read_mask(predictions[0].files[1]).tolist() == [[2, 1, 0]]
    drawn = read_mask(predictions[0].files[3])
    np.testing.assert_array_equal(drawn, overlay(RGB / np.float32(255), np.uint8([[0, 1, 2]])))


def test_colour_pictures_for_a_network_of_three_channels(hue: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    Image.fromarray(RGB).save(tmp_path / "in" / "a.png")
    (prediction,), _ = Predictor(hue, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    assert read_mask(prediction.files[0]).tolist() == [[0, 1, 2]]
    meta = {**COLOUR, "policy": {"colour": "grey"}}
    path = with_metadata(hue, tmp_path / "m.onnx", medpsp=json.dumps(meta))
    (prediction,), _ = Predictor(path, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out2")
    assert read_mask(prediction.files[0]).tolist() == [[0, 0, 0]]


def test_colour_for_a_grey_network_is_refused_series_by_series(
    model: Path, tmp_path: Path, scanned: Any
):
    both = [series_of((2, 1, 3, 3)), series_of((1, 1, 3), "CT", first=2)]
    scanned(both, [RGB, RGB, np.zeros((1, 3), np.int16)])
    (prediction,), rows = Predictor(model, formats=PLAIN).folder(tmp_path / "in", tmp_path / "out")
    assert prediction.name == "series-001"
    assert [(r.file_id, r.code) for r in rows] == [
        ("0", "COLOUR_FOR_GREY_MODEL"),
        ("1", "COLOUR_FOR_GREY_MODEL"),
    ]
    assert not (tmp_path / "out" / "series-000").exists()


def test_what_was_kept_for_training_is_kept_on_the_device(hue: Path, tmp_path: Path):
    meta = {**COLOUR, "policy": {"gaps": "fill", "burned_in": "blank", "colour": "grey"}}
    path = with_metadata(hue, tmp_path / "m.onnx", medpsp=json.dumps(meta))
    assert Predictor(path).model.policy == ReadPolicy(
        modalities=("US", "CT", "IMAGE8"), gaps="fill", burned_in="blank", colour="grey"
    )


def not_onnx(model: Path, path: Path) -> Path:
    path.write_text("certainly no protobuf")
    return path


def cut(model: Path, path: Path) -> Path:
    path.write_bytes(model.read_bytes()[:-50])
    return path


def empty(model: Path, path: Path) -> Path:
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda model, path: path, "no such file; give the .onnx of `medpsp export`"),
        (lambda model, path: path.parent, "no such file"),
        (not_onnx, "is not an ONNX file"),
        (cut, "is not an ONNX file, or a damaged one"),
        (empty, "is not an ONNX file"),
        (lambda m, p: with_metadata(m, p, author="elsewhere"), "not from `medpsp export`"),
        (lambda m, p: with_metadata(m, p, medpsp="{"), r"metadata is damaged \(JSONDecodeError\)"),
        (lambda m, p: with_metadata(m, p, medpsp="[]"), r"metadata is damaged \(no table"),
        (lambda m, p: with_metadata(m, p, medpsp="{}"), r"metadata is damaged \(no table"),
        (
            lambda m, p: with_metadata(m, p, medpsp=json.dumps({"classes": CLASSES})),
            "of an earlier version; export it again",
        ),
        (
            lambda m, p: with_metadata(m, p, medpsp=json.dumps({**METADATA, "window": {"w": 1}})),
            r"metadata is damaged \(TypeError\)",
        ),
        (
            lambda m, p: with_metadata(m, p, medpsp=json.dumps({**METADATA, "policy": {"x": 1}})),
            r"metadata is damaged \(TypeError\)",
        ),
        (
            lambda m, p: with_metadata(
                m, p, medpsp=json.dumps({**METADATA, "tile": {"size": [32, 0], "overlap": 0.5}})
            ),
            r"metadata is damaged \(ValueError\)",
        ),
        (
            lambda m, p: with_metadata(
                m, p, medpsp=json.dumps({**METADATA, "input": GraphInput(colours=3).to_json()})
            ),
            r"do not fit: the input is not image \(N, 3, H, W\) of int16",
        ),
        *(
            (
                lambda m, p, more=more: with_metadata(
                    m, p, medpsp=json.dumps({**METADATA, **more})
                ),
                r"metadata is damaged \((Value|Type|Attribute)Error\)",
            )
            for more in (
                {"classes": "abc"},
                {"classes": [1, 2, 3]},
                {"tile": {"size": [64.5, 64], "overlap": 0.5}},
                {"tile": {"size": [10**9, 64], "overlap": 0.5}},
                {"window": {"center": "a", "width": "b"}},
                {"classes": ["background", "li\nver"]},
                {"modalities": "CT"},
                {"modalities": []},
                {"modalities": [3]},
                {"policy": {"colour": "sepia"}},
                {"codes": [["liver"]]},
                {"codes": {"liver": "x"}},
                {"codes": {"liver": {"type": ["SCT", "1"]}}},
                {"codes": {"liver": {"type": ["SCT", "1" * 17, "x"]}}},
                {"axes": [[0], [1], [2]]},
                {"axes": [[0, 1], [1, 1]]},
                {"axes": [[0, 1], [1, 1], [1, 1]]},
                {"axes": [[0, 1], [1, 1], [2, 0]]},
            )
        ),
    ],
)
def test_a_file_that_is_no_model_of_ours_is_refused(
    model: Path, tmp_path: Path, make: Any, match: str
):
    with pytest.raises(ModelFileError, match=match):
        Predictor(make(model, tmp_path / "m.onnx"))


def test_a_folder_with_nothing_to_segment_is_an_error_with_the_reasons(
    model: Path, tmp_path: Path, phantom: Phantom
):
    predictor = Predictor(model)
    with pytest.raises(ArchiveError, match="no such folder"):
        predictor.folder(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(ArchiveError, match="holds no file"):
        predictor.folder(tmp_path / "in", tmp_path / "out")
    mr = replace(phantom, modality="MR")
    write_series(tmp_path / "in", "P", to_mr(draw(mr, 0)[0], 0), mr)
    with pytest.raises(
        ArchiveError, match=r"nothing to segment among 4 files \(MODALITY_SKIPPED\); .* takes CT"
    ):
        predictor.folder(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_device_needs_neither_torch_nor_the_cluster(
    model: Path, tmp_path: Path, phantom: Phantom
):
    """The whole command in a process of its own, which then says what it has loaded."""
    write_series(tmp_path / "in", "P", draw(phantom, 0)[0], phantom)
    code = (
        "import sys, launch.cli\n"
        f"sys.argv[1:] = ['predict', {str(model)!r}, {str(tmp_path / 'in')!r}, "
        f"{str(tmp_path / 'out')!r}]\n"
        "try:\n    launch.cli.main()\n"
        "finally:\n    print(*sys.modules, sep='\\n', file=open('modules', 'w'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    out = tmp_path / "out"
    first, *others = done.stdout.splitlines()
    assert first.startswith(f"{out / 'series-000.nii.gz'}  CT, 4 slices, organ ")
    assert sorted(others[:3]) == [
        f"  {out / 'series-000'}  4 slices",
        f"  {out / 'series-000.dcm'}",
        f"  {out / 'series-000.png'}",
    ]
    assert sum("predict 1 series" in line for line in done.stderr.splitlines()) == 1
    modules = set((tmp_path / "modules").read_text().split())
    assert {"onnxruntime", "pydicom", "medpsp.deploy.predict"} <= modules
    heavy = {"torch", "ray", "zarr", "pyarrow", "timm", "albumentations", "submitit", "onnx"}
    assert modules & heavy == set()


def test_a_slice_of_any_size_is_seen_in_the_tiles_of_training(tmp_path: Path) -> None:
    """A network that calls class 1 what is above the mean of all that it sees."""
    node = onnx.helper.make_node
    nodes = [
        node("Cast", ["image"], ["wide"], to=1),
        node("ReduceMean", ["wide"], ["mean"], axes=[2, 3]),
        node("Sub", ["wide", "mean"], ["one"]),
        node("Neg", ["one"], ["zero"]),
        node("Concat", ["zero", "one"], ["logits"], axis=1),
        node("ArgMax", ["logits"], ["class"], axis=1, keepdims=0),
        node("Cast", ["class"], ["mask"], to=2),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "mean",
        [info("image", 2, ["N", 1, "H", "W"])],
        [info("logits", 1, ["N", 2, "H", "W"]), info("mask", 2, ["N", "H", "W"])],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx")
    given = GraphInput(dtype="uint8")

    def masks(image: np.ndarray, tiling: Tiling) -> np.ndarray:
        return class_masks(session, given, image, None, tiling)

    image = np.zeros((1, 1, 8, 24), np.uint8)
    image[..., :12], image[..., 14:16], image[..., 20:] = 100, 40, 20
    assert masks(image, Tiling((8, 24)))[0, 0, 14] == 0  # below the mean of all
    by_tiles = masks(image, Tiling((8, 8), 0.0))
    assert by_tiles[0, 0].tolist() == [0] * 8 + [1] * 4 + [0] * 8 + [1] * 4
    small = np.full((1, 1, 3, 3), 50, np.uint8)
    assert masks(small, Tiling((3, 3))).sum() == 0
    framed = masks(small, Tiling((8, 8)))  # zeros around it, as crops have them
    assert framed.shape == (1, 3, 3)
    assert framed.all()


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "LINEAR", "SIGMOID"])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_the_graph_windows_as_the_shards_do(function: Any, inverted: bool, dtype: Any) -> None:
    given = GraphInput(dtype=dtype, context=1, views=2)
    windows = (
        Window(center=40, width=400, function=function),
        Window(center=-3.5, width=7, function=function),
    )
    rng = np.random.default_rng(0)
    values = rng.integers(-300, 400, (3, 5, 7)).astype(dtype)
    if dtype == "float32":
        values[0, 0, :3] = np.nan, np.inf, -np.inf
    planes = as_planes(list(values), given)
    assert planes.shape == (3, 5, 7)
    rows = torch.from_numpy(window_rows(windows, inverted)[None])
    unit = DeployGraph(nn.Identity(), given).unit(torch.from_numpy(planes[None]), rows)
    expected = [to_unit(plane, window, inverted) for plane in values for window in windows]
    assert unit.shape == (1, 6, 5, 7)
    if function == "LINEAR_EXACT":
        np.testing.assert_array_equal(unit[0].numpy(), np.stack(expected))
    else:
        np.testing.assert_allclose(unit[0].numpy(), np.stack(expected), atol=2e-6)
    outside = torch.full((1, 3, 1, 1), given.outside(inverted)).to(getattr(torch, dtype))
    around = DeployGraph(nn.Identity(), given).unit(outside, rows)
    assert around.abs().max() < 1e-6  # what lies around a small image is 0


def test_a_graph_with_its_windows_in_it_refuses_others(tmp_path: Path, phantom: Phantom) -> None:
    given = GraphInput(windows=(CT_WINDOW,))
    meta = {**METADATA, "input": given.to_json()}
    export_onnx(DeployGraph(Lines(), given), tmp_path / "m.onnx", 18, meta)
    hu, _ = draw(phantom, 0)
    files = write_series(tmp_path / "in" / "a", "A", hu, phantom)
    (prediction,), _ = Predictor(tmp_path / "m.onnx", formats=PLAIN).folder(
        tmp_path / "in", tmp_path / "out"
    )
    truth = expected((hu + 160) / 400)
    assert prediction.pixels == tuple(int((truth == k).sum()) for k in range(3))
    for path in files:
        ds = pydicom.dcmread(path)
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.save_as(path)
    with pytest.raises(ArchiveError, match=r"among 4 files \(INPUT_FOR_MODEL\)"):
        Predictor(tmp_path / "m.onnx", formats=PLAIN).folder(tmp_path / "in", tmp_path / "again")
    assert not list((tmp_path / "again").glob("*"))


def test_what_a_killed_run_left_is_named_and_stays(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    left = tmp_path / "out/.partial-series-000"
    left.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds \.partial-series-000 of a run that was killed"):
        Predictor(model).folder(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(ConfigError, match="not empty"):
        Predictor(model).folder(tmp_path / "in", tmp_path / "out")
    assert left.is_dir()


def test_values_that_the_type_of_the_graph_does_not_hold() -> None:
    whole, half = np.float32([[1, -5]]), np.float32([[1.5, 0]])
    assert as_planes([whole], GraphInput()).tolist() == [[[1, -5]]]
    for values in (half, np.float32([[40000, 0]]), np.float32([[np.nan, 0]])):
        with pytest.raises(ValueError, match="float32, the model takes int16"):
            as_planes([values], GraphInput())
    assert as_planes([half], GraphInput(dtype="float32")).tolist() == [[[1.5, 0]]]


# what `predict` takes ---------------------------------------------------------------------------


def test_a_file_a_zip_and_a_nifti(tmp_path: Path, phantom: Phantom) -> None:
    model = tmp_path / "m.onnx"
    meta = {**METADATA, "modalities": ["CT"], "axes": [[0, 1], [1, 1], [2, 1]]}
    export_onnx(DeployGraph(Lines(), GraphInput()), model, 18, meta)
    hu, _ = draw(phantom, 0)
    files = write_series(tmp_path / "in", "P", hu, phantom)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
        for path in files:
            packed.write(path, path.name)
    predictor = Predictor(model)
    (whole,), _ = predictor.source(tmp_path / "in", tmp_path / "a")
    (zipped,), _ = predictor.source(tmp_path / "all.zip", tmp_path / "b")
    assert zipped.pixels == whole.pixels
    assert zipped.volumes == whole.volumes
    (one,), _ = predictor.source(files[1], tmp_path / "c")
    assert one.slices == 1
    mask = np.asarray(nib.load(tmp_path / "a/series-000.nii.gz").dataobj)
    affine = nib.load(tmp_path / "a/series-000.nii.gz").affine
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), affine), tmp_path / "v.nii.gz")
    (volume,), rows = predictor.source(tmp_path / "v.nii.gz", tmp_path / "d")
    told = ("kept", "SEG_NOT_WRITTEN", "series-000: a SEG needs DICOM input, a NIfTI is none")
    assert [(row.status, row.code, row.detail) for row in rows] == [told]
    assert volume.pixels == whole.pixels
    shutil.copy(tmp_path / "v.nii.gz", tmp_path / "V.NII.GZ")
    (capital,), _ = predictor.source(tmp_path / "V.NII.GZ", tmp_path / "h")
    assert capital.pixels == whole.pixels
    again = nib.load(tmp_path / "d/series-000.nii.gz")
    np.testing.assert_array_equal(np.asarray(again.dataobj), mask)
    np.testing.assert_allclose(again.affine, affine)
    with pytest.raises(ConfigError, match=r"v\.nii\.gz: no SEG of a NIfTI"):
        Predictor(model, formats=("seg",)).source(tmp_path / "v.nii.gz", tmp_path / "s")
    damaged = bytearray((tmp_path / "v.nii.gz").read_bytes())
    damaged[-5] ^= 1  # of the checksum
    (tmp_path / "sum.nii.gz").write_bytes(damaged)
    damaged[15:60] = bytes(range(45))
    (tmp_path / "torn.nii.gz").write_bytes(damaged)
    for number, bad in enumerate(("sum", "torn")):
        with pytest.raises(ArchiveError, match="NIFTI_UNREADABLE"):
            predictor.source(tmp_path / f"{bad}.nii.gz", tmp_path / f"g{number}")
    (tmp_path / "broken.nii.gz").write_bytes(b"no")
    with pytest.raises(ArchiveError, match=r"broken\.nii\.gz: NIFTI_UNREADABLE"):
        predictor.source(tmp_path / "broken.nii.gz", tmp_path / "e")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "all.zip").read_bytes()[:500])
    with pytest.raises(ArchiveError, match=r"nothing to segment among 1 file \(ARCHIVE_DAMAGED\)"):
        predictor.source(tmp_path / "cut.zip", tmp_path / "f")
    with pytest.raises(ArchiveError, match="no such folder"):
        predictor.source(tmp_path / "nothing", tmp_path / "f")
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), None), tmp_path / "spaced.nii")
    with pytest.raises(ArchiveError, match=r"spaced\.nii: NIFTI_UNPLACED, neither qform nor sform"):
        predictor.source(tmp_path / "spaced.nii", tmp_path / "u")
    assert not (tmp_path / "u").exists()
    image = nib.load(tmp_path / "spaced.nii")
    image.set_qform(affine, 1)  # one of them is enough
    nib.save(image, tmp_path / "turned.nii")
    (volume,), _ = predictor.source(tmp_path / "turned.nii", tmp_path / "u")
    assert volume.pixels == whole.pixels


@pytest.mark.parametrize("how", ["flipped", "canonical", "slices first"])
def test_a_nifti_is_shown_as_the_training_slices_lay(
    tmp_path: Path, phantom: Phantom, how: str
) -> None:
    """A network that calls class 1 what lies left of the middle of the image, class 2 below it."""

    class Sides(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, None]:
            ones = torch.ones_like(image)
            right = torch.cumsum(ones, 3) / ones.sum(3, keepdim=True)
            down = torch.cumsum(ones, 2) / ones.sum(2, keepdim=True)
            bright = image > 0.2
            one = torch.where(bright, 1.0 - right, torch.full_like(image, -1.0))
            two = torch.where(bright, down - 0.4, torch.full_like(image, -1.0))
            return torch.cat([torch.zeros_like(image), one, two], 1), None

    model = tmp_path / "m.onnx"
    meta = {**METADATA, "modalities": ["CT"], "axes": [[0, 1], [1, 1], [2, 1]]}
    meta["tile"] = {"size": [48, 48], "overlap": 0.5}
    export_onnx(DeployGraph(Sides(), GraphInput()), model, 18, meta)
    hu, _ = draw(phantom, 0)
    write_series(tmp_path / "in", "P", hu, phantom)
    predictor = Predictor(model, formats=PLAIN)
    (whole,), _ = predictor.source(tmp_path / "in", tmp_path / "a")
    assert all(whole.pixels)
    truth = nib.load(tmp_path / "a/series-000.nii.gz")
    volume = nib.Nifti1Image(hu.transpose(2, 1, 0), truth.affine)
    if how == "flipped":
        volume = volume.as_reoriented(np.array([[0, 1], [1, -1], [2, 1]]))
    elif how == "canonical":
        volume = nib.as_closest_canonical(volume)
    else:
        volume = volume.as_reoriented(np.array([[1, 1], [2, -1], [0, 1]]))
    nib.save(volume, tmp_path / "v.nii.gz")
    (found,), _ = predictor.source(tmp_path / "v.nii.gz", tmp_path / "b")
    assert found.pixels == whole.pixels
    assert found.volumes == pytest.approx(whole.volumes)
    again = nib.load(tmp_path / "b/series-000.nii.gz")
    np.testing.assert_allclose(again.affine, truth.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(again.dataobj), np.asarray(truth.dataobj))


def test_context_sees_the_slices_beside_each(tmp_path: Path, scanned: Any) -> None:
    """A network whose class is 1 where the slice behind is brighter than the one before."""

    class Rise(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, None]:
            rise = image[:, 2:] - image[:, :1]
            return torch.cat([torch.full_like(rise, 0.001), rise], 1), None

    given = GraphInput(context=1, windows=(CT_WINDOW,))
    meta = {**METADATA, "classes": ["background", "rise"], "modalities": ["CT"]}
    meta["input"] = given.to_json()
    export_onnx(DeployGraph(Rise(), given), tmp_path / "m.onnx", 18, meta)
    levels = [0, 50, 20, 20, 100, 90]
    scanned([series_of((6, 1, 3), "CT")], [np.full((1, 3), v, np.int16) for v in levels])
    (prediction,), _ = Predictor(tmp_path / "m.onnx", formats=PLAIN).folder(
        tmp_path / "in", tmp_path / "out"
    )
    masks = [read_mask(path)[0, 0] for path in prediction.files if "mask" in path.name]
    edged = [levels[0], *levels, levels[-1]]
    assert masks == [int(b > a) for a, b in zip(edged, edged[2:], strict=False)]
    assert masks == [1, 1, 0, 1, 1, 0]


def test_what_is_missing_of_a_series_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A hole makes two answers, and a slice that is cut short takes its part along: no ml of a part
    may pass for those of the whole."""
    archive, phantom = tmp_path / "in", Phantom(shape=(9, 16, 16), spacing=(3.0, 2.0, 2.0))
    write_series(archive, "P", draw(phantom, 1)[0], phantom)
    paths = sorted(archive.iterdir())
    paths[5].unlink()
    predictor = Predictor(model, formats=PLAIN)
    found, rows = predictor.folder(archive, tmp_path / "out")
    assert sorted(one.slices for one in found) == [3, 5]
    show(predictor, found, rows)
    said = capsys.readouterr().out
    for name in ("series-000", "series-001"):
        assert f"MISSING_SLICES: {name}: slices are missing in or beside it" in said
    paths[7].write_bytes(paths[7].read_bytes()[:-20])
    (one,), rows = predictor.folder(archive, tmp_path / "again")
    show(predictor, [one], rows)
    said = capsys.readouterr().out
    assert re.search(r"PIX_TRUNCATED: series-00[01]: slice 2 of 3, and no volume lacks one", said)
    assert "3 PIX_TRUNCATED" in said
    for path in paths[:5]:
        path.unlink()
    with pytest.raises(
        ArchiveError, match=r"\(PIX_TRUNCATED\); PIX_TRUNCATED: series-000: slice 2"
    ):
        predictor.folder(archive, tmp_path / "none")

"""Colour the whole way: shards, training, export, masks. Hue alone tells the two classes apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from PIL import Image

from launch.evaluate import evaluate_job
from launch.export import export_job
from launch.jobs import train_job
from launch.rundir import RunDir
from launch.runpage import write_run_page
from launch.trained import labelled_rows
from medpsp.config import Config
from medpsp.deploy import gates
from medpsp.deploy.inputs import GraphInput
from medpsp.deploy.modelfile import ModelFile
from medpsp.deploy.predict import Predictor
from medpsp.errors import (
    ArchiveError,
    ConfigError,
    ExportError,
    ModelFileError,
    ParityError,
    ShardError,
)
from medpsp.intensity import EIGHT_BIT
from medpsp.train.batch import Batch
from medpsp.train.metrics import confusion, dice_per_class
from medpsp.types import World
from shards.build import build_shards
from shards.check import check_shards
from shards.dataset import example_batch, train_batches, whole_slices
from shards.index import SliceRow, read_index, read_manifest
from shards.reader import ShardReader

Make = Callable[..., Config]
SIDE = 64
COLOURS = {1: (200, 30, 30), 2: (30, 73, 255)}
"""Luma 0.299 R + 0.587 G + 0.114 B: 80.8 and 80.9."""


# batches of shards made by hand -----------------------------------------------------------------


def bucket(root: Path, name: str, images: NDArray[Any], split: str = "train") -> list[SliceRow]:
    """Shards of 2 slices; the label of slice i is i everywhere."""
    labels = (
        np.zeros(images.shape[:3], np.uint8) + np.arange(len(images), dtype=np.uint8)[:, None, None]
    )
    for kind, values in (("image", images), ("label", labels)):
        array = zarr.create_array(
            root / name / kind,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(1, *values.shape[1:]),
            shards=(2, *values.shape[1:]),
            config={"write_empty_chunks": True},
        )
        array[:] = values
    return [
        SliceRow(
            bucket=name,
            slot=slot,
            patient=f"{name} {slot}",
            series=name,
            slice_index=slot,
            modality="IMAGE8",
            photometric="RGB" if images.ndim == 4 else "MONOCHROME2",
            z_mm=float("nan"),
            spacing=(float("nan"),) * 3,
            affine=(),
            window_center=EIGHT_BIT.center,
            window_width=EIGHT_BIT.width,
            voi_center=float("nan"),
            voi_width=float("nan"),
            split=split,  # type: ignore[arg-type]
            order=0.1,
            labelled=True,
            histogram=(1, slot, 0, 0),
            file_id=f"{slot:x}",
        )
        for slot in range(len(images))
    ]


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, list[SliceRow]]:
    """Three slices in colour and three in grey, of different size."""
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (3, 40, 36, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (3, 48, 44)).astype(np.int16)
    rows = bucket(tmp_path, "40x36_uint8", colour) + bucket(tmp_path, "48x44_int16", grey)
    return tmp_path, rows


def config_of(channels: int, augment: str, size: tuple[int, int]) -> Config:
    return Config.model_validate(
        {
            "data": {"archive": "none", "classes": ["background", "a", "b"]},
            "model": {"in_channels": channels},
            "train": {
                "stages": [{"name": "a", "steps": 6, "lr": 1e-3, "augment": augment}],
                "batch_size": 3,
                "size": size,
            },
        }
    )


def test_the_reader_gives_colour_as_it_was_written(mixed: tuple[Path, list[SliceRow]]) -> None:
    root, rows = mixed
    reader = ShardReader(root)
    whole = zarr.open_array(root / "40x36_uint8/image", mode="r")[:]
    for row in rows[:3]:
        image, label = reader.read(row.bucket, row.slot)
        assert (image.shape, image.dtype, label.shape) == ((40, 36, 3), np.uint8, (40, 36))
        np.testing.assert_array_equal(image, whole[row.slot])
        assert (label == row.slot).all()
    (root / "40x36_uint8/image/c/1/0/0/0").unlink()
    reader.read("40x36_uint8", 1)
    with pytest.raises(ShardError, match="40x36_uint8/image slot 2 cannot be read"):
        reader.read("40x36_uint8", 2)


def channels_of(batch: Batch) -> list[bool]:
    """Whether each image is grey, repeated; in colour no two channels of the noise are alike."""
    found = []
    for image, patient in zip(batch.image.numpy(), batch.patients, strict=True):
        equal = bool((image == image[:1]).all())
        assert equal == patient.startswith("48x44_int16")
        found.append(equal)
    return found


@pytest.mark.parametrize("augment", ["none", "high"])
def test_grey_and_colour_train_in_one_batch(
    mixed: tuple[Path, list[SliceRow]], augment: str
) -> None:
    root, rows = mixed
    config = config_of(3, augment, (64, 64))
    kinds = set()
    for batch in train_batches(root, rows, config, World(), (0, 0)):
        assert batch.image.shape == (3, 3, 64, 64)
        assert batch.label.shape == (3, 64, 64)
        assert -0.1 <= float(batch.image.min()) < float(batch.image.max()) <= 1.2  # brightened
        kinds.add(tuple(channels_of(batch)))
    assert any(len(set(kind)) == 2 for kind in kinds)


def test_colour_reaches_the_network_as_v_over_255(mixed: tuple[Path, list[SliceRow]]) -> None:
    root, rows = mixed
    batches = list(whole_slices(root, rows, World(), config_of(3, "none", (32, 32))))
    assert [b.image.shape for b in batches] == [(3, 3, 40, 36), (3, 3, 48, 44)]
    for batch, name in zip(batches, ("40x36_uint8", "48x44_int16"), strict=True):
        channels_of(batch)
        stored = zarr.open_array(root / name / "image", mode="r")[:].astype(np.float32) / 255
        first = stored[..., 0] if stored.ndim == 4 else stored
        np.testing.assert_array_equal(batch.image[:, 0].numpy(), first)
    examples = example_batch(root, rows, config_of(3, "none", (32, 32)), count=6)
    assert examples.image.shape == (6, 3, 32, 32)
    channels_of(examples)
    (grey,) = whole_slices(root, rows[3:], World(), config_of(1, "none", (32, 32)))
    assert grey.image.shape == (3, 1, 48, 44)


# from a folder of pictures to masks -------------------------------------------------------------


def discs(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One red and one blue disc of equal luma on a dim ground: image (H, W, 3), label (H, W)."""
    rng = np.random.default_rng(seed)
    image = rng.normal(40, 8, (SIDE, SIDE, 1)) + np.array([12, 0, 6])
    label = np.zeros((SIDE, SIDE), np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE]
    left = bool(rng.integers(2))
    for index, colour in COLOURS.items():
        radius = rng.uniform(9, 13)
        row = rng.uniform(radius, SIDE - radius)
        column = rng.uniform(15, 18) + (30 if left == (index == 1) else 0)
        inside = (y - row) ** 2 + (x - column) ** 2 < radius**2
        image[inside] = np.array(colour) + rng.normal(0, 8, (int(inside.sum()), 1))
        label[inside] = index
    return image.clip(0, 255).astype(np.uint8), label


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, make_config: Make, ray_once: None) -> Config:
    """12 patients of 2 pictures, 8 to train with, and their shards."""
    root = tmp_path_factory.mktemp("voc")
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for number in range(24):
        stem = f"p{number // 2:02d}-{number % 2}"
        image, label = discs(number)
        Image.fromarray(image).save(root / "JPEGImages" / f"{stem}.png")
        Image.fromarray(label).save(root / "SegmentationClass" / f"{stem}.png")
        lists["train" if number < 16 else "val" if number < 20 else "test"].append(stem)
    for name, stems in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(stems))
    config = make_config(
        root,
        root / "run",
        source="voc",
        archive=root,
        labels=None,
        classes=["background", "red", "blue"],
        voc={"patient_pattern": "^(p[0-9]+)-"},
        window={"center": 40, "width": 400},  # of grey images; colour is shown whole
    )
    stage = {"name": "full", "steps": 60, "lr": 4e-3, "augment": "low"}
    tree = config.model_dump(mode="json")
    tree["train"] |= {"size": [SIDE, SIDE], "batch_size": 8, "stages": [stage], "threads": 1}
    tree["model"] |= {"backbone": "mobilenetv3_large_100", "in_channels": 3}
    tree["model"] |= {"psp_channels": 16, "decoder_channels": 16}
    names = ("cpu_dice", "cpu_drop", "trt_dice", "trt_drop", "half_dice", "half_drop", "latency")
    tree["export"] |= {"allow": dict.fromkeys(names, "60 steps of training")}
    config = Config.model_validate(tree)
    build_shards(config)
    return config


def test_pictures_in_colour_become_shards(pictures: Config) -> None:
    assert list(check_shards(pictures.shards)) == []
    rows = read_index(pictures.shards)
    assert len(rows) == 24
    assert {(r.bucket, r.modality) for r in rows} == {("64x64_uint8", "IMAGE8")}
    assert {r.window for r in rows} == {EIGHT_BIT}
    reader = ShardReader(pictures.shards)
    found = {reader.read(r.bucket, r.slot)[0].tobytes() for r in rows}
    assert found == {discs(number)[0].tobytes() for number in range(24)}


def test_a_grey_network_is_refused_before_it_trains(pictures: Config) -> None:
    model = pictures.model.model_copy(update={"in_channels": 1})
    grey = pictures.model_copy(update={"model": model})
    for job in (train_job, labelled_rows):
        with pytest.raises(ConfigError, match=r"24 of 24 .* in colour; set model\.in_channels=3"):
            job(grey)


@pytest.fixture(scope="module")
def exported(pictures: Config) -> RunDir:
    train_job(pictures)
    export_job(pictures)
    return RunDir(pictures.out)


@pytest.mark.usefixtures("own_handlers")
def test_hue_is_learnt_and_exported(pictures: Config, exported: RunDir, tmp_path: Path) -> None:
    scores = evaluate_job(pictures)
    for name in ("red", "blue"):
        assert scores["dice"][name] > scores["dice_constant_mask"][name] + 0.3
    report = json.loads(exported.export_report.read_text())
    assert max(row["max_abs_diff"] for row in report["parity"]) < 1e-3
    (tmp_path / "in").mkdir()
    held_out = {f"{number}.png": discs(number) for number in range(20, 24)}
    for name, (image, _) in held_out.items():
        Image.fromarray(image).save(tmp_path / "in" / name)
    Image.fromarray(discs(20)[0][..., 0]).save(tmp_path / "in" / "grey.png")
    predictions, rows = Predictor(exported.fp32).folder(tmp_path / "in", tmp_path / "out")
    # training saw no grey: the graph has the window of colours in it
    assert [(row.file_id, row.code) for row in rows] == [("grey.png", "INPUT_FOR_MODEL")]
    assert [p.name for p in predictions] == sorted(held_out)
    counts = np.zeros((3, 3), np.int64)
    for name, (_, label) in held_out.items():
        with Image.open(tmp_path / "out" / f"{name}.mask.png") as mask:
            counts += confusion(label, np.asarray(mask), 3)
        with Image.open(tmp_path / "out" / f"{name}.overlay.png") as drawn:
            assert drawn.mode == "RGB"
    # what the device makes of the files is what evaluation made of the shards
    found = dice_per_class(counts)
    assert found[1:].tolist() == pytest.approx(
        [scores["dice"][n] for n in ("red", "blue")], abs=2e-3
    )


def test_files_say_what_they_are_and_the_dossier_what_was_measured(
    pictures: Config, exported: RunDir
) -> None:
    names = ("fp32", "cpu", "trt", "half")
    files = [exported.fp32, *(exported.variant(name) for name in names[1:])]
    said = [ModelFile(path) for path in files]
    for file in said:
        assert file.given == GraphInput(dtype="uint8", colours=3, windows=(EIGHT_BIT,))
        assert file.meta["manifest"] == read_manifest(pictures.shards).data_id
        assert (file.meta["stride"], file.meta["bins"]) == (16, [1, 3, 5, 7])
    variants = [file.meta["variant"] for file in said]
    assert variants == ["fp32", "int8 QDQ U8S8", "int8 QDQ S8S8", "fp16"]
    found = json.loads(exported.export_report.read_text())
    assert [file["sha256"] for file in found["files"]] == [file.digest for file in said]
    assert len(found["parity"]) >= 20
    assert sum(row["changed"] - row["near_ties"] for row in found["parity"]) == 0
    first = found["gates"][0]
    assert (first["gate"], first["variant"], first["passed"]) == ("parity", "fp32", True)
    assert "at 22 shapes, at most 0.0001 is expected" in first["says"]
    assert found["training"]["splits"]["val"] == {"patients": 2, "slices": 4}
    assert {row["threads"] for row in found["latency"]} == {1, 2}
    assert all(row["peak_rss_mib"] > 30 for row in found["latency"])
    page = (exported.export / "dossier.html").read_text()
    assert "int8 QDQ S8S8" in page
    assert sorted(path.name for path in exported.export.iterdir()) == sorted(
        [*(path.name for path in files), "dossier.html", "dossier.json", "sbom.cdx.json"]
    )


PAPERS = ["dossier.html", "dossier.json"]


def test_a_file_that_differs_leaves_those_of_before(pictures: Config, exported: RunDir) -> None:
    (exported.export / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in exported.export.iterdir()}
    strict = pictures.export.model_copy(update={"parity_tolerance": 1e-12})
    with pytest.raises(ParityError, match="allowed 1e-12"):
        export_job(pictures.model_copy(update={"export": strict}))
    assert {path: path.stat().st_mtime_ns for path in exported.export.iterdir()} == before
    assert not list(pictures.out.glob(".export*"))


def test_fp32_alone_can_be_asked_for(pictures: Config, exported: RunDir, tmp_path: Path) -> None:
    shutil.copytree(pictures.out, tmp_path / "out", symlinks=True)
    alone = pictures.export.model_copy(update={"variants": (), "opset": 11})
    export_job(pictures.model_copy(update={"out": tmp_path / "out", "export": alone}))
    run = RunDir(tmp_path / "out")
    assert sorted(path.name for path in run.export.glob("*.onnx")) == ["model.onnx"]
    found = json.loads(run.export_report.read_text())
    assert [gate["gate"] for gate in found["gates"]] == ["parity"]
    assert found["agreement"] == []
    assert not found["training"]["changed"]


def test_a_refused_file_is_not_given_out_and_the_others_are(
    pictures: Config, exported: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "MOST_DROP", -1.0)
    allow = {"latency": "shared machine", "half_drop": "because <it> is a test"}
    only = pictures.export.model_copy(update={"allow": allow, "variants": ("cpu", "half")})
    with pytest.raises(
        ExportError, match=r"^export: refused model\.int8\.onnx \(.*cpu_drop: "
    ) as e:
        export_job(pictures.model_copy(update={"export": only}))
    assert (
        "model.onnx, model.fp16.onnx and their dossier (of the earlier export model.int8.onnx, "
        in str(e.value)
    )
    assert "export.allow.half_drop" not in str(e.value)
    names = sorted(path.name for path in exported.export.iterdir())
    assert [n for n in names if n != "notes.txt"] == [
        *PAPERS,
        "model.fp16.onnx",
        "model.onnx",
        "sbom.cdx.json",
    ]
    found = json.loads(exported.export_report.read_text())
    assert [file["name"] for file in found["files"]] == ["model.onnx", "model.fp16.onnx"]
    assert "cpu_drop" in {one["gate"] for one in found["refusals"]}
    assert {one["file"] for one in found["refusals"]} == {"model.int8.onnx"}
    assert [row["variant"] for row in found["agreement"]] == ["int8 QDQ U8S8", "fp16"]  # measured
    assert "model.int8.onnx" not in (exported.export / "sbom.cdx.json").read_text()
    page = (exported.export / "dossier.html").read_text()
    assert "Refused: files that did not pass" in page
    assert "because &lt;it&gt; is a test" in page
    Predictor(exported.variant("half"))
    with pytest.raises(ModelFileError, match=r"its export refused it \(.*cpu_drop\)"):
        Predictor(exported.int8)
    RunDir.create(pictures)
    run = write_run_page(exported.root).read_text()
    assert "refused, and not given out: model.int8.onnx" in run
    assert "is not what the dossier was made of" not in run


def test_an_allowed_gate_stands_in_the_dossier(
    pictures: Config, exported: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    (exported.export / "notes.txt").write_text("mine")
    monkeypatch.setattr(gates, "MOST_DROP", -1.0)
    allow = {"cpu_dice": "60 steps of training", "latency": "shared machine"}
    only = pictures.export.model_copy(update={"variants": ("cpu",)})
    told = {**allow, "cpu_drop": "because <it> is a test"}
    out = pictures.model_copy(update={"export": only.model_copy(update={"allow": told})})
    export_job(out)
    page = (exported.export / "dossier.html").read_text()
    assert "because &lt;it&gt; is a test" in page
    names = sorted(path.name for path in exported.export.iterdir())
    assert names == [*PAPERS, "model.int8.onnx", "model.onnx", "notes.txt", "sbom.cdx.json"]


def test_a_folder_of_nothing_but_colour_is_none_for_a_grey_network(
    exported: RunDir, tmp_path: Path
) -> None:
    predictor = Predictor(exported.fp32)
    predictor.model.given = replace(predictor.model.given, colours=1)
    (tmp_path / "in").mkdir()
    Image.fromarray(discs(20)[0]).save(tmp_path / "in" / "a.png")
    with pytest.raises(ArchiveError, match=r"1 file \(COLOUR_FOR_GREY_MODEL\)"):
        predictor.folder(tmp_path / "in", tmp_path / "out")

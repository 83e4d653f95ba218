"""The whole chain on real scans: CT with NIfTI masks, and cardiac MR as image and mask pairs.

Short runs: the Dice is reported beside the constant mask's, not asserted. Asserted is that the
chain runs, loses nothing, and that the masks of the exported file lie on the held-out patient.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from launch.jobs import JOBS
from launch.plan import CHAIN
from launch.rundir import RunDir, open_run
from medpsp.config import Config
from medpsp.deploy.predict import Predictor
from medpsp.identity import create_key, load_key, split_of
from shards.index import read_index, read_manifest

STAGES = [
    {"name": "warm", "steps": 60, "lr": 1e-3, "fraction": 0.4, "augment": "low"},
    {"name": "full", "steps": 140, "lr": 1e-3, "fraction": 1.0, "augment": "mid"},
]
GATES = ("cpu_dice", "cpu_drop", "trt_dice", "trt_drop", "half_dice", "half_drop", "latency")


def run_chain(config: Config) -> dict[str, dict[str, float]]:
    """Every job of the chain in this process; returns the scores."""
    for name in CHAIN:
        JOBS[name](config)
    scores: dict[str, dict[str, float]] = json.loads(RunDir(config.out).evaluation.read_text())
    return scores


def open_config(tmp_path: Path, **changes: object) -> tuple[Config, RunDir]:
    """The shipped ResNet18 configuration with changes."""
    key = tmp_path / "key"
    create_key(key, "public key of a public data set")
    common = {
        "out": tmp_path / "run",
        "data.key_file": key,
        "train.stages": json.dumps(STAGES),
        "train.batch_size": 8,
        "train.eval_every": 100,
        "export.calibration_slices": 24,
        "export.allow": json.dumps(dict.fromkeys(GATES, "200 steps of training")),
    }
    overrides = tuple(f"{name}={value}" for name, value in {**common, **changes}.items())
    return open_run("resnet18", overrides)


def report(
    capsys: pytest.CaptureFixture[str],
    title: str,
    scores: dict[str, dict[str, float]],
    held_out: float,
) -> None:
    with capsys.disabled():
        print(
            f"\n{title}: Dice {scores['dice']}, constant mask {scores['dice_constant_mask']}, "
            f"int8 file on one held-out patient {held_out:.3f}"
        )


def dice(truth: np.ndarray, mask: np.ndarray) -> float:
    return float(2 * (truth & mask).sum() / max(1, truth.sum() + mask.sum()))


@pytest.mark.timeout(1200)
def test_sarcoma_ct(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    archive = data / "seg3d" / "sts_dicom_rtstruct"
    config, run = open_config(
        tmp_path,
        **{
            "data.archive": archive,
            "data.labels": archive,
            "data.modalities": "[CT]",
            "data.label_pattern": "'{PatientID}/CT/mask.nii.gz'",
            "data.classes": "[background, tumour]",
            "train.size": "[160, 160]",
            "data.split": "{val: 0.25, test: 0.2}",
        },
    )
    scores = run_chain(config)
    manifest, rows = read_manifest(config.shards), read_index(config.shards)
    assert manifest.counts["kept"] == 424  # every CT slice of the 8 patients
    assert manifest.counts["quarantined"] == 0
    files = sum(1 for path in archive.rglob("*") if path.is_file())
    assert sum(manifest.counts.values()) == files
    voxels = sum(
        int(np.count_nonzero(np.asarray(nib.load(path).dataobj)))
        for path in archive.glob("*/CT/mask.nii.gz")
    )
    assert sum(row.histogram[1] for row in rows) == voxels  # no labelled voxel lost or invented
    key = load_key(config.data.key_file)
    patient = next(
        path
        for path in sorted(archive.iterdir())
        if path.is_dir() and split_of(key, path.name, 0.25, 0.2) == "test"
    )
    predictions, _ = Predictor(run.int8).folder(patient / "CT" / "image", tmp_path / "masks")
    found = nib.load(predictions[0].files[0])
    truth = nib.load(patient / "CT" / "mask.nii.gz")
    np.testing.assert_allclose(found.affine, truth.affine, atol=1e-2)
    assert found.shape == truth.shape
    score = dice(np.asarray(truth.dataobj) > 0, np.asarray(found.dataobj) > 0)
    report(capsys, "sarcoma CT, 200 steps", scores, score)


@pytest.mark.timeout(1200)
def test_cardiac_mr_pairs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    archive = data / "seg2d" / "sunnybrook_cardiac_mr"
    config, run = open_config(
        tmp_path,
        **{
            "data.source": "voc",
            "data.archive": archive,
            "data.voc": "{images: images, masks: labels, patient_pattern: '^(SC-.+?)-IM-'}",
            "data.classes": "[background, ventricle]",
            "data.label_map": "{0: 0, 255: 1}",
            "train.size": "[128, 128]",
        },
    )
    scores = run_chain(config)
    manifest, rows = read_manifest(config.shards), read_index(config.shards)
    images = sorted((archive / "images").glob("*.png"))
    assert manifest.counts["kept"] == len(images) == 526
    assert {row.split for row in rows} == {"train", "val"}  # as the lists say
    patient = "SC-HF-I-01-IM-"
    (tmp_path / "patient").mkdir()
    for path in images:
        if path.name.startswith(patient):
            shutil.copy(path, tmp_path / "patient")
    predictions, _ = Predictor(run.int8).folder(tmp_path / "patient", tmp_path / "masks")
    assert len(predictions) == len(list((tmp_path / "patient").iterdir())) == 18
    masks = [np.asarray(Image.open(p.files[0])) > 0 for p in predictions]
    truths = [np.asarray(Image.open(archive / "labels" / p.name))[..., 0] > 0 for p in predictions]
    report(capsys, "cardiac MR, 200 steps", scores, dice(np.stack(truths), np.stack(masks)))


def test_rtstruct_gives_the_voxels_of_the_nifti_masks(data: Path, tmp_path: Path):
    """Both formats of every CT series through the shards: the same counts, slice by slice."""
    archive = data / "seg3d" / "sts_dicom_rtstruct"
    counts = []
    for name, changes in {
        "nifti": {"data.label_pattern": "'{PatientID}/CT/mask.nii.gz'"},
        "rtstruct": {"data.label_format": "rtstruct", "data.label_names": "{'GTV_Mass*': tumour}"},
    }.items():
        (tmp_path / name).mkdir()
        config, _ = open_config(
            tmp_path / name,
            **{
                "data.archive": archive,
                "data.labels": archive,
                "data.modalities": "[CT]",
                "data.classes": "[background, tumour]",
                "data.split": "{val: 0.25, test: 0.2}",
                **changes,
            },
        )
        JOBS["shards"](config)
        rows = read_index(config.shards)
        assert len(rows) == 424
        counts.append({(row.file_id, row.frame): row.histogram for row in rows})
    assert counts[0] == counts[1]
    assert sum(histogram[1] for histogram in counts[0].values()) > 100_000

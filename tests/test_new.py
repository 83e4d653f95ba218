"""`medpsp new`: what it proposes for archives of many kinds, what it refuses, and what it hides."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import yaml
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.utils import pack_bits
from pydicom.uid import ExplicitVRLittleEndian
from typer.testing import CliRunner

from launch.cli import app
from launch.new import machine, pace
from launch.new.choices import Evidence, Open, Pace, Places
from launch.new.evidence import gather
from launch.new.facts import Kind
from launch.new.labelfacts import Labels, no_labels
from launch.new.labelmasks import _marks, _numbers
from launch.new.machine import Machine
from launch.new.maskpattern import patterns_of
from launch.new.proposal import propose, stays, write_proposal
from launch.new.proposedata import data_lines
from launch.new.regions import Seen, classes_of_names
from launch.new.shares import shares_of
from launch.new.trial import Tried
from launch.phantom import Phantom, draw, to_mr, write_mask, write_series
from medpsp.config import Config
from medpsp.configio import load_config
from medpsp.dicom.regionnames import region_names
from medpsp.errors import ArchiveError, ConfigError
from medpsp.identity import create_key, split_of
from medpsp.words import ends_of
from shards.build import build_shards
from shards.index import read_index, read_manifest
from tests.canary import Canaries, Scanner, leaks
from tests.labelled import RTSTRUCT, SEG, contour, frame_of, item, region, rtstruct, seg
from tests.planted import raw, write_planted

pytestmark = pytest.mark.usefixtures("own_handlers")
Make = Callable[..., Config]
SHAPE = Phantom(shape=(4, 48, 48))
LIVER, KIDNEY = 1, 2


# archives ----------------------------------------------------------------------------------------


def name_of(number: int) -> str:
    return f"PHANTOM{number:03d}"


def add_patient(root: Path, number: int, phantom: Phantom = SHAPE, part: str = "") -> list[Path]:
    """A series of a patient below ``root``/dicom."""
    values, _ = draw(phantom, number)
    values = values if phantom.modality == "CT" else to_mr(values, number)
    folder = root / "dicom" / f"{phantom.modality}{part}{number}"
    paths = write_series(folder, name_of(number), values, phantom)
    for path in paths if part or phantom.modality not in ("CT", "MR") else ():
        ds = pydicom.dcmread(path)
        ds.BodyPartExamined = part
        ds.save_as(path)
    return paths


def write_labels(root: Path, kind: str, number: int, names: tuple[str, str], **more: Any) -> Path:
    """A SEG of liver and kidneys, or an RTSTRUCT with a large and a small square, of a patient."""
    phantom = more.pop("phantom", SHAPE)
    _, label = draw(phantom, number)
    affine, count = phantom.affine_lps(), phantom.shape[0]
    if kind == "seg":
        frames = [frame_of(affine, k, n) for n in (1, 2) for k in range(count)]
        ds = seg("BINARY", frames, dict(enumerate(names, 1)), affine, phantom.shape[1:])
        ds.BitsAllocated = ds.BitsStored = ds.SamplesPerPixel = 1
        ds.HighBit = ds.PixelRepresentation = 0
        ds.PhotometricInterpretation = "MONOCHROME2"
        both = np.concatenate([label == LIVER, label == KIDNEY])
        ds.PixelData = pack_bits(both.astype(np.uint8))
    else:
        small, large = ((22, 30), (12, 36))
        drawn = (square(affine, *small), square(affine, *(more.pop("second", (32, 40)))))
        ds = rtstruct(dict(zip(names, drawn, strict=True)))
        assert large != small
    ds.PatientID, ds.PatientName = name_of(number), f"Phantom^{name_of(number)}"
    ds.SOPInstanceUID = f"1.2.3.{number}.{1 if kind == 'seg' else 2}"
    del ds.FrameOfReferenceUID
    for keyword, value in more.items():
        setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = SEG if kind == "seg" else RTSTRUCT
    path = root / f"{kind}{number}.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw(ds))
    return path


def square(affine: np.ndarray, low: int, high: int) -> list[Dataset]:
    """A contour on each of slices 1 and 2."""
    corners = np.array([(low, low), (high, low), (high, high), (low, high)])
    return [
        contour((np.column_stack([corners, np.full(4, k), np.ones(4)]) @ affine.T)[:, :3])
        for k in (1, 2)
    ]


def look(
    root: Path, out: Path, labels: Path | None = None, key: Path | None = None, **places: Any
) -> Evidence:
    found = Places(archive=root, file=out, key=key or out.with_suffix(".key"), **places)
    return gather(root, labels, found, 50_000)


def tree_of(root: Path, out: Path, labels: Path | None = None) -> dict[str, Any]:
    """What is proposed, as the file has it."""
    text = propose(look(root, out, labels)).text
    write_proposal(out, text)
    tree: dict[str, Any] = yaml.safe_load(text)
    return tree


# one archive after another -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def proposed(
    archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, tuple[str, ...]]:
    """For the phantom archive of all tests: the file, its text, what was said."""
    out = tmp_path_factory.mktemp("new") / "liver.yaml"
    create_key(out.with_suffix(".key"), "key of the tests 58")
    found = propose(look(archive / "dicom", out, archive / "masks"))
    write_proposal(out, found.text)
    return out, found.text, (*found.said, *found.then)


def test_a_phantom_with_nifti_masks(proposed: tuple[Path, str, tuple[str, ...]], archive: Path):
    out, text, said = proposed
    tree = yaml.safe_load(text)
    assert tree == {
        "out": "runs/liver",
        "data": {
            "archive": str(archive / "dicom"),
            "labels": str(archive / "masks"),
            "classes": ["background", "structure_1", "structure_2", "structure_3"],
            "modalities": ["CT"],
            "split": tree["data"]["split"],
            "key_file": str(out.with_suffix(".key")),
            "max_reject_fraction": 0.07,  # 2 of 34 objects are 5.9 %
            **({"workers": tree["data"]["workers"]} if "workers" in tree["data"] else {}),
        },
        "model": {"context": 1},  # 5 mm apart, pixels of 2.6 mm
        "train": {
            "preset": "onecycle",
            "steps": 1500,
            "size": [64, 64],
            **{k: v for k, v in tree["train"].items() if k not in ("preset", "steps", "size")},
        },
    }
    assert said[-2:] == (f"medpsp config show {out}", f"medpsp run {out}")
    assert "label_pattern (default): It finds 8 of 8 NIfTI masks." in text
    assert "window (default): 40/400 for CT. 98 % of the voxels looked at hold" in text
    assert "1 FILE_EMPTY, 1 HDR_TRUNCATED" in text


def test_each_value_has_its_reason_and_no_default_is_repeated(
    proposed: tuple[Path, str, tuple[str, ...]],
):
    out, text, _ = proposed
    lines = text.splitlines()
    usual = Config.model_validate({"data": {"archive": "", "classes": ["a", "b"]}})
    tree, defaults = yaml.safe_load(text), usual.model_dump(mode="json")
    for section in ("data", "model", "train"):
        for key, value in tree[section].items():
            (place,) = [n for n, line in enumerate(lines) if line.startswith(f"  {key}:")]
            assert re.match("  # [A-Z0-9]", lines[place - 1]) or lines[place - 1].startswith("  # ")
            assert (section, key) in {("data", "archive"), ("data", "classes")} or (
                defaults[section][key] != value
            )
    assert max(map(len, lines)) <= 100
    loaded = load_config(out)
    assert loaded.data.classes == tuple(tree["data"]["classes"])
    assert loaded.train.size == (64, 64)
    assert loaded.train.stages[0].name == "rise"


def test_the_same_bytes_twice(proposed: tuple[Path, str, tuple[str, ...]], archive: Path):
    out, text, said = proposed
    again = propose(look(archive / "dicom", out, archive / "masks"))
    assert (again.text, (*again.said, *again.then)) == (text, said)
    before = out.stat().st_mtime_ns
    write_proposal(out, again.text)
    assert out.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="exists and says something else"):
        write_proposal(out, text + "# more\n")
    assert out.read_text() == text


@pytest.mark.usefixtures("ray_once")
def test_shards_run_on_the_file_as_it_is(
    proposed: tuple[Path, str, tuple[str, ...]], tmp_path: Path
):
    out, text, _ = proposed
    config = load_config(out, (f"out={tmp_path / 'run'}",))
    manifest = build_shards(config)
    rows = read_index(config.shards)
    assert manifest.counts["kept"] == 32
    assert {len(row.histogram) for row in rows} == {5}
    sides = Counter(row.split for row in rows)
    said = re.search(
        r"With the key: val (\d), test (\d) of 8 patients, (\d) for training", text_of(text)
    )
    assert said
    assert tuple(sides[s] // 4 for s in ("val", "test", "train")) == tuple(map(int, said.groups()))
    assert min(sides.values()) >= 4
    assert read_manifest(config.shards).slices == 32


def text_of(text: str) -> str:
    """Comments that go over several lines in one."""
    return re.sub(r"\n *# ", " ", text)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patients of CT, without labels."""
    root = tmp_path_factory.mktemp("plain")
    for number in range(4):
        add_patient(root, number)
    return root


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_label_objects_in_a_folder_of_their_own(kind: str, plain: Path, tmp_path: Path):
    for number in range(4):
        name = ("Liver", "kidneys") if number else ("liver", "Kidneys")  # case does not count
        write_labels(tmp_path / "labels", kind, number, name)
    tree = tree_of(plain / "dicom", tmp_path / "a.yaml", tmp_path / "labels")
    assert tree["data"]["label_format"] == kind
    assert tree["data"]["labels"] == str(tmp_path / "labels")
    assert tree["data"]["classes"] == ["background", "kidneys", "Liver"]  # as most spell them
    assert "label_names" not in tree["data"]
    assert "label_overlap" not in tree["data"]


def test_objects_in_the_archive_names_by_modality_and_overlap(tmp_path: Path):
    """One class for both modalities; the small square lies in the large one, so it comes later."""
    mr = replace(SHAPE, modality="MR", spacing=(5.0, 2.0, 2.0))
    for number in range(3):
        ids = {}
        for phantom in (SHAPE, mr):
            paths = add_patient(tmp_path, number, phantom)
            ids[phantom.modality] = pydicom.dcmread(paths[0]).SeriesInstanceUID
        for modality, phantom in (("CT", SHAPE), ("MR", mr)):
            names = (f"GTV mass_{modality}", f"Body-{modality}_T1")
            folder = tmp_path / "dicom" / modality
            uid = [item(SeriesInstanceUID=ids[modality])]
            reference = [item(RTReferencedStudySequence=[item(RTReferencedSeriesSequence=uid)])]
            write_labels(
                folder,
                "rtstruct",
                number,
                names,
                phantom=phantom,
                second=(12, 40),
                ReferencedFrameOfReferenceSequence=reference,
            )
    found = look(tmp_path / "dicom", tmp_path / "a.yaml")
    text = propose(found).text
    data = yaml.safe_load(text)["data"]
    assert data["classes"] == ["background", "Body", "GTV mass"]
    assert data["label_names"] == {
        "GTV mass_CT": "GTV mass",
        "GTV mass_MR": "GTV mass",
        "Body-CT_T1": "Body",
        "Body-MR_T1": "Body",
    }
    assert data["label_overlap"] == "priority"
    assert "labels" not in data
    assert "modalities" not in data  # CT and MR are the default
    assert [one.overlap for one in found.labels.tried] == [True] * 6
    write_proposal(tmp_path / "a.yaml", text)


def test_without_labels_it_says_how_to_give_them(plain: Path, tmp_path: Path):
    found = propose(look(plain / "dicom", tmp_path / "a.yaml"))
    write_proposal(tmp_path / "a.yaml", found.text)
    config = load_config(tmp_path / "a.yaml")
    assert (config.data.labels, config.data.label_format) == (None, "nifti")
    assert len(config.data.classes) == 2
    said = text_of(found.text)
    assert "OPEN: Labels: none found." in said
    assert "Give the folder of DICOM SEG, RTSTRUCT or NIfTI masks with --labels" in said
    assert found.then == (
        f"medpsp key new {tmp_path / 'a.key'}",
        f"medpsp shards {tmp_path / 'a.yaml'}",
    )


def test_a_mixed_archive(tmp_path: Path):
    """CT and MR of three patients, PT of one, a modality that is none of DICOM; CT is labelled."""
    for number in range(3):
        add_patient(tmp_path, number)
        add_patient(tmp_path, number, replace(SHAPE, modality="MR"), "HEAD")
        label = draw(SHAPE, number)[1]
        write_mask(tmp_path / "masks" / f"{name_of(number)}-CT.nii.gz", label, SHAPE)
    add_patient(tmp_path, 0, replace(SHAPE, modality="PT"))
    add_patient(tmp_path, 0, replace(SHAPE, modality="SMITH"))
    (tmp_path / "dicom" / "notes.txt").write_text("nothing\n")
    found = look(tmp_path / "dicom", tmp_path / "a.yaml", tmp_path / "masks")
    text = propose(found).text
    data = yaml.safe_load(text)["data"]
    assert data["modalities"] == ["CT"]
    assert data["label_pattern"] == "{PatientID}-{Modality}.nii.gz"
    assert "Without MR, PT and other: no labels." in text_of(text)
    assert "SMITH" not in text
    assert found.left == dict.fromkeys(("MR", "PT", "other"), "no labels")
    write_proposal(tmp_path / "a.yaml", text)


def test_masks_of_one_ct_do_not_make_labels_of_mr_that_they_do_not_fit(tmp_path: Path):
    """The default pattern names the same file for both; laid on, it fits the CT alone."""
    for number in range(2):
        add_patient(tmp_path, number)
        add_patient(tmp_path, number, replace(SHAPE, modality="MR", spacing=(5.0, 1.7, 1.7)))
        label = draw(SHAPE, number)[1]
        write_mask(tmp_path / "masks" / f"{name_of(number)}.nii.gz", label, SHAPE)
    found = look(tmp_path / "dicom", tmp_path / "a.yaml", tmp_path / "masks")
    assert found.labels.modalities == ("CT",)
    assert yaml.safe_load(propose(found).text)["data"]["modalities"] == ["CT"]


# ultrasound --------------------------------------------------------------------------------------


def write_ultrasound(path: Path, patient: str, *, coloured: bool, tissue: bool) -> None:
    """A clip of two frames of 40 x 60 in RGB, grey or with a coloured third."""
    ds = Dataset()
    ds.PatientID, ds.PatientName, ds.Modality = patient, f"Nobody^{patient}", "US"
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = (
        f"1.2.{n}.{int(patient.removeprefix('P'))}" for n in (1, 2, 3)
    )
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.Rows, ds.Columns, ds.NumberOfFrames = 40, 60, 2
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    grey = np.random.default_rng(0).integers(0, 200, (2, 40, 60, 1)).astype(np.uint8)
    frames = np.repeat(grey, 3, axis=3)
    if coloured:
        frames[:, :, 20:40, 0] += 50
    ds.PixelData = frames.tobytes()
    if tissue:
        ds.SequenceOfUltrasoundRegions = [region(2, 4, 50, 35)]
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw(ds))


@pytest.mark.parametrize("coloured", [True, False])
def test_ultrasound(coloured: bool, tmp_path: Path):
    for number in range(10):
        path = tmp_path / "us" / f"{number}.dcm"
        write_ultrasound(path, f"P{number}", coloured=coloured, tissue=number != 0)
    found = look(tmp_path / "us", tmp_path / "a.yaml")
    tree = yaml.safe_load(propose(found).text)
    assert len(found.patients) == 9  # one of ten will be quarantined
    assert tree["data"]["modalities"] == ["US"]
    assert tree["data"]["burned_in"] == "blank"
    assert tree["data"]["max_reject_fraction"] == 0.11  # one of ten has no region
    assert "window" not in tree["data"]
    if coloured:
        assert tree["model"] == {"in_channels": 3}
        assert "colour" not in tree["data"]
    else:
        assert tree["data"]["colour"] == "grey"
        assert "model" not in tree
    assert tree["train"]["size"] == [64, 64]
    write_proposal(tmp_path / "a.yaml", propose(found).text)


def test_ultrasound_without_regions_is_for_people_to_look_at(tmp_path: Path):
    for number in range(2):
        path = tmp_path / "us" / f"{number}.dcm"
        write_ultrasound(path, f"P{number}", coloured=False, tissue=False)
    said = propose(look(tmp_path / "us", tmp_path / "a.yaml")).said
    (line,) = [line for line in said if "may show a name" in line]
    assert "data.burned_in=keep if they are clean" in line
    assert line.startswith("OPEN: 100% of the US slices")


# identity ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def canary_runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Canaries, dict[str, subprocess.CompletedProcess[bytes]]]:
    """The command on the archive of canaries, with all kinds of labels, and where it fails."""
    root, known = tmp_path_factory.mktemp("canary"), Canaries()
    planted = write_planted(root, known)
    out = root / "out"
    out.mkdir()
    create_key(root / "key", planted.key)
    seg_only = root / "seg"
    seg_only.mkdir()
    runs: dict[str, list[object]] = {
        "objects": [planted.dicom],
        "masks": [planted.dicom, "--labels", planted.masks, "--key", root / "key"],
        "one patient": [planted.device],
        "nothing": [planted.odd],
        "no labels": [planted.dicom, "--labels", planted.odd],
        "pictures": [planted.voc],
    }

    def run(name: str) -> subprocess.CompletedProcess[bytes]:
        words = ["new", *map(str, runs[name]), "--out", str(out / f"{name.replace(' ', '')}.yaml")]
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", *words], capture_output=True, check=False
        )

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(runs, pool.map(run, runs), strict=True))
    return out, known, done


def test_no_canary_is_in_any_output(
    canary_runs: tuple[Path, Canaries, dict[str, subprocess.CompletedProcess[bytes]]],
):
    out, known, done = canary_runs
    codes = {name: one.returncode for name, one in done.items()}
    failing = {"nothing": 1, "no labels": 2, "pictures": 1}
    assert codes == {**dict.fromkeys(done, 0), **failing}, done["masks"].stderr.decode()
    parts = [(f"{name} {n}", text) for name, one in done.items() for n, text in streams(one)]
    files = sorted(path for path in out.rglob("*") if path.is_file())
    assert [path.name for path in files] == ["masks.yaml", "objects.yaml", "onepatient.yaml"]
    parts += [(path.name, path.read_bytes()) for path in files]
    assert leaks(Scanner(known.needles()), parts) == {}
    assert sum(len(text) for _, text in parts) > 8000


def streams(done: subprocess.CompletedProcess[bytes]) -> list[tuple[str, bytes]]:
    return [("stdout", done.stdout), ("stderr", done.stderr)]


def test_canaries_were_met_and_counted(
    canary_runs: tuple[Path, Canaries, dict[str, subprocess.CompletedProcess[bytes]]],
):
    """Names that are one patient's alone are there, in numbers; those of all patients are shown."""
    out, _, done = canary_runs
    objects = yaml.safe_load((out / "objects.yaml").read_text())["data"]
    assert objects["classes"] == ["background", "liver"]
    said = done["objects"].stdout.decode()
    assert "OPEN: 8 names of segments or regions not shown" in said
    masks = yaml.safe_load((out / "masks.yaml").read_text())["data"]
    assert len(masks["classes"]) == 4
    assert "77, 78, 79 and 80" in done["masks"].stdout.decode()  # of one mask
    assert "1 MASK_GRID_MISMATCH, 1 MASK_LABEL_UNKNOWN, 1 MASK_UNREADABLE" in (
        done["masks"].stdout.decode()
    )


def test_names_of_regions_that_hold_a_person():
    names = ("GTV Smith", "liver", "li", "Ref. point", "DOC1234")
    ds = rtstruct({name: [contour([(0, 0, 0), (9, 0, 0), (9, 9, 0)])] for name in names})
    ds.ROIContourSequence[3].ContourSequence[0].ContourGeometricType = "POINT"
    ds.PatientName, ds.OperatorsName, ds.PatientID = "SMITH^Li", "Jones^Liver", "doc1234"
    ds.SeriesDescription = "liver"
    assert region_names(ds) == [
        ("GTV Smith", True),
        ("liver", False),  # an organ, even where somebody is called so
        ("li", True),
        ("DOC1234", True),
    ]


def seen(*names: tuple[str, int], modality: str = "CT", own: bool = False) -> list[Seen]:
    return [Seen(name, f"p{patient}", modality, own) for name, patient in names]


def test_names_of_one_patient_are_counted_only():
    names = seen(("Liver", 1), ("liver", 2), ("LIVER", 3), ("Smith", 1), ("x\ny", 1), ("x\ny", 2))
    found = classes_of_names([*names, *seen(("Jones", 1), ("Jones", 2), own=True)], told=True)
    assert (found.names, found.spelt, found.hidden) == (("LIVER",), {}, 3)
    alone = seen(("Liver", 1), ("tumor [old]", 1))
    assert classes_of_names(alone, told=False).names == ()
    assert classes_of_names(alone, told=False).hidden == 2
    assert classes_of_names(alone, told=True).names == ("Liver", "tumor [old]")


def test_names_in_fewer_than_half_of_the_patients_are_said_and_left_out():
    often = [("a", n) for n in range(6)]
    found = classes_of_names(seen(*often, ("b", 0), ("b", 1), ("c", 5)), told=True)
    assert (found.names, found.rare, found.hidden) == (("a",), {"b": 2}, 1)


def test_names_are_one_only_where_nothing_but_the_modality_differs():
    same = [*seen(("mass ct", 1), ("mass ct", 2)), *seen(("mass mr", 1), modality="MR")]
    found = classes_of_names(same, told=False)
    assert found.names == found.merged == ("mass",)
    assert found.spelt == {"mass ct": "mass", "mass mr": "mass"}
    apart = seen(("mass t1", 1), ("mass t2", 1), ("mass t1", 2), ("mass t2", 2))
    assert classes_of_names(apart, told=False).names == ("mass t1", "mass t2")


# patterns of masks -------------------------------------------------------------------------------


def fields(patient: str, modality: str = "CT", folder: str = "x", uid: str = "") -> dict[str, str]:
    return {
        "folder": folder,
        "SeriesInstanceUID": uid or f"1.2.{patient}.{modality}",
        "PatientID": patient,
        "Modality": modality,
    }


def best(names: list[str], series: list[dict[str, str]], *, told: bool = True) -> str:
    found = patterns_of(names, series, told=told)
    return found[0].text if found else ""


def test_patterns_of_mask_names():
    both = [fields(p, m, f"scans/{p}/{m}") for p in ("A001", "A002", "A11") for m in ("CT", "MR")]
    people = ("A001", "A002", "A11")
    assert best([f"{p}.nii.gz" for p in people], both) == "{PatientID}.nii.gz"
    assert best([f"{p}/CT/seg.nii" for p in people], both) == "{PatientID}/{Modality}/seg.nii"
    assert best([f"{p}/MR/seg.nii" for p in people], both) == "{PatientID}/{Modality}/seg.nii"
    assert best([f"m/scans/{p}/CT/s.nii" for p in people], both) == "m/{folder}/s.nii"
    uids = [f"{one['SeriesInstanceUID']}_mask.nii.gz" for one in both]
    assert best(uids, both) == "{SeriesInstanceUID}_mask.nii.gz"
    assert best([f"{{{p}}}.nii" for p in people], both) == "{{{PatientID}}}.nii"


def test_text_of_one_patient_is_in_no_pattern():
    three = [fields(p) for p in ("A001", "A002", "A003")]
    assert best(["A001-Smith.nii", "A002-Jones.nii"], three) == ""
    assert best(["A001-A002.nii", "A003-A002.nii"], three) == ""  # an id stands in it
    assert best(["seg.nii", "other.nii"], three) == ""  # it would be the mask of everybody
    one = [fields("A001")]
    assert best(["A001-Smith.nii"], one, told=True) == "{PatientID}-Smith.nii"
    assert best(["A001-Smith.nii"], one, told=False) == ""


def test_ids_within_ids_are_told_apart_by_what_they_find():
    series = [fields(str(n)) for n in range(1, 13)]
    names = [f"patient{n}.nii.gz" for n in range(1, 13)]
    assert best(names, series) == "patient{PatientID}.nii.gz"


def mask(**voxels: int) -> Tried:
    return Tried(modality="CT", voxels={int(k.removeprefix("v")): n for k, n in voxels.items()})


@pytest.mark.parametrize(
    ("tried", "marks", "numbers"),
    [
        ([mask(v0=9, v1=1, v2=1)], [1, 2], {}),
        ([mask(v0=9, v255=1)], [255], {0: 0, 255: 1}),
        ([mask(v0=9, v1=1, v255=1)], [1], {}),  # 255 stays ignore
        ([mask(v0=9, v2=1, v255=1)], [2], {0: 0, 2: 1, 255: 255}),
        ([mask(v0=9, v1=1), mask(v0=9, v4=1)], [1, 4], {0: 0, 1: 1, 4: 2}),
        ([mask(v0=9, v1=1)] * 4 + [mask(v0=9, v7=1)], [1], {}),  # 7 is most likely a slip
    ],
)
def test_values_of_masks(tried: list[Tried], marks: list[int], numbers: dict[int, int]):
    found, rare, why = _marks(tried)
    assert (found, why) == (marks, "")
    assert _numbers(found, [one for one in tried if not rare & set(one.voxels)]) == numbers


def test_images_and_empty_masks_are_no_labels(tmp_path: Path, plain: Path):
    assert "they are images" in _marks([mask(v0=1), Tried(modality="CT")])[2]
    assert "0 values besides 0" in _marks([mask(v0=9)])[2]
    for number in range(4):
        values = np.arange(4 * 48 * 48, dtype=np.int16).reshape(4, 48, 48)
        write_mask(tmp_path / "m" / f"{name_of(number)}.nii.gz", values, SHAPE)  # type: ignore[arg-type]
    found = look(plain / "dicom", tmp_path / "a.yaml", tmp_path / "m")
    assert found.labels.kind == ""
    assert "hold more values than a mask has" in text_of(propose(found).text)


# decisions ---------------------------------------------------------------------------------------


def evidence(**changes: Any) -> Evidence:
    """300 CT slices of 30 patients, 512 x 512, all looked at, without labels."""
    kind = Kind(
        modality="CT",
        patients=30,
        series=30,
        slices=300,
        size=(512, 512),
        pixel_mm=0.8,
        step_mm=5.0,
    )
    known: dict[str, Any] = {
        "places": Places(archive=Path("a"), file=Path("new.yaml"), key=Path("new.key")),
        "met": 300,
        "read": 300,
        "kinds": {"CT": kind},
        "kept": {"CT": kind},
        "used": kind,
        "left": {},
        "labels": no_labels(),
        "patients": [None] * 30,
        "codes": Counter(),
        "objects": 300,
        "machine": Machine(cores=8, memory_gib=32.0),
    }
    return Evidence(**{**known, **changes})


def tree(found: Evidence, tmp_path: Path) -> dict[str, Any]:
    """The proposal; it loads."""
    text = propose(found).text
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
    write_proposal(path, text)
    made: dict[str, Any] = yaml.safe_load(text)
    return made


def test_a_gpu_asks_for_other_settings(tmp_path: Path):
    on_cpu = tree(evidence(), tmp_path)
    assert on_cpu["train"] == {"batch_size": 8}  # crops of 256 x 256 are the default
    text = text_of(propose(evidence()).text)
    assert "ranks (default): Without a GPU one rank computes on 8 cores" in text
    assert "loader_workers (default)" in text
    assert on_cpu["data"]["workers"] == 8
    gpus = Machine(cores=32, memory_gib=256.0, gpus=2, gpu_gib=80.0, bf16=True)
    on_gpus = tree(evidence(machine=gpus), tmp_path)
    assert on_gpus["train"] == {
        "size": [512, 512],
        "batch_size": 32,
        "ranks": 2,
        "precision": "bf16",
        "channels_last": True,
        "compile": "reduce-overhead",
        "augment_on": "device",
        "loader_workers": 8,
        "steps": 2000,  # 300 passes over 180 slices are 1688 of 32
    }
    small = Machine(cores=4, memory_gib=16.0, gpus=1, gpu_gib=2.0)
    on_small = tree(evidence(machine=small), tmp_path)["train"]
    assert on_small["batch_size"] == 4  # 152 MiB an image, half of 2 GiB
    assert "precision" not in on_small
    assert on_small["loader_workers"] == 3


@pytest.mark.parametrize(
    ("seconds", "steps", "time"),
    [
        (0.12, 6000, "About 12 min here (0.12 s a step, measured;"),
        (0.82, 1050, "About 14 min here (0.82 s a step, measured;"),  # 900 / 0.82 is 1097
        (3.0, 300, "About 15 min here"),
        (36.0, 300, "About 3 h here"),
    ],
)
def test_a_first_model_on_a_cpu_takes_a_quarter_of_an_hour(
    seconds: float, steps: int, time: str, tmp_path: Path
):
    found = evidence(pace=Pace(seconds, "measured"))
    train = tree(found, tmp_path)["train"]
    assert train.get("steps", 6000) == steps
    text = text_of(propose(found).text)
    assert time in text
    assert ("A GPU or more steps will give a better one: train.steps=6000" in text) == (
        steps < 6000
    )
    assert ("not with fewer than 300 steps" in text) == (seconds == 36)
    assert any(line.startswith(f"train.steps {steps}: ") for line in propose(found).said)
    stages = load_config(tmp_path / "0.yaml").train.stages
    assert [stage.steps for stage in stages] == [
        round(0.15 * steps),
        round(0.25 * steps),
        steps - round(0.15 * steps) - round(0.25 * steps),
    ]
    gpu = Machine(cores=8, memory_gib=32.0, gpus=1, gpu_gib=80.0)
    on_gpu = evidence(pace=Pace(36.0, "measured"), machine=gpu)
    assert tree(on_gpu, tmp_path)["train"]["steps"] >= 3000  # it only says how long


def test_a_step_is_timed_by_as_many_processes_as_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And estimated where it takes too long: 3 x 2.39 GMACs x 8 images at 30 GMACs/s on 8 cores."""
    small = {"backbone": "timm/test_resnet", "psp_channels": 16, "decoder_channels": 16}
    config: dict[str, Any] = {
        "data": {"archive": "a", "classes": ["a", "b"]},
        "model": small,
        "train": {"size": [48, 48], "batch_size": 4, "ranks": 2},
    }
    found = pace.pace_of(yaml.safe_dump(config), evidence().machine)
    assert found
    assert found.how.startswith("measured")
    assert 0 < found.seconds < 10
    asked = list[str]()

    def started(*_: object, env: dict[str, str], **__: object) -> None:
        asked.append(env["OMP_NUM_THREADS"])
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", started)
        with pytest.raises(InterruptedError):
            pace.pace_of(yaml.safe_dump(config), replace(evidence().machine, cores=6))
    assert asked == ["3"]  # of the cores that are left to this process
    monkeypatch.setattr(pace, "LIMIT_S", 0.05)
    config |= {"model": {"backbone": "resnet18"}, "train": {"batch_size": 8}}
    found = pace.pace_of(yaml.safe_dump(config), evidence().machine)
    assert found
    assert found.seconds == pytest.approx(3 * 2.39 * 8 / 30 / 8)
    assert found.how.startswith("estimated from multiply-adds, as timing took more than 0.05 s")
    assert pace.pace_of(yaml.safe_dump(config), replace(evidence().machine, gpus=1)) is None


def test_a_file_is_the_same_but_for_the_time_of_a_step(tmp_path: Path):
    """It never takes the same time twice; anything else that differs is refused."""
    out = tmp_path / "a.yaml"
    write_proposal(out, propose(evidence(pace=Pace(0.82, "measured"))).text)
    before = out.read_text()
    for text in (propose(evidence(pace=Pace(0.2, "measured"))).text, propose(evidence()).text):
        assert stays(out, text)
        write_proposal(out, text)
    assert out.read_text() == before
    assert not stays(tmp_path / "b.yaml", text)
    other = Machine(cores=2, memory_gib=32.0)
    with pytest.raises(ConfigError, match="exists and says something else"):
        write_proposal(out, propose(evidence(pace=Pace(0.82, "measured"), machine=other)).text)


def test_a_large_archive_on_a_large_gpu(tmp_path: Path):
    many = replace(evidence().used, patients=400, slices=80_000)
    gpu = Machine(cores=16, memory_gib=128.0, gpus=1, gpu_gib=80.0, bf16=True)
    found = evidence(
        used=many,
        kept={"CT": many},
        kinds={"CT": many},
        patients=[None] * 400,
        met=400_000,
        read=50_000,
        machine=gpu,
    )
    made = tree(found, tmp_path)
    assert made["model"]["backbone"] == "convnext_tiny"
    assert made["train"]["steps"] == 60_000  # 20 passes over 384,000 slices would be 480,000
    assert made["data"]["index"] == "runs/new-index"
    text = text_of(propose(found).text)
    assert "50000 of 400000 files were looked at, a sample" in text
    assert "At least 400 patients" in text


def window(low: float, high: float) -> dict[str, float]:
    return {"center": (low + high) / 2, "width": high - low}


def around(low: float, high: float) -> tuple[float, ...]:
    """Evenly spread: 1 % and 99 % lie a hundredth of the width inside."""
    return tuple(np.linspace(low, high, 501))


LUNG, BONE, ORGAN = around(-950, -450), around(100, 1100), around(0, 100)
BODY = (*around(-900, -300), *around(-100, 100), *around(-100, 100))


@pytest.mark.parametrize(
    ("structures", "part", "expected"),
    [
        ([ORGAN], "", None),
        ([BODY, ORGAN], "CHEST", None),  # an outline asks for nothing
        ([LUNG], "CHEST", window(-1000, -400)),  # -945 to -455, a tenth beside
        ([BONE], "", window(10, 1190)),  # 110 to 1090
        ([ORGAN[:30], BONE], "", window(10, 1190)),  # thirty voxels are no structure
        ([LUNG, ORGAN], "", [window(-160, 240), window(-1000, -400)]),
        ([around(20, 70)], "HEAD", window(0, 80)),
        ([around(-30, 110)], "HEAD", window(-30, 110)),
        ([BONE], "HEAD", window(10, 1190)),
        ([], "HEAD", window(0, 80)),
        ([], "CHEST", None),
    ],
)
def test_window_of_ct(
    structures: list[tuple[float, ...]], part: str, expected: Any, tmp_path: Path
):
    kind = replace(evidence().used, parts={part: 300})
    inside = dict(enumerate(structures, 1))
    labels = replace(no_labels(), tried=(Tried(modality="CT", inside=inside, voxels={0: 1, 1: 1}),))
    made = tree(evidence(kept={"CT": kind}, labels=labels), tmp_path)
    key = ("model", "windows") if isinstance(expected, list) else ("data", "window")
    assert made.get(key[0], {}).get(key[1]) == expected
    both = evidence(kept={"CT": kind, "MR": replace(kind, modality="MR")}, labels=labels)
    assert "window" not in tree(both, tmp_path)["data"]  # it would be for both
    said = any("would suit the CT better" in line for line in propose(both).said)
    assert said == (expected is not None)


def test_thin_slices_get_their_neighbours(tmp_path: Path):
    for step, pixel, context in ((5.0, 0.8, None), (1.0, 0.8, 1), (float("nan"), 0.8, None)):
        kind = replace(evidence().used, step_mm=step, pixel_mm=pixel)
        made = tree(evidence(used=kind, kept={"CT": kind}), tmp_path)
        assert made.get("model", {}).get("context") == context


def test_few_slices_with_a_structure_are_drawn_more_often(tmp_path: Path):
    tried = (Tried(modality="CT", slices=100, labelled=20, voxels={0: 9, 1: 1}),)
    labels = replace(no_labels(), kind="rtstruct", classes=("background", "a"), tried=tried)
    assert tree(evidence(labels=labels), tmp_path)["train"]["foreground"] == 0.5
    much = replace(labels, tried=(replace(tried[0], labelled=60),))
    assert "foreground" not in tree(evidence(labels=much), tmp_path)["train"]


def test_one_patient_is_too_few():
    said = propose(evidence(patients=[None])).said
    assert any("There is one patient: training and validation need one each" in s for s in said)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 14, 15, 40])
def test_shares_leave_each_side_somebody(count: int):
    """As `split_of` has it, whatever the key."""
    from medpsp.identity import unit_hash

    names = [f"patient {n}" for n in range(count)]
    for number in range(40):
        key = f"a key of the tests {number}".encode()
        shares = shares_of([unit_hash(key, "split", name) for name in names])
        sides = Counter(split_of(key, name, shares.val, shares.test) for name in names)
        assert (sides["train"], sides["val"], sides["test"]) == shares.counts
        assert sides["train"]
        assert sides["val"] >= (2 if 8 <= count else 1)
        assert sides["test"] >= (0 if count == 2 else 1)


def test_names_show_only_ends_that_are_known():
    assert ends_of(["a.nii.gz", "b.NII.GZ", "John.Smith", "c.txt", "d"]) == (
        "2 .nii.gz, 2 other and 1 .txt"
    )


def test_labels_inside_the_archive(tmp_path: Path):
    """The scan of the archive has met them: found from the folder of the labels, or the root."""
    for number in range(2):
        add_patient(tmp_path, number)
        label = draw(SHAPE, number)[1]
        write_mask(tmp_path / "dicom" / "masks" / f"{name_of(number)}.nii.gz", label, SHAPE)
        write_labels(tmp_path / "dicom" / "drawn", "seg", number, ("liver", "kidney"))
    dicom = tmp_path / "dicom"
    masks = look(dicom, tmp_path / "a.yaml", dicom / "masks").labels
    assert (masks.kind, masks.folder, masks.pattern) == (
        "nifti",
        dicom / "masks",
        "{PatientID}.nii.gz",
    )
    drawn = look(dicom, tmp_path / "a.yaml", dicom / "drawn").labels
    assert (drawn.kind, drawn.folder, drawn.files) == ("seg", dicom / "drawn", 2)
    both = look(dicom, tmp_path / "a.yaml").labels
    assert (both.kind, both.folder, both.beside) == ("seg", None, ("NIfTI masks (2 patients)",))
    with pytest.raises(ConfigError, match="the archive lies inside it"):
        look(dicom, tmp_path / "a.yaml", tmp_path)


def test_series_without_labels_and_labels_without_series_are_counted(tmp_path: Path):
    """Three of five patients have a SEG; one SEG lies nowhere near an image."""
    for number in range(5):
        add_patient(tmp_path, number)
    for number in (0, 1, 2, 9):
        write_labels(tmp_path / "dicom", "seg", number, ("liver", "kidney"))
    text = text_of(propose(look(tmp_path / "dicom", tmp_path / "a.yaml")).text)
    assert (
        "Series are there for 3 of 4 SEG objects, of 3 patients. Not the others: 1 "
        "LABEL_UNMATCHED. 2 series have none and are left out." in text
    )
    for number in (0, 1, 2):
        (tmp_path / "dicom" / f"seg{number}.dcm").unlink()
    text = text_of(propose(look(tmp_path / "dicom", tmp_path / "a.yaml")).text)
    assert "OPEN: Labels: 1 SEG or RTSTRUCT object found, but none that belongs to" in text


def test_images_in_the_folder_of_the_labels_are_no_trouble(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(plain / "dicom" / "CT0", tmp_path / "labels" / "CT0")
    for number in range(2):
        write_labels(tmp_path / "labels", "seg", number, ("liver", "kidney"))
    with caplog.at_level("INFO", "medpsp"):
        found = look(plain / "dicom", tmp_path / "a.yaml", tmp_path / "labels")
    assert found.labels.classes == ("background", "kidney", "liver")
    assert "read one by one" not in caplog.text


# samples and indexes -----------------------------------------------------------------------------


def test_a_sample_says_so(archive: Path, tmp_path: Path):
    places = Places(archive=archive / "dicom", file=tmp_path / "a.yaml", key=tmp_path / "key")
    found = gather(archive / "dicom", archive / "masks", places, 13)
    assert (found.met, found.read) == (35, 13)
    text = text_of(propose(found).text)
    assert "13 of 35 files were looked at, a sample: what is rare may be missing" in text
    assert "not all were looked at: the usual shares" in text


@pytest.mark.usefixtures("ray_once")
def test_an_index_stands_for_the_archive(
    archive: Path, make_config: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    config = make_config(archive, tmp_path / "run", index=tmp_path / "index", workers=1)
    build_shards(config)
    before = {p: p.read_bytes() for p in (tmp_path / "index").rglob("*") if p.is_file()}
    found = look(
        archive / "dicom", tmp_path / "a.yaml", archive / "masks", index=tmp_path / "index"
    )
    after = {p: p.read_bytes() for p in (tmp_path / "index").rglob("*") if p.is_file()}
    assert after == before
    assert found.used.slices == 32
    text = propose(found).text
    assert "objects of the index were looked at" in text_of(text)
    assert yaml.safe_load(text)["data"]["index"] == str(tmp_path / "index")
    shutil.copytree(archive / "masks", tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="knows none of the files"):
        look(tmp_path / "elsewhere", tmp_path / "b.yaml", index=tmp_path / "index")
    with pytest.raises(ConfigError, match="holds no scan"):
        look(archive / "dicom", tmp_path / "b.yaml", index=tmp_path / "nothing")
    assert "Traceback" not in capfd.readouterr().err


# refusals ----------------------------------------------------------------------------------------


def test_refusals(plain: Path, tmp_path: Path):
    dicom, out = plain / "dicom", tmp_path / "a.yaml"
    empty, words = tmp_path / "empty", tmp_path / "words"
    empty.mkdir()
    words.mkdir()
    for name in ("a.txt", "b.txt", "Smith.John"):
        (words / name).write_text("nothing")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), words / "q.nii.gz")
    with pytest.raises(ArchiveError, match="nowhere: no such folder"):
        look(tmp_path / "nowhere", out)
    with pytest.raises(ArchiveError, match="holds no file"):
        look(empty, out)
    seen_kinds = "4 of 4 files were looked at: 2 .txt, 1 .nii.gz and 1 other"
    with pytest.raises(ArchiveError, match=f"nothing DICOM in it, {re.escape(seen_kinds)}"):
        look(words, out)
    with pytest.raises(ConfigError, match=r"--labels .*nowhere: no such folder"):
        look(dicom, out, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"--labels .*empty: an empty folder"):
        look(dicom, out, empty)
    kinds = "seen: 2 .txt, 1 .nii.gz and 1 other"
    with pytest.raises(ConfigError, match=f"nothing in it belongs to the images; {kinds}"):
        look(dicom, out, words)
    with pytest.raises(ConfigError, match="a folder, expected the name of a file"):
        write_proposal(empty, "a: 1\n")


def test_the_command(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Written beside nothing of the archive; with a key in the environment none is named."""
    monkeypatch.setenv("MEDPSP_KEY", "a key in the environment")
    out = tmp_path / "x" / "a.yaml"
    done = CliRunner().invoke(app, ["new", str(plain / "dicom"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "key_file" not in yaml.safe_load(out.read_text())["data"]
    assert done.stdout.splitlines()[-2:] == [f"medpsp config show {out}", f"medpsp shards {out}"]
    done = CliRunner().invoke(app, ["new", str(plain / "dicom"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-3].startswith(f"{out}  was there and says the same")
    inside = CliRunner().invoke(
        app, ["new", str(plain / "dicom"), "--out", str(plain / "dicom" / "a.yaml")]
    )
    assert isinstance(inside.exception, ConfigError)
    assert "lies inside the archive" in str(inside.exception)
    assert json.dumps(sorted(os.listdir(plain))) == '["dicom"]'


def test_a_place_that_cannot_be_written_is_refused_before_the_archive_is_read(
    plain: Path, tmp_path: Path
):
    for out, words in (
        (tmp_path, "a folder, expected"),
        (Path("/proc/a.yaml"), "cannot be written"),
    ):
        done = CliRunner().invoke(app, ["new", str(plain / "nowhere"), "--out", str(out)])
        assert isinstance(done.exception, ConfigError)
        assert words in str(done.exception)


def test_open_questions_are_in_the_file_and_said(plain: Path, tmp_path: Path):
    found = look(plain / "dicom", tmp_path / "a.yaml")
    opened = [line for line in data_lines(found) if isinstance(line, Open)]
    made = propose(found)
    assert opened
    for one in opened:
        assert f"OPEN: {one.text}" in text_of(made.text)
        assert f"OPEN: {one.text}" in made.said
    assert isinstance(found.labels, Labels)


def test_control_groups_bound_what_a_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any version and depth, as `doctor` reads them: not the top of version 2 alone."""
    monkeypatch.setattr(machine, "memory_allowed", lambda: 2**30)
    monkeypatch.setattr(machine, "whole_cores", lambda: 1)
    monkeypatch.setattr(machine, "_has_driver", lambda: False)
    assert machine.this_machine() == Machine(cores=1, memory_gib=1.0)

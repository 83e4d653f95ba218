"""Nothing that names a patient leaves the archive: the whole chain, and every byte that it leaves.

The archive of `planted` holds some 12,000 canaries. Everything that the commands write or print is
unpacked and searched for each of them in 18 forms.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zarr
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from launch.phantom import draw, write_mask
from medpsp.dicom.labelref import label_target
from medpsp.dicom.labels import read_nifti_mask
from medpsp.dicom.names import NameRule
from medpsp.dicom.parse import parse
from medpsp.dicom.placement import grid_of
from medpsp.dicom.read import read_frame, read_headers
from medpsp.dicom.rtstruct import read_contours
from medpsp.dicom.sandbox import Sandbox
from medpsp.dicom.seg import read_segments
from medpsp.dicom.series import group_series
from medpsp.errors import LabelError, SourceError
from medpsp.identity import create_key, fingerprint, pseudonym
from medpsp.types import Place, ReadPolicy, SliceRef
from shards.index import read_index, read_manifest, read_objects
from tests.canary import CODECS, Canaries, Scanner, encoded, leaks, tree_layers
from tests.labelled import series, slice_ref
from tests.planted import (
    PATIENTS,
    SHAPE,
    Planted,
    broken_objects,
    label_objects,
    malformed,
    planted_slices,
    raw,
    write_planted,
)

CLASSES = ["background", "liver", "kidney", "lesion"]
Parts = list[tuple[str, bytes]]


# what the commands leave

CHAIN = """
import sys
from launch.jobs import run_command, setup_logging
from launch.plan import plan_jobs
from launch.rundir import open_run
from launch.local import submit_plan

setup_logging()
config, run = open_run(sys.argv[1], (sys.argv[2],))
plan = plan_jobs(config)
submit_plan(plan[:2], run)
sys.exit(max(run_command(job.name, run.config)[0] for job in plan[2:]))
"""
"""`medpsp run`, but with the last three jobs in one process: torch takes seconds to import."""

SHARDS = """
import json
import sys
from pathlib import Path
import ray
from launch.jobs import run_command, setup_logging
from launch.rundir import open_run

setup_logging()
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
for changes in json.loads(sys.argv[2]):
    _, run = open_run(sys.argv[1], changes)
    print(run_command("shards", run.config)[0])
(shard,) = run.root.glob("shards/*/label/c/0/0/0")
shard.unlink()
shard.mkdir()  # where a file should be: a task of Ray fails
print(run_command("shards", run.config)[0])
shard.rmdir()
"""
"""`medpsp shards` with several changes of a configuration, and one Ray for all; a code for each."""


SECRETS = {
    name: f"Sec{hashlib.sha256(name.encode()).hexdigest()[:29]}"
    for name in (
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "PGPASSWORD"),
        *("GITHUB_TOKEN", "SLURM_JWT", "SSH_AUTH_SOCK", "MY_OWN_SECRET"),
    )
}
"""In the environment of every command; none of them is ours to know, so none may be written."""


@dataclass(frozen=True)
class Chain:
    """The archive, its canaries, where the commands wrote, and what they printed."""

    planted: Planted
    known: Canaries
    root: Path
    said: dict[str, subprocess.CompletedProcess[bytes]]

    @property
    def out(self) -> Path:
        """Every artefact is below it, temporary files and Ray's logs too."""
        return self.root / "out"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """Everything that a user can run, on one archive, in two lines of commands at a time."""
    root = tmp_path_factory.mktemp("canary")
    known = Canaries()
    planted = write_planted(root, known)
    create_key(root / "key", planted.key)
    (root / "out").mkdir()
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(_config(planted, root)), encoding="utf-8")
    short = Path(tempfile.mkdtemp(prefix="cn", dir="/tmp"))  # Ray's sockets allow 107 characters
    home = {name: str(short / name.lower()) for name in ("HOME", "TMPDIR", "RAY_TMPDIR")}
    for folder in home.values():
        Path(folder).mkdir()
    said: dict[str, subprocess.CompletedProcess[bytes]] = {}

    def python(name: str, *words: object, **more: str) -> None:
        said[name] = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=short,
            env={**os.environ, **SECRETS, **home, **more, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            check=False,
        )

    def medpsp(name: str, *words: object, **more: str) -> None:
        python(name, "-m", "launch.cli", *words, **more)

    def main_line() -> None:
        out = root / "out/main"
        python("chain", "-c", CHAIN, config, f"out={out}")
        medpsp("report", "report", out / "config.yaml")
        medpsp("voc", "voc", out / "config.yaml", root / "out/voc", "--bits", "16")
        # a SEG names its patient, and is the one file that may
        others = ("--format", "nifti,png,gif,mesh")
        model, fp32 = out / "export/model.int8.onnx", out / "export/model.onnx"
        medpsp("predict", "predict", model, planted.device, root / "out/p", *others)
        medpsp("predict odd", "predict", fp32, planted.odd, root / "out/q", *others)
        medpsp("sbom", "sbom", "--out", root / "out/install.cdx.json")
        medpsp("doctor", "doctor", out / "config.yaml")

    def side_line() -> None:
        secret = {"MEDPSP_KEY": planted.key, "PYTHONWARNINGS": "default"}
        seg, regions, pictures = (
            f"out={root / 'out' / n}" for n in ("seg", "rtstruct", "pictures")
        )
        whole = ("data.labels=null", "data.unlabelled=keep")
        options = ("data.burned_in=blank", "data.dates=shift", f"data.crosswalk={root / 'vault/c'}")
        keep = ("data.non_volumes=keep", "data.gaps=fill", "data.colour=grey", "data.key_file=null")
        voc = ("data.source=voc", f"data.archive={planted.voc}", "data.labels=null")
        changes = (
            (seg, "data.label_format=seg", *whole, *options),
            (regions, "data.label_format=rtstruct", *whole, *keep),
            (pictures, "data.voc.patient_pattern=^([A-Z0-9]+)_", *voc),
        )
        python("shards", "-c", SHARDS, config, json.dumps(changes), **secret)
        medpsp("too many", "shards", config, *changes[1], "data.max_reject_fraction=0", **secret)
        medpsp(
            "nothing", "shards", config, f"out={root / 'out/odd'}", f"data.archive={planted.odd}"
        )

    with ThreadPoolExecutor(2) as pool:
        for line in [pool.submit(main_line), pool.submit(side_line)]:
            line.result()
    shutil.move(short, root / "out" / "temporary")
    return Chain(planted, known, root, said)


def _config(planted: Planted, root: Path) -> dict[str, Any]:
    return {
        "data": {
            "archive": str(planted.dicom),
            "labels": str(planted.masks),
            "classes": CLASSES,
            "modalities": ["CT", "MR", "US"],
            "key_file": str(root / "key"),
            "split": {"val": 0.25, "test": 0.25},
            "shard_slices": 16,
            "max_reject_fraction": 1,
        },
        "model": {"psp_channels": 8, "decoder_channels": 8, "aux": False},
        "train": {
            "size": [32, 32],
            "batch_size": 4,
            "stages": [{"name": "only", "steps": 2, "lr": 1e-3}],
        },
        "export": {
            "variants": ["cpu"],
            "calibration_slices": 2,
            "allow": dict.fromkeys(("cpu_dice", "cpu_drop", "latency"), "a few steps of training"),
        },
    }


def scanner_of(known: Canaries, key: str = "") -> Scanner:
    told = {"the key": key, **SECRETS} if key else {}
    secret = {
        needle: f"{name} as {form}" for name, text in told.items() for form, needle in encoded(text)
    }
    return Scanner({**known.needles(), **secret})


def test_the_commands_end_as_they_should(chain: Chain) -> None:
    codes = {name: done.returncode for name, done in chain.said.items()}
    failed = {"predict odd": 1, "too many": 1, "nothing": 1}
    ok = dict.fromkeys(("chain", "report", "voc", "predict", "shards", "sbom"), 0)
    assert codes.pop("doctor") in (0, 1)  # it says what this machine lacks
    assert codes == {**ok, **failed}, chain.said["chain"].stderr.decode()
    assert chain.said["shards"].stdout.split() == [b"0", b"0", b"0", b"1"]


def test_no_canary_is_in_anything_that_the_chain_leaves(chain: Chain) -> None:
    scanner = scanner_of(chain.known, chain.planted.key)
    said: Parts = []
    for name, done in chain.said.items():
        said += [(f"stdout of {name}", done.stdout), (f"stderr of {name}", done.stderr)]
    parts = 0

    def counted() -> Iterator[tuple[str, bytes]]:
        nonlocal parts
        for part in (*said, *tree_layers(chain.out)):
            parts += 1
            yield part

    found = leaks(scanner, counted())
    files = sum(path.is_file() for path in chain.out.rglob("*"))
    print(
        f"\n{len(chain.known)} canaries, {len(scanner.needles)} needles, {files} files, "
        f"{parts} parts, {scanner.scanned / 2**20:.0f} MiB: {len(found)} with a canary"
    )
    assert found == {}
    assert len(chain.known) > 10_000


def test_the_scan_covers_every_kind_of_artefact(chain: Chain) -> None:
    """An empty folder would pass the test above."""
    for pattern in (
        *("main/shards/*/*/c/**/0", "main/shards/commits/*.json", "main/shards/index.parquet"),
        *("main/shards/objects.parquet", "main/shards/manifest.json", "main/shards/report.html"),
        *("main/logs/*.log", "main/logs/jobs/*.log"),
        *("main/config.yaml", "main/evaluation.json", "main/export/dossier.html"),
        *("main/tensorboard/events.*", "main/checkpoints/*/state.pt", "main/checkpoints/*/*.json"),
        *("main/export/model.onnx", "main/export/model.int8.onnx", "p/*.nii.gz", "p/*/*.png"),
        *("p/*.gif", "main/export/dossier.json", "main/export/sbom.cdx.json", "install.cdx.json"),
        *("main/run.html", "main/evaluation.html", "main/jobs/*.json"),
        *("voc/JPEGImages/*.png", "voc/SegmentationClass/*.png", "voc/slices.csv"),
        *("seg/shards/*_uint8/image/c/**/0", "pictures/shards/index.parquet"),
        *("temporary/ray_tmpdir/**/worker-*.err", "temporary/ray_tmpdir/**/raylet.out"),
    ):
        assert list(chain.out.glob(pattern)), pattern
    names = [name for name, _ in tree_layers(chain.out / "main/shards")]
    assert "report.html > data URI > pixels" in names
    assert any(name.endswith("image/zarr.json decoded") for name in names)


def test_the_page_of_the_run_has_every_part(chain: Chain) -> None:
    """The chain ran to its end, so nothing is said to be missing, and it tells no place."""
    page = (chain.out / "main/run.html").read_text()
    for name in ("data", "splits", "images", "classes", "curves", "scores", "cases", "export"):
        assert f'<section id="{name}"' in page
    assert not re.search(r" yet[:.]|: damaged|cannot be read|not what|is not there", page)
    assert "a few steps of training" in page  # why gates were allowed
    assert str(chain.root) not in page
    assert os.uname().nodename not in re.sub('base64,[^"]*', "", page).split()


def test_every_way_to_fail_is_among_them(chain: Chain) -> None:
    """Codes of the objects, from all runs: each is an error path that saw canaries."""
    codes = {
        row.code
        for name in ("main", "seg", "rtstruct", "pictures")
        for row in read_objects(chain.out / name / "shards")
    }
    assert codes >= {
        *("ELEM_INVALID", "HDR_TRUNCATED", "HDR_DEPTH", "PIX_TRUNCATED", "TS_UNSUPPORTED"),
        *("NOT_IMAGE", "NOT_DICOM", "DICOMDIR", "PHI_BURNED_IN", "PHOTOMETRIC_UNSUPPORTED"),
        *("MODALITY_SKIPPED", "DEC_ERROR", "FILE_EMPTY", "NOT_REGULAR", "SYMLINK_LOOP"),
        *("GZIP_DAMAGED", "ARCHIVE_DAMAGED", "ARCHIVE_NESTED", "ARCHIVE_UNSUPPORTED"),
        *(
            "LABEL_NONE",
            "LABEL_USED",
            "LABEL_OBJECT",
            "SEG_TYPE",
            "RT_UNREADABLE",
            "MASK_UNREADABLE",
        ),
        *("MASK_LABEL_UNKNOWN", "MASK_GRID_MISMATCH", "MASK_OUTSIDE_ROOT", "IMAGE_UNREADABLE"),
    }


def test_the_chain_had_something_to_learn_from(chain: Chain) -> None:
    """All eight patients in their containers and syntaxes, four slices each, labelled."""
    rows = read_index(chain.out / "main/shards")
    assert len({row.patient for row in rows}) == PATIENTS
    assert [row.labelled for row in rows] == [True] * 4 * PATIENTS
    assert all(any(row.histogram[1:-1]) for row in rows)
    labelled = {row.patient for row in read_index(chain.out / "seg/shards") if row.labelled}
    assert len(labelled) == PATIENTS


def test_ultrasound_is_blanked_around_its_region(chain: Chain) -> None:
    """The name lay in row 0 of each frame; the region is rows 4 to 15 of columns 2 to 13."""
    (path,) = chain.out.glob("seg/shards/*_uint8/image")
    frames = np.asarray(zarr.open_array(path)[:2])  # the other slots of its shard are empty
    assert frames.shape == (2, 16, 16, 3)
    assert not frames[:, :4].any()
    assert not frames[:, :, :2].any()
    assert not frames[:, :, 14:].any()
    assert frames[:, 4:, 2:14].mean() == pytest.approx(127, abs=10)  # random, 0 to 254
    rows = [row for row in read_objects(chain.out / "seg/shards") if row.code == "PHI_BURNED_IN"]
    assert len(rows) == 2  # one without a region, and BurnedInAnnotation YES


def test_days_are_shifted_where_asked_for_and_stored_nowhere_else(chain: Chain) -> None:
    key = chain.planted.key.encode()
    days = {row.patient: row.study_day for row in read_index(chain.out / "seg/shards")}
    for number, patient in enumerate(chain.planted.patients):
        date = chain.known.date(f"patient {number} StudyDate")
        moved = days[pseudonym(key, "patient", patient)]
        assert 1 <= abs(moved - datetime.strptime(date, "%Y%m%d").toordinal()) <= 3650
    assert {row.study_day for row in read_index(chain.out / "main/shards")} == {-1}


def test_the_crosswalk_holds_the_real_names_for_the_owner_alone(chain: Chain) -> None:
    path = chain.root / "vault/c"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    files = [chain.known.text(f"patient {n} file {k}") for n in range(PATIENTS) for k in range(4)]
    assert [name for name in files if name not in text] == []
    assert len(text.splitlines()) == len(read_objects(chain.out / "seg/shards"))


def test_the_manifest_says_how_names_were_kept_out(chain: Chain) -> None:
    manifests = {
        name: read_manifest(chain.out / name / "shards") for name in ("main", "seg", "rtstruct")
    }
    assert {name: m.deid["pixel"] for name, m in manifests.items()} == {
        **{"main": "flagged", "seg": "cleaned", "rtstruct": "flagged"}
    }
    assert {name: m.deid["temporal"] for name, m in manifests.items()} == {
        **{"main": "REMOVED", "seg": "MODIFIED", "rtstruct": "REMOVED"}
    }
    prints = {m.deid["key"] for m in manifests.values()}  # a file or the environment: one key
    assert prints == {fingerprint(chain.planted.key.encode())}


# the canaries are planted, and the scanner finds them


def test_every_canary_is_found_in_the_archive_itself(chain: Chain) -> None:
    """But for patient 6, whose data sets are deflated, and what is cut off or written over."""
    known, scanner = chain.known, scanner_of(chain.known)
    places = ("dicom", "masks", "voc", "device", "odd")
    data = [part for place in places for part in tree_layers(chain.root / place)]
    names = {hit.rpartition(" as ")[0] for hits in leaks(scanner, data).values() for hit in hits}
    kinds = (known.texts, known.uids, known.dates, known.times, known.numbers)
    planted = {where for kind in kinds for where in kind}
    gone = re.compile(
        r"patient 6 |no (meta|preamble) |cut padding|text for pixels JPEG |malformed (\w+) \2$"
        r"|PatientID that is no file name . PatientID"
    )
    assert {where for where in planted - names if not gone.match(where)} == set()
    assert len(names) > 10_000


@pytest.fixture
def few() -> Canaries:
    known = Canaries()
    known.text("text")
    known.uid("uid")
    known.date("date")
    known.time("time")
    known.number("number")
    return known


def test_canaries_are_legal_and_apart() -> None:
    known = Canaries()
    texts = {known.text(f"{n}") for n in range(5000)}
    assert len(texts) == 5000
    assert all(len(text) == 10 and text.isalnum() and text == text.upper() for text in texts)
    days = [known.date(f"{n}") for n in range(5000)]
    assert (days[0], days[-1]) == ("18010101", "18420123")
    assert known.text("7") == known.text("7")
    datetime.strptime(known.time("now"), "%H%M%S.%f")
    assert 10**9 <= int(known.number("any")) < 2**31
    assert len(known.uid("one")) <= 64


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["texts", "uids", "dates", "times", "numbers"])
def test_the_scanner_finds_each_kind_in_each_form(few: Canaries, kind: str, codec: str) -> None:
    scanner = scanner_of(few)
    ((where, value),) = getattr(few, kind).items()
    data = value.encode(codec)
    for wrapped in (data, data.hex().encode(), data.hex().upper().encode()):
        for shift in range(8):
            hits = scanner.hits(b"," * shift + wrapped + b",")
            assert {hit.split()[0] for hit in hits} == {where}, (wrapped, shift)
    for before in range(7):
        for after in range(4):
            coded = base64.b64encode(b"x" * before + data + b"y" * after)
            assert {hit.split()[0] for hit in scanner.hits(coded)} == {where}, coded


def test_the_scanner_finds_what_people_make_of_a_value() -> None:
    known = Canaries()
    text, uid = known.text("a"), known.uid("b")
    day = known.dates["c"] = "18710304"
    scanner = scanner_of(known)
    assert day == "18710304"
    spelt = ("1871-03-04", "04.03.1871", "03/04/1871", "04-03-1871", "04031871", "40301781")
    for value in (*spelt, text.lower(), text.capitalize(), uid.rsplit(".", 1)[1]):
        assert scanner.hits(f"<{value}>".encode()), value
    assert scanner.hits(b"0.1234187103045678") == set()  # eight digits of a float
    assert scanner.hits(b"9f3c18710304be") == set()  # and of a hash
    assert scanner.hits(b"8\x001871030487")
    assert scanner.hits(text[:9].encode()) == set()
    assert scanner.hits(b"") == scanner.hits(b"short") == set()


def test_the_scanner_finds_needles_across_its_pieces_and_at_the_ends(few: Canaries) -> None:
    scanner, text = scanner_of(few), few.text("text").encode()
    for at in (0, 2**20 - 9, 2**20 - 5, 2**20 - 1, 2**20, 2**21 - 10):
        data = bytearray(2**21)
        data[at : at + 10] = text
        assert scanner.hits(bytes(data)) == {"text as utf-8"}, at


def _gzip(folder: Path, text: str) -> None:
    (folder / "a").write_bytes(gzip.compress(gzip.compress(text.encode())))


def _zip(folder: Path, text: str) -> None:
    with zipfile.ZipFile(folder / "a", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b", text.encode("utf-16-le"))


def _tar(folder: Path, text: str) -> None:
    data = text.encode()
    with tarfile.open(folder / "a", "w:gz") as archive:
        info = tarfile.TarInfo("b")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def _parquet(folder: Path, text: str) -> None:
    pq.write_table(pa.table({"a": [[text, "b"]]}), folder / "a", compression="zstd")


def _parquet_number(folder: Path, text: str) -> None:
    pq.write_table(pa.table({"a": [1871030401]}), folder / "a", compression="zstd")


def _zarr(folder: Path, text: str) -> None:
    values = np.frombuffer((text * 50).encode(), np.uint8).astype(np.int16)  # UTF-16 then
    zarr.create_array(folder / "z", data=values, chunks=(50,), shards=(100,))


def _png_text(folder: Path, text: str) -> None:
    info = PngInfo()
    info.add_itxt("a", text * 9, zip=True)
    Image.new("L", (3, 3)).save(folder / "a", "PNG", pnginfo=info)


def _png_profile(folder: Path, text: str) -> None:
    Image.new("L", (3, 3)).save(folder / "a", "PNG", icc_profile=text.encode() * 9)


def _png_pixels(folder: Path, text: str) -> None:
    values = np.frombuffer(text.encode(), np.uint8)[None]
    Image.fromarray(np.repeat(values, 9, axis=0)).save(folder / "a", "PNG")


def _png_in_event(folder: Path, text: str) -> None:
    _png_text(folder, text)
    (folder / "a").write_bytes(b"\x12\x34event" + (folder / "a").read_bytes() + b"tail")


def _data_uri(folder: Path, text: str) -> None:
    _png_pixels(folder, text)
    data = base64.b64encode((folder / "a").read_bytes()).decode()
    (folder / "a").write_text(f'<img src="data:image/png;base64,{data}">')


def _checkpoint(folder: Path, text: str) -> None:
    torch.save({"model": {text: torch.zeros(2)}}, folder / "a")


def _tensor(folder: Path, text: str) -> None:
    torch.save(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), folder / "a")


def _onnx(folder: Path, text: str) -> None:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    onnx.helper.set_model_props(model, {"medpsp": json.dumps({"a": text})})
    onnx.save(model, folder / "a")


def _nifti(folder: Path, text: str) -> None:
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    image.header["aux_file"] = text.encode()
    nib.save(image, folder / "a.nii.gz")


def _name(folder: Path, text: str) -> None:
    (folder / f"a{text}").mkdir()


def _link(folder: Path, text: str) -> None:
    (folder / "a").symlink_to(f"/nowhere/{text}")


@pytest.mark.parametrize(
    "wrap",
    [
        *(_gzip, _zip, _tar, _parquet, _parquet_number, _zarr, _png_text, _png_profile),
        *(_png_pixels, _png_in_event, _data_uri, _checkpoint, _tensor, _onnx, _nifti),
        *(_name, _link),
    ],
)
def test_the_scanner_looks_into_every_container(
    tmp_path: Path, wrap: Callable[[Path, str], None]
) -> None:
    known = Canaries()
    text = known.text("text")
    known.numbers["number"] = "1871030401"
    assert leaks(scanner_of(known), tree_layers(tmp_path)) == {}
    wrap(tmp_path, text)
    assert leaks(scanner_of(known), tree_layers(tmp_path))


# what errors say


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scanner, list[Path]]:
    """Objects that cannot be read, or not wholly, and the canaries in them."""
    folder, known = tmp_path_factory.mktemp("bad"), Canaries()
    hu, label = draw(SHAPE, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dict(broken_objects(folder / "scratch", known))
        slices = planted_slices(folder / "scratch", known, "patient 0", hu, SHAPE)
        whole = {"CT": raw(slices[0]), **label_objects(known, "patient 0", label)}
        for name, data in whole.items():
            found |= malformed(data, known, name)
            found |= {f"{name} cut at {k}": data[:k] for k in range(0, len(data), 211)}
    paths = []
    for number, (name, data) in enumerate(found.items()):
        paths.append(folder / f"{number}_{known.text(name)}")
        paths[-1].write_bytes(data)
    return scanner_of(known), paths


def _attempts(path: Path, box: Sandbox | None) -> Iterator[Callable[[], object]]:
    """All that can be asked of an object, in this process or in the sandbox."""
    place, policy = Place(str(path)), ReadPolicy(burned_in="keep", non_volumes="keep")
    rule = NameRule(classes=tuple(CLASSES))
    volume = series(affine=SHAPE.affine_lps(), shape=SHAPE.shape)
    if box:
        yield lambda: [box.frame(ref) for ref in box.headers(place, "id", policy)]
        yield lambda: box.label_target(place)
        for kind in ("seg", "rtstruct", "nifti"):
            labelled = replace(volume, masks=(place,), mask_kind=kind)
            yield partial(box.labels, labelled, rule, "affine", "never")
        return
    grid = grid_of(volume)
    yield lambda: [read_frame(ref) for ref in read_headers(place, "id", policy)]
    yield lambda: label_target(parse(place).header)
    yield lambda: read_contours(parse(place).header, grid, rule)
    yield lambda: read_segments(parse(place).header, lambda n: np.zeros((48, 48)), grid, rule)


def _told(error: BaseException) -> bytes:
    """Everything that a log could hold of an error."""
    lines = [*traceback.format_exception(error), repr(error), repr(error.args)]
    return "\n".join(lines).encode("utf-8", "surrogateescape") + pickle.dumps(error)


@pytest.mark.parametrize("where", ["here", "sandbox"])
def test_no_error_tells_a_value(
    bad: tuple[Scanner, list[Path]],
    where: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    scanner, paths = bad
    told: list[tuple[str, list[str]]] = []
    caplog.set_level(logging.DEBUG)
    with Sandbox() if where == "sandbox" else nullcontext() as box, warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            for attempt in _attempts(path, box):
                try:
                    attempt()
                except SourceError as error:
                    told.append((error.code, sorted(scanner.hits(_told(error)))))
    assert [(code, hits) for code, hits in told if hits] == []
    codes = Counter(code for code, _ in told)
    assert codes.total() > 1000
    assert len(codes) > 18
    printed = "".join((*capfd.readouterr(), caplog.text)).encode("utf-8", "surrogateescape")
    assert scanner.hits(printed) == set()


def test_no_nifti_header_is_told(tmp_path: Path) -> None:
    known, grid = Canaries(), grid_of(series(affine=SHAPE.affine_lps(), shape=SHAPE.shape))
    path = tmp_path / f"{known.text('name')}.nii"
    write_mask(path, draw(SHAPE, 0)[1], SHAPE)
    whole, text, errors = path.read_bytes(), known.text("field").encode(), []
    for at in range(0, 348, 2):
        path.write_bytes(whole[:at] + text + whole[at + len(text) :])
        try:
            read_nifti_mask(path, grid)
        except LabelError as error:
            errors.append(_told(error))
    assert len(errors) > 50
    scanner = scanner_of(known)
    assert [told for told in errors if scanner.hits(told)] == []


def test_no_geometry_error_tells_an_identity() -> None:
    known, no = Canaries(), float("nan")
    keywords = ("patient_id", "series_uid", "frame_of_reference", "study_date", "series_split_key")
    given = {key: known.text(key) for key in keywords}
    plane = {"orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), "pixel_spacing": (1.0, 1.0)}

    def ref(z: float, name: str, **fields: Any) -> SliceRef:
        own = {"sop_uid": known.uid(f"{name} {z}"), "path": known.text(f"path of {name} {z}")}
        return slice_ref(**{**given, **own, **plane, "position": (0, 0, z), **fields})

    refs = [
        *(ref(z, "gap", series_uid=known.uid("gap")) for z in (0, 1, 2, 7, 8)),
        *(ref(z, "uneven", series_uid=known.uid("uneven")) for z in (0, 1, 2.5, 3.5)),
        *(ref(0, name, series_uid=known.uid("same place")) for name in "ab"),
        *(ref(z, "conflict", sop_uid=known.uid("conflict")) for z in (20, 30)),
        ref(no, "nonfinite"),
        ref(40, "orientation", orientation=(1.0, 0, 0, 1, 0, 0)),
        ref(50, "spacing", pixel_spacing=(0.0, 1.0)),
    ]
    _, refused = group_series(refs, ReadPolicy(gaps="reject"), lambda refs: False)
    assert {error.code for _, error in refused} == {
        *("MISSING_SLICES", "UNEVEN_SPACING", "DUP_POSITION", "DUP_CONFLICT"),
        *("GEOM_NONFINITE", "GEOM_BAD_IOP", "GEOM_BAD_SPACING"),
    }
    scanner = scanner_of(known)
    assert [error for _, error in refused if scanner.hits(_told(error))] == []

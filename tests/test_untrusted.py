"""Files of strangers: nothing in them is run, and none of them writes where it likes."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import stat
import sys
import tarfile
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from typer.testing import CliRunner

from launch.cli import app
from launch.dossier import write_dossier
from launch.new.proposal import _comment
from medpsp.config import ModelConfig
from medpsp.configio import load_config
from medpsp.deploy.mesh import write_meshes
from medpsp.deploy.modelfile import ModelFile
from medpsp.dicom.container import open_place, walk_objects
from medpsp.errors import CheckpointError, ConfigError, DicomError, ModelFileError
from medpsp.model.backbones import build_backbone
from medpsp.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from tests.riskycalls import risks

ROOT = Path(__file__).resolve().parent.parent

# code -------------------------------------------------------------------------------------------

ALLOWED = {
    ("launch/sbatch.py", "import submitit"): "its helpers; no result is read here",
    ("launch/submit.py", "import submitit"): "it pickles jobs into the run folder, "
    "which SLURM reads there",
    ("medpsp/model/backbones.py", "import pickle"): "the type of the error of a bad file",
    ("medpsp/train/checkpoint.py", "import pickle"): "the type of the error of a bad file",
    ("shards/build.py", "import ray"): "it pickles tasks between its own processes",
    ("shards/check.py", "import multiprocessing"): "a pool of our own processes",
    ("shards/loader.py", "import multiprocessing"): "a pipe to our own children",
    ("shards/loadworker.py", "import multiprocessing"): "a pipe to the parent",
    ("shards/loadworker.py", "import pickle"): "the type of an error",
    ("shards/loadworker.py", "multiprocessing.reduction.ForkingPickler.loads"): "an error that was "
    "pickled in the same line, to see whether it survives that",
    ("shards/planner.py", "import multiprocessing"): "a pool of our own processes",
}
"""All that is left, and why."""


def test_no_module_runs_what_a_file_says() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), risk)
        for place in ("medpsp", "launch", "shards", "slurm")
        for path in (ROOT / place).rglob("*.py")
        for risk in risks(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import pickle as p; p.load(f)", ["import pickle", "pickle.load"]),
        ("from pickle import loads as read; read(b)", ["import pickle", "pickle.loads"]),
        ("import joblib", ["import joblib"]),
        ("import shelve", ["import shelve"]),
        ("from marshal import loads", ["import marshal"]),
        ("import torch; torch.load(p)", ["torch.load of more than weights"]),
        ("import torch; torch.load(p, weights_only=False)", ["torch.load of more than weights"]),
        ("from torch import load; load(p)", ["torch.load of more than weights"]),
        ("import torch; torch.load(p, weights_only=True)", []),
        ("import timm; timm.models.load_state_dict(p)", ["timm.models.load_state_dict of more"]),
        ("import numpy as np; np.load(p, allow_pickle=True)", ["numpy.load of pickles"]),
        ("import numpy as np; np.load(p); np.load(p, allow_pickle=False)", []),
        ("import yaml; yaml.load(t, yaml.SafeLoader)", ["yaml.load"]),
        ("from yaml import unsafe_load; unsafe_load(t)", ["yaml.unsafe_load"]),
        ("import yaml; yaml.safe_load(t)", []),
        ("eval('1'); model.eval()", ["eval"]),
        ("exec(code)", ["exec"]),
        ("import os; os.system('ls')", ["os.system"]),
        ("import subprocess as s; s.run('ls', shell=True)", ["subprocess.run through a shell"]),
        ("import subprocess; subprocess.run(['ls'], check=True)", []),
        ("import tarfile; tarfile.open(p)", ["tarfile.open"]),
        ("archive.extractall(place)", ["archive.extractall"]),
        ("import zipfile; zipfile.ZipFile(p).extract(m)", ["zipfile.ZipFile(p).extract", "zip"]),
    ],
)
def test_the_search_finds_each_kind(line: str, said: list[str]) -> None:
    found = list(risks(line))
    assert len(found) == len(said)
    assert all(text.startswith(start) for text, start in zip(found, said, strict=True))


class Evil:
    """Pickled so that a folder appears when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_the_pickle_is_one_that_works(tmp_path: Path) -> None:
    torch.save({"model": Evil(tmp_path / "mark")}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_with_code_in_it_is_refused_in_one_line(tmp_path: Path, old: bool) -> None:
    """Its SHA-256 is right: whoever can write the file can write that as well."""
    state = TrainState(step=3, stage="a", best=0, score=0, model={})
    path = save_checkpoint(tmp_path, "step-00000003", {"model": {}}, state)
    evil = {"model": Evil(tmp_path / "mark")}
    torch.save(evil, path / "state.pt", _use_new_zipfile_serialization=not old)
    meta = json.loads((path / "meta.json").read_text())
    del meta["sha256"]
    whole = (path / "state.pt").read_bytes() + json.dumps(meta, sort_keys=True).encode()
    digest = hashlib.sha256(whole).hexdigest()
    (path / "meta.json").write_text(json.dumps({**meta, "sha256": digest}))
    with pytest.raises(CheckpointError, match=r"not a file of tensors .*do not use it") as caught:
        load_checkpoint(path, torch.device("cpu"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_with_code_in_them_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    torch.save({"conv1.weight": Evil(tmp_path / "mark")}, tmp_path / name)
    config = ModelConfig(backbone="resnet18", pretrained=tmp_path / name)
    with pytest.raises(ConfigError, match=r"not a file of weights .*\.safetensors") as caught:
        build_backbone(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()


def test_a_configuration_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for tag in ("python/object/apply:os.mkdir", "python/name:os.mkdir", "python/module:os"):
        path.write_text(f"out: !!{tag} [{tmp_path}/mark]\n")
        with pytest.raises(ConfigError, match="not YAML"):
            load_config(path)
        path.write_text("data: {archive: a, classes: [a, b]}\n")
        with pytest.raises(ConfigError):
            load_config(path, (f"out=!!{tag} [{tmp_path}/mark]",))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("place", ["inside", "../secret", "{root}/secret"])
def test_a_model_reads_no_file_beside_its_own_folder(tmp_path: Path, place: str) -> None:
    """ONNX lets a graph name files with its weights; one of its own folder is read."""
    (tmp_path / "in").mkdir()
    for name in ("secret", "in/inside"):
        (tmp_path / name).write_bytes(bytes(64))
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    told = {"location": place.format(root=tmp_path), "offset": "0", "length": "4"}
    for key, value in told.items():
        tensor.external_data.add(key=key, value=value)
    info = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [info], [tensor])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    (tmp_path / "in/m.onnx").write_bytes(model.SerializeToString())
    said = "not from `medpsp export`" if place == "inside" else "onnxruntime cannot load it"
    with pytest.raises(ModelFileError, match=said):
        ModelFile(tmp_path / "in/m.onnx")


# places -----------------------------------------------------------------------------------------

HOSTILE = (
    "../../up",
    "/absolute",
    "a/../../up",
    "..",
    "nul\0byte",
    "line\nbreak",
    "C:\\up",
    "~/up",
)


@contextmanager
def writes() -> Iterator[list[str]]:
    """Whatever this thread opens for writing, makes, links or removes meanwhile."""
    seen: list[str] = []
    alive, thread = [True], threading.get_ident()

    def hook(event: str, words: tuple[Any, ...]) -> None:
        if not alive or threading.get_ident() != thread:
            return
        changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        if event == "open" and isinstance(words[2], int) and words[2] & changing:
            seen.append(f"open {words[0]}")
        elif event in ("os.mkdir", "os.symlink", "os.link", "os.rename", "os.remove", "os.chmod"):
            seen.append(f"{event} {words}")

    sys.addaudithook(hook)  # there is no way to take one off
    try:
        yield seen
    finally:
        alive.clear()


def hostile_zip() -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for name in HOSTILE:
            with warnings.catch_warnings(action="ignore"):
                info = zipfile.ZipInfo("x")
            info.filename = name  # ZipInfo itself would cut it at the zero byte
            archive.writestr(info, name.encode())
        link = zipfile.ZipInfo("link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        pipe = zipfile.ZipInfo("pipe")
        pipe.create_system, pipe.external_attr = 3, (stat.S_IFIFO | 0o666) << 16
        archive.writestr(pipe, "x")
    return out.getvalue()


def hostile_tar() -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as archive:
        for name in HOSTILE:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
            info = tarfile.TarInfo("special")
            info.type, info.linkname = kind, "../../etc/passwd"
            archive.addfile(info)
        # a member below a link, which an unpacker would follow
        info = tarfile.TarInfo("special/inside")
        archive.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    ("make", "refused"), [(hostile_zip, 2), (hostile_tar, 4)], ids=["zip", "tar"]
)
def test_members_are_read_in_place_whatever_they_are_called(
    tmp_path: Path, make: Callable[[], bytes], refused: int
) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/archive").write_bytes(make())
    before = sorted(tmp_path.rglob("*"))
    given, codes = [], Counter[str]()
    with writes() as seen:
        for item in walk_objects(tmp_path / "deep/er"):
            try:
                if item.code:
                    raise DicomError(item.code, item.detail)
                given.append(open_place(item.place).read().decode())
            except DicomError as error:
                codes[error.code] += 1
    assert seen == []
    assert sorted(tmp_path.rglob("*")) == before
    assert [name.partition("\0")[0] for name in given] == [n.partition("\0")[0] for n in HOSTILE]
    empty = {"FILE_EMPTY": 1} if make is hostile_tar else {}
    assert codes == {"NOT_REGULAR": refused, "ARCHIVE_OPENED": 1, **empty}


def test_the_watch_for_writes_sees_them(tmp_path: Path) -> None:
    with writes() as seen:
        (tmp_path / "a").mkdir()
        (tmp_path / "a/b").write_text("x")
        (tmp_path / "a/c").symlink_to("b")
        (tmp_path / "a/b").read_text()
    (tmp_path / "a/c").unlink()
    assert len(seen) == 3


def test_a_million_members_are_listed_one_at_a_time(tmp_path: Path) -> None:
    """By count: 100,000 empty files in one tar are skipped without a file or a list of them."""
    block = tarfile.TarInfo("../../x").tobuf()
    (tmp_path / "many.tar").write_bytes(block * 100_000 + bytes(1024))
    listed = walk_objects(tmp_path)
    assert sum(1 for _ in listed) == 100_001
    assert [path.name for path in tmp_path.iterdir()] == ["many.tar"]


@pytest.mark.parametrize("name", [*HOSTILE, "<img src=x onerror=alert(1)>", "a" * 300, "日本/語"])
def test_surfaces_of_any_class_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    mask = np.zeros((4, 6, 6), np.uint8)
    mask[1:3, 2:4, 2:4] = 1
    files = write_meshes(tmp_path / "out/series-000", mask, np.eye(4), ["background", name])
    assert {path.parent for path in files} == {tmp_path / "out"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "out",
        *sorted(p.name for p in files),
    ]
    assert all(path.name.isprintable() and len(path.name) < 120 for path in files)


def test_a_stage_is_a_folder_name_and_a_voc_list_a_file_name(tmp_path: Path) -> None:
    tree = {"data": {"archive": "a", "classes": ["a", "b"]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    for name in ("../up", "/abs", "a/b", ".", "a\nb"):
        stage = yaml.safe_dump([{"name": name, "steps": 1, "lr": 0.1}], default_flow_style=True)
        with pytest.raises(ConfigError, match="name"):
            load_config(tmp_path / "c.yaml", (f"train.stages={' '.join(stage.split())}",))


# pages ------------------------------------------------------------------------------------------

XSS = ('"><script>alert(1)</script>', "<img src=x onerror=alert(1)>", "javascript:'onload='x")


@pytest.mark.parametrize("text", XSS)
def test_the_dossier_escapes_every_text(tmp_path: Path, text: str) -> None:
    from tests.test_dossier import known

    facts: Any = planted(copy.deepcopy(known()), text)
    write_dossier(tmp_path, facts)
    page = (tmp_path / "dossier.html").read_text()
    assert "alert(1)" in page or "onload" in page  # it is shown
    for tag in ("<script", "<img src=x", "onload='"):
        assert tag not in page.lower()
    json.loads((tmp_path / "sbom.cdx.json").read_text())


def planted(tree: Any, text: str) -> Any:
    """A copy whose texts, and names of classes, have a text behind them; digests stay."""
    if isinstance(tree, dict):
        return {
            key + text if "<" in key else key: planted(value, text) for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [planted(value, text) for value in tree]
    return tree + text if isinstance(tree, str) and len(tree) != 64 else tree


def test_a_proposal_cannot_be_given_keys_by_a_name() -> None:
    """Ends of lines of YAML that are none for most: U+0085, U+2028 and U+2029."""
    for end in ("\x85", "\u2028", "\u2029", "\n", "\r", "\x0b"):
        lines = list(_comment(f"names seen: liver{end}out: /elsewhere", ""))
        assert yaml.safe_load("\n".join(lines)) is None


def test_sbom_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["sbom", "--out", str(tmp_path / "s.json")])
    assert done.exit_code == 0
    assert json.loads((tmp_path / "s.json").read_text())["bomFormat"] == "CycloneDX"

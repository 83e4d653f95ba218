"""The command line: what it offers, and how it answers nonsense."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import onnx
import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from launch.cli import app
from launch.clihelp import ORDER
from launch.phantom import Phantom, draw, write_mask, write_series
from launch.plan import describe, plan_jobs
from launch.rundir import find_config, shipped_configs
from medpsp import __version__
from medpsp.config import BACKBONES, Config
from medpsp.configio import dump_yaml, load_config
from medpsp.deploy.inputs import GraphInput
from medpsp.types import Window

pytestmark = pytest.mark.usefixtures("own_handlers")
Make = Callable[..., Config]
HEAVY = ("torch", "ray", "zarr", "albumentations", "numpy", "pydantic", "submitit", "pydicom")

COMMANDS = {
    "new": ["archive", "--labels", "--out", "--key", "--index", "--most"],
    "shards": ["config", "overrides", "--step", "--part"],
    "check": ["config", "overrides", "--repair", "--quick"],
    "train": ["config", "overrides"],
    "evaluate": ["config", "overrides"],
    "export": ["config", "overrides"],
    "run": [
        *("config", "overrides", "--cluster", "--from", "--wait", "--no-wait"),
        *("--dry-run", "--no-dry-run"),
    ],
    "status": ["out", "--watch", "--no-watch"],
    "logs": ["out", "job"],
    "cancel": ["out"],
    "resume": ["out"],
    "sweep": ["config", "overrides", "--over", "--cluster", "--wait", "--no-wait"],
    "compare": ["runs", "--html"],
    "scale": ["config", "overrides", "--ranks", "--backbones", "--link-gb", "--cluster"],
    "measure": ["config", "overrides"],
    "demo": ["out", "overrides"],
    "report": ["config", "overrides"],
    "page": ["run"],
    "voc": ["config", "out", "overrides", "--bits"],
    "key new": ["path"],
    "predict": ["model", "source", "out", "--threads", "--format"],
    "watch": ["model", "inbox", "out", "--settle", "--every", "--once", "--threads", "--format"],
    "receive": [
        *("model", "out", "--port", "--host", "--aet", "--answer", "--threads", "--format"),
    ],
    "tensorrt": ["model", "out", "--least", "--most", "--batch", "--dla"],
    "sbom": ["--out"],
    "backbones": ["config", "overrides", "--height", "--width", "--classes"],
    "doctor": ["config", "overrides", "--cluster"],
    "config schema": [],
    "config list": [],
    "config show": ["config", "overrides"],
}

# name: (exit code, what the one line says, command); words in braces are keys of `places`.
NONSENSE = {
    "unknown configuration": (2, "config 'dmeo': .*did you mean 'demo'", "shards dmeo"),
    "not YAML": (2, r"not YAML \(line 2\)", "shards {not_yaml}"),
    "unknown key": (
        2,
        r"train\.batchsize: .*did you mean 'train.batch_size'",
        "train {c} train.batchsize=1",
    ),
    "bad override": (2, "override 'train.size': expected key=value", "train {c} train.size"),
    "out of range": (2, r"train\.batch_size", "train {c} train.batch_size=0"),
    "unknown backbone": (2, "did you mean 'resnet18'", "train {c} model.backbone=resnet81"),
    "ranks and batch": (2, "cannot be shared by 2", "train {c} train.ranks=2 train.batch_size=5"),
    "no labels folder": (2, "data.labels .*: no such folder", "shards {c} data.labels={root}/no"),
    "no key": (2, "data.key_file .*: cannot be read", "shards {c} data.key_file={root}/no"),
    "no validation": (2, "raise data.split.val", "shards {c} data.split.val=0"),
    "crosswalk in shards": (
        2,
        "lies inside the shards",
        "shards {c} data.crosswalk={out}/{number}/shards/x",
    ),
    "show nonsense": (2, "unknown key", "config show {c} nonsense=1"),
    "doctor of nothing": (2, "config 'dmeo': .*did you mean 'demo'", "doctor dmeo"),
    "doctor of no cluster": (2, "cluster 'nope': no such file", "doctor {c} --cluster nope"),
    "new of nothing": (2, "nowhere: no such folder", "new {root}/nowhere --out {root}/n.yaml"),
    "new without DICOM": (
        1,
        r"nothing DICOM in it, 2 of 2 files .*: 2 \.nii\.gz",
        "new {two}/masks --out {root}/n.yaml",
    ),
    "new with wrong labels": (
        2,
        "nothing in it belongs to the images; seen: 4 DICOM images",
        "new {dicom}/1 --labels {dicom}/3 --out {root}/n.yaml",
    ),
    "missing archive": (2, "no such folder", "shards {c} data.archive={root}/nowhere"),
    "empty archive": (1, "holds no file", "shards {c} data.archive={empty}"),
    "out below a file": (1, "out .*: cannot be written", "shards {c} out={file}/run"),
    "check before shards": (1, "no manifest.json; run `medpsp shards`", "check {c}"),
    "train before shards": (1, "no manifest.json; run `medpsp shards`", "train {c}"),
    "two ranks before shards": (1, "no manifest.json", "train {c} train.ranks=2"),
    "other classes": (1, r"made with other data\.classes", "train {made} data.classes=[a,b]"),
    "evaluate before train": (1, "run `medpsp train` first, which", "evaluate {made}"),
    "export before train": (1, "run `medpsp train` first", "export {made}"),
    "mask of another shape": (
        1,
        "4 MASK_GRID_MISMATCH",
        "shards {c} data.archive={two}/dicom data.labels={two}/masks",
    ),
    "chain on a missing archive": (
        2,
        "shards: archive .*no such folder",
        "run {c} data.archive={root}/nowhere",
    ),
    "chain with a wrong folder": (2, "shards: data.labels", "run {c} data.labels={root}/no"),
    "demo below a file": (1, r"cannot be written \(Not a directory\)", "demo {file}/demo"),
    "no model": (2, "model .*: no such file", "predict {root}/no.onnx {dicom} {out}/p"),
    "a model from elsewhere": (1, "not from `medpsp export`", "predict {foreign} {dicom} {out}/p"),
    "predict what": (
        2,
        "--format masks: expected some of seg",
        "predict {ours} {dicom} {out}/p --format masks",
    ),
    "a model that is none": (1, "is not an ONNX file", "predict {not_yaml} {dicom} {out}/p"),
    "predict what is not there": (
        2,
        "no: no such folder or file",
        "predict {ours} {root}/no {out}/p",
    ),
    "predict what is no DICOM": (
        1,
        r"nothing DICOM in it, 2 files: 2 \.nii\.gz; the model takes CT",
        "predict {ours} {two}/masks {out}/p",
    ),
    "shards of what is no DICOM": (
        1,
        r"data\.archive .*: nothing DICOM in it, 2 files: 2 \.nii\.gz; give the root",
        "shards {c} data.archive={two}/masks",
    ),
    "a setting as an option": (
        2,
        r"--steps: no such option; settings are written as train\.steps=3$",
        "train {c} --steps 3",
    ),
    "a setting like an option": (2, r"written as train\.batch_size=4$", "run {c} --batch-siz=4"),
    "an option that is nearly one": (2, "did you mean '--repair'", "check {c} --repiar"),
    "predict nothing": (1, "holds no file", "predict {ours} {empty} {out}/p"),
    "sbom below a file": (1, "Not a directory: ", "sbom --out {file}/s.json"),
    "predict below a file": (1, "Not a directory: ", "predict {ours} {dicom} {file}/p"),
}


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory,
    archive: Path,
    make_config: Make,
    made: Config,
    phantom: Phantom,
) -> dict[str, Path]:
    """Everything that the commands above name."""
    root = tmp_path_factory.mktemp("cli")
    names = ("out", "c.yaml", "made.yaml", "not.yaml", "empty", "file")
    out, c, whole, not_yaml, empty, file = (root / name for name in names)
    c.write_text(dump_yaml(make_config(archive, out)))
    whole.write_text(dump_yaml(made))
    not_yaml.write_text("a: b\n  c: [d\n")
    empty.mkdir()
    file.write_text("")
    two = root / "two"
    for number, spacing in ((1, 3.0), (3, 2.6)):  # patient 1 is all of val
        hu, label = draw(phantom, number)
        write_series(two / "dicom" / f"{number}", f"PHANTOM00{number}", hu, phantom)
        grid = Phantom(shape=(4, 40, 40), spacing=(5.0, spacing, spacing))
        write_mask(two / "masks" / f"PHANTOM00{number}.nii.gz", label[:, 4:44, 4:44], grid)
    foreign, ours = root / "foreign.onnx", root / "ours.onnx"
    write_identity(foreign, {})
    write_identity(
        ours,
        {
            "medpsp": json.dumps(
                {
                    "classes": ["a"],
                    "modalities": ["CT"],
                    "window": None,
                    "tile": {"size": [32, 32], "overlap": 0.5},
                    "input": GraphInput(
                        dtype="float32", windows=(Window(center=0.5, width=1),)
                    ).to_json(),
                }
            )
        },
    )
    return {
        "root": root,
        "out": out,
        "c": c,
        "made": whole,
        "not_yaml": not_yaml,
        "empty": empty,
        "file": file,
        "two": two,
        "foreign": foreign,
        "ours": ours,
        "dicom": two / "dicom",
    }


def write_identity(path: Path, metadata: dict[str, str]) -> None:
    """The smallest network: logits are the image, of one class."""
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    kind, shape = onnx.TensorProto.FLOAT, ["N", 1, "H", "W"]
    graph = onnx.helper.make_graph(
        [
            node("Identity", ["image"], ["logits"]),
            node("ArgMax", ["logits"], ["index"], axis=1, keepdims=0),
            node("Cast", ["index"], ["mask"], to=onnx.TensorProto.UINT8),
            node("Cast", ["index"], ["confidence"], to=kind),
        ],
        "identity",
        [info("image", kind, shape)],
        [
            info("mask", onnx.TensorProto.UINT8, ["N", "H", "W"]),
            info("confidence", kind, ["N", "H", "W"]),
            info("logits", kind, shape),
        ],
    )
    model = onnx.helper.make_model(
        graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 18)]
    )
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def answers(places: dict[str, Path]) -> dict[str, subprocess.CompletedProcess[str]]:
    """All of it, three processes at a time; those that share a run folder take turns."""
    turn = threading.Lock()

    def ask(item: tuple[int, str]) -> tuple[str, subprocess.CompletedProcess[str]]:
        number, name = item
        words = [word.format(**places, number=number) for word in NONSENSE[name][2].split()]
        if str(places["c"]) in words and not any(word.startswith("out=") for word in words):
            words.append(f"out={places['out']}/{number}")
        command = [sys.executable, "-m", "launch.cli", *words]
        with turn if str(places["made"]) in words else nullcontext():
            return name, subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=300
            )

    with ThreadPoolExecutor(3) as pool:
        return dict(pool.map(ask, enumerate(NONSENSE)))


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_ends_in_one_clear_line(
    name: str, answers: dict[str, subprocess.CompletedProcess[str]], places: dict[str, Path]
):
    code, text, _ = NONSENSE[name]
    done = answers[name]
    lines = done.stderr.splitlines()
    said = [line for line in lines if line.startswith("medpsp:")]
    assert len(said) == 1, done.stderr
    assert lines[-1] == said[0]
    assert re.search(text, said[0]), said[0]
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if "before shards" in name or name == "chain on a missing archive":
        assert not (places["out"] / str(list(NONSENSE).index(name))).exists()
    if code == 2 and not name.startswith("chain") and name != "no validation":
        assert len([line for line in lines if not line.startswith("scan ")]) == 1


def test_the_help_fits_80_columns_in_the_order_of_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    done, bare = (CliRunner().invoke(app, words) for words in (["--help"], []))
    assert (done.exit_code, bare.exit_code) == (0, 0)
    assert done.stdout == bare.stdout
    lines = done.stdout.partition("Commands:\n")[2].splitlines()
    assert [line for line in lines if "..." in line or len(line) > 80] == []
    assert [line.split()[0] for line in lines] == [name for name in ORDER if name != "measure"]


def test_the_version():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"medpsp {__version__}\n")


def test_commands_and_flags_are_frozen():
    """A rename breaks scripts: it needs a line in the change log, and a change here."""
    group = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        if inner is None:
            found[name] = flags(command)
        else:
            found |= {f"{name} {sub}": flags(leaf) for sub, leaf in inner.items()}
    assert found == COMMANDS


def flags(command: object) -> list[str]:
    names: list[str] = []
    for param in command.params:  # type: ignore[attr-defined]
        if param.param_type_name == "argument":
            names.append(param.name)
        else:
            names += [*param.opts, *param.secondary_opts]
    return names


def test_help_imports_nothing_heavy_for_any_command():
    calls = [["--help"], ["-h"], *([*name.split(), "--help"] for name in COMMANDS)]
    code = (
        "import sys, launch.cli\n"
        f"for words in {calls!r}:\n"
        "    sys.argv[1:] = words\n"
        "    try:\n        launch.cli.main()\n"
        "    except SystemExit as end:\n        assert end.code == 0, words\n"
        "    print('MODULES', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    texts = re.split("^MODULES.*$", done.stdout, flags=re.MULTILINE)
    modules = [set(line.split()) for line in re.findall("^MODULES.*$", done.stdout, re.MULTILINE)]
    assert len(modules) == len(calls)
    for text, words in zip(texts, calls, strict=False):
        assert "Usage:" in text
        assert all(word in text for word in words[:-1])
    assert modules[0] & set(HEAVY) == set()
    assert modules[-1] & set(HEAVY) <= {"pydantic"}  # typer reads types of arguments with it


@pytest.mark.parametrize(
    ("way", "asked", "spins"),
    [
        ("cli.main()", {}, "0"),  # commands, and ranks that torchrun starts
        ("jobs.run_command('train', Path('none.yaml'))", {}, "0"),  # submitit's processes
        ("cli.main()", {"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"),
        ("cli.main()", {"GOMP_SPINCOUNT": "1000"}, "1000"),
    ],
)
def test_threads_of_torch_sleep_at_barriers_unless_asked_not_to(
    way: str, asked: dict[str, str], spins: str
):
    code = (
        "import sys\nfrom contextlib import suppress\nfrom pathlib import Path\n"
        "from launch import cli, jobs\n"
        "sys.argv[1:] = ['config', 'list']\n"
        f"with suppress(SystemExit, cli.ConfigError):\n    {way}\n"
        "import torch\n"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env = {**kept, **asked, "OMP_DISPLAY_ENV": "VERBOSE"}  # libgomp says what it goes by
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said)) == {spins}


def test_a_dry_run_prints_the_plan_and_starts_nothing(places: dict[str, Path], tmp_path: Path):
    done = CliRunner().invoke(app, ["run", str(places["c"]), f"out={tmp_path}", "--dry-run"])
    config = load_config(places["c"], (f"out={tmp_path}",))
    assert done.exit_code == 0
    assert done.stdout == describe(plan_jobs(config), tmp_path / "config.yaml") + "\n"
    assert list(tmp_path.iterdir()) == []


def test_config_commands_print_what_others_can_read():
    run = CliRunner().invoke
    schema = json.loads(run(app, ["config", "schema"]).stdout)
    assert set(schema["properties"]) == set(Config.model_fields)
    assert run(app, ["config", "list"]).stdout.split() == shipped_configs()
    shown = yaml.safe_load(run(app, ["config", "show", "demo", "seed=5"]).stdout)
    expected = load_config(find_config("demo"), ("seed=5",))
    assert Config.model_validate(shown) == expected
    assert expected.seed == 5


def test_backbones_of_a_configuration(tmp_path: Path):
    tree = "data: {archive: a, classes: [x, y, z]}\nmodel: {head: shallow}\n"
    (tmp_path / "c.yaml").write_text(tree + "train: {size: [64, 96]}\n")
    done = CliRunner().invoke(app, ["backbones", str(tmp_path / "c.yaml"), "--width", "32"])
    assert done.exit_code == 0, done.output
    assert "PSPNet, shallow head, 3 classes, 64 x 32" in done.output


def test_backbones_have_a_row_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, ["backbones", "--height", "64", "--width", "64"])
    assert done.exit_code == 0
    for name in BACKBONES:
        assert re.search(rf"^{name} +(\d+\.\d\d +){{4}}\d+ +\d+( +[\d.]+){{2}}$", done.stdout, re.M)


def test_check_says_that_all_is_well_and_keeps_a_log(made: Config, places: dict[str, Path]):
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "check", str(places["made"])],
        capture_output=True,
        text=True,
        check=True,
    )
    *_, bar, end = done.stderr.splitlines()  # a slow one has more than one bar
    assert re.fullmatch(r"check 32/32 slices, [\d.]+ slices/s, ETA 0 s", bar)
    assert end == "check: every digest, slice and split is as the manifest says"
    assert done.stdout == ""
    assert end in (made.out / "logs" / "check.log").read_text()


def test_a_terminal_gets_a_bar_on_stderr_and_log_lines_above_it():
    code = (
        "import logging\n"
        "from launch.jobs import setup_logging\n"
        "from medpsp.progress import Bar\n"
        "setup_logging()\n"
        "with Bar('slicing', 4, 'slices') as bar:\n"
        "    bar.resume_at(2)\n"
        "    logging.getLogger('medpsp').info('a line of the log')\n"
        "    bar.advance(2, note='all done')\n"
        "print('the result')\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # the other end is closed
            pass
        out, _ = process.communicate()
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert process.returncode == 0
    assert out == "the result\n"
    lines = [line.strip() for line in re.split("[\r\n]+", text)]
    assert "a line of the log" in lines  # on a line of its own, not behind the bar
    last = [line for line in lines if line.startswith("slicing ") and "100%" in line][-1]
    assert "4/4" in last
    assert "slices/s" in last
    assert "all done" in lines[lines.index(last) + 1 :]  # below it

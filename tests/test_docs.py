"""The pages are true: every command on them runs, every key, code, tag and file on them exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.cli import app
from launch.configpage import config_markdown
from launch.phantom import Phantom, draw, write_archive, write_series
from launch.profile import Profile
from medpsp.config import Config
from medpsp.configio import dump_yaml, load_config
from medpsp.dicom.codes import CODES
from medpsp.identity import load_key
from tests.conftest import KEY
from tests.pages import LANGUAGES, PAGES, ROOT, blocks, commands, inline, outside_fences

GATES = "cpu_dice cpu_drop trt_dice trt_drop half_dice half_drop saturation latency".split()
SMALL = (
    "data.shard_slices=16",
    "data.max_reject_fraction=0.1",
    "model.backbone=timm/test_resnet",
    "model.psp_channels=16",
    "model.decoder_channels=16",
    "train.size=[48, 48]",
    "train.batch_size=4",
    "train.ranks=1",
    "train.stages=[{name: one, steps: 1, lr: 1.0e-3}, {name: two, steps: 2, lr: 1.0e-3}]",
    "train.log_every=1",
    "evaluate.bootstrap=100",
    "export.variants=[cpu]",
    "export.calibration_slices=2",
    "export.validation_slices=2",
    f"export.allow={{{', '.join(f'{gate}: a few steps' for gate in GATES)}}}",
)
"""Sizes with which the commands of the pages run, and a network that has learnt nothing."""
SUBSTITUTED = (
    ("make demo", f"medpsp demo runs/demo {shlex.join(SMALL)}"),  # what its recipe says
    ("medpsp run organs.yaml", f"medpsp run organs.yaml {shlex.join(SMALL)}"),
    # the file of the quickstart, whose commands have made the shards and trained
    ("medpsp run resnet18", "medpsp run my.yaml --from export"),
    ("/archive/", "../archive/"),
    ("runs/liver/sweep/*", "runs/liver"),
    ("--over train.steps=300", "--over train.clip_norm=0.5"),  # the file has stages of its own
    ("model.int8.trt.onnx kit/", "model.onnx kit/"),
    ("answers/", "answers/ --settle 0.5"),
    ("--answer PACS@localhost:104", "--port 0"),
)
"""Paths of a reader to those of the test, and sizes."""
UNTIL = {"medpsp watch": r": 1 series, 4 slices", "medpsp receive": "listening on 127.0.0.1:"}
"""Commands that go on for ever: what they say when they work; then they are asked to end."""
ELSEWHERE = {
    "make test": ".ci/run",
    "sudo apt install --no-install-recommends slurmctld slurmd slurm-client munge": ".ci/run",
    "tensorboard --logdir runs": "tests/test_tensorboard.py::tensorboard",
    "medpsp doctor my.yaml --cluster my-site.yaml": "tests/test_slurm.py::test_the_whole_chain",
    "medpsp run my.yaml --cluster my-site.yaml": "tests/test_slurm.py::test_the_whole_chain",
    "medpsp status runs/liver": "tests/test_slurm.py::test_the_whole_chain",
    "medpsp logs runs/liver train": "tests/test_slurm.py::test_the_whole_chain",
    "medpsp status runs/liver --watch": "tests/test_slurm.py::ends_well",
    "medpsp cancel runs/liver": "tests/test_slurm.py::"
    "test_zero_1_is_cancelled_resumed_and_leaves_out_a_node_without_the_shared_folder",
    "medpsp resume runs/liver": "tests/test_slurm.py::"
    "test_zero_1_is_cancelled_resumed_and_leaves_out_a_node_without_the_shared_folder",
    "medpsp sweep my.yaml --cluster my-site.yaml --over model.backbone=resnet18,convnext_tiny "
    "--over seed=0,1,2": "tests/test_slurm.py::test_a_sweep_over_backbones_ends_in_a_table",
    "medpsp scale my.yaml --cluster my-site.yaml --ranks 1,2,4": "tests/test_slurm.py::"
    "test_scale_at_one_and_two_ranks",
    "srun --ntasks-per-node=1 python -m launch.nodes runs/liver shards my.yaml": "tests/"
    "test_slurm.py::test_ray_on_two_nodes_of_an_allocation_makes_the_same_shards",
    "sudo python slurm/lab up": "tests/slurmlab.py::cluster",
    'eval "$(sudo python slurm/lab env)"': "tests/test_lab.py::"
    "test_nodes_with_namespaces_fail_and_heal_and_leave_nothing",
    "medpsp run my.yaml --cluster generic": "tests/test_slurm.py::test_the_whole_chain",
    "sudo python slurm/lab fail gpu1": "tests/test_lab.py::"
    "test_nodes_with_namespaces_fail_and_heal_and_leave_nothing",
    "sudo python slurm/lab down": "tests/slurmlab.py::cluster",
}
"""Commands that are not run here, and the function that runs them: all that needs a SLURM."""
ON_A_GPU = {"perf/mfu", "mem/peak_active_gib", "mem/peak_reserved_gib", "mem/alloc_retries"}
OF_SEVERAL = {"perf/slowest_rank", "val/case/median", "val/case/best"}
"""What a run of several ranks, or of several validation slices, has."""
FILES = (".json", ".html", ".csv", ".txt", ".onnx")
NO_CODES = {"MEDPSP_KEY"}
PHANTOM = Phantom(shape=(4, 48, 48))
COMMAND = """import functools, launch.cli, launch.demo as demo
demo.PATIENTS = 10
demo.Phantom = functools.partial(demo.Phantom, shape=(4, 48, 48))
launch.cli.main()
"""
"""`medpsp`, but that the archive of the demo is as small."""
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in PAGES}


def substituted(text: str) -> str:
    for name, value in SUBSTITUTED:
        text = text.replace(name, value)
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a folder for each page, which share the runs and the files that pages show."""
    root = tmp_path_factory.mktemp("docs")
    (root / "runs").mkdir()
    (root / "bin").mkdir()
    write_archives(root / "archive")
    program = root / "bin/medpsp"
    (root / "program.py").write_text(COMMAND)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {root}/program.py "$@"\n')
    program.chmod(0o755)
    files = {b.title: b.text for text in TEXTS.values() for b in blocks(text) if b.title}
    assert set(files) == {"my.yaml", "my-site.yaml"}
    (root / "my.yaml").write_text(substituted(files["my.yaml"]))
    files["my.yaml"] = dump_yaml(load_config(root / "my.yaml", SMALL))
    for page in TEXTS:
        folder = root / page
        folder.mkdir()
        if page != "README":
            (folder / "runs").symlink_to(root / "runs")
        for name, content in files.items():
            (folder / name).write_text(content)
        if "medpsp key new project.key" not in here(page):
            write_key(folder / "project.key")
    # other pages show what its commands have made
    (root / "runs/demo").symlink_to(root / "README/runs/demo")
    (root / "runs/organs").symlink_to(root / "README/runs/organs")
    return root


def here(page: str) -> list[str]:
    """Commands that run in the folder of a page: those that README has, too, run once, there."""
    known = commands(TEXTS["README"]) if page == "quickstart" else []
    return [c for c in commands(TEXTS[page]) if c not in (*ELSEWHERE, *known)]


def write_archives(root: Path) -> None:
    """Patients with masks, and a new one; one of the patients is in val, two are in test."""
    write_archive(root, 8, PHANTOM)
    (root / "dicom").rename(root / "ct")
    write_series(root / "new-patient", "NEW", draw(PHANTOM, 99)[0], PHANTOM)


def write_key(path: Path) -> None:
    """Always the same, so that each split has patients."""
    path.unlink(missing_ok=True)
    path.write_text(KEY + "\n")
    path.chmod(0o600)


def execute(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run to the end, or until it says what `UNTIL` waits for."""
    path = f"{folder.parent}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    line, said = command[-1], ""
    wanted = next((text for start, text in UNTIL.items() if line.startswith(start)), "")
    with subprocess.Popen(command, cwd=folder, env=env, **how) as process:
        if wanted:
            assert process.stdout
            while not re.search(wanted, said) and (more := process.stdout.readline()):
                said += more
            process.terminate()
        rest, _ = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, said + rest)


@pytest.fixture(scope="module")
def ran(place: Path) -> dict[str, list[subprocess.CompletedProcess[str]]]:
    """Every command and every piece of Python, page after page; a page ends where one fails."""
    done: dict[str, list[subprocess.CompletedProcess[str]]] = {page: [] for page in TEXTS}
    for page, text in TEXTS.items():
        shell = [["bash", "-c", substituted(c)] for c in here(page)]
        python = [[sys.executable, "-c", b.text] for b in blocks(text) if b.language == "python"]
        for command in (*shell, *python):
            done[page].append(execute(command, place / page))
            if done[page][-1].returncode:
                break
            if command[-1] == "medpsp key new project.key":
                assert len(load_key(place / page / "project.key")) == 64
                write_key(place / page / "project.key")
    return done


@pytest.mark.parametrize("page", TEXTS)
def test_every_command_runs(page: str, ran: dict[str, list[subprocess.CompletedProcess[str]]]):
    for done in ran[page]:
        assert done.returncode == 0, f"{done.args[-1]}\n{done.stdout}"
        assert "Traceback" not in done.stdout


def test_make_demo_is_the_command_that_stands_for_it():
    make = ["make", "--no-print-directory", "-n", "-o", ".venv/.ready", "demo"]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == ".venv/bin/medpsp demo runs/demo\n"
    assert (ROOT / ".ci/run").read_text().endswith("exec make test\n")


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_runs_elsewhere_runs_there(command: str):
    """Its subcommand and options, or what is installed, stand in the function that is named."""
    assert any(command in commands(text) for text in TEXTS.values()), "on no page any more"
    file, _, name = ELSEWHERE[command].partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    words = shlex.split(command.replace("eval", "").replace('"', "").strip("$() "))
    chosen = [word.partition("=")[0] for word in words if word.startswith("-")]
    if name:
        (text,) = (
            ast.get_source_segment(text, node) or ""
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and node.name == name
        )
        chosen += words[1:2] if words[0] == "medpsp" else []
        chosen += [w for w in ("up", "env", "fail", "down", "launch.nodes") if w in words]
        chosen = [word for word in chosen if word != "-m"]
        assert [word for word in chosen if f'"{word}' not in text] == []
    else:
        chosen += words if words[0] == "make" else words[words.index("install") + 2 :]
        assert [word for word in chosen if word not in text] == []


def test_commands_are_found_wherever_they_stand():
    text = "```sh\na \\\n  b  # told\n\n# all of it\nc '#1' x#y\n```\n```console\n$ d\nsaid\n```\n"
    assert commands(text + "```text\ne\n```\n") == ["a b", "c '#1' x#y", "d"]
    assert inline(text + "`f` ``g``") == ["f", "g"]


@pytest.mark.parametrize("page", TEXTS)
def test_no_command_hides_from_the_test(page: str):
    starts = r"^\s*(\$ )?(sudo |medpsp |make |python |pip |srun |tensorboard |apt |cp |docker )"
    for block in blocks(TEXTS[page]):
        assert block.language in LANGUAGES, block.text
        if block.language in ("text", "yaml"):
            assert not re.search(starts, block.text, re.MULTILINE), block.text
    bare = outside_fences(TEXTS[page])
    assert "```" not in bare
    assert not re.search(rf"^ {{4}}{starts[1:]}", bare, re.MULTILINE)


def test_inline_commands_and_targets_exist():
    group: Any = typer.main.get_command(app)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = 0
    for code in [code for text in TEXTS.values() for code in inline(text)]:
        words = code.split()
        if words[0] == "make":
            assert set(words[1:2]) <= set(targets), code
        if words[0] != "medpsp" or len(words) == 1 or not words[1][0].islower():
            continue
        leaf = group.commands.get(words[1])
        assert leaf, code
        if hasattr(leaf, "commands") and len(words) > 2:
            leaf = leaf.commands.get(words[2])
            assert leaf, code
        known = {"--help", *(option for param in leaf.params for option in param.opts)}
        assert {word for word in words if word.startswith("--")} <= known, code
        seen += 1
    assert seen > 40


@pytest.mark.parametrize("page", TEXTS)
def test_yaml_is_a_configuration(page: str):
    for block in blocks(TEXTS[page]):
        if block.language != "yaml":
            continue
        tree = yaml.safe_load(block.text)
        if "cpu" in tree:
            Profile.model_validate(tree)
        else:
            tree["data"] = {"archive": "a", "classes": ["a", "b"], **tree["data"]}
            Config.model_validate(tree)


def test_the_page_of_the_configuration_is_made_from_it():
    page = ROOT / "docs/configuration.md"
    assert page.read_text(encoding="utf-8") == config_markdown(), (
        "python -c 'from launch.configpage import *; print(config_markdown(), end=\"\")' "
        "> docs/configuration.md"
    )


def keys() -> dict[str, str]:
    """Every key by its whole name, and its meaning, as the page of the configuration has them."""
    found, section = {}, ""
    for line in TEXTS["configuration"].split("## Site profile")[0].splitlines():
        if heading := re.fullmatch(r"###? ([a-z]+\S*)", line):
            section = heading[1] + "."
        elif row := re.fullmatch(r"\| `(\w+)` \| .* \| ([^|]*) \|", line.replace("\\|", "/")):
            found[section + row[1]] = row[2]
    return found


def test_every_key_has_a_meaning_and_pages_name_no_other():
    known = keys()
    assert len(known) > 100
    assert [name for name, meaning in known.items() if not meaning] == []
    sections = "data|model|loss|train|evaluate|export"
    for page, text in TEXTS.items():
        for name in re.findall(rf"(?<![\w/`.])`?((?:{sections})(?:\.[a-z0-9_]+)+)", text):
            if name.endswith(FILES):
                continue
            plain = re.sub(rf"(export\.allow)\.({'|'.join(GATES)})$", r"\1", name)
            assert re.sub(r"\.\d+\.", "[].", plain) in known, f"{page}: {name}"


def test_codes_on_the_pages_are_known():
    named = {code for text in TEXTS.values() for code in inline(text)}
    named = {code for code in named if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", code)} - NO_CODES
    assert len(named) > 100
    assert named - set(CODES) == set()


def test_files_that_the_pages_name_are_there(
    place: Path, ran: dict[str, list[subprocess.CompletedProcess[str]]]
):
    for page in ("README", "index", "quickstart"):
        for code in [code for code in inline(TEXTS[page]) if code.startswith("runs/")]:
            name = code.replace("steps=300", "clip_norm=0.5")  # as in SUBSTITUTED
            assert (place / name).exists(), f"{page}: {name}"


def test_the_curves_that_the_page_explains_are_those_of_a_run(
    place: Path, ran: dict[str, list[subprocess.CompletedProcess[str]]]
):
    events = EventAccumulator(str(place / "runs/liver/tensorboard"))
    events.Reload()
    tags = events.Tags()
    found = {*tags["scalars"], *tags["images"], *tags["tensors"]} - {"stage/text_summary"}
    found = {tag for tag in found if re.match("(train|val|perf|mem|stage)/", tag)}
    codes = {code for code in inline(TEXTS["tensorboard"]) if "/" in code}
    told = (
        {code for code in codes if re.match("(train|val|perf|mem|stage)/", code)}
        - ON_A_GPU
        - OF_SEVERAL
    )
    assert told >= {"train/loss", "val/pr/CLASS"}
    assert {re.sub("(liver|kidney|lesion)$", "CLASS", tag) for tag in found} == told

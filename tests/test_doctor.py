"""`medpsp doctor`: what each row says, here and where something is wrong on purpose.

Nothing is patched where the real thing can be had: limits, mounts, frozen disks, broken packages.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.doctor import checks, gpu, machine, packages, places, rows, slurm
from launch.doctor.rows import Row, Verdict, note, ok, problem
from launch.doctor.steps import Step, run
from launch.profile import Profile
from medpsp.config import Config
from medpsp.configio import dump_yaml

ROOT = Path(__file__).resolve().parents[1]
Make = Callable[..., Config]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and other users take root")
BROKEN = {
    "submitit": "import ctypes; ctypes.string_at(0)",
    "onnxscript": "raise ImportError('libx.so: cannot open shared object file', name=__name__)",
    "pynetdicom": "raise ValueError('numpy.dtype size changed')",
    "imagecodecs": """
import importlib.machinery, importlib.util, os, sys
above = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
rest = [entry for entry in sys.path if entry and entry != above]
spec = importlib.machinery.PathFinder.find_spec("imagecodecs", rest)
real = sys.modules["imagecodecs"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real)
real.jpegls_decode = lambda *_, **__: os.abort()
""",
}


def package(folder: Path, name: str, text: str = "") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def metadata(folder: Path, name: str, version: str, *more: str) -> None:
    """An installed distribution without a file."""
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *more]
    (place / "METADATA").write_text("\n".join(lines) + "\n")


def alone(
    check: str, before: str = "", mount: tuple[str, Path] | None = None, **environment: str
) -> list[Row]:
    """Rows of a check in a process of its own, with limits, rights and mounts of its own."""
    code = (
        "import json, os, resource\nimport medpsp.identity\n"
        f"from launch.doctor import machine, places\n{before}\n"
        f"print(json.dumps([row.tree() for row in {check}]))"
    )
    command = [sys.executable, "-c", code]
    if mount:
        script = 'mount --make-rprivate / && mount -t tmpfs -o "$0" test "$1" && shift && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", script, mount[0], str(mount[1]), *command]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [rows.row_of(tree) for tree in json.loads(done.stdout)]


def read(text: str) -> dict[str, list[Row]]:
    """The report back to rows; its lines must be aligned, plain and short."""
    found: dict[str, list[list[str]]] = {}
    own: list[str] = []
    for line in text.splitlines()[:-1]:
        assert line.isascii()
        assert len(line) <= rows.WIDTH
        head, rest = line[:28], line[28:]
        if head.strip():
            own = [*head.split(maxsplit=0)[0].rsplit(maxsplit=1), rest, ""]
            found.setdefault(own[0], []).append(own)
        elif rest.startswith(("do: ", "    ")):
            own[3] = f"{own[3]} {rest[4:]}".strip()
        else:
            own[2] += f" {rest}"
    return {
        what: [Row(what, Verdict(verdict), said, todo) for _, verdict, said, todo in several]
        for what, several in found.items()
    }


def doctor(words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "launch.cli", "doctor", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 400)),
    )


@pytest.fixture(scope="module")
def config_file(archive: Path, make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor")
    path = root / "c.yaml"
    path.write_text(dump_yaml(make_config(archive, root / "out")))
    return path


@pytest.fixture(scope="module")
def fine(config_file: Path) -> subprocess.CompletedProcess[str]:
    """This machine, but for few open files."""
    words = [str(config_file), "train.engine=zero2"]
    return doctor(words, config_file.parent, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def ill(config_file: Path) -> subprocess.CompletedProcess[str]:
    """Much wrong at once."""
    root = config_file.parent / "ill"
    for name, text in BROKEN.items():
        package(root / "broken", name, text)
    package(root / "ros", "launch")
    program(root / "bin", "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library'; exit 18")
    (root / "none").mkdir()
    (root / "key").write_text("0123456789abcdef" * 4)
    (root / "key").chmod(0o640)
    words = ["train.compile=true", "data.archive=nowhere", f"data.key_file={root}/key"]
    return doctor(
        [str(config_file), *words, f"data.labels={root}/none", "--cluster", "generic"],
        root / "ros",
        PATH=str(root / "bin"),
        PYTHONPATH=f"{root}/broken:{ROOT}",
        OMP_NUM_THREADS="4096",
        GLOO_SOCKET_IFNAME="nope0",
    )


def test_a_machine_on_which_all_is_there(fine: subprocess.CompletedProcess[str]):
    found = read(fine.stdout)
    assert fine.stderr == ""
    several = [row for own in found.values() for row in own]
    bad = [row for row in several if row.verdict is Verdict.problem]
    assert [row.what for row in bad] == ["open files"], bad
    notes = sum(row.verdict is Verdict.note for row in several)
    assert fine.stdout.splitlines()[-1] == f"{len(several)} checks, problems: 1, notes: {notes}"
    assert fine.returncode == 1
    assert found["medpsp[shards]"][0].found.startswith("google-crc32c ")
    assert found["decoders"] == [
        ok("decoders", "all 17 transfer syntaxes: " + ", ".join(decoder_names()))
    ]
    assert found["gloo"] == [ok("gloo", "two ranks meet")]
    assert found["places"] == [ok("places", "out, archive, labels and index lie apart")]
    assert found["data.key_file"][0].verdict is Verdict.ok
    assert found["train.engine"][0].found.startswith("zero2, DeepSpeed ")
    assert re.match(r"shards \d+ KiB to \d+ KiB, checkpoints and", found["room"][0].found)
    assert found["threads"] == [ok("threads", "OMP_NUM_THREADS=1")]
    imported = found["imports"][0].found.split(", ")
    assert {"torch", "ray", "zarr", "deepspeed", "onnxruntime"} <= set(imported)
    assert found["open files"] == [
        problem(
            "open files",
            "200 for a process (ulimit -n)",
            "`ulimit -n 400` before the command raises that",
        )
    ]


def test_the_report_names_neither_host_nor_user(fine: subprocess.CompletedProcess[str]):
    for name in {os.uname().nodename, socket.getfqdn(), str(Path.home())} - {"localhost"}:
        assert name not in fine.stdout


def decoder_names() -> list[str]:
    from launch.doctor.decoders import NAMES
    from medpsp.dicom.codestream import CODECS
    from medpsp.dicom.decode import NATIVE

    assert set(NAMES) == {*NATIVE, *CODECS}
    return [NAMES[syntax] for syntax in (*NATIVE, *CODECS)]


ANSWERS = {
    "launch": [
        problem(
            "launch",
            "jobs and ranks that start here would import another one, {root}/ros/launch",
            "give the command from another folder: Python looks into the current one first",
        )
    ],
    "open files": [
        problem(
            "open files",
            "200 for a process (ulimit -n)",
            "`ulimit -n 400` before the command raises that",
        )
    ],
    "data.archive": [
        problem(
            "data.archive",
            "nowhere: no such folder",
            "set data.archive to where it lies, or mount it",
        )
    ],
    "data.labels": [
        problem(
            "data.labels",
            "{root}/none: holds no file; is it mounted?",
            "set data.labels to where it lies, or mount it",
        )
    ],
    "places": [note("places", "not checked", "see data.labels first")],
    "data.key_file": [
        problem("data.key_file", "{root}/key: mode 0640, expected 0600", "chmod 600 it")
    ],
    "SLURM": [
        problem(
            "SLURM",
            "no sbatch, srun, scontrol on the path",
            "submit from a machine that has them",
        )
    ],
    "GPU": [
        problem(
            "GPU",
            "nvidia-smi says: Failed to initialize NVML: Driver/library",
            "mend the driver; where it was updated, restart the machine",
        )
    ],
    "train.compile": [
        problem("train.compile", "no C++ compiler", "apt install g++, or train.compile=false")
    ],
}


@pytest.mark.parametrize("what", ANSWERS)
def test_what_is_wrong_is_said_with_what_to_do(
    ill: subprocess.CompletedProcess[str], config_file: Path, what: str
):
    def placed(row: Row) -> Row:
        root = rows.private(config_file.parent / "ill")
        return Row(row.what, row.verdict, row.found.replace("{root}", root), row.todo)

    private = {row: placed(row) for row in ANSWERS[what]}
    found = [
        Row(row.what, row.verdict, rows.private(row.found), row.todo)
        for row in read(ill.stdout)[what]
    ]
    assert found == list(private.values())


def test_an_ill_machine_gets_its_whole_report(ill: subprocess.CompletedProcess[str]):
    found = read(ill.stdout)
    assert ill.returncode == 1
    assert ill.stderr == ""
    assert [row for row in found["imports"] if row.verdict is Verdict.problem] == [
        problem(
            "imports",
            "onnxscript: cannot be imported (libx.so: cannot open shared object file)",
            "pip install --force-reinstall onnxscript",
        ),
        problem(
            "imports",
            "submitit: ends Python (SIGSEGV)",
            "pip install --force-reinstall 'submitit'; if it stays, libraries of LD_LIBRARY_PATH "
            "do not fit",
        ),
        problem(
            "imports",
            "pynetdicom: ValueError: numpy.dtype size changed",
            "pip install --force-reinstall 'pynetdicom'",
        ),
    ]
    assert [row.found.split(":")[0] for row in found["decoders"]] == [
        *("15 of 17 transfer syntaxes", "JPEG-LS Lossless", "JPEG-LS Near-lossless"),
    ]
    assert found["decoders"][1] == problem(
        "decoders",
        "JPEG-LS Lossless: DEC_CRASH: the decoder ended with -6",
        "pip install --force-reinstall imagecodecs",
    )
    names = ", ".join(sorted(name for _, name in socket.if_nameindex()))
    todo = f"`unset GLOO_SOCKET_IFNAME`, or take one of {names}"
    absent = "GLOO_SOCKET_IFNAME=nope0: there is no such interface here"
    assert found["interfaces"] == [problem("interfaces", absent, todo)]
    said = "ifa != nullptr. Unable to find address for: nope0"
    assert found["gloo"] == [problem("gloo", said, todo)]
    assert found["profile memory"][0].verdict is Verdict.ok
    cores = len(os.sched_getaffinity(0))
    if machine.cores_allowed() == cores:
        told = f"OMP_NUM_THREADS=4096, with {cores} cores"
        assert found["threads"] == [note("threads", told, f"`export OMP_NUM_THREADS={cores}`")]


# Steps: what happens to a check does not happen to the others.


def crashes() -> list[Row]:
    os.abort()


def hangs() -> list[Row]:
    time.sleep(600)
    return []


def fails() -> list[Row]:
    raise KeyError("nothing")


def prints() -> list[Row]:
    print("not a row")
    os.write(1, b"nor is this\n")
    return [ok("prints", f"by {os.getpid()}")]


def step(name: str, lane: str = "a", **more: Any) -> Step:
    return Step(what=name, call=f"{__name__}:{name}", lane=lane, **more)


def test_a_check_that_crashes_hangs_or_raises_costs_its_own_row():
    several = [
        step("prints"),
        step("crashes", crash="mend it"),
        step("prints"),
        step("hangs", seconds=0.5, silence="wake it", missed=Verdict.note),
        step("prints", needs="hangs"),
        step("fails"),
        step("prints", label="last"),
        step("prints", lane="b"),
    ]
    began = time.monotonic()
    found = {id(one): own for one, own in run(several)}
    assert time.monotonic() - began < 60
    told = [found[id(one)] for one in several]
    first, third, after, beside = (told[place][0] for place in (0, 2, 6, 7))
    assert {row.verdict for row in (first, third, after, beside)} == {Verdict.ok}
    assert len({first.found, third.found, after.found, beside.found}) == 4
    assert told[1] == [problem("crashes", "ends Python (SIGABRT)", "mend it")]
    assert told[3] == [note("hangs", "no answer within 0 s", "wake it")]
    assert told[4] == [note("prints", "not checked", "see hangs first")]
    assert told[5] == [problem("fails", "KeyError: 'nothing'", "mend that, and check again")]


def test_all_checks_together_have_an_end():
    several = [step("hangs", label="one"), step("prints")]
    found = [(one.what, own) for one, own in run(several, seconds=0.2)]
    todo = "see what did not answer before it"
    assert found == [
        ("hangs", [note("hangs", "one: not checked, 0.2 s were over", todo)]),
        ("prints", [note("prints", "not checked, 0.2 s were over", todo)]),
    ]


def test_no_process_can_be_started():
    import launch.doctor.steps  # noqa: F401 - before there are no files to open it with

    before = (
        "from launch.doctor.steps import Step, run\nimport selectors, subprocess\n"
        "used = len(os.listdir('/proc/self/fd')) - 1\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (used + 3, used + 3))\n"
    )
    check = "[row for _, own in run([Step(what='a', call='a:b', lane='a')]) for row in own]"
    assert alone(check, before) == [
        problem(
            "a",
            "no process can be started for it (Too many open files)",
            "raise the limits of processes and open files (ulimit -u, ulimit -n)",
        )
    ]


def test_a_torch_that_crashes_is_named_and_nothing_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package(tmp_path, "torch", BROKEN["submitit"])
    monkeypatch.syspath_prepend(str(tmp_path))
    several = [one for one in checks.steps_for(None, None) if one.lane == "torch"]
    found = {(one.what, one.label): own for one, own in run(several)}
    assert found.pop(("imports", "torch")) == [
        problem(
            "imports",
            "torch: ends Python (SIGSEGV)",
            "pip install --force-reinstall 'torch'; if it stays, libraries of LD_LIBRARY_PATH do "
            "not fit",
        )
    ]
    for (what, label), own in found.items():
        text = f"{label}: not checked" if label else "not checked"
        assert own == [note(what, text, "see torch first")]
    assert {what for what, _ in found} == {"imports", "gloo", "GPU and torch", "NCCL"}


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A disk on which whoever writes is held by the kernel, and cannot be killed."""
    image, place = tmp_path / "image", tmp_path / "frozen"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(16 * 2**20)
    for words in (
        ["mkfs.ext4", "-q", str(image)],
        ["mount", "-o", "loop", str(image), str(place)],
        ["fsfreeze", "-f", str(place)],
    ):
        known = shutil.which(words[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if (
            not known
            or subprocess.run([known, *words[1:]], capture_output=True, check=False).returncode
        ):
            subprocess.run(["umount", str(place)], capture_output=True, check=False)
            pytest.skip(f"{words[0]}: not allowed here")
    yield place
    subprocess.run(["fsfreeze", "-u", str(place)], check=True)
    for _ in range(100):
        if subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode == 0:
            break
        time.sleep(0.1)


@needs_root
def test_a_file_system_that_holds_its_processes(frozen: Path):
    arguments = {"out": str(frozen / "run")}
    call = "launch.doctor.places:run_row"
    held = Step(
        what="run folder",
        call=call,
        lane="a",
        arguments=arguments,
        seconds=1,
        silence=checks.DEAD,
    )
    began = time.monotonic()
    found = [own for _, own in run([held, step("prints")])]
    assert time.monotonic() - began < 30
    assert found[0] == [
        problem(
            "run folder",
            "no answer within 1 s",
            "is its file system there? A dead server holds whoever touches it, `df -h`, too",
        )
    ]
    assert found[1][0].verdict is Verdict.ok


# Packages.


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of distributions that are found before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_versions_that_are_too_old_or_missing(site: Path):
    metadata(site, "zarr", "2.18.3")
    metadata(site, "albumentations", "2.0.9")
    wanted = ["numpy>=2.0", "nosuchbase>=1", "zarr<4,>=3.1; extra == 'shards'"]
    wanted += ["nosuchshards>=2; extra == 'shards'", "albumentations==2.0.8; extra == 'train'"]
    wanted += ["nosuchtrain; extra == 'train'", "numpy>=2.0; extra == 'train'"]
    metadata(site, "medpsp", "9", *(f"Requires-Dist: {text}" for text in wanted))
    here = packages.version_of("numpy")
    assert packages.package_rows(["shards"]) == [
        problem("packages", "missing: nosuchbase", "pip install 'nosuchbase>=1'"),
        ok("packages", f"numpy {here}"),
        problem("medpsp[shards]", "missing: nosuchshards", "pip install 'medpsp[shards]'"),
        problem("medpsp[shards]", "zarr 2.18.3, expected <4,>=3.1", "pip install 'zarr<4,>=3.1'"),
        note(
            "medpsp[train]",
            "missing: nosuchtrain",
            "for `medpsp train`: pip install 'medpsp[train]'",
        ),
        problem(
            "medpsp[train]",
            "albumentations 2.0.9, expected ==2.0.8",
            "pip install 'albumentations==2.0.8'",
        ),
    ]
    (row,) = packages.tested_row()
    assert row.verdict is Verdict.note
    assert "zarr 2.18.3 (3." in row.found
    assert row.todo.startswith("nothing while all works; else install again with `--constraint")


def test_the_python(site: Path):
    assert packages.python_row()[0].verdict is Verdict.ok
    metadata(site, "medpsp", "9", "Requires-Python: >=9")
    (row,) = packages.python_row()
    assert row == problem(
        "Python",
        f"{sys.version.split()[0]}, expected >=9",
        "make a virtual environment with another Python",
    )


def test_another_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On PYTHONPATH as ROS 2 puts it; further back; and in the same folder."""
    ros = tmp_path / "ros"
    package(ros, "launch")
    monkeypatch.setenv("PYTHONPATH", str(ros))
    monkeypatch.chdir(tmp_path)
    (row,) = packages.launch_row()
    assert row.verdict is Verdict.problem
    assert row.todo.endswith("out of PYTHONPATH, for example with `unset PYTHONPATH`")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ros}")
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ros)])
    keep = "keep one of them in this environment: which is taken depends on the order"
    place = rows.private(ros / "launch")
    text = f"of medpsp; another one is further back on the path, {place}"
    assert packages.launch_row() == [note("launch", text, keep)]
    both = tmp_path / "both"
    metadata(both, "launch", "3.4.2")
    (both / "launch").symlink_to(ROOT / "launch")
    monkeypatch.setattr(sys, "path", [str(ROOT), str(both)])
    assert packages.launch_row() == [
        problem(
            "launch",
            "ROS 2's is in the same folder: files of one may have replaced those of the other",
            "install medpsp into a virtual environment of its own",
        )
    ]


# The machine.


def group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "memory", "cores", "tasks"),
    [
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/memory.max": "4294967296\n",
                "sys/fs/cgroup/job/cpu.max": "50000 100000\n",
                "sys/fs/cgroup/job/pids.max": "300\n",
                "sys/fs/cgroup/job/pids.current": "100\n",
            },
            *(2**32, 0.5, 200),
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n2:pids:/j\n1:memory:/j\n",
                "sys/fs/cgroup/memory/j/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "25000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/pids/j/pids.max": "max\n",
                "sys/fs/cgroup/pids/j/pids.current": "7\n",
            },
            *(2**30, 0.25, None),
        ),
        ({}, None, float(len(os.sched_getaffinity(0))), None),
    ],
)
def test_control_groups_of_both_versions(
    tmp_path: Path, files: dict[str, str], memory: int | None, cores: float, tasks: int | None
):
    from medpsp.machine import cores_allowed, memory_allowed, tasks_left

    root = group(tmp_path, files)
    found = (memory_allowed(root), cores_allowed(root), tasks_left(root))
    assert found == (memory, cores, tasks)
    total = "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n"
    group(root, {"proc/meminfo": total})
    (row,) = machine.memory_row(root)
    if memory == 2**32:
        assert row == note(
            "memory",
            "4 GiB (control group) of 64 GiB, 32 GiB available",
            "set data.memory_mib below that: programs see all of it",
        )
    if memory == 2**30:
        assert row == note(
            "memory",
            "1 GiB (control group) of 64 GiB, 32 GiB available",
            "enough to predict; a shard task alone may take 1472 MiB (data.decode_memory_mib)",
        )
    if tasks:
        (row,) = machine.tasks_row(root)
        assert row.verdict is Verdict.problem
        assert row.found.endswith(", 200 more in this control group")
        assert row.todo == (
            "raise the limit of the job or container (docker run --pids-limit=4096): Ray takes 200 "
            "for two workers"
        )


@needs_root
def test_limits_of_processes():
    half = "os.setuid(65534); resource.setrlimit(resource.RLIMIT_NPROC, ({0}, {0}))"
    todo = "raise it with `ulimit -u 4096`, or ask who runs this machine: Ray takes 200 for two"
    for limit, verdict in ((200, Verdict.problem), (900, Verdict.note)):
        (row,) = alone("machine.tasks_row()", half.format(limit))
        assert row.verdict is verdict
        assert row.found.startswith(f"{limit} processes and threads for this user (ulimit -u)")
        assert row.todo == f"{todo} workers"


def test_limits_of_a_process():
    before = (
        "limit = resource.setrlimit\nlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "limit(resource.RLIMIT_FSIZE, (2**20, 2**20))\nlimit(resource.RLIMIT_AS, (2**33, 2**33))\n"
        "machine.INFINIBAND = machine.Path('/')\nlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    )
    names = ("files_row", "written_row", "memory_row", "locked_row", "cores_row")
    calls = " + ".join(f"machine.{name}({'0' if name == 'cores_row' else ''})" for name in names)
    files, written, memory, locked, cores = alone(calls, before)
    assert files.todo == "ask who runs this machine for more, or lower train.loader_workers"
    assert written == problem(
        "file size", "1 MiB (ulimit -f)", "`ulimit -f unlimited`: shards and checkpoints are larger"
    )
    assert memory.found.startswith("8 GiB (ulimit -v) of ")
    assert memory.todo == (
        "`ulimit -v unlimited`: torch and CUDA reserve addresses that they never fill"
    )
    assert locked == note(
        "locked memory",
        "64 KiB (ulimit -l), and there is InfiniBand",
        "`ulimit -l unlimited`, or have it set for SLURM's jobs: NCCL registers its buffers",
    )
    seen = os.cpu_count()
    if seen and seen > 1:
        here = f"1 of the {seen} that programs see (affinity or control group)"
        assert cores == ok("cores", here)
        (more,) = alone("machine.cores_row(64)", before)
        assert more == note(
            "cores",
            f"{here}, and train.threads asks for 64 with all ranks",
            "set train.threads to 0: then the ranks divide the cores that are ours",
        )


def test_a_clock_that_is_behind():
    assert machine.clock_row(0.0) == [
        problem(
            "clock",
            "1970-01-01 00:00 UTC, before medpsp was installed here",
            "set it, or start NTP: SLURM and TLS refuse wrong times",
        )
    ]


def test_threads_that_are_no_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "all")
    assert machine.threads_row()[0] == note(
        "threads", "OMP_NUM_THREADS=all is no number", "unset OMP_NUM_THREADS"
    )


# Places.


@needs_root
def test_disks(tmp_path: Path):
    place, run_folder = tmp_path / "disk", f"places.run_row('{tmp_path}/disk/runs/a')"
    place.mkdir()
    mend = "mend its rights, or take another folder (out=FOLDER)"
    (row,) = alone(run_folder, mount=("ro,size=1m", place))
    assert row == problem(
        "run folder", f"{place}/runs/a: cannot be written (Read-only file system)", mend
    )
    full = f"open('{place}/x', 'wb').write(bytes(2**20))"
    (row,) = alone(run_folder, full, mount=("size=1m", place))
    said = "cannot be written (No space left on device)"
    assert row == problem("run folder", f"{place}/runs/a: {said}", mend)
    (row,) = alone(run_folder, mount=("size=64m", place))
    todo = "make room, at least 1 GiB; `df -h` shows disks"
    assert row == problem("run folder", f"{place}/runs/a: 64 MiB of 64 MiB free", todo)
    (row,) = alone("places.shm_row()", mount=("size=64m", places.SHM))
    assert row == note(
        "shared memory",
        "/dev/shm: 64 MiB of 64 MiB free",
        "enlarge it (docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm): Ray takes "
        "the disk in its place, NCCL may fail",
    )


@needs_root
def test_rights(tmp_path: Path):
    """As another user: mode bits do not bind root."""
    for above in (tmp_path, *tmp_path.parents[:3]):
        if above.name.startswith(("pytest", "popen", "test")):
            above.chmod(0o755)
    key, folder = tmp_path / "key", tmp_path / "archive"
    key.write_text("0123456789abcdef")
    key.chmod(0o600)
    folder.mkdir(mode=0o700)
    other = "os.setgroups([]); os.setuid(65534)"
    calls = f"places.key_row('{key}') + places.source_row('archive', '{folder}')"
    calls += f" + places.run_row('{tmp_path}/out') + places.run_row('{folder}/out')"
    ours = alone(calls, other)
    assert ours == [
        problem(
            "data.key_file",
            f"{key}: cannot be read (PermissionError)",
            "name the file that was made for these data; only if there is none yet, make one with "
            "`medpsp key new FILE`: another key gives other pseudonyms and splits",
        ),
        problem(
            "data.archive",
            f"{folder}: cannot be read (Permission denied)",
            "have its owner let this user read it",
        ),
        problem(
            "run folder",
            f"{tmp_path}/out: cannot be written (Permission denied)",
            "mend its rights, or take another folder (out=FOLDER)",
        ),
        problem(
            "run folder",
            f"{folder}/out: cannot be written (Permission denied)",
            "mend its rights, or take another folder (out=FOLDER)",
        ),
    ]


def test_a_file_in_the_place_of_a_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (row,) = places.run_row(str(tmp_path / "file"))
    assert row.found == f"{tmp_path}/file: a file, expected a folder"
    (row,) = places.source_row("archive", str(tmp_path / "file"))
    assert row.found == f"{tmp_path}/file: a file, expected a folder"


def test_a_server_with_another_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    (row,) = places.run_row(str(tmp_path))
    assert row.verdict is Verdict.problem
    assert row.found.endswith("; the clock of its server is +3600 s off ours")
    assert row.todo == "set up NTP on both: what is newest is decided by times of files"


def test_temporary_files(tmp_path: Path):
    gone = str(tmp_path / "gone")
    (row,) = alone("places.temp_row()", TMPDIR=gone)
    assert row.found == f"TMPDIR {rows.private(gone)} cannot be written; /tmp is taken in its place"
    assert row.todo == "set TMPDIR to a folder of your own with some GiB"


def test_the_sockets_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ray._private.utils import validate_socket_filepath

    most = places.LIMIT - len(places.SESSION)
    validate_socket_filepath("/" + "x" * (most - 1) + places.SESSION)
    with pytest.raises(OSError, match="107"):
        validate_socket_filepath("/" + "x" * most + places.SESSION)
    long = tmp_path / ("x" * most)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    assert places.ray_row() == [
        problem(
            "Ray",
            f"its folder has a path of {len(str(long))} bytes, and its sockets leave room for "
            f"{most}",
            "set RAY_TMPDIR to a short path with room, such as /tmp",
        )
    ]


@pytest.mark.parametrize(
    ("text", "found", "todo"),
    [
        (None, "no key", "make one with `medpsp key new FILE` and name it, or set MEDPSP_KEY. "),
        ("short", "{key}: 5 bytes, expected at least 16", "make one with `medpsp key new FILE`"),
    ],
)
def test_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, found: str, todo: str
):
    monkeypatch.delenv("MEDPSP_KEY", raising=False)
    key = tmp_path / "key"
    if text:
        key.write_text(text)
        key.chmod(0o600)
    (row,) = places.key_row(str(key) if text else None)
    assert row.verdict is Verdict.problem
    assert row.found == found.format(key=key)
    assert row.todo.startswith(todo)


# GPU, SLURM, and what a configuration asks for.


def test_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "nvidia-smi", "echo 'GPU A, 550.54, 81559, 81000\nGPU B, 550.54, 81559, 90'")
    assert gpu.driver_row() == [
        ok("GPU", "driver 550.54"),
        ok("GPU", "GPU A, 79 of 80 GiB free"),
        note(
            "GPU",
            "GPU B, 0 of 80 GiB free",
            "`nvidia-smi` shows whose processes these are; CUDA_VISIBLE_DEVICES takes others",
        ),
    ]
    import torch

    if not torch.cuda.is_available():
        (row,) = gpu.torch_row(0, "")
        assert row.verdict is Verdict.problem
        assert row.todo.startswith("a driver for CUDA") or "from PyPI" in row.todo
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        hidden = "`unset CUDA_VISIBLE_DEVICES`, if training is to use them"
        said = "CUDA_VISIBLE_DEVICES hides all GPUs"
        assert gpu.torch_row(0, "") == [note("GPU and torch", said, hidden)]
    monkeypatch.setattr(gpu, "ASK_S", 0.3)
    program(tmp_path, "nvidia-smi", "exec sleep 600")
    assert gpu.driver_row() == [
        problem(
            "GPU",
            "nvidia-smi: no answer within 0 s",
            "restart the machine: the driver or a GPU hangs (`dmesg | grep -i xid` shows why)",
        )
    ]


@needs_root
def test_a_machine_without_loopback():
    code = (
        "import json\nfrom launch.doctor.gpu import gloo_row\n"
        "print(json.dumps([row.tree() for row in gloo_row()]))"
    )
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = [rows.row_of(tree) for tree in json.loads(done.stdout)]
    assert row.verdict is Verdict.problem
    assert row.todo == (
        "`ip link set lo up`, and let processes of this user connect there: training needs it"
    )


PARTITIONS = """\
PartitionName=cpu AllowGroups=ALL Default=YES MaxNodes=UNLIMITED MaxTime=1-02:00:00 State=UP \
TotalCPUs=64 TotalNodes=2
PartitionName=gpu Default=NO MaxTime=UNLIMITED State=DOWN TotalNodes=3
"""


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("sbatch", "srun"):
        program(tmp_path, name, "exit 1")
    (row,) = slurm.slurm_rows(None, {})
    assert row == note("SLURM", "no scontrol on the path", slurm.NO_SLURM)
    (tmp_path / "text").write_text(PARTITIONS)
    program(tmp_path, "scontrol", f"exec /bin/cat {tmp_path}/text")
    site = Profile.model_validate({"gpu": {"partition": "gpu"}}).model_dump(mode="json")
    assert slurm.slurm_rows(site, {"cpu": 1561, "gpu": 10}) == [
        ok("SLURM", "partitions cpu* (2 nodes), gpu (3 nodes, not up)"),
        problem(
            "profile cpu",
            "a job asks 1561 min, partition cpu gives 1560",
            "set cpu.minutes, or minutes of the job, to less",
        ),
        problem(
            "profile gpu",
            "partition gpu is not up",
            "ask who runs the cluster, or set gpu.partition to one of cpu, gpu",
        ),
    ]
    site["gpu"]["partition"] = "fat"
    assert slurm.slurm_rows(site, {"cpu": 1560, "gpu": 10})[1:] == [
        ok("profile cpu", "partition cpu"),
        problem(
            "profile gpu",
            "partition fat, which is not there",
            "set gpu.partition to one of cpu, gpu",
        ),
    ]
    todo = "`scontrol ping` says more; is slurm.conf (SLURM_CONF) the cluster's, is munged up?"
    program(tmp_path, "scontrol", "exit 1")
    said = "its programs are there, no controller answers"
    assert slurm.slurm_rows(None, {}) == [note("SLURM", said, todo)]
    monkeypatch.setattr(slurm, "SLURM_S", 0.3)
    program(tmp_path, "scontrol", "exec /bin/sleep 600")
    said = "its programs are there, no answer within 0 s"
    assert slurm.slurm_rows(site, {}) == [problem("SLURM", said, todo)]


def test_what_a_configuration_asks_for(config_file: Path, tmp_path: Path):
    from launch.doctor.asked import engine_rows, memory_row, places_row, room_row
    from medpsp.configio import load_config

    def tree(*words: str) -> dict[str, Any]:
        asked: dict[str, Any] = json.loads(load_config(config_file, words).model_dump_json())
        return asked

    assert engine_rows(tree("train.engine=zero1"), None) == [
        problem(
            "train.engine",
            "zero1: no DeepSpeed here",
            "pip install 'medpsp[train]', or train.engine=ddp",
        )
    ]
    (row,) = engine_rows(tree("train.engine=zero1", "train.precision=fp64"), "1")
    assert (row.verdict, row.todo) == (Verdict.problem, "train.engine=ddp")
    (row,) = memory_row(tree("data.workers=100000"))
    assert row.verdict is Verdict.note
    assert re.match(r"set data.memory_mib to at most \d+, or lower data.workers", row.todo)
    (row,) = memory_row(tree("data.ray_address=127.0.0.1:9"))
    assert row.found.startswith("data.ray_address 127.0.0.1:9: no Ray cluster answers there")
    (row,) = places_row(tree(f"out={tree()['data']['archive']}/out"))
    assert (row.verdict, row.todo) == (Verdict.problem, "take a folder outside it")
    with (tmp_path / "IM1").open("wb") as file:
        file.truncate(15 * 2**40)  # a hole
    small = ("model.backbone=timm/test_resnet", f"data.archive={tmp_path}")
    (row,) = room_row(tree(*small))
    assert row.verdict is Verdict.problem
    assert re.match(r"shards \d+ GiB to 15360 GiB, checkpoints and the rest 1 GiB; ", row.found)
    assert re.match(r"make room for \d+ GiB more, or set out to a folder elsewhere", row.todo)


def test_what_is_private(monkeypatch: pytest.MonkeyPatch):
    import pwd

    user, host = pwd.getpwuid(os.getuid()).pw_name, os.uname().nodename
    monkeypatch.setenv("HOME", "/homes/x")
    told = rows.private(f"/homes/x/venv: /scratch/{user}/tmp is not on {host}\n of /homes/xy")
    assert told == "~/venv: /scratch/$USER/tmp is not on $HOST of /homes/xy"

"""A decoder that dies, spins, eats memory or is orphaned costs one object, with a code."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medpsp.dicom import sandbox
from medpsp.dicom.read import read_frame, read_headers
from medpsp.dicom.sandbox import Sandbox, SandboxPool
from medpsp.dicom.wire import receive, send
from medpsp.errors import DicomError, SourceError
from medpsp.types import Place, ReadPolicy, SliceRef
from tests.encoded import write_object

POLICY = ReadPolicy()
VALUES = np.arange(40 * 36, dtype="<u2").reshape(40, 36)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(write_object(tmp_path / "f", VALUES, PixelPaddingValue=7)))


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    """One whose child knows a task more, ``run``, which runs the Python that it is given."""

    def popen(command: list[str], **how: Any) -> Any:
        task = "\nimport os, medpsp.dicom.tasks as t\ndef run(code):\n    exec(code, globals())\n"
        start, call = command[-1].rsplit("; ", 1)
        hook = f"{start}{task}    return None, []\nt.TASKS['run'] = run\n{call}"
        return subprocess.Popen([*command[:-1], hook], **how)

    with pytest.MonkeyPatch.context() as patch, Sandbox(seconds=1, memory_mib=256) as made:
        named = {**vars(subprocess), "Popen": popen}
        patch.setattr(sandbox, "subprocess", SimpleNamespace(**named))
        yield made


def pid_of(box: Sandbox) -> int:
    assert box._child
    return box._child.pid


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(SourceError) as caught:
        action()
    return caught.value.code


def first(box: Sandbox, place: Place) -> SliceRef:
    (ref,) = box.headers(place, "id", POLICY)
    return ref


def test_the_child_says_what_we_would_say(box: Sandbox, place: Place) -> None:
    assert box.headers(place, "id", POLICY) == read_headers(place, "id", POLICY)
    there, here = box.frame(first(box, place)), read_frame(first(box, place))
    assert there.values.dtype == here.values.dtype
    np.testing.assert_array_equal(there.values, here.values)
    assert there.padding is not None
    np.testing.assert_array_equal(there.padding, here.padding)
    assert np.argwhere(there.padding).tolist() == [[0, 7]]


@pytest.mark.parametrize(
    ("code", "reason", "survives"),
    [
        ("os.abort()", "DEC_CRASH", False),  # what GDCM does
        ("os.kill(os.getpid(), 11)", "DEC_CRASH", False),
        ("os.kill(os.getpid(), 9)", "DEC_OOM", False),  # what the kernel does
        ("os._exit(3)", "DEC_CRASH", False),
        ("raise SystemExit", "DEC_CRASH", False),
        ("while True: pass", "DEC_TIMEOUT", False),
        ("bytearray(2**29)", "DEC_OOM", True),  # 512 MiB, 256 are allowed
        ("raise type('Panic', (BaseException,), {})", "DEC_ERROR", True),  # what Rust does
        ("f = lambda: f(); f()", "HDR_DEPTH", True),
        ("int('CANARY')", "DEC_ERROR", True),
    ],
)
def test_what_goes_wrong_has_a_code_and_the_next_call_works(
    box: Sandbox, place: Place, code: str, reason: str, survives: bool
) -> None:
    ref = first(box, place)
    child = pid_of(box)
    with pytest.raises(DicomError) as caught:
        box.call("run", code=code)
    assert caught.value.code == reason
    assert "CANARY" not in repr(caught.value)
    np.testing.assert_array_equal(box.frame(ref).values, VALUES)
    assert (pid_of(box) == child) == survives


def test_what_a_codec_prints_is_no_answer(box: Sandbox) -> None:
    assert box.call("run", code="print('x' * 9999, flush=True); os.write(1, b'y')") == (None, [])


def test_killed_while_we_wait(box: Sandbox, place: Place) -> None:
    ref = first(box, place)
    os.kill(pid_of(box), signal.SIGSTOP)
    killer = threading.Timer(0.1, os.kill, (pid_of(box), signal.SIGKILL))
    killer.start()
    assert code_of(lambda: box.frame(ref)) == "DEC_OOM"
    np.testing.assert_array_equal(box.frame(ref).values, VALUES)


def test_killed_between_calls(box: Sandbox, place: Place) -> None:
    ref = first(box, place)
    assert box._child
    box._child.kill()
    box._child.wait()
    np.testing.assert_array_equal(box.frame(ref).values, VALUES)


def test_a_child_that_hangs_without_using_the_cpu(
    box: Sandbox, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = first(box, place)
    child = pid_of(box)
    os.kill(child, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        past = SimpleNamespace(monotonic=lambda: time.monotonic() - 1000)
        patch.setattr(sandbox, "time", past)
        assert code_of(lambda: box.frame(ref)) == "DEC_TIMEOUT"
    assert not Path(f"/proc/{child}").exists()
    np.testing.assert_array_equal(box.frame(ref).values, VALUES)


def test_ctrl_c_leaves_no_answer_for_the_next_question(
    box: Sandbox, place: Place, tmp_path: Path
) -> None:
    other = Place(str(write_object(tmp_path / "g", VALUES + 1)))
    wanted, ref = first(box, other), first(box, place)
    child = pid_of(box)
    os.kill(child, signal.SIGINT)  # it goes to the whole group, and children leave it to us
    os.kill(child, signal.SIGSTOP)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            box.frame(ref)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not Path(f"/proc/{child}").exists()
    np.testing.assert_array_equal(box.frame(wanted).values, VALUES + 1)


def test_a_child_ignores_ctrl_c(box: Sandbox, place: Place) -> None:
    ref = first(box, place)
    child = pid_of(box)
    os.kill(child, signal.SIGINT)
    np.testing.assert_array_equal(box.frame(ref).values, VALUES)
    assert pid_of(box) == child


def test_the_child_of_a_killed_parent_ends(place: Place) -> None:
    code = (
        "import sys\n"
        "from medpsp.dicom.sandbox import Sandbox\n"
        "from medpsp.types import Place, ReadPolicy\n"
        "box = Sandbox()\n"
        f"box.headers(Place({place.path!r}), '', ReadPolicy())\n"
        "print(box._child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as parent:
        assert parent.stdout
        watched = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        assert select.select([watched], [], [], 20)[0], "an orphan"
    os.close(watched)


def test_a_fork_has_a_child_of_its_own(box: Sandbox, place: Place) -> None:
    ref = first(box, place)
    child = pid_of(box)
    forked = os.fork()
    if not forked:
        right = (box.frame(ref).values == VALUES).all() and pid_of(box) != child
        box.close()
        os._exit(0 if right else 1)
    assert os.waitpid(forked, 0)[1] == 0
    np.testing.assert_array_equal(box.frame(ref).values, VALUES)
    assert pid_of(box) == child


def test_names_that_are_no_utf_8(box: Sandbox, place: Place, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff\xfe \n"
    os.rename(place.path, odd)
    ref = first(box, Place(os.fsdecode(odd)))
    assert os.fsencode(ref.path) == odd
    np.testing.assert_array_equal(box.frame(ref).values, VALUES)


def test_modules_of_the_current_folder_are_not_imported(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(5)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    with Sandbox() as box:
        assert len(box.headers(place, "id", POLICY)) == 1


def test_a_pool_answers_in_order_and_compares_pixels(place: Place, tmp_path: Path) -> None:
    same = Place(str(write_object(tmp_path / "g", VALUES)))
    other = Place(str(write_object(tmp_path / "h", VALUES + 1)))

    def read(box: Sandbox, place: Place) -> SliceRef | str:
        try:
            return first(box, place)
        except SourceError as error:
            return error.code

    places = [place, same, Place(str(tmp_path / "gone")), other]
    with SandboxPool(2) as pool:
        answers = list(pool.map(read, places))
        assert [item for item, _ in answers] == places
        one, two, gone, three = (answer for _, answer in answers)
        assert gone == "FILE_UNREADABLE"
        assert isinstance(one, SliceRef)
        assert isinstance(two, SliceRef)
        assert isinstance(three, SliceRef)
        assert pool.same_pixels([one, two])
        assert not pool.same_pixels([one, three])
        Path(same.path).write_bytes(b"")
        assert not pool.same_pixels([one, two])


@pytest.mark.parametrize("dtype", ["?", "u1", "<i2", ">i2", "<f4", "<f8", "<u4", "<i8"])
def test_arrays_cross_the_pipe(dtype: str) -> None:
    arrays = [np.arange(6).reshape(2, 3).astype(dtype), np.empty((0, 4), dtype)]
    pipe = io.BytesIO()
    send(pipe, {"a": [1, None, "\udcff"]}, [arrays[0].T, arrays[1]])
    pipe.seek(0)
    tree, found = receive(pipe)
    assert tree == {"a": [1, None, "\udcff"]}
    np.testing.assert_array_equal(found[0], arrays[0].T)
    assert found[1].shape == (0, 4)


@pytest.mark.parametrize(
    "data",
    [
        *(
            len(text).to_bytes(8, "little") + b"\1\0\0\0" + text + bytes(12)
            for text in (
                b'["ok", [["<i2", [-2, -3]]]]',
                b'["ok", [["<i2", ["a"]]]]',
                b'["ok", [["<i2", [1.5, 4]]]]',
                b'["ok", [[["x"], [2]]]]',
                b'["ok", [3]]',
                b'["ok", 5]',
                b"[" * 100_000,
            )
        ),
        b"",
        b"\x05",
        b"\xff" * 12,
        b"\4\0\0\0\0\0\0\0\0\0\0\0nope",
        b'\x2a\0\0\0\0\0\0\0\1\0\0\0[0, [["|O8", [1]], ["<i2", [99999999]] ]  ]',
    ],
)
def test_nonsense_on_the_pipe_is_the_end(data: bytes) -> None:
    with pytest.raises(EOFError):
        receive(io.BytesIO(data))

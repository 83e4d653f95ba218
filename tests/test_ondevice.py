"""`medpsp watch` and `medpsp receive`, over real sockets and with real processes.

The network is made by hand: class 1 above 40.5 HU and class 2 above 160.5 HU in the window 40/400.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import pydicom
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.dul import DULServiceProvider
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    CTImageStorage,
    MRImageStorage,
    SegmentationStorage,
    Verification,
)
from pynetdicom.transport import AssociationSocket

from launch.ondevice import predict_source
from launch.phantom import Phantom, draw, to_mr, write_series
from medpsp.deploy import dicomnet, receive, sender, watch
from medpsp.deploy.answers import Format
from medpsp.deploy.dicomnet import Peer
from medpsp.deploy.inputs import GraphInput
from medpsp.deploy.jobs import owned
from medpsp.deploy.predict import Predictor
from medpsp.deploy.receive import Listen, Receiver
from medpsp.deploy.watch import Watch, stamps_of
from medpsp.errors import ConfigError

LOW, HIGH = (40.5 + 160) / 400, (160.5 + 160) / 400
METADATA = {
    "classes": ["background", "organ", "bone"],
    "modalities": ["CT"],
    "window": None,
    "tile": {"size": [64, 64], "overlap": 0.5},
    "input": GraphInput().to_json(),
    "axes": [[0, -1], [1, -1], [2, 1]],  # as nibabel's identity lies, in LPS
}
PATIENT = "Doe-Jane"
CT = Phantom(shape=(4, 48, 48))
SECONDS = 120
"""Longest wait for anything."""


def expected(hu: np.ndarray) -> np.ndarray:
    return (hu > 40.5).astype(np.uint8) + (hu > 160.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits 0, x - LOW and 2 x - LOW - HIGH of the shown x, as `medpsp export` names them."""
    path = tmp_path_factory.mktemp("model") / "lines.onnx"
    numbers = {
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "three": np.array([3], np.int64),
        "slope": np.array([0, 1, 2], np.float32).reshape(3, 1, 1, 1),
        "shift": np.array([0, -LOW, -LOW - HIGH], np.float32),
        "least": np.float32(0),
        "most": np.float32(1),
    }
    nodes = [
        ("Cast", ["image"], "values", {"to": TensorProto.FLOAT}),
        ("Slice", ["window", "zero", "one", "two"], "low_", {}),
        ("Slice", ["window", "one", "two", "two"], "width_", {}),
        ("Unsqueeze", ["low_", "three"], "low", {}),
        ("Unsqueeze", ["width_", "three"], "width", {}),
        ("Sub", ["values", "low"], "above", {}),
        ("Div", ["above", "width"], "share", {}),
        ("Clip", ["share", "least", "most"], "shown", {}),
        ("Conv", ["shown", "slope", "shift"], "logits", {}),
        ("ArgMax", ["logits"], "best", {"axis": 1, "keepdims": 0}),
        ("Cast", ["best"], "mask", {"to": TensorProto.UINT8}),
        ("Softmax", ["logits"], "shares", {"axis": 1}),
        ("ReduceMax", ["shares", "one"], "confidence", {"keepdims": 0}),
    ]
    size = ["N", "H", "W"]
    given = [
        helper.make_tensor_value_info("image", TensorProto.INT16, ["N", 1, "H", "W"]),
        helper.make_tensor_value_info("window", TensorProto.FLOAT, ["N", 1, 3]),
    ]
    made = [
        helper.make_tensor_value_info("mask", TensorProto.UINT8, size),
        helper.make_tensor_value_info("confidence", TensorProto.FLOAT, size),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3, "H", "W"]),
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, names, [out], **how) for kind, names, out, how in nodes],
        "lines",
        given,
        made,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(proto, {"medpsp": json.dumps(METADATA)})
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor(model, 1, ("seg",))


class Heard(logging.Handler):
    """Log lines of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.queue: Queue[str] = Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.queue.put(record.getMessage())

    def until(self, word: str) -> str:
        """The next line that holds a word."""
        while word not in (line := self.queue.get(timeout=SECONDS)):
            pass
        return line


@pytest.fixture
def heard() -> Iterator[Heard]:
    logger, handler = logging.getLogger("medpsp"), Heard()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def eventually(true: Callable[[], Any], every: float = 0.005) -> None:
    until = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < until
        time.sleep(every)


def command(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def series(folder: Path, seed: int = 0, phantom: Phantom = CT) -> tuple[list[Path], np.ndarray]:
    """Files against the order of the slices, and HU."""
    hu, _ = draw(phantom, seed)
    values = to_mr(hu, 0) if phantom.modality == "MR" else hu
    return write_series(folder, PATIENT, values, phantom), hu


# the receiver


@contextmanager
def receiving(predictor: Predictor, out: Path, **how: Any) -> Iterator[Receiver]:
    stop = threading.Event()
    with Receiver(predictor, out, Listen(port=0, **how)) as receiver:
        thread = threading.Thread(target=receiver.serve, args=(stop.is_set,))
        thread.start()
        try:
            yield receiver
        finally:
            stop.set()
            thread.join(SECONDS)
    assert not thread.is_alive()


def associate(address: tuple[str, int], kind: str = CTImageStorage) -> Any:
    entity = AE(ae_title="SENDER")
    entity.add_requested_context(kind, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    assoc = entity.associate(*address)
    assert assoc.is_established
    return assoc


def send(address: tuple[str, int], files: list[Path], kind: str = CTImageStorage) -> list[int]:
    assoc = associate(address, kind)
    found = [assoc.send_c_store(path).Status for path in files]
    assoc.release()
    return found


@contextmanager
def listening(entity: AE, store: Callable[[evt.Event], int]) -> Iterator[Peer]:
    """An entity that waits for associations."""
    server = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)]
    )
    assert server
    try:
        yield Peer(aet="ARCHIVE", host="127.0.0.1", port=server.server_address[1])
    finally:
        entity.shutdown()


@contextmanager
def answers(*syntaxes: str) -> Iterator[tuple[Peer, Queue[pydicom.Dataset]]]:
    """An archive that takes SEG."""
    got: Queue[pydicom.Dataset] = Queue()

    def store(event: evt.Event) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        got.put(dataset)
        return 0x0000

    entity = AE(ae_title="ARCHIVE")
    entity.require_called_aet = True
    entity.add_supported_context(SegmentationStorage, list(syntaxes))
    with listening(entity, store) as peer:
        yield peer, got


def mask_of(seg: pydicom.Dataset, files: list[Path]) -> np.ndarray:
    """(N, H, W) by the images that frames reference; class n is the segment with its label."""
    order = {str(pydicom.dcmread(path).SOPInstanceUID): n for n, path in enumerate(files)}
    mask = np.zeros((len(files), seg.Rows, seg.Columns), np.uint8)
    labels = {s.SegmentNumber: s.SegmentLabel for s in seg.SegmentSequence}
    for group, frame in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        (segment,) = group.SegmentIdentificationSequence
        value = METADATA["classes"].index(labels[segment.ReferencedSegmentNumber])
        mask[order[source.ReferencedSOPInstanceUID]][frame == 1] = value
    return mask


def no_spool(out: Path) -> bool:
    return not list(out.glob(".spool-*")) and not list(out.glob(".part-*"))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_series_that_is_sent_comes_back_as_a_seg(
    predictor: Predictor, tmp_path: Path, heard: Heard, syntax: str
):
    out = tmp_path / "out"
    files, hu = series(tmp_path / "a")
    others, _ = series(tmp_path / "b", 1)
    with answers(syntax) as (peer, got), receiving(predictor, out, answer=peer) as receiver:
        assert send(receiver.address, files) == [0] * 4
        seg = got.get(timeout=SECONDS)
        assert send(receiver.address, others) == [0] * 4
        second = got.get(timeout=SECONDS)
        heard.until("assoc-000002/series-000.dcm: SEG sent")
    image = pydicom.dcmread(files[0])
    assert seg.Modality == "SEG"
    assert seg.file_meta.TransferSyntaxUID == syntax
    assert (seg.PatientID, seg.StudyInstanceUID) == (image.PatientID, image.StudyInstanceUID)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == image.SeriesInstanceUID
    assert set(np.unique(expected(hu))) == {0, 1, 2}
    np.testing.assert_array_equal(mask_of(seg, files), expected(hu))
    assert mask_of(second, others).any()
    kept = pydicom.dcmread(out / "assoc-000001" / "series-000.dcm")
    assert kept.SOPInstanceUID == seg.SOPInstanceUID
    assert jobs(out) == ["assoc-000001", "assoc-000002", "unsent"]
    assert jobs(out / "unsent") == []
    said = "\n".join(heard.lines)
    assert "assoc-000001: 4 objects, 1 series, 4 slices" in said
    assert f"sent to {peer}" in said
    assert not [word for word in (PATIENT, "SENDER", image.StudyInstanceUID) if word in said]


def test_numbers_go_on_and_what_a_killed_one_left_is_removed(
    predictor: Predictor, tmp_path: Path, heard: Heard
):
    (tmp_path / "out" / "assoc-000041").mkdir(parents=True)
    (tmp_path / "out" / ".spool-x").mkdir()
    (tmp_path / "out" / ".part-assoc-000042").mkdir()
    files, _ = series(tmp_path / "in")
    with receiving(predictor, tmp_path / "out") as receiver:
        assert no_spool(tmp_path / "out")
        assoc = associate(receiver.address)
        assoc.send_c_store(files[0])
        (spool,) = (tmp_path / "out").glob(".spool-*")
        assert spool.stat().st_mode & 0o777 == 0o700
        assert [p.name for p in spool.iterdir()] == ["000001.dcm"]
        assoc.release()
        heard.until("assoc-000042: 1 object, 1 series, 1 slice,")
    assert no_spool(tmp_path / "out")


def test_what_waits_is_segmented_by_the_next_start(
    predictor: Predictor, tmp_path: Path, heard: Heard
):
    """Killed before, while, after, and once too often."""
    out = tmp_path / "out"
    for kept in (".whole-0-assoc-000004", ".whole-1-assoc-000002", ".whole-0-assoc-000003"):
        series(out / kept)
    series(out / ".whole-2-assoc-000001")
    (out / "assoc-000003").mkdir()
    files, _ = series(tmp_path / "in")
    with receiving(predictor, out) as receiver:
        send(receiver.address, files)
        heard.until("assoc-000005: 4 objects, 1 series")
    assert not list(out.glob(".whole-*"))
    assert jobs(out) == [f"assoc-{number:06d}" for number in (2, 3, 4, 5)]
    assert list((out / "assoc-000003").iterdir()) == []  # there before
    assert [line.split(":")[0] for line in heard.lines if "1 series" in line] == [
        f"assoc-{number:06d}" for number in (2, 4, 5)
    ]
    (line,) = (line for line in heard.lines if "assoc-000001" in line)
    assert "dropped: 2 receivers were killed while they segmented it; its sender" in line


def test_a_killed_receiver_loses_nothing_of_what_it_took(model: Path, tmp_path: Path):
    out = tmp_path / "out"
    files, hu = series(tmp_path / "in")
    process = command("receive", model, out, "--port", 0, "--threads", 1)
    assert process.stdout
    host, port = process.stdout.readline().split()[-1].rsplit(":", 1)
    for _ in range(3):
        assert send((host, int(port)), files) == [0] * 4
    process.kill()  # as soon as the last release is answered
    process.communicate(timeout=SECONDS)
    process = command("receive", model, out, "--port", 0, "--threads", 1)
    names = [f"assoc-{number:06d}" for number in (1, 2, 3)]
    eventually(lambda: jobs(out) == names, 0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    for name in names:
        (seg,) = (out / name).iterdir()
        np.testing.assert_array_equal(mask_of(pydicom.dcmread(seg), files), expected(hu))
    assert not list(out.glob(".whole-*"))


def test_an_association_that_the_disk_stopped_is_segmented_later(
    predictor: Predictor, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
):
    files, _ = series(tmp_path / "in")
    real, fails = predictor.source, [2]

    def full(*given: Any) -> Any:
        fails[0] -= 1
        if fails[0] >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    monkeypatch.setattr(predictor, "source", full)
    monkeypatch.setattr(receive, "RETRY_S", 0.0)
    with receiving(predictor, tmp_path / "out") as receiver:
        send(receiver.address, files)
        for _ in range(2):
            line = heard.until("assoc-000001: 4 objects, failed")
            assert line.endswith("failed: No space left on device; tried again later")
        heard.until("assoc-000001: 4 objects, 1 series")
    assert not list((tmp_path / "out").glob(".whole-*"))


def test_a_folder_of_notes_that_is_away_ends_no_sending(
    tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
):
    peer, tries = Peer(aet="ARCHIVE", host="127.0.0.1", port=9), [0]

    def away(out: Path) -> list[str]:
        tries[0] += 1
        if tries[0] in (2, 3):  # the first is that of the start
            raise OSError(errno.ESTALE, "Stale file handle")
        return []

    monkeypatch.setattr(sender, "unsent", away)
    one = sender.Sender(tmp_path, peer, "MEDPSP", (0.0,))
    one.start()
    eventually(lambda: tries[0] >= 4)
    one.close()
    (line,) = heard.lines
    assert line.startswith("unsent: SEG_NOT_SENT: Stale file handle")


def test_echo_leaves_nothing_behind(predictor: Predictor, tmp_path: Path):
    with receiving(predictor, tmp_path / "out") as receiver:
        assoc = associate(receiver.address, Verification)
        assert assoc.send_c_echo().Status == 0
        assoc.release()
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


def test_it_lives_on_after_what_it_cannot_segment(
    predictor: Predictor, tmp_path: Path, heard: Heard
):
    """Another modality, an association that breaks off, bytes that are no DICOM."""
    out = tmp_path / "out"
    files, _ = series(tmp_path / "ct")
    strangers, _ = series(tmp_path / "mr", 0, Phantom(shape=(2, 32, 32), modality="MR"))
    with receiving(predictor, out) as receiver:
        send(receiver.address, strangers, MRImageStorage)
        assert heard.until("assoc-000001") == (
            "assoc-000001: 2 objects, failed: nothing to segment among 2 files "
            "(MODALITY_SKIPPED); the model takes CT"
        )
        assoc = associate(receiver.address)
        assoc.send_c_store(files[0])
        assoc.abort()
        assert "aborted after 1 object" in heard.until("assoc-000002: dropped")
        assoc = associate(receiver.address)  # the cable is pulled
        assoc.send_c_store(files[0])
        assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)
        heard.until("assoc-000003: dropped")
        with socket.create_connection(receiver.address) as line:
            line.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert line.recv(100)[0] == 7  # A-ABORT
        assert send(receiver.address, files) == [0] * 4
        heard.until("assoc-000004: 4 objects, 1 series")
    assert sorted(p.name for p in out.iterdir()) == [".lock", "assoc-000004"]


def test_nothing_that_peers_send_reaches_the_terminal(
    predictor: Predictor, tmp_path: Path, heard: Heard, capfd: pytest.CaptureFixture[str]
):
    files, _ = series(tmp_path / "in")
    image = pydicom.dcmread(files[0])
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "1.2.03.777"  # no valid UID
    image.save_as(files[0])
    with receiving(predictor, tmp_path / "out") as receiver:
        send(receiver.address, files[:1])
        heard.until("assoc-000001")
        for junk in (
            b"\x01\x00\x00\x00\x00\x10" + b"\xff" * 16,
            b"\x04\x00\x7f\xff\xff\xff",
            b"\0",
        ):
            with socket.create_connection(receiver.address) as line:
                line.sendall(junk)
                line.shutdown(socket.SHUT_WR)
    found = capfd.readouterr()
    assert "Traceback" not in found.err
    assert "777" not in found.out + found.err + "".join(heard.lines)


FIRST, SECOND = "assoc-000001/series-000.dcm", "assoc-000002/series-000.dcm"


def test_answers_that_nobody_takes_stay_and_the_next_start_sends_them_in_order(
    predictor: Predictor, tmp_path: Path, heard: Heard
):
    out = tmp_path / "out"
    files, _ = series(tmp_path / "in")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    nobody = Peer(aet="PACS", host="127.0.0.1", port=port)
    with receiving(predictor, out, answer=nobody, pauses=(SECONDS,)) as receiver:
        for name in (FIRST, SECOND):
            send(receiver.address, files)
            assert heard.until("SEG_NOT_SENT") == (
                f"{name}: SEG_NOT_SENT: no connection (PACS@127.0.0.1:{port}); it stays, and is "
                "sent later"
            )
    assert heard.until("next start").startswith("receive: 2 SEG are not sent to PACS@127.0.0.1")
    uids = [pydicom.dcmread(out / name).SOPInstanceUID for name in (FIRST, SECOND)]
    (out / "unsent" / "assoc-000003.series-000.dcm").touch()  # killed before it had its name
    heard.lines.clear()
    with receiving(predictor, out) as receiver:
        pass
    assert heard.lines == ["receive: 2 SEG of before are not sent without --answer"]
    with answers(ExplicitVRLittleEndian) as (peer, got), receiving(predictor, out, answer=peer):
        assert [got.get(timeout=SECONDS).SOPInstanceUID for _ in uids] == uids
        heard.until(f"{SECOND}: SEG sent")
    assert jobs(out / "unsent") == []


def test_an_answer_is_tried_again(predictor: Predictor, tmp_path: Path, heard: Heard):
    files, _ = series(tmp_path / "in")
    statuses, seen = [0xA700, 0xC000, 0xC000, 0xB000], []

    def store(event: evt.Event) -> int:
        seen.append(event.request.AffectedSOPInstanceUID)
        return statuses[len(seen) - 1]

    entity = AE(ae_title="ARCHIVE")
    entity.add_supported_context(SegmentationStorage)
    with (
        listening(entity, store) as peer,
        receiving(predictor, tmp_path / "out", answer=peer, pauses=(0, 0.01)) as receiver,
    ):
        send(receiver.address, files)
        heard.until("SEG sent")
    assert len(seen) == 4
    assert len(set(seen)) == 1
    told = [line for line in heard.lines if "SEG_NOT_SENT" in line]  # each reason once
    assert [line.split("SEG_NOT_SENT: ")[1][:13] for line in told] == [
        "status 0xa700",
        "status 0xc000",
    ]


def test_a_seg_that_is_refused_holds_up_no_other(
    predictor: Predictor, tmp_path: Path, heard: Heard
):
    files, _ = series(tmp_path / "in")
    seen: list[str] = []

    def store(event: evt.Event) -> int:
        seen.append(event.request.AffectedSOPInstanceUID)
        return 0x0000 if len(seen) > 1 else 0xA900

    entity = AE(ae_title="ARCHIVE")
    entity.add_supported_context(SegmentationStorage)
    with (
        listening(entity, store) as peer,
        receiving(predictor, tmp_path / "out", answer=peer, pauses=(SECONDS,)) as receiver,
    ):
        send(receiver.address, files)
        heard.until(f"{FIRST}: SEG_NOT_SENT: status 0xa900")
        send(receiver.address, files)
        heard.until(f"{SECOND}: SEG sent")
    assert jobs(tmp_path / "out" / "unsent") == ["assoc-000001.series-000.dcm"]


@contextmanager
def hanging(accepts: bool) -> Iterator[tuple[Peer, threading.Event]]:
    """A peer that takes a line and says nothing, or takes an association and no SEG."""
    reached, go_on = threading.Event(), threading.Event()

    def store(event: evt.Event) -> int:
        reached.set()
        go_on.wait(SECONDS)
        return 0xC000

    if accepts:
        entity = AE(ae_title="ARCHIVE")
        entity.add_supported_context(SegmentationStorage)
        with listening(entity, store) as peer:
            try:
                yield peer, reached
            finally:
                go_on.set()
        return
    with socket.create_server(("127.0.0.1", 0)) as mute:

        def take() -> None:
            line, _ = mute.accept()
            with line:
                reached.set()
                go_on.wait(SECONDS)

        thread = threading.Thread(target=take)
        thread.start()
        yield Peer(aet="ARCHIVE", host="127.0.0.1", port=mute.getsockname()[1]), reached
        go_on.set()
        thread.join()


@pytest.mark.parametrize("accepts", [False, True])
def test_a_peer_that_hangs_holds_up_neither_receiving_nor_the_end(
    predictor: Predictor, tmp_path: Path, heard: Heard, accepts: bool, monkeypatch: Any
):
    """With the peer's time set to more than the test has, whatever waits for it fails here."""
    monkeypatch.setattr(dicomnet, "CONNECT_S", 2 * SECONDS)
    monkeypatch.setattr(dicomnet, "ANSWER_S", 2 * SECONDS)
    out = tmp_path / "out"
    files, _ = series(tmp_path / "in")
    with hanging(accepts) as (peer, reached):
        with receiving(predictor, out, answer=peer) as receiver:
            send(receiver.address, files)
            assert reached.wait(SECONDS)
            send(receiver.address, files)
            heard.until("assoc-000002: 4 objects, 1 series")
            assert not [line for line in heard.lines if "SEG_NOT_SENT" in line]  # it still hangs
            entity = receiver._sender._entity
        assert not [t for t in threading.enumerate() if t.name == "sender"]
        eventually(lambda: not lines_of(entity))  # they would keep the process
    assert heard.until("next start").startswith("receive: 2 SEG are not sent")
    assert [line for line in heard.lines if line.startswith(f"{SECOND}: SEG_NOT_SENT")]
    assert len(jobs(out / "unsent")) == 2


def lines_of(entity: Any) -> list[threading.Thread]:
    threads = [t for t in threading.enumerate() if isinstance(t, DULServiceProvider)]
    return [thread for thread in threads if thread.assoc.ae is entity]


def test_a_peer_that_stops_reading_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The SEG is larger than the buffers of both ends: its write alone would wait for ever."""
    monkeypatch.setattr(dicomnet, "ANSWER_S", 0.5)
    image = pydicom.dcmread(series(tmp_path / "in")[0][0])
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = SegmentationStorage
    image.PixelData = bytes(2**25)
    image.save_as(tmp_path / "seg.dcm")
    stuck, recv = threading.Event(), AssociationSocket.recv

    def slow(line: Any, number: int) -> Any:
        if line.assoc.is_acceptor and line.assoc.is_established:
            stuck.wait(SECONDS)
        return recv(line, number)

    monkeypatch.setattr(AssociationSocket, "recv", slow)
    entity = AE(ae_title="ARCHIVE")
    entity.add_supported_context(SegmentationStorage)
    server = entity.start_server(("127.0.0.1", 0), block=False)
    assert server
    peer = Peer(aet="ARCHIVE", host="127.0.0.1", port=server.server_address[1])
    reply = dicomnet.send(tmp_path / "seg.dcm", peer, dicomnet.sending_entity("MEDPSP"))
    assert reply == dicomnet.Reply("no answer, or SEG is not taken")
    assert not stuck.is_set()
    stuck.set()
    entity.shutdown()


def test_a_killed_receiver_and_one_that_is_stopped_keep_what_is_not_sent(
    model: Path, tmp_path: Path
):
    out = tmp_path / "out"
    files, _ = series(tmp_path / "in")
    words = ("receive", model, out, "--port", 0, "--threads", 1, "--answer")
    with hanging(False) as (peer, reached):
        process = command(*words, peer)
        assert process.stdout
        host, port = process.stdout.readline().split()[-1].rsplit(":", 1)
        send((host, int(port)), files)
        assert reached.wait(SECONDS)
        process.kill()
        process.communicate(timeout=SECONDS)
        assert jobs(out) == ["assoc-000001", "unsent"]
    with hanging(True) as (peer, reached):
        process = command(*words, peer)
        assert reached.wait(SECONDS)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=dicomnet.ANSWER_S / 2)  # nobody waits for the peer
    assert process.returncode == 0, said
    assert f"{FIRST}: SEG_NOT_SENT: " in said
    assert "receive: 1 SEG are not sent" in said
    with answers(ExplicitVRLittleEndian) as (peer, got):
        process = command(*words, peer)
        assert (
            got.get(timeout=SECONDS).SOPInstanceUID == pydicom.dcmread(out / FIRST).SOPInstanceUID
        )
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert f"{FIRST}: SEG sent to {peer}" in said
    assert jobs(out / "unsent") == []


def test_a_full_disk_is_told_to_the_sender(
    predictor: Predictor, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
):
    files, _ = series(tmp_path / "in")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "000002.dcm":
            write(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    with receiving(predictor, tmp_path / "out") as receiver:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            assert send(receiver.address, files) == [0, 0xA700, 0, 0]
            assert "not stored: 1 of 4 objects" in heard.until("assoc-000001: dropped")
        assert send(receiver.address, files) == [0] * 4
        heard.until("assoc-000002: 4 objects, 1 series")
    assert "assoc-000001: an object cannot be stored: No space left on device" in heard.lines
    assert no_spool(tmp_path / "out")


def test_a_port_and_a_folder_have_one_receiver(predictor: Predictor, tmp_path: Path, heard: Heard):
    with receiving(predictor, tmp_path / "a") as receiver:
        port = receiver.address[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port} of 127.0.0.1"):
            with Receiver(predictor, tmp_path / "b", Listen(port=port)):
                pass
        with pytest.raises(ConfigError, match="another medpsp is at work there"):
            with Receiver(predictor, tmp_path / "a", Listen(port=0)):
                pass
    assert not heard.lines
    with Receiver(predictor, tmp_path / "b", Listen(port=0, host="0.0.0.0")):
        assert [line for line in heard.lines if "no encryption and no authentication" in line]


def test_peers_titles_and_a_missing_package(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert Peer.parse("PACS@10.0.0.5:104") == Peer(aet="PACS", host="10.0.0.5", port=104)
    assert Peer.parse("A_B@[::1]:11112").host == "::1"
    for text in (
        "PACS",
        "PACS@host",
        "@host:1",
        "P@h:0",
        "P@h:65536",
        "A" * 17 + "@h:1",
        "a\\@h:1",
    ):
        with pytest.raises(ConfigError, match="expected AET@host:port"):
            Peer.parse(text)
    with pytest.raises(ConfigError, match="--aet MUCH-TOO-LONG-A-NAME: expected 1 to 16"):
        Receiver(predictor, tmp_path, Listen(aet="MUCH-TOO-LONG-A-NAME"))
    monkeypatch.setitem(sys.modules, "pynetdicom", None)
    with pytest.raises(ConfigError, match=r"pip install 'medpsp\[receive\]'"):
        Receiver(predictor, tmp_path, Listen())


def test_receive_ends_with_0_when_it_is_asked_to_while_it_works(model: Path, tmp_path: Path):
    out = tmp_path / "out"
    files, _ = series(tmp_path / "in", 0, Phantom(shape=(96, 64, 64)))
    process = command("receive", model, out, "--port", 0, "--threads", 1)
    assert process.stdout
    host, port = process.stdout.readline().split()[-1].rsplit(":", 1)
    send((host, int(port)), files)
    late = associate((host, int(port)))
    eventually(lambda: list(out.glob(".part-assoc-*")))
    process.send_signal(signal.SIGTERM)
    eventually(lambda: refuses((host, int(port))), every=0.2)
    late.send_c_store(files[0])
    late.release()
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert "assoc-000001: 96 objects, 1 series, 96 slices" in said
    assert "assoc-000002: 1 object, 1 series, 1 slice," in said
    assert no_spool(out)


def refuses(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return True
    return False


# the watch


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def never() -> bool:
    return False


def jobs(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir() if p.name != ".lock")


def once(predictor: Predictor, inbox: Path, out: Path) -> int:
    with owned(out):
        return Watch(predictor, inbox, out, settle=0).run(never, once=True)


def test_an_entry_is_ready_when_it_has_not_changed_for_long_enough(
    predictor: Predictor, inbox: Path, tmp_path: Path
):
    watched = Watch(predictor, inbox, tmp_path / "out", settle=5)
    (inbox / "empty").mkdir()
    (inbox / "a").mkdir()
    (inbox / "a" / "1").write_bytes(b"1")
    (inbox / "b").write_bytes(b"1")
    for name in (".hidden", "c.part", "d.PARTIAL", "e.tmp"):
        (inbox / name).write_bytes(b"1")
    assert watched.look(100) == []
    (inbox / "a" / "2").write_bytes(b"2")
    assert [r.entry.name for r in watched.look(105)] == ["b"]
    os.utime(inbox / "a" / "2", (1, 1))  # a copy that keeps an old time
    assert [r.entry.name for r in watched.look(109)] == ["b"]
    assert [r.entry.name for r in watched.look(113.9)] == ["b"]
    assert [r.entry.name for r in watched.look(114)] == ["a", "b"]
    (inbox / "c.part").rename(inbox / "c")
    assert [r.entry.name for r in watched.look(115)] == ["a", "b"]
    assert [r.entry.name for r in watched.look(120)] == ["a", "b", "c"]


def test_every_kind_of_entry_is_done_once(
    predictor: Predictor, inbox: Path, tmp_path: Path, heard: Heard
):
    out = tmp_path / "out"
    files, hu = series(inbox / PATIENT)
    (inbox / f"{PATIENT}.dcm").write_bytes(files[0].read_bytes())
    with zipfile.ZipFile(inbox / f"{PATIENT}.zip", "w") as packed:
        for path in files:
            packed.write(path, path.name)
    nib.save(nib.Nifti1Image(hu.T, np.eye(4)), inbox / f"{PATIENT}.nii.gz")
    (inbox / f"{PATIENT}: a report.txt").write_text("hello " * 40)
    before = [stamps_of(path) for path in sorted(inbox.iterdir())]
    every: tuple[Format, ...] = ("seg", "nifti")
    writer = Predictor(predictor.model.path, 1, every)
    assert once(writer, inbox, out) == 1
    names = jobs(out)
    assert [name.endswith(".failed") for name in names].count(True) == 1
    assert len(names) == 5
    assert all(len(name.removesuffix(".failed")) == len("job-") + 12 for name in names)
    found = sorted(len(list(out.glob(f"{name}/*"))) for name in names)
    assert found == [0, 1, 2, 2, 2]  # the text; the NIfTI has no SEG; the others SEG and NIfTI
    (failed,) = out.glob("*.failed")
    line = "nothing DICOM in it, 1 file: 1 .txt; the model takes CT"
    assert failed.read_text() == line + "\n"
    assert f"{failed.stem}: failed: {line}" in heard.lines
    assert len([name for name in heard.lines if "1 series, 4 slices" in name]) == 3
    assert "Doe" not in "".join(heard.lines)
    masks = [p for p in out.glob("*/*.nii.gz") if len(list(p.parent.iterdir())) == 1]
    np.testing.assert_array_equal(np.asarray(nib.load(masks[0]).dataobj), expected(hu).T)
    heard.lines.clear()
    assert once(writer, inbox, out) == 0  # nothing is left to do
    assert heard.lines == []
    assert jobs(out) == names
    assert [stamps_of(path) for path in sorted(inbox.iterdir())] == before
    failed.unlink()  # try it again
    assert once(writer, inbox, out) == 1
    files[0].unlink()  # changed: a new job, and the old one stays
    assert once(writer, inbox, out) == 0
    assert len(jobs(out)) == 6
    assert set(names) < set(jobs(out))


def test_no_surface_where_nothing_was_found_is_no_failure(
    predictor: Predictor, inbox: Path, tmp_path: Path, heard: Heard
):
    nib.save(nib.Nifti1Image(np.full((9, 8, 7), -900, np.int16), np.eye(4)), inbox / "air.nii.gz")
    writer = Predictor(predictor.model.path, 1, ("mesh",))
    assert once(writer, inbox, tmp_path / "out") == 0
    (job,) = jobs(tmp_path / "out")
    assert not list((tmp_path / "out" / job).iterdir())
    assert "1 series, 7 slices" in heard.lines[0]
    predict_source(predictor.model.path, inbox / "air.nii.gz", tmp_path / "told", 1, "mesh")


def test_a_mesh_of_a_nifti_is_written_and_the_seg_that_it_cannot_have_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    nib.save(nib.Nifti1Image(draw(CT, 0)[0].T, np.eye(4)), tmp_path / "v.nii.gz")
    predict_source(model, tmp_path / "v.nii.gz", tmp_path / "out", 1, "seg,mesh")
    kinds = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert kinds == {".stl", ".glb"}
    told = capsys.readouterr().out.splitlines()
    assert told[-2:] == [
        "SEG_NOT_WRITTEN: series-000: a SEG needs DICOM input, a NIfTI is none",
        "remarks: 1 SEG_NOT_WRITTEN",
    ]


def test_an_entry_that_changes_while_it_is_read_is_left_for_later(
    predictor: Predictor, inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files, _ = series(inbox / "a")
    source = predictor.source

    def growing(*given: Any) -> Any:
        found = source(*given)
        (inbox / "a" / "more").write_bytes(files[0].read_bytes())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "source", growing)
        assert once(predictor, inbox, tmp_path / "out") == 0
    assert jobs(tmp_path / "out") == []
    assert once(predictor, inbox, tmp_path / "out") == 0
    assert len(jobs(tmp_path / "out")) == 1


def test_a_full_disk_is_no_fault_of_the_entry(
    predictor: Predictor,
    inbox: Path,
    tmp_path: Path,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
):
    series(inbox / "a")
    now = 1000.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    watched = Watch(predictor, inbox, tmp_path / "out", settle=0)

    def full(*given: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(inbox / "a"))

    (tmp_path / "out").mkdir()
    (item,) = watched.look(now)
    with monkeypatch.context() as patch:
        patch.setattr(predictor, "source", full)
        assert not watched.do(item)
    assert heard.lines == [f"{item.name}: failed: No space left on device"]
    assert jobs(tmp_path / "out") == []
    assert watched.look(1059) == []
    assert watched.look(1060) == [item]
    assert watched.do(item)
    assert jobs(tmp_path / "out") == [item.name]


def test_any_error_is_the_end_of_one_entry_only(
    predictor: Predictor, inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    series(inbox / "a")
    series(inbox / "b", 1)
    source, calls = predictor.source, []

    def unlucky(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise RuntimeError("Doe, Jane")
        return source(*given)

    monkeypatch.setattr(predictor, "source", unlucky)
    assert once(predictor, inbox, tmp_path / "out") == 1
    (failed,) = (tmp_path / "out").glob("*.failed")
    assert failed.read_text() == "RuntimeError\n"
    assert len(jobs(tmp_path / "out")) == 2


def test_folders_that_cannot_be_are_refused(predictor: Predictor, inbox: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="lies inside"):
        Watch(predictor, inbox, inbox / "out")
    with pytest.raises(ConfigError, match="lies inside"):
        Watch(predictor, inbox, inbox)
    with pytest.raises(ConfigError, match="no such folder"):
        Watch(predictor, tmp_path / "none", tmp_path / "out")


def test_a_killed_watch_leaves_whole_folders_only(model: Path, inbox: Path, tmp_path: Path):
    out = tmp_path / "out"
    series(inbox / PATIENT, 0, Phantom(shape=(96, 64, 64)))
    words = ("watch", model, inbox, out, "--settle", 0, "--threads", 1, "--format", "seg,png")
    process = command(*words)
    eventually(lambda: list(out.glob(".part-*/.partial-*/series-000/*.png")))
    process.kill()
    process.communicate(timeout=SECONDS)
    assert [name[:10] for name in jobs(out)] == [".part-job-"]
    (inbox / "text").write_text("hello " * 40)
    process = command(*words, "--once")
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, said  # the text
    assert PATIENT not in said
    (done,) = [name for name in jobs(out) if not name.endswith(".failed")]
    assert len(list((out / done / "series-000").iterdir())) == 96
    assert pydicom.dcmread(out / done / "series-000.dcm").Modality == "SEG"
    assert len(jobs(out)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watch_finishes_the_entry_at_hand(
    model: Path, inbox: Path, tmp_path: Path, number: signal.Signals
):
    out = tmp_path / "out"
    for name in "ab":
        series(inbox / name, 0, Phantom(shape=(96, 64, 64)))
    process = command("watch", model, inbox, out, "--settle", 0, "--threads", 1, "--format", "png")
    eventually(lambda: list(out.glob(".part-*/.partial-*/series-000/*.png")))
    os.killpg(process.pid, number)  # as systemd and a terminal do: the decoders hear it, too
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    (done,) = jobs(out)
    assert len(list((out / done / "series-000").iterdir())) == 96

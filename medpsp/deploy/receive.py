"""Images that arrive by C-STORE (PS3.4 B), answered with DICOM SEG; pynetdicom speaks the protocol.

Objects of one association lie in a private folder until it is released. They are segmented then,
one association after another, in the thread that calls `Receiver.serve`; `Sender` sends in its own.
What waits for either is on disk, so that a process that is killed loses nothing.
"""

from __future__ import annotations

import logging
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from medpsp.deploy.dicomnet import Peer, entity_of, is_loopback, take_images
from medpsp.deploy.jobs import SPOOL, owned, run_job
from medpsp.deploy.predict import Predictor
from medpsp.deploy.sender import PAUSES, Sender, unsent
from medpsp.deploy.waiting import MOST_TRIES, keep, tried, untried, waiting
from medpsp.errors import ConfigError
from medpsp.words import many

if TYPE_CHECKING:
    from pynetdicom.association import Association
    from pynetdicom.events import Event
    from pynetdicom.transport import ThreadedAssociationServer

log = logging.getLogger("medpsp")

POLL_S = 0.2
"""Seconds until a request to stop is seen."""
RETRY_S = 60.0
"""Seconds until an association is segmented again that the disk or the memory stopped."""
OUT_OF_RESOURCES = 0xA700
"""Status of a C-STORE that may work later (PS3.4 table B.2-1)."""


@dataclass(frozen=True, kw_only=True)
class Listen:
    """How the receiver is reached, and where its answers go.

    Attributes:
        aet: Its application entity title.
        host: Address to bind.
        port: To bind; 0 for a free one.
        answer: None: answers stay in the folder.
        pauses: As `PAUSES`.
    """

    aet: str = "MEDPSP"
    host: str = "127.0.0.1"
    port: int = 11112
    answer: Peer | None = None
    pauses: tuple[float, ...] = PAUSES


@dataclass
class _Spool:
    """Objects of one association: how many came, and how many are stored."""

    name: str
    folder: Path | None = None
    came: int = 0
    stored: int = 0


class Receiver:
    """A Storage SCP (PS3.4 B.2) and Verification SCP for all images whose pixels can be decoded.

    Use it as a context: it listens from the beginning of that on.

    Args:
        predictor: The model at work.
        out: For ``assoc-<number>`` folders, numbered on from those that are there.
        listen: Addresses.

    Raises:
        ConfigError: pynetdicom is missing; the title is none; the port or the folder is in use.
    """

    def __init__(self, predictor: Predictor, out: Path, listen: Listen) -> None:
        self.predictor, self.out, self.listen = predictor, out, listen
        self._ae = entity_of(listen.aet)
        take_images(self._ae)
        self._server: ThreadedAssociationServer | None = None
        self._open: dict[Association, _Spool] = {}
        self._whole: queue.SimpleQueue[_Spool] = queue.SimpleQueue()
        self._later: list[tuple[float, _Spool]] = []
        self._lock = threading.Lock()
        self._number = 0
        self._sender: Sender | None = None
        if listen.answer:
            self._sender = Sender(out, listen.answer, listen.aet, listen.pauses)
        self._stack = ExitStack()

    def __enter__(self) -> Receiver:
        with ExitStack() as stack:
            stack.enter_context(owned(self.out))
            left = waiting(self.out)
            names = {path.name for path in self.out.glob("assoc-*")} | {name for name, *_ in left}
            numbers = [name.removeprefix("assoc-") for name in names]
            self._number = max((int(number) for number in numbers if number.isdecimal()), default=0)
            self._take_up(left)
            self._server = self._listening()
            if self._sender:
                self._sender.start()
                stack.callback(self._sender.close)
            elif segs := unsent(self.out):
                log.warning("receive: %d SEG of before are not sent without --answer", len(segs))
            stack.callback(self._drop_all)
            stack.callback(self._ae.shutdown)
            self._stack = stack.pop_all()
        if not is_loopback(self.address[0]):
            log.warning(
                "receive: %s can be reached from the network; there is no encryption and no "
                "authentication",
                self.address[0],
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        if self._server is None:
            raise RuntimeError("the receiver does not listen")
        return str(self._server.server_address[0]), int(self._server.server_address[1])

    def serve(self, stop: Callable[[], bool]) -> None:
        """Segment and answer until asked to stop; associations at hand are finished then."""
        while not stop():
            self._next()
        if self._server is None:
            return
        self._server.shutdown()
        while self._at_hand():
            self._next()

    def _take_up(self, left: list[tuple[str, int, Path]]) -> None:
        """What an earlier process did not come to; nothing may kill one start after another."""
        for name, tries, folder in left:
            spool = _Spool(name, folder, stored=len(list(folder.iterdir())))
            if (self.out / name).exists():  # killed between the answer and the end
                shutil.rmtree(folder, ignore_errors=True)
            elif tries >= MOST_TRIES:
                self._drop(spool, f"{tries} receivers were killed while they segmented it")
            else:
                log.info("%s: %s of before, segmented now", name, many(spool.stored, "object"))
                self._whole.put(spool)

    def _at_hand(self) -> bool:
        """Whether an association is to be finished; a connection that is none yet is not."""
        threads = self._server.active_associations if self._server else []
        busy = any(assoc.is_established for assoc in threads)
        return busy or bool(self._open) or not self._whole.empty()

    def _listening(self) -> ThreadedAssociationServer | None:
        from pynetdicom import evt

        where = self.listen
        handlers: list[tuple[object, Callable[[Event], object]]] = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_ACSE_RECV, self._leaving),  # RELEASED comes after the answer
            (evt.EVT_ABORTED, lambda event: self._aborted(event.assoc)),
        ]
        try:
            return self._ae.start_server(
                (where.host, where.port),
                block=False,
                evt_handlers=handlers,  # type: ignore[arg-type]
            )
        except OSError as error:
            raise ConfigError(
                f"receive: cannot listen on port {where.port} of {where.host} ({error.strerror}); "
                "another receiver may: end it, or take another --port or --host"
            ) from None

    def _store(self, event: Event) -> int:
        with self._lock:
            spool = self._open.get(event.assoc)
            if spool is None:
                self._number += 1
                spool = self._open[event.assoc] = _Spool(f"assoc-{self._number:06d}")
        spool.came += 1
        path: Path | None = None
        try:
            if spool.folder is None:
                spool.folder = Path(tempfile.mkdtemp(prefix=SPOOL, dir=self.out))  # mode 0700
            path = spool.folder / f"{spool.came:06d}.dcm"
            path.write_bytes(event.encoded_dataset())
        except OSError as error:
            log.error("%s: an object cannot be stored: %s", spool.name, error.strerror)
            if path:
                path.unlink(missing_ok=True)
            return OUT_OF_RESOURCES
        spool.stored += 1
        return 0x0000

    def _leaving(self, event: Event) -> None:
        """Once the release is answered the sender forgets its images: they are kept before."""
        from pynetdicom.pdu_primitives import A_RELEASE

        spool = self._open.get(event.assoc)
        if spool is None or not isinstance(getattr(event, "primitive", None), A_RELEASE):
            return
        if spool.stored < spool.came:  # a mask of half a series looks like one of a whole one
            self._drop(
                spool, f"not stored: {spool.came - spool.stored} of {many(spool.came, 'object')}"
            )
        elif spool.folder:
            try:
                spool.folder = keep(spool.folder, spool.name)
                self._whole.put(spool)
            except OSError as error:
                self._drop(spool, f"not stored: {error.strerror}")
        del self._open[event.assoc]  # last: `_at_hand` must see it all the time

    def _aborted(self, assoc: Association) -> None:
        spool = self._open.pop(assoc, None)
        if spool:
            self._drop(spool, f"aborted after {many(spool.stored, 'object')}")

    def _drop(self, spool: _Spool, why: str) -> None:
        log.error("%s: dropped: %s; its sender has to send it again", spool.name, why)
        if spool.folder:
            shutil.rmtree(spool.folder, ignore_errors=True)

    def _drop_all(self) -> None:
        if left := waiting(self.out):
            told = many(len(left), "association")
            log.warning("receive: %s not segmented; kept for the next start", told)
        for assoc in list(self._open):
            self._aborted(assoc)

    def _next(self) -> None:
        """The next association, if one is whole within `POLL_S`."""
        for assoc in list(self._open):
            if not assoc.is_alive():  # its thread ended without a word
                self._aborted(assoc)
        if self._later and self._later[0][0] <= time.monotonic():
            self._whole.put(self._later.pop(0)[1])
        try:
            spool = self._whole.get(timeout=POLL_S)
        except queue.Empty:
            return
        try:
            self._segment(spool)
        except OSError as error:  # the folder of answers itself
            self._again(spool, error.strerror or type(error).__name__)

    def _segment(self, spool: _Spool) -> None:
        if spool.folder is None:
            return
        sender, spool.folder = self._sender, tried(spool.folder)
        job = run_job(
            self.predictor,
            spool.folder,
            self.out / spool.name,
            before=sender.note if sender else lambda files: None,
        )
        if job and job.again:
            spool.folder = untried(spool.folder)
            self._again(spool, job.line)
            return
        shutil.rmtree(spool.folder, ignore_errors=True)
        if job is None or job.failed:
            why = job.line if job else ""
            log.error("%s: %s, failed: %s", spool.name, many(spool.stored, "object"), why)
            return
        log.info("%s: %s, %s", spool.name, many(spool.stored, "object"), job.line)
        if sender:
            sender.wake()

    def _again(self, spool: _Spool, why: str) -> None:
        """No fault of the images."""
        told = many(spool.stored, "object")
        log.error("%s: %s, failed: %s; tried again later", spool.name, told, why)
        self._later.append((time.monotonic() + RETRY_S, spool))

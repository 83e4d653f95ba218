"""A process that parses and decodes for us and may die: that costs one object.

Codecs meet hostile and damaged bytes. They run in a child with a limit of memory and of CPU time;
when it ends, the object that it was at gets a reason code and the next one a new child. Requests
and answers are JSON with raw arrays behind: nothing from the child is unpickled.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import lru_cache
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medpsp.dataconfig import DECODE_MEMORY_MIB, DECODE_SECONDS
from medpsp.dicom.checked import checked_refs, checked_target
from medpsp.dicom.labelref import LabelRef
from medpsp.dicom.names import LabelVolume, NameRule
from medpsp.dicom.placement import grid_of, grid_tree
from medpsp.dicom.read import Pixels
from medpsp.dicom.wire import receive, send
from medpsp.errors import DicomError, SourceError, source_error
from medpsp.types import Place, ReadPolicy, Series, SliceRef

TASKS = "medpsp.dicom.tasks"
Answer = tuple[Any, list[NDArray[Any]]]
In = TypeVar("In")
Out = TypeVar("Out")


class Sandbox:
    """One child process, started on first use and again after it died.

    Args:
        seconds: CPU seconds for one object; the wall clock may take four times that and 10 s.
        memory_mib: What the child may allocate beyond what its imports took, MiB.
        module: Whose ``main(seconds, memory_mib)`` the child runs.
    """

    def __init__(
        self,
        seconds: int = DECODE_SECONDS,
        memory_mib: int = DECODE_MEMORY_MIB,
        module: str = TASKS,
    ) -> None:
        self.seconds, self.memory_mib, self.module = seconds, memory_mib, module
        self._wall_seconds = 4 * seconds + 10
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def headers(self, place: Place, file_id: str, policy: ReadPolicy) -> list[SliceRef]:
        """`read.read_headers` in the child; also DEC_CRASH, DEC_TIMEOUT, DEC_OOM."""
        tree, _ = self.call("headers", place=place, policy=asdict(policy))
        refs = checked_refs(tree)
        # names of old archives need not be UTF-8: they never pass through the child's answer
        return [replace(r, path=place.path, member=place.member, file_id=file_id) for r in refs]

    def frame(self, ref: SliceRef) -> Pixels:
        """`read.read_frame` in the child."""
        _, arrays = self.call("frame", ref=asdict(ref))
        return Pixels(arrays[0], arrays[1] if len(arrays) > 1 else None)

    def digest(self, ref: SliceRef) -> str:
        """SHA-256 of the values of `read.read_frame`."""
        tree, _ = self.call("digest", ref=asdict(ref))
        return str(tree)

    def label_target(self, place: Place) -> LabelRef:
        """`labelref.label_target` of a SEG or RTSTRUCT."""
        tree, _ = self.call("label_target", place=place)
        return checked_target(tree)

    def label_head(self, place: Place) -> tuple[str, str]:
        """`labelref.label_head` in the child; empty texts where even that cannot be read."""
        try:
            (kind, patient), _ = self.call("label_head", place=place)
        except SourceError:
            return "", ""
        return str(kind), str(patient)

    def labels(self, series: Series, rule: NameRule, geometry: str, resample: str) -> LabelVolume:
        """(N, H, W) uint8 classes of all mask objects of a series, on its grid."""
        tree, arrays = self.call(
            "labels",
            kind=series.mask_kind,
            places=series.masks,
            grid=grid_tree(grid_of(series, series.mask_partial)),
            rule=asdict(rule),
            options=[geometry, resample],
        )
        return LabelVolume(arrays[0], {str(code): int(n) for code, n in tree.items()})

    def image(self, place: Place) -> NDArray[Any]:
        """`voc.read_image` of a plain image."""
        return self.call("image", place=place)[1][0]

    def mask(
        self, place: Place, shape: tuple[int, int], label_map: dict[int, int], classes: int
    ) -> NDArray[np.uint8]:
        """(H, W) classes of a mask that is a plain image."""
        numbers = [list(pair) for pair in label_map.items()]
        request = {"place": place, "shape": shape, "numbers": numbers, "classes": classes}
        return self.call("mask", **request)[1][0]

    def call(self, task: str, **request: Any) -> Answer:
        """Let the child do one of `tasks.TASKS`.

        Raises:
            SourceError: What the task raised, or DEC_CRASH, DEC_TIMEOUT, DEC_OOM.
        """
        with self._lock:
            try:
                self._send({"task": task, **request})
                _, tree, arrays = self._answer()
                return tree, arrays
            except (BrokenPipeError, EOFError, TimeoutError) as error:
                raise self._obituary(error) from None
            except SourceError:
                raise
            except BaseException:  # Ctrl-C: the answer to come must not meet the next request
                self.close()
                raise

    def stream(self, task: str, **request: Any) -> Iterator[Answer]:
        """Let the child do a task that answers many times, each time within the limits of one.

        Raises:
            SourceError: As `call`, at the answer where it happens; the stream has ended then.
        """
        with self._lock:
            try:
                self._send({"task": task, **request})
                while True:
                    kind, tree, arrays = self._answer()
                    if kind == "ok":
                        return
                    yield tree, arrays
            except (BrokenPipeError, EOFError, TimeoutError) as error:
                raise self._obituary(error) from None
            except SourceError:
                raise
            except BaseException:  # also where the caller does not want the rest
                self.close()
                raise

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    pipe.close()

    def _send(self, request: dict[str, Any]) -> None:
        if self._owner != os.getpid():  # after a fork the child is our parent's
            self._child, self._owner = None, os.getpid()
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = self._start()
        if self._child.stdin is None:
            raise EOFError
        send(self._child.stdin, request, [])

    def _answer(self) -> tuple[str, Any, list[NDArray[Any]]]:
        if self._child is None or self._child.stdout is None:
            raise EOFError
        (kind, tree), arrays = receive(self._child.stdout, time.monotonic() + self._wall_seconds)
        if kind in ("ok", "item"):
            return kind, tree, arrays
        raise source_error(kind, [str(value) for value in tree])

    def _start(self) -> subprocess.Popen[bytes]:
        # the modules that we have, and none from the current folder
        code = f"import sys; sys.path[:] = {sys.path!r}; from {self.module} import main; "
        return subprocess.Popen(
            [sys.executable, "-c", f"{code}main({self.seconds}, {self.memory_mib})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # codecs print there, and what they print may quote values
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def _obituary(self, error: Exception) -> DicomError:
        child, code = self._child, 0
        if child and not isinstance(error, TimeoutError):
            with suppress(subprocess.TimeoutExpired):  # it lives, but talks nonsense
                code = child.wait(10)
        self.close()
        if isinstance(error, TimeoutError):
            return DicomError("DEC_TIMEOUT", f"no answer within {self._wall_seconds} s")
        if code == -signal.SIGXCPU:
            return DicomError("DEC_TIMEOUT", f"over {self.seconds} s of CPU (data.decode_seconds)")
        if code == -signal.SIGKILL:
            return DicomError("DEC_OOM", "the decoder was killed, most likely for its memory")
        return DicomError("DEC_CRASH", f"the decoder ended with {code}")


class SandboxPool:
    """Several sandboxes that work at once, each for one thread.

    Args:
        workers: Number of children.
        seconds: Of `Sandbox`.
        memory_mib: Of `Sandbox`.
        module: Of `Sandbox`; its tasks hold those of `tasks.TASKS`.
    """

    def __init__(
        self,
        workers: int,
        seconds: int = DECODE_SECONDS,
        memory_mib: int = DECODE_MEMORY_MIB,
        module: str = TASKS,
    ) -> None:
        self._boxes = [Sandbox(seconds, memory_mib, module) for _ in range(workers)]
        self._idle: SimpleQueue[Sandbox] = SimpleQueue()
        for box in self._boxes:
            self._idle.put(box)
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for box in self._boxes:
            box.close()

    def map(
        self, function: Callable[[Sandbox, In], Out], items: Iterable[In], ahead: int = 64
    ) -> Iterator[tuple[In, Out]]:
        """(item, function(sandbox, item)) in the order of the items; few are in flight."""

        def run(item: In) -> tuple[In, Out]:
            box = self._idle.get()
            try:
                return item, function(box, item)
            finally:
                self._idle.put(box)

        running: deque[Future[tuple[In, Out]]] = deque()
        for item in items:
            running.append(self._threads.submit(run, item))
            if len(running) >= ahead * len(self._boxes):
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def same_pixels(self, refs: Sequence[SliceRef]) -> bool:
        """Whether frames decode to the same values; one that does not decode is like no other."""
        digests = [digest for _, digest in self.map(or_error(Sandbox.digest), refs)]
        decoded = not any(isinstance(digest, SourceError) for digest in digests)
        return decoded and len(set(digests)) == 1


def or_error(
    function: Callable[[Sandbox, In], Out],
) -> Callable[[Sandbox, In], Out | SourceError]:
    """The same for `SandboxPool.map`, where one bad item must not end the others."""

    def run(box: Sandbox, item: In) -> Out | SourceError:
        try:
            return function(box, item)
        except SourceError as error:
            return error

    return run


@lru_cache(maxsize=2)
def shared_sandbox(seconds: int, memory_mib: int, module: str = TASKS) -> Sandbox:
    """The one sandbox of this process; its child ends with us, when its input closes."""
    return Sandbox(seconds, memory_mib, module)

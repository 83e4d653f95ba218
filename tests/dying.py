"""Children of a scan and of shard tasks that die at some files; a scan that stops to be killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from medpsp.dicom import tasks
from shards import encode, scanner

ALWAYS, ONCE = "KILLS", "KILLONCE"


def main(seconds: int, memory_mib: int) -> None:
    """As `scanner.main`, but opening some files ends it."""
    sys.addaudithook(_die)
    here = {"scan": scanner.scan, "encode": encode.encode}
    tasks.main(seconds, memory_mib, {**tasks.TASKS, **here})


def _die(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not isinstance(arguments[0], str):
        return
    name = os.path.basename(arguments[0])
    if name.startswith(ALWAYS):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == ONCE and not os.path.exists(arguments[0] + ".met"):
        os.mkdir(arguments[0] + ".met")
        os.kill(os.getpid(), signal.SIGKILL)


def stopping_scan(archive: str, index: str, point: str, count: int) -> None:
    """Scan until a point is met for the ``count``-th time; say so and wait to be killed.

    Points are: before rename, after rename (of a partition and of the list in turn), before delete
    (of a partition), read (rows have come in).
    """
    from medpsp.dataconfig import DataConfig
    from medpsp.dicom.sandbox import SandboxPool
    from shards import merge
    from shards.catalog import SCANNER, Catalog

    left = [count]

    def stop(here: str) -> None:
        left[0] -= here == point
        if not left[0]:
            print("here", flush=True)
            sys.stdin.read()

    replace, unlink = Path.replace, Path.unlink

    def replacing(path: Path, target: Path) -> Path:
        stop("before rename")
        found = replace(path, target)
        stop("after rename")
        return found

    def unlinking(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".parquet":
            stop("before delete")
        unlink(path, missing_ok)

    Path.replace, Path.unlink = replacing, unlinking  # type: ignore[method-assign, assignment]
    merge.FILES_AT_ONCE = 4
    data = DataConfig(archive=Path(archive), index=Path(index), classes=("a", "b"), workers=1)
    with SandboxPool(1, module=SCANNER) as pool:
        Catalog.scan(data, b"k" * 32, pool, lambda *_: stop("read"), part_rows=6)
    print("done", flush=True)


if __name__ == "__main__":
    stopping_scan(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))

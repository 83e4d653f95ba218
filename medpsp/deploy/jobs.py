"""One source segmented into a folder that is there whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medpsp.deploy.answers import Prediction
from medpsp.deploy.folders import lock
from medpsp.deploy.predict import Predictor
from medpsp.dicom.codes import told_rows
from medpsp.durable import sync_all
from medpsp.errors import MedpspError
from medpsp.progress import duration
from medpsp.types import ScanRow
from medpsp.words import end_of, many

WORK, SPOOL = ".part-", ".spool-"
"""Beginnings of names of what is not whole yet in a folder of answers."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What became of one.

    Attributes:
        line: Counts, reason codes and seconds; no name of a file or folder.
        files: Answers; none of meshes where nothing was found.
        failed: There are no answers.
        again: It failed for this machine (disk, memory), not for its source.
    """

    line: str
    files: tuple[Path, ...] = ()
    failed: bool = False
    again: bool = False


def run_job(
    predictor: Predictor,
    source: Path,
    folder: Path,
    same: Callable[[], bool] = lambda: True,
    before: Callable[[Sequence[Path]], None] = lambda files: None,
) -> Job | None:
    """Segment one source into a folder that appears whole, or not at all.

    Args:
        predictor: The model at work.
        source: As for `Predictor.source`.
        folder: To make.
        same: Asked at the end: False where the source is not what it was.
        before: Told the answers' names when they are on disk, just before they get them.

    Returns:
        None where ``same`` says no; nothing is kept then.
    """
    began, part = time.perf_counter(), folder.with_name(WORK + folder.name)
    shutil.rmtree(part, ignore_errors=True)
    try:
        found, rows = _segment(predictor, source, part)
        if not same():
            return None
        sync_all(part)
        files = tuple(folder / path.relative_to(part) for made in found for path in made.files)
        before(files)
        part.rename(folder)
        return Job(line=_line(found, rows, time.perf_counter() - began), files=files)
    except MedpspError as error:
        job = Job(line=_without_path(" ".join(str(error).split())), failed=True)
    except OSError as error:
        job = Job(line=error.strerror or type(error).__name__, failed=True, again=True)
    except Exception as error:  # noqa: BLE001 - one job ends no service; ORT's errors share no base
        lacking = isinstance(error, MemoryError)
        job = Job(line=type(error).__name__, failed=True, again=lacking)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return job if same() else None


def _segment(
    predictor: Predictor, source: Path, out: Path
) -> tuple[list[Prediction], list[ScanRow]]:
    """Under a name that names nobody: messages and some answers carry that of the source."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"entry{end_of(source.name)}"
        link.symlink_to(source.resolve())
        return predictor.source(link, out)


def _without_path(text: str) -> str:
    head, _, rest = text.partition(": ")
    return rest if tempfile.gettempdir() in head else text


def _line(found: Sequence[Prediction], rows: Sequence[ScanRow], seconds: float) -> str:
    slices = sum(made.slices for made in found)
    line = f"{len(found)} series, {many(slices, 'slice')}, {duration(seconds)}"
    return "; ".join(filter(None, (line, told_rows(rows))))


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """A folder of answers for this process alone; what a killed one left half made is removed.

    Raises:
        ConfigError: Another one is at work there.
        OSError: It cannot be made.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock(handle, out)
        for path in (*out.glob(f"{WORK}*"), *out.glob(f"{SPOOL}*")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)

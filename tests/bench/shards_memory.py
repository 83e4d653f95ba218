"""Memory of a conversion of an archive that is 20 times larger than its budget.

Counted is the proportional set size (PSS: shared pages are shared out) of every process that the
command started, sampled every 50 ms: what works on shards (`data.memory_mib` bounds it), and all
else.

    python tests/bench/shards_memory.py [--budget 704] [--times 20] [--dir FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from medpsp.config import Config
from medpsp.identity import create_key
from tests.bench.shards_data import PER_SERIES, _make_native
from tests.killing import command, family, state


def archive_of(folder: Path, size: int) -> int:
    """CT series of at least ``size`` bytes; number of files."""
    model = folder / "model"
    _make_native(model, PER_SERIES)
    files = sorted(model.rglob("*.dcm"))
    data = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    written = count = number = 0
    while written < size:
        target = folder / "archive" / f"s{number:04d}"
        target.mkdir(parents=True)
        for place, whole in enumerate(data):
            one = renamed(whole, number)
            (target / f"{place:04d}.dcm").write_bytes(one)
            written, count = written + len(one), count + 1
        number += 1
    return count


def renamed(data: bytes, number: int) -> bytes:
    """Another patient, study, series and other objects, of the same length."""
    from pydicom import dcmread
    from pydicom.filebase import DicomBytesIO

    ds = dcmread(DicomBytesIO(data[:20000]), stop_before_pixels=True, force=True)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        uid = str(ds[keyword].value)
        data = data.replace(
            uid.encode(), f"{uid[:-6]}{int(uid[-6:]) % 1000:03d}{number:03d}".encode()
        )
    return data.replace(b"BENCH0000", f"BENCH{number:04d}".encode())


class Watch(threading.Thread):
    """Peaks of the memory below a process, in MiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.over = pid, threading.Event()
        self.tasks = self.driver = self.rest = 0.0

    def run(self) -> None:
        while not self.over.wait(0.05):
            tasks = driver = rest = 0.0
            for process in family(self.pid):
                try:
                    words = " ".join(process.cmdline())
                    pss = process.memory_full_info().pss / 2**20
                except psutil.Error:
                    continue
                if process.pid == self.pid:
                    driver = pss
                elif words.startswith(("ray::_write", "ray::IDLE")) or "shards.encode" in words:
                    tasks += pss
                else:
                    rest += pss
            self.tasks, self.driver = max(self.tasks, tasks), max(self.driver, driver)
            self.rest = max(self.rest, rest)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=int, default=704)
    parser.add_argument("--times", type=float, default=20)
    parser.add_argument("--dir", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.dir) as folder:
        root = Path(folder)
        began = time.monotonic()
        count = archive_of(root, int(chosen.budget * chosen.times * 2**20))
        size = sum(f.stat().st_size for f in (root / "archive").rglob("*.dcm")) / 2**20
        print(f"archive: {count} files, {size:.0f} MiB, made in {time.monotonic() - began:.0f} s")
        create_key(root / "key", "key of the bench 7")
        tree = {
            "archive": root / "archive",
            "classes": ["background", "a"],
            "unlabelled": "keep",
            "split": {"val": 0.3, "test": 0.0},
            "key_file": root / "key",
            "workers": 2,
            "memory_mib": chosen.budget,
            "decode_memory_mib": 256,
        }
        config = Config.model_validate({"out": root / "out", "data": tree})
        began = time.monotonic()
        with command(config) as process:
            watch = Watch(process.pid)
            watch.start()
            code = process.wait()
            watch.over.set()
            watch.join()
        shards = len(state(config.shards, "commits/*.json"))
        print(f"exit {code}, {shards} shards, {time.monotonic() - began:.0f} s")
        print(
            f"peak PSS, MiB: shard tasks {watch.tasks:.0f} of data.memory_mib {chosen.budget}; "
            f"driver {watch.driver:.0f}; Ray's own processes {watch.rest:.0f}"
        )


if __name__ == "__main__":
    main()

"""The peers, run by the Python of .venv-bench/shards: a line of JSON asks, a line of JSON answers.

Each function does its work and returns its CPU seconds, children included, imports not.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
FAILURES = (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, ImportError)


class Timer:
    """CPU seconds between enter and exit."""

    cpu = 0.0


@contextmanager
def timed() -> Iterator[Timer]:
    timer, before = Timer(), _used()
    yield timer
    timer.cpu = _used() - before


def _used() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def versions(names: list[str]) -> Answer:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return {"versions": found}


def pydicom_zarr(files: list[str], out: str, plugin: str = "") -> Answer:
    """pydicom, modality LUT to float32, zarr-python 3 as it comes, one slice a chunk."""
    import numpy as np
    import zarr
    from pydicom import dcmread
    from pydicom.pixels import apply_modality_lut

    shutil.rmtree(out, ignore_errors=True)
    with timed() as timer:
        first = dcmread(files[0], stop_before_pixels=True)
        frame = (first.Rows, first.Columns)
        array = zarr.create_array(
            out, shape=(len(files), *frame), chunks=(1, *frame), dtype="float32"
        )
        for number, file in enumerate(files):
            ds = dcmread(file)
            if plugin:
                ds.pixel_array_options(decoding_plugin=plugin)
            array[number] = apply_modality_lut(ds.pixel_array, ds).astype(np.float32)
    return {"cpu": timer.cpu, "bytes": _size(out)}


def monai(folder: str) -> Answer:
    """MONAI's PydicomReader: a series to one array, nothing written."""
    from monai.data import PydicomReader

    reader = PydicomReader()
    with timed() as timer:
        reader.get_data(reader.read(folder))
    return {"cpu": timer.cpu}


def simpleitk(files: list[str], folder: str = "") -> Answer:
    """SimpleITK's ImageSeriesReader: files, sorted by us or by it, to one image; none written."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    with timed() as timer:
        reader.SetFileNames(files or reader.GetGDCMSeriesFileNames(folder))
        reader.Execute()
    return {"cpu": timer.cpu}


def dcm2niix(folder: str, out: str, gz: str) -> Answer:
    """dcm2niix of a folder to one .nii (-z n) or .nii.gz (-z i: its own gzip, level 6)."""
    shutil.rmtree(out, ignore_errors=True)
    Path(out).mkdir()
    tool = Path(sys.executable).with_name("dcm2niix")
    with timed() as timer:
        done = subprocess.run(
            [tool, "-z", gz, "-b", "n", "-f", "x", "-o", out, folder],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    if not any(Path(out).glob("*.nii*")):
        raise RuntimeError(f"dcm2niix wrote nothing, exit {done.returncode}")
    return {"cpu": timer.cpu, "bytes": _size(out)}


def rle(source: list[str], out: list[str]) -> Answer:
    """Data for the bench: the same slices in RLE."""
    from pydicom import dcmread
    from pydicom.uid import RLELossless

    for old, new in zip(source, out, strict=True):
        ds = dcmread(old)
        ds.compress(RLELossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
        ds.save_as(new)
    return {"cpu": 0.0}


def mds_write(array: str, out: str) -> Answer:
    """Uncompressed samples, as they come fastest."""
    import numpy as np
    from streaming import MDSWriter

    values = np.load(array, mmap_mode="r")
    shutil.rmtree(out, ignore_errors=True)
    shape = ",".join(map(str, values.shape[1:]))
    with MDSWriter(out=out, columns={"image": f"ndarray:int16:{shape}"}) as writer:
        for value in values:
            writer.write({"image": np.ascontiguousarray(value)})
    if not np.array_equal(_mds(out)[len(values) - 1]["image"], values[-1]):
        raise ValueError("MDS gave back other values")
    return {"cpu": 0.0, "bytes": _size(out)}


@lru_cache(maxsize=1)
def _mds(folder: str) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(local=folder, shuffle=False, batch_size=1)


def mds_read(folder: str, order: list[int]) -> Answer:
    data = _mds(folder)
    with timed() as timer:
        for number in order:
            data[number]["image"]
    return {"cpu": timer.cpu}


def blosc2_write(array: str, out: str, kind: str) -> Answer:
    """One file, one slice a chunk. ``nnunet``: float32, z-scored; ``int16``: as it is. LZ4HC-5."""
    import blosc2
    import numpy as np

    values = np.load(array)
    if kind == "nnunet":
        values = values.astype(np.float32)
        values = (values - values.mean()) / values.std()
    Path(out).unlink(missing_ok=True)
    blosc2.set_nthreads(1)
    blosc2.asarray(
        np.ascontiguousarray(values),
        chunks=(1, *values.shape[1:]),
        urlpath=out,
        cparams={"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1},
    )
    if not np.array_equal(_blosc2(out)[len(values) - 1], values[-1]):
        raise ValueError("blosc2 gave back other values")
    return {"cpu": 0.0, "bytes": _size(out)}


@lru_cache(maxsize=4)
def _blosc2(path: str) -> Any:
    import blosc2

    blosc2.set_nthreads(1)
    return blosc2.open(path, mode="r", dparams={"nthreads": 1}, mmap_mode="r")


def blosc2_read(path: str, order: list[int], keep: bool) -> Answer:
    """Opened for every slice as nnU-Net does, or once."""
    import blosc2

    blosc2.set_nthreads(1)
    whole = _blosc2(path)
    with timed() as timer:
        for number in order:
            handle = (
                whole
                if keep
                else blosc2.open(path, mode="r", dparams={"nthreads": 1}, mmap_mode="r")
            )
            handle[number]
    return {"cpu": timer.cpu}


def ffcv() -> Answer:
    """Only says whether it is there."""
    import ffcv as found

    return {"cpu": 0.0, "version": found.__version__}


def _size(place: str) -> int:
    path = Path(place)
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


TASKS: dict[str, Callable[..., Answer]] = {
    f.__name__: f
    for f in (
        *(versions, pydicom_zarr, monai, simpleitk, dcm2niix, rle),
        *(mds_write, mds_read, blosc2_write, blosc2_read, ffcv),
    )
}


def main() -> None:
    """Answer until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = TASKS[request.pop("task")](**request)
        except FAILURES as error:  # the row says it
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

"""The reader: equal to zarr-python on every slice, an error on everything else."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from medpsp.errors import ShardError
from shards.bucket import create_bucket, shard_files
from shards.codec import LABEL, image_codec
from shards.reader import ShardReader
from shards.shardfile import OpenShards, ShardWriter
from tests.test_codec import DTYPES, PROFILES, profile_settings

SLOTS = 3
COUNT = 7  # the last shard has one slice and two empty slots
HOLE = 4


def bucket_name(dtype: str) -> str:
    return f"18x20_{dtype}"


def slices(dtype: str, count: int = COUNT) -> np.ndarray:
    """(N, H, W) or (N, H, W, 3), noise over all values of the dtype."""
    rng = np.random.default_rng(11)
    shape = (count, 18, 20, 3) if dtype == "uint8" else (count, 18, 20)
    if dtype == "float32":
        return rng.normal(0, 1e5, shape).astype(np.float32)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def labels(count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(12).integers(0, 3, (count, 18, 20), np.uint8)


def make_store(
    root: Path, dtype: str = "int16", profile: str = "default", count: int = COUNT
) -> tuple[np.ndarray, np.ndarray]:
    """Shards of 3 slots; slot 4 is empty."""
    images, masks = slices(dtype, count), labels(count)
    bucket = bucket_name(dtype)
    create_bucket(root, bucket, count, profile_settings(profile))
    codec = image_codec(profile, dtype)
    for number in range(-(-count // SLOTS)):
        writers = [ShardWriter(root / path, SLOTS) for path in shard_files(bucket, number)]
        for slot in range(number * SLOTS, min((number + 1) * SLOTS, count)):
            if slot != HOLE:
                writers[0].append(slot % SLOTS, codec.encode(images[slot]))
                writers[1].append(slot % SLOTS, LABEL.encode(masks[slot]))
        for writer in writers:
            writer.commit()
    return images, masks


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path)
    return tmp_path


BUCKET = bucket_name("int16")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_slice_equals_what_zarr_python_reads(profile: str, dtype: str, tmp_path: Path):
    images, masks = make_store(tmp_path, dtype, profile)
    bucket = bucket_name(dtype)
    theirs = [zarr.open_array(tmp_path / bucket / n, mode="r") for n in ("image", "label")]
    reader = ShardReader(tmp_path)
    assert reader.frame(bucket) == (images.shape[1:], images.dtype)
    present = [n for n in range(COUNT) if n != HOLE]
    for number in [*present, *reversed(present)]:
        image, label = reader.read(bucket, number)
        assert (image.dtype, label.dtype) == (images.dtype, np.uint8)
        np.testing.assert_array_equal(image, np.asarray(theirs[0][number]))
        np.testing.assert_array_equal(label, np.asarray(theirs[1][number]))
        np.testing.assert_array_equal(image, images[number])
        np.testing.assert_array_equal(label, masks[number])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_its_slices_in_their_order(dtype: str, tmp_path: Path):
    images, masks = make_store(tmp_path, dtype)
    slots = [6, 0, 5, 0]
    out, marks = np.empty((4, *images.shape[1:]), images.dtype), np.empty((4, 18, 20), np.uint8)
    ShardReader(tmp_path).read_batch(bucket_name(dtype), slots, out, marks)
    np.testing.assert_array_equal(out, images[slots])
    np.testing.assert_array_equal(marks, masks[slots])


def test_either_half_can_be_left_out(store: Path):
    reader, image, label = ShardReader(store), np.zeros((18, 20), np.int16), labels(1)[0]
    before = label.copy()
    reader.read_into(BUCKET, np.int64(3), image, None)  # type: ignore[arg-type]
    np.testing.assert_array_equal(image, slices("int16")[3])
    np.testing.assert_array_equal(label, before)
    reader.read_into(BUCKET, 3, None, label)
    np.testing.assert_array_equal(label, labels()[3])
    (store / BUCKET / "label/c/1/0/0").unlink()
    reader.close()
    reader.read_into(BUCKET, 3, image, None)


def read_only() -> np.ndarray:
    out = np.zeros((18, 20), np.int16)
    out.setflags(write=False)
    return out


@pytest.mark.parametrize(
    ("out", "why"),
    [
        (np.zeros((20, 18), np.int16), r"\(20, 18\) int16, expected \(18, 20\) int16"),
        (np.zeros((18, 20), np.uint16), "uint16, expected"),
        (np.zeros((18, 20), ">i2"), "expected"),
        (np.zeros((20, 18), np.int16).T, "not C-contiguous"),
        (np.zeros((18, 40), np.int16)[:, ::2], "not C-contiguous"),
        (read_only(), "not writeable"),
    ],
)
def test_memory_that_does_not_fit_is_refused(out: np.ndarray, why: str, store: Path):
    before = out.copy()
    with pytest.raises(ValueError, match=why):
        ShardReader(store).read_into(BUCKET, 0, out, None)
    np.testing.assert_array_equal(out, before)
    with pytest.raises(ValueError, match="for 2 slices, expected 1"):
        ShardReader(store).read_batch(BUCKET, [0], np.zeros((2, 18, 20), np.int16))


# nothing that is not there, nothing that is damaged


@pytest.mark.parametrize(
    ("slot", "why"),
    [
        (HOLE, "the slot is empty"),
        (-1, "has slots 0 to 6"),
        (COUNT, "has slots 0 to 6"),
        (2**70, "has slots 0 to 6"),
        ("0", "integer"),
    ],
)
def test_a_slot_without_a_slice_is_an_error(slot: Any, why: str, store: Path):
    with pytest.raises(ShardError, match=f"image slot {slot} cannot be read .*{why}.*--repair"):
        ShardReader(store).read(BUCKET, slot)


@pytest.mark.parametrize("bucket", ["9x9_int16", "", "../x"])
def test_a_bucket_that_is_not_there_is_an_error(bucket: str, store: Path):
    with pytest.raises(ShardError, match=r"slot 0 cannot be read \(its file is missing"):
        ShardReader(store).read(bucket, 0)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"codecs": []}', '{"zarr_format": 3}'])
def test_metadata_that_is_damaged_is_an_error(text: str, store: Path):
    (store / BUCKET / "label/zarr.json").write_text(text)
    with pytest.raises(ShardError, match="label slot 2 cannot be read"):
        ShardReader(store).read(BUCKET, 2)


def chunk_byte(path: Path) -> int:
    return 60


def crc_byte(path: Path) -> int:
    """The last byte of the first chunk."""
    data = path.read_bytes()
    return int.from_bytes(data[-SLOTS * 16 - 4 :][8:16], "little") - 1


def index_byte(path: Path) -> int:
    return path.stat().st_size - 40


def index_crc_byte(path: Path) -> int:
    return path.stat().st_size - 1


@pytest.mark.parametrize("name", ["image", "label"])
@pytest.mark.parametrize("place", [chunk_byte, crc_byte, index_byte, index_crc_byte])
def test_a_flipped_bit_is_an_error(name: str, place: Callable[[Path], int], store: Path):
    path = store / BUCKET / name / "c/0/0/0"
    data = bytearray(path.read_bytes())
    data[place(path)] ^= 4
    path.write_bytes(data)
    reader = ShardReader(store)
    with pytest.raises(ShardError, match=f"{BUCKET}/{name} slot 0 cannot be read .*CRC32C"):
        reader.read(BUCKET, 0)
    np.testing.assert_array_equal(reader.read(BUCKET, 6)[0], slices("int16")[6])  # others are whole


@pytest.mark.parametrize("keep", [0, 3, 51, 52, -1, -40])
def test_a_shard_cut_short_is_an_error(keep: int, store: Path):
    path = store / BUCKET / "image/c/1/0/0"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShardError, match="image slot 3 cannot be read"):
        ShardReader(store).read(BUCKET, 3)


def test_a_shard_cut_short_under_an_open_reader_is_an_error(store: Path):
    reader = ShardReader(store)
    reader.read(BUCKET, 5)
    os.truncate(store / BUCKET / "image/c/1/0/0", 100)
    with pytest.raises(ShardError, match=r"slot 5 cannot be read \(the file ends after"):
        reader.read(BUCKET, 5)


def test_a_shard_that_is_missing_is_an_error(store: Path):
    (store / BUCKET / "image/c/1/0/0").unlink()
    with pytest.raises(ShardError, match=r"slot 3 cannot be read \(its file is missing\)"):
        ShardReader(store).read(BUCKET, 3)


def test_the_index_of_a_shard_written_anew_is_read_anew(store: Path):
    reader = ShardReader(store, handles=1)
    reader.read_into(BUCKET, 0, np.empty((18, 20), np.int16))
    fresh = slices("int16")[::-1]
    writer, codec = (
        ShardWriter(store / BUCKET / "image/c/0/0/0", SLOTS),
        image_codec("fast", "int16"),
    )
    for slot in (2, 1, 0):
        writer.append(slot, codec.encode(fresh[slot]))
    writer.commit()
    reader.read_into(BUCKET, 5, np.empty((18, 20), np.int16))  # closes the first
    np.testing.assert_array_equal(reader.read(BUCKET, 0)[0], fresh[0])


# descriptors, forks, other processes


def opened() -> list[str]:
    names = []
    for name in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue  # that of the listing
    return names


def test_few_files_stay_open_and_none_after_the_reader(tmp_path: Path):
    images, _ = make_store(tmp_path, count=90)
    reader = ShardReader(tmp_path, handles=8)
    for slot in [n for n in range(90) if n != HOLE] * 2:
        np.testing.assert_array_equal(reader.read(BUCKET, slot)[0], images[slot])
        assert sum(str(tmp_path) in name for name in opened()) <= 8
    reader.close()
    assert not any(str(tmp_path) in name for name in opened())
    reader.read(BUCKET, 0)
    del reader
    assert not any(str(tmp_path) in name for name in opened())


def test_a_low_limit_of_the_process_is_kept_to(tmp_path: Path):
    """40 descriptors, all taken by others in the end: 60 files are read all the same."""
    images, _ = make_store(tmp_path, count=90)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    try:
        reader = ShardReader(tmp_path)
        reader.read(BUCKET, 0)
        with contextlib.suppress(OSError):  # until there are no more
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        found = [reader.read(BUCKET, slot)[0] for slot in range(5, 90)]
    finally:
        for handle in taken:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # not before: what compares is imported late, and an import needs a descriptor, too
    np.testing.assert_array_equal(found, images[5:90])


def test_known_indexes_are_bounded(store: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shards.shardfile.INDEX_BYTES", 2 * SLOTS * 16)
    files = OpenShards(1)
    for _ in range(2):
        for number in range(3):
            files.get(str(store / shard_files(BUCKET, number)[0]), SLOTS)
            assert len(files._known) <= 2
    assert files._known_bytes == sum(k.pairs.nbytes for k in files._known.values())


def read_all(reader: ShardReader) -> list[bytes]:
    return [b"".join(map(bytes, reader.read(BUCKET, n))) for n in range(COUNT) if n != HOLE]


def test_a_reader_goes_on_on_both_sides_of_a_fork(store: Path):
    reader = ShardReader(store)
    expected = read_all(reader)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # no assertion here: a child that raised would go on as a second pytest
        good = all(read_all(reader) == expected for _ in range(20))
        os.write(write_end, b"good" if good else b"bad")
        os._exit(0)
    os.close(write_end)
    assert all(read_all(reader) == expected for _ in range(20))
    with os.fdopen(read_end) as pipe:
        assert pipe.read() == "good"
    assert os.waitpid(child, 0)[1] == 0


def test_a_reader_travels_to_a_spawned_process_without_its_files(store: Path):
    reader = ShardReader(store, handles=5)
    expected = read_all(reader)
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert (copy.root, copy.handles, copy._arrays) == (store, 5, {})
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_all, (reader,)) == expected


def test_reading_our_layout_imports_no_zarr(store: Path):
    code = (
        "import sys; from pathlib import Path; from shards.reader import ShardReader\n"
        f"ShardReader(Path({str(store)!r})).read({BUCKET!r}, 0)\n"
        "print('zarr' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# other layouts


def foreign(root: Path, **layout: Any) -> np.ndarray:
    images, masks = slices("int16"), labels()
    for name, values in (("image", images), ("label", masks)):
        array = zarr.create_array(
            root / BUCKET / name, shape=values.shape, dtype=values.dtype, fill_value=0, **layout
        )
        array[:] = values
    return images


FOREIGN: list[dict[str, Any]] = [
    {"chunks": (1, 18, 20)},
    {"chunks": (2, 9, 10), "compressors": None},
    {"chunks": (1, 18, 20), "shards": (3, 18, 20)},
    {"chunks": (1, 9, 10), "shards": (2, 18, 20), "compressors": zarr.codecs.GzipCodec()},
    {"chunks": (1, 18, 20), "chunk_key_encoding": {"name": "v2", "separator": "."}},
    {"chunks": (1, 18, 20), "zarr_format": 2},
]


@pytest.mark.parametrize("layout", FOREIGN)
def test_other_layouts_are_read_through_zarr_python(layout: dict[str, Any], tmp_path: Path):
    if layout.get("zarr_format") == 2:
        layout = {**layout, "compressors": None}
    images = foreign(tmp_path, **layout)
    reader = ShardReader(tmp_path)
    assert reader.frame(BUCKET) == ((18, 20), np.int16)
    for number in range(COUNT):
        image, label = reader.read(BUCKET, number)
        np.testing.assert_array_equal(image, images[number])
        np.testing.assert_array_equal(label, labels()[number])
    for slot in (-1, COUNT):
        with pytest.raises(ShardError, match=f"slot {slot} cannot be read .*has slots 0 to 6"):
            reader.read(BUCKET, slot)


@pytest.mark.parametrize("layout", FOREIGN[:4])
def test_a_file_of_another_layout_that_is_missing_is_an_error(
    layout: dict[str, Any], tmp_path: Path
):
    images = foreign(tmp_path, **layout)
    first, *_, last = sorted(p for p in (tmp_path / BUCKET / "image/c").rglob("*") if p.is_file())
    last.unlink()
    reader = ShardReader(tmp_path)
    np.testing.assert_array_equal(reader.read(BUCKET, 0)[0], images[0])
    with pytest.raises(ShardError, match=r"slot 6 cannot be read \(its file is missing\)"):
        reader.read(BUCKET, 6)
    first.unlink()
    with pytest.raises(ShardError, match="slot 0 cannot be read"):
        reader.read(BUCKET, 0)


def test_a_damaged_chunk_of_another_layout_is_an_error(tmp_path: Path):
    foreign(tmp_path, chunks=(1, 18, 20), compressors=zarr.codecs.ZstdCodec(checksum=True))
    path = tmp_path / BUCKET / "image/c/2/0/0"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="image slot 2 cannot be read"):
        ShardReader(tmp_path).read(BUCKET, 2)


@pytest.mark.parametrize("cname", ["zlib", "blosclz", "lz4hc", "snappy"])
@pytest.mark.parametrize("shuffle", ["noshuffle", "bitshuffle"])
def test_what_zarr_python_writes_in_our_layout_is_read_directly(
    cname: Any, shuffle: Any, tmp_path: Path
):
    from numcodecs import blosc

    if cname not in blosc.list_compressors():
        pytest.skip(f"numcodecs has no {cname}")
    images = foreign(
        tmp_path,
        chunks=(1, 18, 20),
        shards=(3, 18, 20),
        compressors=[
            zarr.codecs.BloscCodec(cname=cname, clevel=5, shuffle=shuffle, typesize=2),
            zarr.codecs.Crc32cCodec(),
        ],
    )
    reader = ShardReader(tmp_path)
    for number in range(COUNT):
        np.testing.assert_array_equal(reader.read(BUCKET, number)[0], images[number])


@pytest.mark.parametrize("slots", [0, -8, 8.5, "8"])
def test_a_shard_of_no_slots_is_an_error(slots: Any, store: Path):
    path = store / BUCKET / "image/zarr.json"
    tree = json.loads(path.read_text())
    tree["chunk_grid"]["configuration"]["chunk_shape"][0] = slots
    path.write_text(json.dumps(tree))
    with pytest.raises(ShardError, match=rf"zarr.json says {slots!r} slots a shard"):
        ShardReader(store).read(BUCKET, 0)


def test_a_pipe_in_place_of_a_shard_holds_nobody_up(store: Path):
    path = store / shard_files(BUCKET, 0)[0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ShardError, match="image slot 0 cannot be read"):
        ShardReader(store).read(BUCKET, 0)

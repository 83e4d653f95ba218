"""Chunks, shard files, sealed files: zarr-python reads what we write, no flipped bit passes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numcodecs import blosc

from medpsp.dicom.names import NameRule
from medpsp.errors import ShardError
from shards.bucket import create_bucket, shard_files
from shards.codec import LABEL, Codec, codec_of, frame_chunk, image_codec, with_crc
from shards.dhash import difference_hash
from shards.sealed import read_sealed, sealed_bytes
from shards.settings import WriteSettings
from shards.shardfile import ABSENT, ShardWriter, read_shard_index

PROFILES = ("default", "fast", "dense", "jpegls", "htj2k")
DTYPES = ("int16", "float32", "uint8")


def profile_settings(profile: str) -> WriteSettings:
    return WriteSettings(
        source="dicom",
        labels=NameRule(classes=("background", "organ")),
        label_map=(),
        mask_geometry="affine",
        mask_resample="never",
        window=None,
        header_window=False,
        padding="background",
        shard_slices=3,
        profile=profile,
    )


def values(dtype: str, shape: tuple[int, ...] = (18, 20)) -> np.ndarray:
    rng = np.random.default_rng(5)
    if dtype == "float32":
        return rng.normal(0, 1e5, shape).astype(np.float32)
    info = np.iinfo(dtype)
    found = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    found.flat[:2] = info.min, info.max
    return found


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_python_reads_what_we_write(profile: str, dtype: str, tmp_path: Path) -> None:
    bucket = f"18x20_{dtype}"
    frame = (18, 20, 3) if dtype == "uint8" else (18, 20)
    create_bucket(tmp_path, bucket, 5, profile_settings(profile))
    codec = image_codec(profile, dtype)
    tree = json.loads((tmp_path / bucket / "image/zarr.json").read_text())
    assert codec_of(tree) == codec  # the reader finds it from the file alone
    slices = {number: values(dtype, frame) + number for number in (0, 1, 4)}
    for shard in (0, 1):
        writer = ShardWriter(tmp_path / shard_files(bucket, shard)[0], 3)
        for number, one in slices.items():
            if number // 3 == shard:
                writer.append(number % 3, codec.encode(one))
        sha, size = writer.commit()
        path = tmp_path / shard_files(bucket, shard)[0]
        assert size == path.stat().st_size
        assert len(sha) == 64
    array = zarr.open_array(tmp_path / bucket / "image", mode="r")
    assert array.shape == (5, *frame)
    for number in range(5):  # slots without a chunk have the fill value
        expected = slices.get(number, np.zeros(frame, dtype))
        np.testing.assert_array_equal(np.asarray(array[number]), expected)


@pytest.mark.parametrize("profile", PROFILES)
def test_zarr_python_writes_what_we_read(profile: str, tmp_path: Path) -> None:
    """Without scipy's or our writer: the codec for zarr-python encodes as well."""
    create_bucket(tmp_path, "18x20_int16", 3, profile_settings(profile))
    array = zarr.open_array(tmp_path / "18x20_int16/image", mode="r+")
    expected = np.stack([values("int16") for _ in range(3)])
    array[:] = expected
    codec = image_codec(profile, "int16")
    out = np.empty((18, 20), np.int16)
    with (tmp_path / shard_files("18x20_int16", 0)[0]).open("rb") as file:
        for number, (offset, length) in enumerate(read_shard_index(file.fileno(), 3).tolist()):
            file.seek(offset)
            codec.decode_into(file.read(length), out)
            np.testing.assert_array_equal(out, expected[number])


@given(
    image=arrays(np.int16, st.tuples(st.integers(1, 40), st.integers(1, 40))),
    profile=st.sampled_from(PROFILES),
)
@settings(max_examples=60)
def test_every_profile_is_lossless(image: np.ndarray, profile: str) -> None:
    codec, out = image_codec(profile, "int16"), np.empty_like(image)
    codec.decode_into(codec.encode(image), out)
    np.testing.assert_array_equal(out, image)


@given(bit=st.integers(0, 8 * 400 - 1), profile=st.sampled_from(PROFILES))
@settings(max_examples=60)
def test_no_flipped_bit_of_a_chunk_passes(bit: int, profile: str) -> None:
    image = values("int16", (8, 8))
    codec = image_codec(profile, "int16")
    chunk = bytearray(codec.encode(image))
    chunk[bit // 8 % len(chunk)] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="CRC32C"):
        codec.decode_into(bytes(chunk), np.empty((8, 8), np.int16))


@pytest.mark.parametrize(
    ("chunk", "why"),
    [
        (b"", "CRC32C"),
        (b"abc", "CRC32C"),
        (with_crc(b""), "buffer"),
        (with_crc(b"\0" * 16), "bytes, expected 128"),
        (LABEL.encode(np.zeros((8, 8), np.uint8)), "64 bytes, expected 128"),
        (LABEL.encode(np.zeros((64, 8), np.uint8)), "512 bytes, expected 128"),
    ],
)
def test_a_chunk_of_something_else_is_a_value_error(chunk: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        image_codec("default", "int16").decode_into(chunk, np.empty((8, 8), np.int16))


@pytest.mark.parametrize("kind", ["jpegxl", "jpegls", "htj2k"])
@pytest.mark.parametrize("payload", [b"", b"\xff\xd8\xff\xf7", b"\0" * 50])
def test_a_frame_that_is_no_codestream_is_a_value_error(kind: Any, payload: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Codec(kind=kind).decode_into(frame_chunk(payload, 0), np.empty((8, 8), np.int16))


def test_frames_of_another_size_are_refused() -> None:
    codec = Codec(kind="jpegls")
    with pytest.raises(ValueError, match=r"\(8, 9\).*expected \(8, 8\)"):
        codec.decode_into(codec.encode(values("int16", (8, 9))), np.empty((8, 8), np.int16))


def test_an_offset_is_added_to_the_values_of_a_frame() -> None:
    """12 stored bits and an intercept of -1024, as scanners have it."""
    import imagecodecs

    stored = np.array([[0, 1024], [3000, 4095]], np.uint16)
    out = np.empty((2, 2), np.int16)
    chunk = frame_chunk(imagecodecs.jpegls_encode(stored), -1024)
    Codec(kind="jpegls").decode_into(chunk, out)
    assert out.tolist() == [[-1024, 0], [1976, 3071]]


def test_blosc_starts_no_threads() -> None:
    assert blosc.use_threads is False


def changed(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(tree))
    place = copy
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return dict(copy)


SHARDING = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("codecs",), [{"name": "bytes"}]),
        ((*SHARDING, "index_location"), "start"),
        ((*SHARDING, "index_codecs"), [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ((*SHARDING, "chunk_shape"), [2, 18, 20]),
        ((*SHARDING, "chunk_shape"), [1, 9, 20]),
        ((*SHARDING, "codecs", 0, "configuration", "endian"), "big"),
        ((*SHARDING, "codecs", 2, "name"), "gzip"),
        (("storage_transformers",), [{"name": "x"}]),
        (("chunk_key_encoding", "name"), "v2"),
    ],
)
def test_a_layout_that_is_not_ours_is_left_to_zarr_python(
    path: tuple[Any, ...], value: Any, tmp_path: Path
) -> None:
    create_bucket(tmp_path, "18x20_int16", 3, profile_settings("default"))
    tree = json.loads((tmp_path / "18x20_int16/image/zarr.json").read_text())
    assert codec_of(tree) is not None
    assert codec_of(changed(tree, path, value)) is None


# shard files


def test_a_shard_by_hand(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "c/0/0/0", 3)
    writer.append(2, b"abc")
    writer.append(0, b"de")
    sha, size = writer.commit()
    data = (tmp_path / "c/0/0/0").read_bytes()
    assert sha == hashlib.sha256(data).hexdigest()
    # five bytes, three pairs of eight bytes and a CRC
    assert (data[:5], size) == (b"abcde", 5 + 48 + 4)
    with (tmp_path / "c/0/0/0").open("rb") as file:
        index = read_shard_index(file.fileno(), 3)
    assert index.tolist() == [[3, 2], [ABSENT, ABSENT], [0, 3]]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["0"]


def test_an_aborted_shard_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "c/0/0/0", 3)
    writer.append(0, b"abc")
    writer.abort()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@given(bit=st.integers(0, 8 * 52 - 1))
@settings(max_examples=40)
def test_no_flipped_bit_of_an_index_passes(bit: int, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("shard") / "0"
    writer = ShardWriter(path, 3)
    writer.append(0, b"abc")
    writer.commit()
    data = bytearray(path.read_bytes())
    data[3 + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(ValueError, match="CRC32C"):
        read_shard_index(file.fileno(), 3)


@pytest.mark.parametrize("pair", [(0, 4), (4, 0), (3, 1), (2**63, 2**63), (2**64 - 2, 3)])
def test_an_index_that_points_outside_is_refused(pair: tuple[int, int], tmp_path: Path) -> None:
    index = np.array([pair], "<u8")
    (tmp_path / "0").write_bytes(b"abc" + with_crc(index.tobytes()))
    with (tmp_path / "0").open("rb") as file, pytest.raises(ValueError, match="outside"):
        read_shard_index(file.fileno(), 1)


# sealed files


@given(bit=st.integers(0, 8 * 2000))
@settings(max_examples=80)
def test_no_flipped_bit_of_a_sealed_file_passes(bit: int, tmp_path_factory: Any) -> None:
    tree = {"name": "ü", "rows": [[1, 2.5, None, "x", float("nan")]], "nested": {"a": []}}
    data = sealed_bytes(tree)
    path = tmp_path_factory.mktemp("sealed") / "file.json"
    path.write_bytes(data)
    assert read_sealed(path).keys() == tree.keys()
    broken = bytearray(data)
    broken[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(broken)
    with pytest.raises(ShardError, match=r"file\.json"):
        read_sealed(path)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"7", b'{"sha256": "x"}', b"\xff"])
def test_what_is_no_sealed_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_bytes(data)
    with pytest.raises(ShardError, match=r"f\.json"):
        read_sealed(tmp_path / "f.json")


# the fingerprint of pictures


def test_a_difference_hash_by_hand() -> None:
    """Seventeen columns of rising steps: every block is brighter than its left neighbour."""
    rising = np.repeat(np.arange(17)[None] * 10, 16, axis=0).astype(np.int16)
    assert difference_hash(rising) == "f" * 64
    assert difference_hash(rising[:, ::-1]) == "0" * 64
    assert difference_hash(np.zeros((16, 17), np.int16)) == "0" * 64
    assert difference_hash(rising[:15]) == "0" * 64  # too small to say anything


def test_a_difference_hash_is_the_same_under_rescaling_and_in_colour() -> None:
    image = values("int16", (64, 68)).astype(np.int16) // 64
    known = difference_hash(image)
    assert difference_hash((image * 3 + 100).astype(np.float32)) == known
    grey = ((image + 512) // 4).astype(np.uint8)
    assert difference_hash(np.repeat(grey[..., None], 3, axis=2)) == difference_hash(grey)

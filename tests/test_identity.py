"""Keys that others cannot read, pseudonyms that repeat, splits that stay."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import stat
from datetime import datetime
from pathlib import Path

import pytest

from medpsp.errors import ConfigError
from medpsp.identity import (
    create_key,
    fingerprint,
    load_key,
    pseudonym,
    shifted_day,
    split_of,
    unit_hash,
)

KEY = b"sixteen bytes or"
PATIENTS = [f"patient {number}" for number in range(2000)]


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDPSP_KEY", raising=False)


def key_file(folder: Path, content: bytes = KEY, mode: int = 0o600) -> Path:
    path = folder / "project.key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [KEY, KEY + b"\n", b"  " + KEY + b"\r\n"])
def test_key_file_without_its_line_end(tmp_path: Path, content: bytes) -> None:
    assert load_key(key_file(tmp_path, content)) == KEY


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_key_file_of_the_owner_alone(tmp_path: Path, mode: int) -> None:
    assert load_key(key_file(tmp_path, mode=mode)) == KEY


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_key_file_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=f"mode 0{mode:o}, expected 0600; chmod 600 it"):
        load_key(key_file(tmp_path, mode=mode))


def test_short_key_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="15 bytes, expected at least 16") as caught:
        load_key(key_file(tmp_path, KEY[:15] + b"\n"))
    assert KEY[:15].decode() not in str(caught.value)


def test_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(FileNotFoundError\)"):
        load_key(tmp_path / "gone")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_key(tmp_path)


def test_a_full_disk_leaves_no_part_of_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, *words: object, **more: object) -> None:
        os.close(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fdopen", full)
        with pytest.raises(OSError, match="No space"):
            create_key(tmp_path / "a.key")
    create_key(tmp_path / "a.key")
    assert len(load_key(tmp_path / "a.key")) == 64


def test_key_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDPSP_KEY", KEY.decode() + "\n")
    assert load_key(None) == KEY
    assert load_key(key_file(tmp_path, b"another key of sixteen")) == b"another key of sixteen"
    monkeypatch.setenv("MEDPSP_KEY", "short")
    with pytest.raises(ConfigError, match="MEDPSP_KEY: 5 bytes"):
        load_key(None)


def test_no_key_is_made_in_passing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no key; make one with `medpsp key new FILE`"):
        load_key(None)


def test_new_key_is_random_private_and_never_overwritten(tmp_path: Path) -> None:
    for name in ("a", "b"):
        create_key(tmp_path / name)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    first = load_key(tmp_path / "a")
    assert len(first) == 64
    assert first != load_key(tmp_path / "b")
    with pytest.raises(ConfigError, match="a: exists; a key is never overwritten"):
        create_key(tmp_path / "a", "ff" * 32)
    assert load_key(tmp_path / "a") == first


def test_shifted_days_keep_order_and_intervals_of_a_patient() -> None:
    dates = ("20240101", "20240131", "20250101")
    days = [shifted_day(KEY, "Jane", date) for date in dates]
    assert (days[1] - days[0], days[2] - days[0]) == (30, 366)  # 2024 is a leap year
    true = datetime(2024, 1, 1).toordinal()
    offsets = {shifted_day(KEY, patient, dates[0]) - true for patient in PATIENTS}
    assert len(offsets) > 1000
    assert 0 not in offsets
    assert max(abs(offset) for offset in offsets) <= 3650
    assert [shifted_day(KEY, "Jane", text) for text in ("", "2024", "CANARY..")] == [-1, -1, -1]


def test_pseudonym_is_a_keyed_hash() -> None:
    expected = hmac.new(KEY, b"patient\0Jane", hashlib.sha256).hexdigest()[:16]
    assert pseudonym(KEY, "patient", "Jane") == expected
    assert pseudonym(KEY, "patient", "Jane") == "8a59327a410b682e"  # as openssl has it
    assert fingerprint(KEY) == hmac.new(KEY, b"fingerprint\0", hashlib.sha256).hexdigest()[:8]


def test_pseudonyms_are_apart() -> None:
    told = {pseudonym(KEY, kind, value) for kind in ("patient", "file") for value in PATIENTS}
    assert len(told) == 4000
    assert pseudonym(KEY, "patient", "Jane") != pseudonym(KEY + b"!", "patient", "Jane")
    assert pseudonym(KEY, "ab", "c") != pseudonym(KEY, "a", "bc")


def test_file_name_that_is_no_utf8_has_a_pseudonym() -> None:
    odd, other = b"m\xfcller.dcm".decode(errors="surrogateescape"), "m\u00fcller.dcm"
    assert len(pseudonym(KEY, "file", odd)) == 16
    assert pseudonym(KEY, "file", odd) != pseudonym(KEY, "file", other)


def test_unit_hash_is_even() -> None:
    places = [unit_hash(KEY, "stage", patient) for patient in PATIENTS]
    assert 0 <= min(places)
    assert max(places) < 1
    tenths = [sum(low / 10 <= p < (low + 1) / 10 for p in places) for low in range(10)]
    assert all(150 < count < 250 for count in tenths)  # 200 +- 13.4 a tenth


def test_shares_of_the_splits() -> None:
    splits = [split_of(KEY, patient, val=0.2, test=0.1) for patient in PATIENTS]
    assert 345 < splits.count("val") < 455  # 400 +- 17.9
    assert 160 < splits.count("test") < 240  # 200 +- 13.4
    assert {split_of(KEY, patient, val=0, test=0) for patient in PATIENTS} == {"train"}


def test_a_patient_stays_when_others_come() -> None:
    few = {patient: split_of(KEY, patient, 0.2, 0.2) for patient in PATIENTS[:50]}
    many = {patient: split_of(KEY, patient, 0.2, 0.2) for patient in reversed(PATIENTS)}
    assert few.items() <= many.items()


def test_held_out_sets_are_nested_in_larger_ones() -> None:
    def members(name: str, val: float, test: float) -> set[str]:
        return {p for p in PATIENTS if split_of(KEY, p, val, test) == name}

    assert members("test", 0.2, 0.1) < members("test", 0.2, 0.2)
    assert members("val", 0.1, 0.2) < members("val", 0.2, 0.2)
    assert members("train", 0.2, 0.2) < members("train", 0.1, 0.2)


def test_stage_order_does_not_follow_the_split() -> None:
    """With one hash for both, the first stage would hold the neighbours of the test patients."""
    train = [p for p in PATIENTS if split_of(KEY, p, 0.2, 0.2) == "train"]
    early = sum(unit_hash(KEY, "stage", p) < 0.2 for p in train)
    assert 0.16 < early / len(train) < 0.24

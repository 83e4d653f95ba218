"""Pseudonyms and splits: keyed hashes, so that they repeat with the key and mean nothing without.

HMAC-SHA-256(key, kind || 0x00 || value), as in NIST FIPS 198-1. An unkeyed hash of a patient id
can be undone by trying all ids, so there is no unkeyed mode.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from datetime import datetime
from pathlib import Path

from medpsp.errors import ConfigError
from medpsp.types import Split

KEY_VARIABLE = "MEDPSP_KEY"
MIN_KEY_BYTES = 16


def load_key(path: Path | None) -> bytes:
    """The project key: from a file, or from MEDPSP_KEY. It is never made in passing.

    Raises:
        ConfigError: None given, file missing, not regular or readable by others, key shorter than
            16 bytes.
    """
    variable = os.environ.get(KEY_VARIABLE)
    if path is None and variable:
        return _checked(os.fsencode(variable).strip(), f"environment variable {KEY_VARIABLE}")
    if path is None:
        raise ConfigError(
            f"data.key_file: no key; make one with `medpsp key new FILE` and name it, or set "
            f"{KEY_VARIABLE}. Keep it: other keys give other pseudonyms and splits"
        )
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise ConfigError(f"data.key_file {path}: not a regular file")
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_bytes().strip()
    except OSError as error:
        seen_from = "" if path.is_absolute() else f", seen from {Path.cwd()}"
        raise ConfigError(
            f"data.key_file {path}: cannot be read ({type(error).__name__}{seen_from}); "
            "name the file that was made for these data; only if there is none yet, make one with "
            "`medpsp key new FILE`: another key gives other pseudonyms and splits"
        ) from None
    if mode & 0o077:
        raise ConfigError(f"data.key_file {path}: mode {mode:04o}, expected 0600; chmod 600 it")
    return _checked(text, f"data.key_file {path}")


def create_key(path: Path, text: str = "") -> None:
    """Write a key file with mode 0600: 32 random bytes as hex unless ``text`` is given.

    Raises:
        ConfigError: The file exists, a key is never overwritten; or it is a folder.
        OSError: It cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path}: exists; a key is never overwritten, take another name"
        ) from None
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write((text or secrets.token_hex(32)) + "\n")
    except OSError:  # a full disk leaves no part of a key
        path.unlink(missing_ok=True)
        raise


def _checked(key: bytes, where: str) -> bytes:
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(f"{where}: {len(key)} bytes, expected at least {MIN_KEY_BYTES}")
    return key


def _digest(key: bytes, kind: str, value: str) -> bytes:
    # surrogateescape: file names of old archives are bytes that need not be UTF-8
    text = value.encode("utf-8", "surrogateescape")
    return hmac.new(key, kind.encode() + b"\0" + text, hashlib.sha256).digest()


def pseudonym(key: bytes, kind: str, value: str) -> str:
    """16 hex digits that stand for a patient, a series or a file; ``kind`` keeps them apart."""
    return _digest(key, kind, value).hex()[:16]


def fingerprint(key: bytes) -> str:
    """8 hex digits that tell whether two sets were made with the same key."""
    return _digest(key, "fingerprint", "").hex()[:8]


def unit_hash(key: bytes, kind: str, value: str) -> float:
    """A number in [0, 1) with 53 random bits."""
    return int.from_bytes(_digest(key, kind, value)[:8], "big") / 2**64 * (1 - 2**-53)


def shifted_day(key: bytes, patient_id: str, date: str) -> int:
    """Proleptic ordinal of a DICOM date (YYYYMMDD), moved by a keyed offset of the patient.

    1 to 3650 days back or forth, the same for all dates of a patient: order and intervals stay.
    -1 where the date is none.
    """
    try:
        day = datetime.strptime(date[:8], "%Y%m%d").toordinal()
    except ValueError:
        return -1
    place = unit_hash(key, "date", patient_id)
    offset = 1 + int(place * 7300) % 3650
    return day + (offset if place < 0.5 else -offset)


def split_of(key: bytes, patient_id: str, val: float, test: float) -> Split:
    """The split of a patient: thresholds of the keyed hash, so new patients move nobody."""
    place = unit_hash(key, "split", patient_id)
    if place < test:
        return "test"
    return "val" if place < test + val else "train"

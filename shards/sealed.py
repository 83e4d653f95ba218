"""Files that notice when any byte of them is not what was written: JSON, and pages for people."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from medpsp.errors import ShardError

_SEAL_MARK = b'"sha256":"'


class SealError(ShardError):
    """A sealed file is not what was written."""


def _seal(text: bytes) -> bytes:
    """What stands in place of the last bracket."""
    return f',"sha256":"{hashlib.sha256(text).hexdigest()}"}}\n'.encode()


_SEAL_BYTES = len(_seal(b""))


def sealed_bytes(tree: dict[str, Any], indent: int | None = None) -> bytes:
    """A JSON object as text, with the SHA-256 of all the rest as its last field.

    Args:
        tree: Without a field ``sha256``.
        indent: Spaces a level, for people; None: as short as can be.
    """
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(tree, separators=separators, indent=indent).encode()
    return text[:-1] + _seal(text)


def is_sealed(data: bytes) -> bool:
    """Whether every byte is what `sealed_bytes` made."""
    return data[-_SEAL_BYTES:] == _seal(data[:-_SEAL_BYTES] + b"}")


def claims_seal(data: bytes) -> bool:
    """Whether a file ever had a seal, as far as one flipped bit can leave it to be seen."""
    end = data[-_SEAL_BYTES:]
    return (
        len(end) == _SEAL_BYTES
        and sum(a == b for a, b in zip(end[1:], _SEAL_MARK, strict=False)) >= len(_SEAL_MARK) - 1
    )


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed_bytes` made.

    Raises:
        FileNotFoundError: No such file.
        ShardError: Not readable; `SealError` where a byte differs from what was written.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ShardError(f"{path.name}: cannot be read ({type(error).__name__})") from None
    if not is_sealed(data):
        raise SealError(f"{path.name}: is not what was written")
    tree: dict[str, Any] = json.loads(data[:-_SEAL_BYTES] + b"}")
    return tree


def sealed_page(text: bytes) -> bytes:
    """An HTML page with the SHA-256 of all the rest in a comment behind it."""
    return text + f"<!-- sha256 {hashlib.sha256(text).hexdigest()} -->\n".encode()


_COMMENT_BYTES = len(sealed_page(b""))


def is_sealed_page(data: bytes) -> bool:
    """Whether every byte is what `sealed_page` made."""
    return data == sealed_page(data[:-_COMMENT_BYTES])

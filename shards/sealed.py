"""JSON files that notice when any byte of them is not what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from medpsp.errors import ShardError



def _seal(text: bytes) -> bytes:
    """What stands in place of the last bracket."""
    return f',"sha256":"{hashlib.sha256(text).hexdigest()}"}}\n'.encode()


_SEAL_BYTES = len(_seal(b""))


def sealed_bytes(tree: dict[str, Any]) -> bytes:
    """A JSON object as text, with the SHA-256 of all the rest as its last field."""
    text = json.dumps(tree, separators=(",", ":")).encode()
    return text[:-1] + _seal(text)


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed_bytes` made.

    Raises:
        FileNotFoundError: No such file.
        ShardError: Not readable, or a byte differs from what was written.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ShardError(f"{path.name}: cannot be read ({type(error).__name__})") from None
    text, seal = data[:-_SEAL_BYTES] + b"}", data[-_SEAL_BYTES:]
    if seal != _seal(text):
        raise ShardError(f"{path.name}: is not what was written")
    tree: dict[str, Any] = json.loads(text)
    return tree

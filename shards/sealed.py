"""JSON files that notice when any byte of them is not what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from medpsp.errors import ShardError

_SEAL = "sha256"


def sealed_bytes(tree: dict[str, Any]) -> bytes:
    """A JSON object as text, with the SHA-256 of all the rest as its last field."""
    text = json.dumps(tree, separators=(",", ":"))
    seal = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-1]},"{_SEAL}":"{seal}"}}\n'.encode()


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed_bytes` made.

    Raises:
        FileNotFoundError: No such file.
        ShardError: Not readable, or a byte differs from what was written.
    """
    try:
        data = path.read_bytes()
        tree = json.loads(data)
        del tree[_SEAL]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{path.name}: cannot be read ({type(error).__name__})") from None
    if sealed_bytes(tree) != data:
        raise ShardError(f"{path.name}: is not what was written")
    return dict(tree)

"""The mutation check itself, on a module of one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).with_name("mutants.py")
LEFT = "least: return min(values) -> return max(values)"


def run(root: Path, explained: list[str]) -> tuple[int, list[str]]:
    """Exit code and lines, where the test of the module knows lists of one value only."""
    (root / "tests").mkdir(exist_ok=True)
    (root / "toy.py").write_text("def least(values):\n    return min(values)\n")
    (root / "test_toy.py").write_text(
        "import toy\n\ndef test_least():\n    assert toy.least([1]) == 1\n"
    )
    (root / "tests" / "mutants.toml").write_text(
        '["toy.py"]\ntests = ["test_toy.py"]\n'
        f'[["toy.py".left]]\nwhy = "lists have one value"\nmutants = {explained}\n'
    )
    done = subprocess.run(
        [sys.executable, TOOL], cwd=root, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines()


def test_what_is_left_must_be_explained_and_nothing_else(tmp_path: Path) -> None:
    assert run(tmp_path, ["least: a -> b"]) == (
        1,
        [
            f"toy.py: left: {LEFT}",
            "toy.py: explained in tests/mutants.toml and not left: least: a -> b",
            "toy.py: 2 mutants, 1 killed, 1 left, 1 of them not explained",
        ],
    )
    assert run(tmp_path, [LEFT]) == (
        0,
        ["toy.py: 2 mutants, 1 killed, 1 left, 0 of them not explained"],
    )

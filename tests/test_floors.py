"""The house: what the linters do not hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for name in ("medpsp", "shards", "launch") for p in (ROOT / name).rglob("*.py"))
HEAVY = ("torch", "ray", "zarr", "albumentations", "numpy", "pydantic", "submitit", "pydicom")


def test_no_source_file_is_over_300_lines():
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in SOURCES}
    assert len(lengths) > 30
    assert {name: n for name, n in lengths.items() if n > 300} == {}


def test_no_function_is_over_60_lines():
    import ast

    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    long[f"{path.name}:{node.name}"] = length
    assert long == {}


@pytest.mark.parametrize("module", ["launch.cli", "medpsp.errors", "medpsp"])
def test_light_modules_import_nothing_heavy(module: str):
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert module in out
    assert sorted(set(out) & set(HEAVY)) == []


def test_contracts_break_when_a_floor_is_broken(tmp_path: Path):
    """The linter must be able to fail: a planted upward import is found."""
    import shutil

    for name in ("medpsp", "shards", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = tmp_path / "medpsp" / "intensity.py"
    planted.write_text("import shards.reader\n" + planted.read_text())
    tool = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [tool, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "medpsp.intensity -> shards.reader" in done.stdout

"""All files of the decode corpus, read flat and by pydicom: the same values, pixels and reasons."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.twoways import Ways


def test_both_ways_agree_on_every_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = Ways()
    for path in sorted(path for path in (data / "decode").rglob("*") if path.is_file()):
        ways.add(path)
    with capsys.disabled():
        print(f"\n  {dict(ways.counts)}")
    assert ways.apart == []
    assert ways.counts["flat"] >= 86  # of the single images in files that pydicom reads

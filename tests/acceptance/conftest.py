"""Where the real data are: the folder named by MEDPSP_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    named = os.environ.get("MEDPSP_DATA")
    if not named:
        pytest.skip("MEDPSP_DATA is not set; it names the folder of the real data sets")
    root = Path(named)
    assert root.is_dir(), f"MEDPSP_DATA is {root}, which is no folder"
    return root

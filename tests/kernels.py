"""What a program prints with one thread of BLAS, with two, and with the kernels of other CPUs."""

from __future__ import annotations

import os
import subprocess
import sys

KINDS = (
    {"OPENBLAS_NUM_THREADS": "1"},
    {"OPENBLAS_NUM_THREADS": "2"},
    {"OPENBLAS_CORETYPE": "Haswell"},
    {"OPENBLAS_CORETYPE": "Nehalem"},
)


def prints(code: str) -> set[str]:
    """The different outputs of a program, one process a kind."""
    return {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **kind},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for kind in KINDS
    }

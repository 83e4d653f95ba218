"""What this machine has to train with."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace

from medpsp.machine import memory_allowed, whole_cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine.

    Attributes:
        cores: Whole ones that affinity and control groups leave to this process.
        memory_gib: Of the machine, or as much of it as control groups leave to this process.
        gpus: CUDA devices that torch sees.
        gpu_gib: Memory of the smallest of them.
        bf16: They all compute in it.
    """

    cores: int
    memory_gib: float
    gpus: int = 0
    gpu_gib: float = 0.0
    bf16: bool = False


def this_machine() -> Machine:
    """Look at the machine; torch is imported only where there is a driver."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = min(whole, memory_allowed() or whole)
    found = Machine(cores=whole_cores(), memory_gib=memory / 2**30)
    if not _has_driver():
        return found
    try:
        import torch
    except ImportError:
        return found
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    if not gpus:
        return found
    return replace(
        found,
        gpus=len(gpus),
        gpu_gib=min(one.total_memory for one in gpus) / 2**30,
        bf16=all(one.major >= 8 for one in gpus),  # Ampere; older ones emulate it
    )


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True

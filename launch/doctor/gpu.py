"""GPUs as the driver and torch see them, NCCL between them, and gloo between processes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.doctor.rows import Row, note, ok, private, problem

ASK_S = 8.0
MEET_S = 10.0
DRIVER = Path("/proc/driver/nvidia/version")
_QUERY = "--query-gpu=name,driver_version,memory.total,memory.free"
SHARE_TAKEN = 0.5
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def driver_row() -> list[Row]:
    """What nvidia-smi says; it is asked for no longer than `ASK_S`."""
    if not shutil.which("nvidia-smi"):
        if DRIVER.exists():
            found = "the machine has an NVIDIA driver, which cannot be asked here (no nvidia-smi)"
            todo = "in a container: docker run --gpus all, or apptainer exec --nv"
            return [note("GPU", found, todo)]
        todo = "nothing, unless this machine is to train: that is slow without one"
        return [note("GPU", "no NVIDIA driver", todo)]
    try:
        done = subprocess.run(
            ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=ASK_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        found = f"nvidia-smi: no answer within {ASK_S:.0f} s"
        todo = "restart the machine: the driver or a GPU hangs (`dmesg | grep -i xid` shows why)"
        return [problem("GPU", found, todo)]
    gpus = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 3]
    if done.returncode or not gpus:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        todo = "mend the driver; where it was updated, restart the machine"
        return [problem("GPU", f"nvidia-smi says: {private(said[0])}", todo)]
    rows = [ok("GPU", f"driver {gpus[0][1]}")]
    for name, _, total, free in gpus:
        found = f"{name}, {_gib(free)} of {_gib(total)} GiB free"
        taken = free.isdecimal() and total.isdecimal() and int(free) < SHARE_TAKEN * int(total)
        todo = "`nvidia-smi` shows whose processes these are; CUDA_VISIBLE_DEVICES takes others"
        rows.append(note("GPU", found, todo) if taken else ok("GPU", found))
    return rows


def _gib(mib: str) -> str:
    return f"{int(mib) / 1024:.0f}" if mib.isdecimal() else "?"


def torch_row(ranks: int, precision: str) -> list[Row]:
    """Whether torch can use what the driver has.

    Args:
        ranks: Of the configuration on this machine; 0 without one.
        precision: ``train.precision``; empty without a configuration.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return [*_unseen(torch), *_cpu_rows(precision)]
    capable = [torch.cuda.get_device_capability(n) >= (8, 0) for n in range(count)]
    found = f"torch {torch.__version__} sees {count}"
    try:
        for number in range(count):
            float((torch.ones(8, device=f"cuda:{number}") + 1).sum())
        rows = [ok("GPU and torch", f"{found}, bf16 {'yes' if all(capable) else 'no'}")]
    except RuntimeError as error:
        todo = "a torch that is built for this GPU and driver; `nvidia-smi`: is it free?"
        rows = [problem("GPU and torch", f"{found}, but: {private(error)}", todo)]
    if precision == "bf16" and not all(capable):
        todo = "train.precision=fp32: bf16 needs compute capability 8.0"
        rows.append(note("train.precision", "bf16, which a GPU here only imitates", todo))
    if ranks > count:
        todo = f"set train.ranks to {count} at most, or all ranks use the CPU"
        rows.append(note("train.ranks", f"{ranks} ranks, {count} GPU here", todo))
    return rows


def _unseen(torch: Any) -> list[Row]:
    """Why torch sees no GPU though there is one."""
    if driver_row()[0].verdict != "ok":
        return []
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        todo = "`unset CUDA_VISIBLE_DEVICES`, if training is to use them"
        return [note("GPU and torch", "CUDA_VISIBLE_DEVICES hides all GPUs", todo)]
    if not (torch.version.cuda or torch.version.hip):
        todo = "pip install --force-reinstall torch torchvision, from PyPI"
        return [problem("GPU and torch", f"torch {torch.__version__} is for CPUs only", todo)]
    try:
        torch.cuda.init()
        why = "it finds none"
    except RuntimeError as error:
        why = private(error)
    todo = f"a driver for CUDA {torch.version.cuda}, or a torch for the CUDA of this driver"
    return [problem("GPU and torch", f"torch {torch.__version__}: {why}", todo)]


def _cpu_rows(precision: str) -> list[Row]:
    if precision != "bf16":
        return []
    text = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    )
    if {"avx512_bf16", "amx_bf16", "bf16"} & set(text.split()):
        return [ok("train.precision", "bf16, by this CPU")]
    todo = "train.precision=fp32, where training is to run on this machine"
    return [note("train.precision", "bf16, which this CPU only imitates, slowly", todo)]


def nccl_row() -> list[Row]:
    """An all-reduce over all GPUs of this machine; nothing where there is none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count or not torch.version.cuda:
        return []
    nccl: Any = torch.cuda.nccl
    version = ".".join(map(str, nccl.version()))
    tensors = [torch.ones(1, device=f"cuda:{number}") for number in range(count)]
    try:
        nccl.all_reduce(tensors)
        sums = {float(tensor) for tensor in tensors}
    except RuntimeError as error:
        todo = "NCCL_DEBUG=INFO shows more; NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1 may help"
        return [problem("NCCL", f"{version}: {private(error)}", todo)]
    if sums != {float(count)}:
        return [problem("NCCL", f"{version}: {count} ones add up to {sums}", "test the GPUs")]
    return [ok("NCCL", f"{version}, an all-reduce over {count} GPU")]


def gloo_row() -> list[Row]:
    """Two ranks meet and add; they are threads of this process.

    By the address that torch takes: of GLOO_SOCKET_IFNAME, of the host's name, or else loopback.
    """
    error = _meet()
    if error is None:
        return [ok("gloo", "two ranks meet")]
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return [problem("gloo", private(error), _other_interface("GLOO_SOCKET_IFNAME"))]
    todo = "`ip link set lo up`, and let processes of this user connect there: training needs it"
    return [problem("gloo", private(error), todo)]


def _meet() -> str | None:
    import torch
    import torch.distributed

    dist: Any = torch.distributed
    store, said = dist.HashStore(), list[str | float]()

    def rank(number: int) -> None:
        try:
            group = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=MEET_S))
            ones = torch.ones(1)
            group.allreduce([ones]).wait()
            said.append(float(ones))
        except RuntimeError as error:
            said.append(str(error).rpartition("] ")[2])  # without the place in gloo's source

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return None if said == [2.0, 2.0] else next((s for s in said if isinstance(s, str)), "no sum")


def interface_rows() -> list[Row]:
    """Network interfaces that the environment names."""
    here, rows = {name for _, name in socket.if_nameindex()}, []
    for variable in INTERFACES:
        text = os.environ.get(variable, "")
        if not text or text.startswith("^"):
            continue
        gloo = variable.startswith("GLOO")
        exact = gloo or text.startswith("=")  # NCCL takes beginnings of names, too
        names = text.removeprefix("=").split(",")
        fits = [n in here if exact else any(own.startswith(n) for own in here) for n in names]
        if all(fits) if gloo else any(fits):
            rows.append(ok("interfaces", f"{variable}={text}"))
        else:
            found = f"{variable}={text}: there is no such interface here"
            rows.append(problem("interfaces", found, _other_interface(variable)))
    return rows


def _other_interface(variable: str) -> str:
    names = ", ".join(sorted(name for _, name in socket.if_nameindex()))
    return f"`unset {variable}`, or take one of {names}"

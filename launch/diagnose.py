"""What Python, torch and the kernel raise, as the one line that a user needs.

An error of ours says itself what to do; here are those of the machine, and those that hide behind
an error of ours. Nothing heavy is imported: torch's errors are known by their words.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.cluster import memory_limit
from launch.rundir import places, told_path
from medpsp.errors import LaunchError, MedpspError, NonFiniteLossError

SHM = Path("/dev/shm")
MORE_SHM = "enlarge it (docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm)"
NEARLY_NONE = 2**20
"""Bytes; a disk with less is full."""
RIGHTS = "mend its rights, or take another folder"
OTHER_FOLDER = f"{RIGHTS} (out=FOLDER)"

_PEER_GONE = re.compile(
    r"connection (was likely )?closed|connection (re)?set by|broken pipe|connection reset"
    r"|remote process exited|ncclRemoteError|communicator was aborted|failed to recv, got 0 bytes",
    re.IGNORECASE,
)
_PEER_SILENT = re.compile(
    r"timed out|wait timeout|collective operation timeout|operations have failed or timed out",
    re.IGNORECASE,
)
_SHARED = re.compile(r"/dev/shm|shared memory|write to file </torch_", re.IGNORECASE)
_AMOUNT = re.compile(r"allocate ([\d.]+ ?(?:[KMGT]i?)?B\b|\d+ bytes)")
_GPU = re.compile(r"GPU (\d+) has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+)")
_LIBRARY = re.compile(
    r"cannot open shared object|invalid ELF|file too short|undefined symbol|ELF class|not found \("
)


def diagnosis(error: BaseException) -> str | None:
    """The line for a trouble of the machine or of another rank.

    Returns:
        None for an error that says enough itself, and for a bug.
    """
    own = isinstance(error, MedpspError) and not isinstance(error, LaunchError)
    for cause in _chain(error):
        # the advice of our own errors is wrong where the limits of this process are to blame
        for look in (_handles, _memory) if own else _LOOKS:
            line = look(cause)
            if line:
                return line
    return _access(error)


def lost_peer(error: BaseException) -> bool:
    """Whether an error only tells that another rank failed: that one knows why."""
    if isinstance(error, NonFiniteLossError):
        return not error.own
    return not isinstance(error, MedpspError) and any(_peer(cause) for cause in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _says(error: BaseException, *codes: int) -> bool:
    """By number, or by the words where C++ or a process in between left nothing else."""
    if isinstance(error, OSError) and error.errno:
        return error.errno in codes
    return any(os.strerror(code) in str(error) for code in codes)


def _peer(error: BaseException) -> str:
    if not isinstance(error, RuntimeError):
        return ""
    text = str(error)
    if _PEER_GONE.search(text):
        return (
            "lost the connection to another rank, which ended; why, says that rank's own line or "
            "its log in logs/ranks"
        )
    if _PEER_SILENT.search(text) and re.search(r"\d ?m?s\b|milliseconds|seconds|NCCL", text):
        return (
            "another rank did not answer in time; what each rank was at is in the heartbeat files "
            "in logs/ranks"
        )
    return ""


def _port(error: BaseException) -> str:
    if not (_says(error, errno.EADDRINUSE) or "EADDRINUSE" in str(error)):
        return ""
    found = re.search(r"port: (\d+)", str(error))
    port = found[1] if found else os.environ.get("MASTER_PORT", "?")
    return (
        f"port {port} is in use by another program (`ss -ltnp | grep {port}` shows which); end "
        "that one, or set MASTER_PORT to a free port on all ranks"
    )


def _space(error: BaseException) -> str:
    if not _says(error, errno.ENOSPC, errno.EDQUOT):
        return ""
    name = error.filename if isinstance(error, OSError) else None
    where = existing_folder(Path(os.fsdecode(name))) if name else _full_place(str(error))
    if where is None:
        return "disk full: which one is not known (`df -h` shows them); make room and go on"
    usage = shutil.disk_usage(where)
    room = f"{size_text(usage.free)} of {size_text(usage.total)} free after clean-up"
    if _same_disk(where, SHM):
        return (
            f"shared memory full: {SHM}, {room}; delete what is left there, {MORE_SHM}, or lower "
            "train.ranks and train.loader_workers"
        )
    quota = "disk quota reached" if _says(error, errno.EDQUOT) else "disk full"
    place = (isinstance(error, OSError) and told_path(error)) or str(where)
    return (
        f"{quota}: {place}, {room}; delete old runs or checkpoints there, or set out to a folder "
        "on another disk, and give the same command again"
    )


def _full_place(text: str) -> Path | None:
    """Where an error without a path may come from: the first place we write to that is full."""
    if _SHARED.search(text):
        return SHM
    looked = [existing_folder(path) for path in (*places(), Path(tempfile.gettempdir()), SHM)]
    return next((p for p in looked if shutil.disk_usage(p).free < NEARLY_NONE), None)


def existing_folder(path: Path) -> Path:
    """The folder itself, or the first above it that is there."""
    above = (path.absolute(), *path.absolute().parents)
    # of a folder that may not be entered pathlib raises, os.path knows nothing
    return next(p for p in above if os.path.isdir(p))


def _same_disk(one: Path, other: Path) -> bool:
    return other.is_dir() and one.stat().st_dev == other.stat().st_dev


def _handles(error: BaseException) -> str:
    if "can't start new thread" in str(error):
        most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        return (
            f"no more threads: this user may have {most} threads and processes (ulimit -u); raise "
            "that, or lower train.ranks, train.loader_workers and train.threads"
        )
    if _says(error, errno.ENFILE):
        return "too many open files on this machine (fs.file-max); end other programs or raise it"
    if not _says(error, errno.EMFILE):
        return ""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"too many open files: a process may have {soft} here (ulimit -n); {more_files()}"


def more_files() -> str:
    """How this process gets more open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    better = 4096 if hard in (-1, resource.RLIM_INFINITY) else min(hard, 4096)
    if better <= soft:
        return "ask who runs this machine for more, or lower train.loader_workers"
    return f"`ulimit -n {better}` before the command raises that"


def _memory(error: BaseException) -> str:
    text = str(error)
    amount = found[1] if (found := _AMOUNT.search(text)) else "what was asked for"
    advice = "lower train.batch_size or train.size, or raise train.accumulate"
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
        free = _GPU.search(text)
        where = f" on GPU {free[1]}, {free[3]} of {free[2]} free" if free else ""
        return f"GPU memory: no room for {amount}{where}; {advice}"
    known = any(words in text for words in ("can't allocate memory", "bad_alloc", "bad allocation"))
    if known or isinstance(error, MemoryError) or _says(error, errno.ENOMEM):
        return f"memory: no room for {amount}, {memory_limit()}; {advice}"
    return ""


def _imports(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install 'medpsp[all]'"
    broken = isinstance(error, OSError) and not error.errno and _LIBRARY.search(str(error))
    if not isinstance(error, ImportError) and not broken:
        return ""
    name = getattr(error, "name", None)
    top = str(name).partition(".")[0] if name else "a library"
    again = f"pip install --force-reinstall {top}" if name else "pip install 'medpsp[all]'"
    text = " ".join(str(error).split())
    return f"{top} cannot be imported ({text}); install it again: {again}"


def _access(error: BaseException) -> str | None:
    """Folders that may not be written; files are told with their path."""
    own = isinstance(error, LaunchError)
    cause = error.__context__ if own else error
    codes = (errno.EACCES, errno.EPERM, errno.EROFS)
    if not isinstance(cause, OSError) or cause.errno not in codes:
        return None
    if isinstance(error, MedpspError) and not own:
        return None  # it names the setting
    where = told_path(cause) or "a file of the archive"
    told = str(error) if own else f"{where}: {cause.strerror}"
    return f"{told}; {OTHER_FOLDER if own else RIGHTS}"


def size_text(count: int) -> str:
    """Bytes, rounded."""
    power = min((max(count, 1).bit_length() - 1) // 10, 3)
    return f"{count / 1024**power:.0f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


_LOOKS: tuple[Callable[[BaseException], str], ...] = (
    _port,
    _space,
    _handles,
    _memory,
    _imports,
    _peer,
)

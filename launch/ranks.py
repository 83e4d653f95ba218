"""Several ranks on this machine by torchrun, and their errors as one line.

Rank 0 shows what it does; the others write to ``logs/ranks/rank-N.log``. A rank that fails leaves
its line for the process that started it, in a folder off the run's disk, which may be full.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from launch.cluster import memory_limit, oom_kills
from launch.rundir import REASONS, RunDir, keep_place
from launch.terminal import show
from medpsp.config import Config
from medpsp.errors import (
    EXIT_AGAIN,
    EXIT_CONFIG,
    ConfigError,
    Interrupted,
    LaunchError,
    MedpspError,
)
from medpsp.machine import threads_each
from medpsp.train.stop import SIGNALS, asking

log = logging.getLogger("medpsp")
FORWARDED = (*SIGNALS, signal.SIGQUIT)
"""By torchrun to the ranks."""
_PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


def start_ranks(config: Config, command: str = "train") -> None:
    """Run a command in ``train.ranks`` processes; rank 0 shows, the others write to logs.

    torchrun picks a free port and stops all ranks when one fails.

    Args:
        config: In its run folder.
        command: Of ``medpsp``.

    Raises:
        Interrupted: The ranks were asked to end, and saved.
        LaunchError: A rank failed; with the reason it left, or the signal that killed it.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("no torch", name="torch")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    run_dir, ranks = RunDir(config.out), config.train.ranks
    folder = run_dir.logs / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    arguments = [
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--redirects={','.join(f'{rank}:3' for rank in range(1, ranks))}",
        f"--signals-to-handle={','.join(one.name for one in asking(FORWARDED))}",
        f"--log-dir={folder}",
        "-m",
        "launch.cli",
        command,
        str(run_dir.config),
    ]
    killed = oom_kills()
    with tempfile.TemporaryDirectory(prefix="medpsp-", ignore_cleanup_errors=True) as left:
        os.environ.update(_environment(config, left))
        try:
            run(parse_args(arguments))  # type: ignore[no-untyped-call]
        except SignalException as stop:
            if reason := _reason(Path(left)):
                raise _error(reason, ranks) from None
            raise SystemExit(128 + int(stop.sigval)) from None
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            out_of_memory = killed is not None and (oom_kills() or 0) > killed
            reason = _first(codes, Path(left), folder, out_of_memory)
            raise _error(reason, ranks) from None


class Reason(NamedTuple):
    """Why a rank ended: its exit code says what kind of error it was."""

    rank: int
    line: str
    code: int = 1


def _error(reason: Reason, ranks: int) -> MedpspError:
    """What the process that started the ranks raises."""
    if reason.code == EXIT_AGAIN:
        return Interrupted(reason.line)
    if reason.code == EXIT_CONFIG:
        return ConfigError(reason.line)
    named = reason.line.startswith("train: rank ")  # by its watch
    return LaunchError(
        reason.line if named else f"train: rank {reason.rank} of {ranks}: {reason.line}"
    )


def end_with_parent() -> None:
    """In a rank started here: be asked to save and end when the process that started it is gone."""
    if REASONS not in os.environ:
        return
    follow_parent()


def follow_parent() -> None:
    """Be asked to save and end when the process that started this one is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:  # it went before
        os.kill(os.getpid(), signal.SIGTERM)


def _environment(config: Config, left: str) -> dict[str, str]:
    threads = config.train.threads or threads_each(config.train.ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # to save, after a step and a validation that may be long; then the watch ends them itself
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(
            max(config.train.first_step_seconds, config.train.step_seconds)
        ),
        REASONS: left,
    }


def log_job(run: RunDir, name: str) -> None:
    """Log to ``logs/NAME.log``; a rank other than 0 to its own file, which gets a plain name.

    From here on the traceback of a bug goes there, too.
    """
    sys.excepthook = log_bug
    threading.excepthook = log_thread
    logging.raiseExceptions = False  # or each line for a log on a full disk is a traceback
    keep_place(run.root)
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        run.log_to(name)
        return
    for handler in log.handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank}: %(message)s"))
    file, link = log_file(), run.logs / "ranks" / f"rank-{rank}.log"
    if file is not None:
        with suppress(OSError):  # the log itself is there
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(file, link.parent))
    world, node = os.environ.get("WORLD_SIZE", "?"), os.uname().nodename
    log.info("one of %s ranks, process %d on %s", world, os.getpid(), node)


def log_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For ``sys.excepthook``: the traceback into the log, and one line that names it."""
    file = log_file()
    if file is None or not issubclass(kind, Exception):
        sys.__excepthook__(kind, error, trace)
        return
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(traceback.format_exception(kind, error, trace))
    say_last(f"{kind.__name__}, a bug in medpsp: its traceback is at the end of {file}")


def log_thread(told: threading.ExceptHookArgs) -> None:
    """For ``threading.excepthook``: into the log; the main thread says what it meets itself."""
    file = log_file()
    if file is None or told.exc_value is None or isinstance(told.exc_value, SystemExit):
        threading.__excepthook__(told)
        return
    with suppress(OSError), file.open("a", encoding="utf-8") as lines:  # it may have no file left
        trace = told.exc_traceback
        lines.writelines(traceback.format_exception(told.exc_type, told.exc_value, trace))


def log_file() -> Path | None:
    """The file that this process logs to, if there is one."""
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            return Path(handler.baseFilename)
    with suppress(OSError):
        file = Path("/proc/self/fd/2").readlink()
        if file.is_file():
            return file
    return None


def leave_reason(line: str, echo: bool, code: int) -> bool:
    """In a rank started here, leave the line for the parent; False elsewhere.

    Args:
        line: Why it ends.
        echo: It ends because another one did.
        code: With which it will exit.
    """
    folder = os.environ.get(REASONS)
    if folder is None or "RANK" not in os.environ:
        return False
    path = Path(folder) / f"{os.environ['RANK']}.{'echo' if echo else code}"
    try:
        path.write_text(line + "\n", encoding="utf-8")
    except OSError:
        return False
    return True


def say_last(line: str, echo: bool = False, code: int = 1) -> None:
    """Why this process ends: to the one that started this rank, else to the terminal; and logged.

    Args:
        line: Without the name of the program.
        echo: As for `leave_reason`.
        code: As for `leave_reason`.
    """
    if leave_reason(line, echo, code):
        if os.environ["RANK"] != "0":  # rank 0 shares the terminal with the parent
            log.error("%s", line)
        return
    rank = os.environ.get("RANK")
    who = f"rank {rank}: " if rank and not line.startswith("train: rank ") else ""
    show(f"medpsp: {who}{line}\n")
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, line, (), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _first(codes: Mapping[int, int], left: Path, folder: Path, out_of_memory: bool) -> Reason:
    """The rank that failed first, and why: others fail because it did."""
    if reason := _reason(left):
        return reason
    # torchrun kills those that do not end after the first one, so this comes second
    killed = [rank for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM]
    if killed:
        return Reason(killed[0], _killed(-codes[killed[0]], out_of_memory))
    echoes = {int(path.stem) for path in left.glob("*.echo")}
    if silent := [rank for rank in codes if rank not in echoes]:
        rank = silent[0]
        return Reason(rank, f"ended with code {codes[rank]}; {_place(folder, rank)}")
    return _reason(left, "echo") or Reason(min(codes), "failed")


def _reason(left: Path, kind: str = "[0-9]*") -> Reason | None:
    """The first line that was left, and who left it."""
    for path in sorted(left.glob(f"*.{kind}"), key=lambda path: path.stat().st_mtime_ns):
        if line := path.read_text(encoding="utf-8").strip():
            code = path.suffix.removeprefix(".")
            return Reason(int(path.stem), line, int(code) if code.isdecimal() else 1)
    return None


def _killed(number: int, out_of_memory: bool) -> str:
    name, advice = signal.Signals(number).name, "lower train.batch_size or raise train.accumulate"
    if number == signal.SIGKILL and out_of_memory:
        return f"killed by the kernel, out of memory ({memory_limit()}); {advice}"
    if number == signal.SIGKILL:
        return f"killed by SIGKILL (out of memory? {memory_limit()}; {advice})"
    if number == signal.SIGBUS:
        return "killed by SIGBUS (disk or /dev/shm full? `df -h` shows it)"
    return f"killed by {name}; its log is in logs/ranks"


def _place(folder: Path, rank: int) -> str:
    link = folder / f"rank-{rank}.log"
    if rank == 0:
        return "its output stands above"
    found = [link] if link.exists() else sorted(folder.glob(f"*/attempt_*/{rank}/stderr.log"))
    return f"its output is in {found[-1]}" if found else f"its output is in {folder}"

"""Several ranks on this machine by torchrun, and their errors as one line."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import signal
from pathlib import Path

from launch.rundir import RunDir
from medpsp.config import Config
from medpsp.errors import EXIT_AGAIN, Interrupted, LaunchError

REASONS = "MEDPSP_RANK_REASONS"
"""Set for ranks started here: the folder where a failing rank leaves its line."""


def start_ranks(config: Config) -> None:
    """Run `medpsp train` in ``train.ranks`` processes; rank 0 shows, the others write to logs.

    torchrun picks a free port and stops all ranks when one fails.

    Raises:
        Interrupted: The ranks were asked to end, and saved.
        LaunchError: A rank failed; with the reason it left, or the signal that killed it.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("no torch", name="torch")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    ranks, folder = config.train.ranks, RunDir(config.out).logs / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    threads = config.train.threads or max(1, (os.cpu_count() or 1) // ranks)
    os.environ.update(
        {
            "OMP_NUM_THREADS": str(threads),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
            REASONS: str(folder),
        }
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    quiet = ",".join(f"{rank}:3" for rank in range(1, ranks))
    arguments = [
        "--standalone",
        f"--nproc-per-node={ranks}",
        *([f"--redirects={quiet}", f"--log-dir={folder}"] if quiet else []),
        "-m",
        "launch.cli",
        "train",
        str(RunDir(config.out).config),
    ]
    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except SignalException as stop:
        if reason := _left_reason(folder):
            raise Interrupted(reason) from None
        raise SystemExit(128 + int(stop.sigval)) from None
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda item: item[1].timestamp)
        if first.exitcode == EXIT_AGAIN:
            raise Interrupted(_left_reason(folder)) from None
        reason = _left_reason(folder) or _exit_reason(first.exitcode)
        raise LaunchError(f"train: rank {rank} of {ranks}: {reason}") from None


def leave_reason(line: str) -> bool:
    """In a rank started here, leave the line for the parent; False elsewhere."""
    folder = os.environ.get(REASONS)
    if folder is None or "RANK" not in os.environ:
        return False
    (Path(folder) / f"{os.environ['RANK']}.failed").write_text(line + "\n", encoding="utf-8")
    return True


def _left_reason(folder: Path) -> str:
    for path in sorted(folder.glob("*.failed")):
        return path.read_text(encoding="utf-8").strip()
    return ""


def _exit_reason(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory? lower train.batch_size)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"ended with code {code}; its output stands above or in the run's logs/ranks"

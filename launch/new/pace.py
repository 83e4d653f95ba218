"""How long a step of the proposed network takes on this machine: timed, or estimated.

python -m launch.new.pace CONFIG     a rank of it; the first prints the seconds of each step
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from itertools import repeat
from pathlib import Path

from launch.cluster import detect_world, free_port
from launch.new.choices import Pace
from launch.new.machine import Machine
from medpsp.config import Config
from medpsp.configio import load_config
from medpsp.progress import duration

log = logging.getLogger("medpsp")
LIMIT_S = 30.0
"""For all of it: a few seconds are the start of torch."""
_WARM_UP, _STEPS = 1, 3
_GMACS = {"resnet18": 2.39, "convnext_tiny": 5.07}
"""Of an image of 256 x 256, forward (`medpsp backbones`); backward takes about twice as many."""
_GMACS_A_CORE = 30.0
"""A second, of ResNet18 in fp32; 60 were measured on a server of 2023."""


def pace_of(text: str, machine: Machine) -> Pace | None:
    """Time a few steps on made images, in as many processes as there would be ranks.

    Args:
        text: Of a proposal.
        machine: It is for; the time is estimated where it cannot be taken, and there is no GPU.

    Returns:
        None where nothing is known.
    """
    load, cores = os.getloadavg()[0], os.cpu_count() or 1  # the load, too, is of the whole machine
    busy = f" while others used this machine (load {load:.0f} on {cores} cores)"
    busy = busy if load > cores + 1 else ""  # one is our own
    with tempfile.TemporaryDirectory(prefix="medpsp-") as folder:
        file = Path(folder) / "new.yaml"
        file.write_text(text, encoding="utf-8")
        config = load_config(file)
        if importlib.util.find_spec("torch") is None:
            found, why = list[float](), "there is no torch here"
        else:
            log.info("timing a step of the proposed network: %s at most", duration(LIMIT_S))
            found, why = _timed(file, config.train.ranks, machine.cores)
    if found:
        return Pace(statistics.median(found[_WARM_UP:] or found), f"measured{busy}")
    if machine.gpus:
        log.warning("a step could not be timed: %s", why)
        return None
    return Pace(_estimated(config, machine), f"estimated from multiply-adds, as {why}")


def _timed(file: Path, ranks: int, cores: int) -> tuple[list[float], str]:
    """Seconds of the steps that were done in time; where there is none, why."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "launch.new.pace", str(file)]
    started = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // ranks))}
        if ranks > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            env |= {**place, **{name: str(number) for name, number in numbers.items()}}
        out = subprocess.DEVNULL if rank else subprocess.PIPE
        started.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.DEVNULL))
    first, found = started[0], list[float]()
    clock = threading.Timer(LIMIT_S, first.kill)
    clock.start()
    try:
        for line in first.stdout or ():
            found.append(float(line))
            if len(found) == _WARM_UP + _STEPS:
                break  # ranks take a while to part
    finally:
        clock.cancel()
        if first.stdout:
            first.stdout.close()
        for process in started:
            process.kill()
            process.wait()
    late = first.returncode == -signal.SIGKILL
    return found, f"timing took more than {duration(LIMIT_S)}" if late else "its process failed"


def _estimated(config: Config, machine: Machine) -> float:
    rows, columns = config.train.size
    images = config.train.batch_size * rows * columns / 65536
    gmacs = 3 * _GMACS.get(config.model.backbone, max(_GMACS.values())) * images
    return gmacs / (_GMACS_A_CORE * machine.cores)


def _rank(file: Path) -> None:
    """Print the seconds of each step as they are known: it may be ended at any time."""
    from launch.measure import made_batch, step_times
    from medpsp.model.psp import build_model
    from medpsp.train.ranks import process_group

    # to compile takes minutes, once in each stage
    config, world = load_config(file, ("train.compile=false",)), detect_world()
    train = config.train
    with process_group(world, train.threads, alone=train.engine != "ddp") as device:
        model = build_model(config.model.untrained, len(config.data.classes)).to(device)
        batches = repeat(made_batch(config, train.batch_size // world.size), _WARM_UP + _STEPS)
        for seconds in step_times(model, config, world, device, batches):
            if world.rank == 0:
                sys.stdout.write(f"{seconds:.6f}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))

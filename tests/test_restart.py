"""Training that is killed, again and again, ends with the weights of an undisturbed run.

Each try is a process of its own that knows nothing but the files.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medpsp.config import Config
from medpsp.errors import EXIT_AGAIN, Interrupted
from medpsp.train.checkpoint import load_checkpoint, read_state
from medpsp.train.loop import fit
from medpsp.train.ranks import process_group
from medpsp.train.stop import OUT_OF_TIME, StopRequest, asking
from medpsp.types import World
from tests.children import SERVER
from tests.squares import CPU, make_config, make_run, names, network

KILLS = 20
SAVE_EVERY = 3
STEPS = 24


def config_of() -> Config:
    """Three stages, one of them with a frozen part; average, dropout, statistics of norms."""
    stages = (
        {"name": "warm", "steps": 8},
        {"name": "head", "steps": 6, "trains": "head"},
        {"name": "full", "steps": STEPS - 14},
    )
    return make_config(*stages, save_every=SAVE_EVERY, eval_every=5, ema=0.9, batch_size=2)


def train(folder: Path, rank: int, size: int, port: int) -> None:
    """One try; leaves as the command line would."""
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    config, world = config_of(), World(rank=rank, size=size, local_rank=rank)
    with StopRequest().listening() as stop, process_group(world, 1, seconds=60):
        run = make_run(config, folder, world, stop=stop)
        try:
            fit(run, network(config))
        except Interrupted:
            os._exit(EXIT_AGAIN)
        except RuntimeError:  # a peer is gone
            os._exit(1)
    os._exit(0)


def start(folder: Path, size: int) -> list[Any]:
    port = free_port()
    ranks = [SERVER.Process(target=train, args=(folder, rank, size, port)) for rank in range(size)]
    for process in ranks:
        process.start()
    return ranks


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(ranks: list[Any], seconds: float = 120) -> list[int]:
    """Wait for all; a rank whose peer is gone may wait for it."""
    for process in ranks:
        process.join(seconds)
        assert process.exitcode is not None, "hangs"
    return [process.exitcode for process in ranks]


def newest(folder: Path) -> int:
    return max((read_state(p).step for p in (folder / "checkpoints").glob("step-*")), default=0)


def final(folder: Path) -> tuple[dict[str, Any], Any]:
    return load_checkpoint(folder / "checkpoints" / f"step-{STEPS:08d}", CPU)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ranks, folder, and seconds of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    warm = SERVER.Process(target=config_of)  # or the time would be that of the server's imports
    warm.start()
    assert end([warm]) == [0]
    began = time.monotonic()
    assert end(start(folder, request.param)) == [0] * request.param
    return request.param, folder, time.monotonic() - began


def test_random_kills_change_no_bit(undisturbed: Any, tmp_path: Path) -> None:
    """A signal costs no step, SIGKILL at most those since the last checkpoint."""
    size, straight, seconds = undisturbed
    rng, kills, runs = random.Random(size), 0, 0
    seen = {signal.SIGTERM: 0, signal.SIGUSR2: 0, signal.SIGKILL: 0}
    while kills < KILLS // 2:
        folder = tmp_path / f"run{runs}"
        runs += 1
        for _ in range(60):
            before = newest(folder)
            ranks = start(folder, size)
            wait = rng.uniform(0.05, 0.6) * seconds
            victim, number = rng.choice(ranks), list(seen)[kills % len(seen)]
            victim.join(wait)
            alive = victim.exitcode is None
            if alive and kills < KILLS // 2:
                os.kill(victim.pid, number)
                kills += 1
                seen[number] += 1
            if number == signal.SIGKILL and alive:
                victim.join(20)
            codes = end(ranks)
            assert newest(folder) >= before
            if set(codes) == {0}:
                break
            assert set(codes) <= {0, 1, EXIT_AGAIN, -number}, codes
        assert same(final(straight)[0], final(folder)[0])
        assert final(straight)[1] == final(folder)[1]
        kept = [  # a signal near the end leaves another last but one
            {name for name in names(root / "checkpoints") if not name.startswith("step-")}
            for root in (straight, folder)
        ]
        assert kept[0] == kept[1]
        best = [read_state(root / "checkpoints" / "best") for root in (straight, folder)]
        assert best[0] == best[1]
    assert min(seen.values()) >= KILLS // 2 // len(seen), seen


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_obeyed_at_the_next_step(tmp_path: Path, number: int) -> None:
    config = config_of()
    with StopRequest().listening() as stop:
        run = make_run(config, tmp_path, stop=stop)
        asked = signalling(run.batches, 4, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=rf"stopped by {signal.Signals(number).name} after "):
            fit(replaced(run, asked), network(config))
    assert newest(tmp_path) == 5  # the step of the fifth batch is finished, and no other


def test_the_end_of_the_time_is_obeyed(tmp_path: Path) -> None:
    config = config_of()
    over = StopRequest(deadline=time.time())
    assert StopRequest(deadline=time.time() + 10, margin=9).code == 0
    assert over.code == OUT_OF_TIME
    with pytest.raises(Interrupted, match="the end of its time after step 1, which is saved"):
        fit(make_run(config, tmp_path, stop=over), network(config))
    assert newest(tmp_path) == 1


def test_a_second_ctrl_c_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)  # Ray leaves one of its own
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.code == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("no_nohup")
def test_a_closed_terminal_asks_only_whom_nohup_did_not_shield() -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP)
    assert asking(numbers) == [*numbers]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert asking(numbers) == [signal.SIGTERM]
        with StopRequest().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def signalling(batches: Callable[..., Any], at: int, act: Callable[[], None]) -> Any:
    """Batches, and something that happens with the n-th of them."""
    count = 0

    def found(stage: int, first: int) -> Any:
        nonlocal count
        for batch in batches(stage, first):
            if count == at:
                act()
            count += 1
            yield batch

    return found


def replaced(run: Any, batches: Any) -> Any:
    from dataclasses import replace

    return replace(run, batches=batches)

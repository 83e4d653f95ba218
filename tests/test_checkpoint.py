"""Checkpoints under kill and decay. Run as a program, this file is the process that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from medpsp.errors import CheckpointError
from medpsp.train import checkpoint
from medpsp.train.checkpoint import (
    META,
    STATE,
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    mark_best,
    prune,
    read_state,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def save(folder: Path, step: int, name: str = "") -> Path:
    state = TrainState(step=step, stage="full", best=0.5, score=0.25, model={"bins": [1, 3]})
    tensors = {"model": {"w": torch.full((4,), float(step))}}
    return save_checkpoint(folder, name or f"step-{step:08d}", tensors, state)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def evaluation(folder: Path, step: int) -> None:
    """What the loop does after an evaluation that is the best so far."""
    mark_best(save(folder, step))
    prune(folder, step)


def test_saved_and_read_back_without_code_in_the_file(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = TrainState(step=7, stage="warm", best=0.1 + 0.2, score=1 / 3, model={"classes": ["a"]})
    tensors = {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}
    path = save_checkpoint(tmp_path, "step-00000007", tensors, state)
    assert names(path) == [META, STATE]
    found, again = load_checkpoint(path, CPU)
    assert again == state
    assert torch.equal(found["model"]["weight"], layer.weight)
    fresh = torch.optim.AdamW(layer.parameters())
    fresh.load_state_dict(found["optimizer"])
    assert torch.equal(
        fresh.state[layer.weight]["exp_avg"], optimizer.state[layer.weight]["exp_avg"]
    )
    direct = torch.load(path / STATE, weights_only=True)
    assert torch.equal(direct["model"]["bias"], layer.bias)


def test_latest_is_the_highest_step_and_nothing_at_first(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for step, name in ((300, ""), (1200, ""), (400, "stage-0-warm")):
        save(tmp_path, step, name)
    mark_best(tmp_path / "step-00000300")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00001200"


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    state = read_state(path)
    for position in range(0, (path / STATE).stat().st_size, 7):
        flip(path / STATE, position)
        with pytest.raises(CheckpointError, match="SHA-256"):
            read_state(path)
        flip(path / STATE, position)
    noticed = 0
    for position in range((path / META).stat().st_size):
        flip(path / META, position)
        try:
            assert read_state(path) == state  # only white space may change unseen
        except CheckpointError:
            noticed += 1
        flip(path / META, position)
    spaces = sum(byte in b" \n" for byte in (path / META).read_bytes())
    assert noticed >= (path / META).stat().st_size - spaces
    assert read_state(path) == state


def test_a_damaged_newest_gives_way_to_an_older_one(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        save(tmp_path, step)
    flip(tmp_path / "step-00000400" / STATE, 100)
    (tmp_path / "step-00000300" / META).unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000200"
    path = save(tmp_path, 400)  # training comes by again and replaces it
    assert latest_checkpoint(tmp_path) == path


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (100, 200):
        (save(tmp_path, step) / STATE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"delete .* to start anew"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"step": 1}', '{"sha256": "x"}'])
def test_broken_meta(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / META).write_text(text)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, CPU)


def test_prune_keeps_two_the_best_and_the_named(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400, 500):
        save(tmp_path, step)
    save(tmp_path, 200, "stage-0-warm")
    mark_best(tmp_path / "step-00000200")
    prune(tmp_path, 500)
    kept = ["best", "stage-0-warm", "step-00000200", "step-00000400", "step-00000500"]
    assert names(tmp_path) == kept
    assert load_checkpoint(tmp_path / "best", CPU)[1].step == 200
    mark_best(tmp_path / "step-00000500")
    prune(tmp_path, 500)
    assert names(tmp_path) == ["best", "stage-0-warm", "step-00000400", "step-00000500"]
    assert load_checkpoint(tmp_path / "best", CPU)[1].step == 500


def test_what_is_left_out_as_damaged_takes_no_place(tmp_path: Path) -> None:
    """Training went on from step 200, below two torn ones; strange names are nobody's."""
    for step in (100, 200, 300, 400, 500):
        save(tmp_path, step)
    (tmp_path / "step-notes.txt").touch()
    prune(tmp_path, 300)
    kept = ["step-00000200", "step-00000300", "step-00000400", "step-00000500", "step-notes.txt"]
    assert names(tmp_path) == kept


def test_best_survives_a_copy_that_followed_links(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    save(tmp_path, 50, "best")  # a folder now
    assert latest_checkpoint(tmp_path) == path
    mark_best(path)
    assert (tmp_path / "best").is_symlink()
    assert read_state(tmp_path / "best").step == 100


def test_leftovers_of_a_killed_process_go_with_the_next_save(tmp_path: Path) -> None:
    for name in (".step-00000100.partial", ".stage-0-warm.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 200)
    assert names(tmp_path) == ["step-00000200"]


def test_a_kill_at_any_line_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(done.stdout)
    assert len(results) > 40  # kills, one at each line that runs
    assert all(result["signal"] == signal.SIGKILL for result in results[:-1])
    assert results[-1]["signal"] == 0
    seen = [(result["latest"], result["best"]) for result in results]
    # in this order, and nothing else: still the old one, saved but not marked, saved and marked
    assert sorted(set(seen)) == [(300, 100), (400, 100), (400, 400)]
    assert seen == sorted(seen)
    assert max(result["hidden"] for result in results) == 1  # a partial folder was left there
    assert all(result["after"] == ["best", "step-00000400", "step-00000500"] for result in results)


def kill_at(folder: Path, line: int) -> int:
    """One evaluation at step 400 in a child that is killed as its n-th line starts."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    evaluation(folder, 400)
    os._exit(0)


def main(root: Path) -> None:
    results: list[dict[str, Any]] = []
    while not results or results[-1]["signal"]:
        folder = root / str(len(results))
        for step in (100, 200, 300):
            save(folder, step)
        mark_best(folder / "step-00000100")
        code = -kill_at(folder, len(results))
        latest = latest_checkpoint(folder)
        result = {
            "signal": code,
            "latest": read_state(latest).step if latest else None,
            "best": read_state(folder / "best").step,
            "hidden": len(list(folder.glob(".*.partial"))),
        }
        evaluation(folder, 400)
        evaluation(folder, 500)
        results.append({**result, "after": names(folder)})
    print(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

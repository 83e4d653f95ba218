"""A conversion that is killed anywhere ends, when it is run again, as if it had not been."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.phantom import Phantom, write_archive
from medpsp.config import Config
from shards.check import check_shards
from tests.killing import Harm, command, contents, convert, state, wait_for, workers

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight patients of 12 slices: 24 shards of 4."""
    root = tmp_path_factory.mktemp("large")
    write_archive(root, 8, Phantom(shape=(12, 192, 192)))
    return root


@pytest.fixture(scope="module")
def undisturbed(large: Path, tmp_path_factory: pytest.TempPathFactory, make_config: Make) -> Config:
    config = make_config(large, tmp_path_factory.mktemp("whole"), shard_slices=4, workers=1)
    convert(config)
    return config


def test_kills_of_driver_and_tasks_change_no_byte_and_repeat_no_shard(
    large: Path, undisturbed: Config, make_config: Make, tmp_path: Path
):
    config = make_config(large, tmp_path / "out", shard_slices=4, index=tmp_path / "index")
    harm = Harm(config, random.Random(4))
    for kills in (2, 1, 2):
        harm.run(kills)
    convert(config)
    harm.look()
    assert harm.drivers >= 1
    assert harm.tasks >= 1
    assert (harm.repeated, harm.left) == (0, 0)
    assert contents(config.shards) == contents(undisturbed.shards)


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(
    large: Path, undisturbed: Config, make_config: Make, tmp_path: Path, count: int
):
    config = make_config(large, tmp_path / "out", shard_slices=4, workers=count)
    convert(config)
    assert contents(config.shards) == contents(undisturbed.shards)


def test_parts_of_an_array_give_the_same_bytes(
    large: Path, undisturbed: Config, make_config: Make, tmp_path: Path
):
    """Plan, three parts of which two are at work at once, publish: as jobs of an array would."""
    settings: dict[str, Any] = {"shard_slices": 4, "workers": 1, "index": tmp_path / "index"}
    config = make_config(large, tmp_path / "out", **settings)
    convert(config, "--step", "plan")
    with command(config, "--step", "publish") as early:
        assert early.wait(60) == 1
    assert "24 of 24 shards are not written" in (config.out / "command.log").read_text()
    with command(config, "--step", "convert", "--part", "3/3") as one:
        convert(config, "--step", "convert", "--part", "1/3")
        assert one.wait(120) == 0
    assert len(state(config.shards, "commits/*.json")) == 16
    convert(config, "--step", "convert", "--part", "2/3")
    convert(config, "--step", "publish")
    assert contents(config.shards) == contents(undisturbed.shards)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "medpsp-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root and the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    large: Path, undisturbed: Config, make_config: Make, tmp_path: Path, small_disk: Path
):
    config = make_config(large, tmp_path / "out", shard_slices=4, workers=1)
    config.out.mkdir()
    (config.out / "shards").symlink_to(small_disk)
    ballast = small_disk / "ballast"
    whole = contents(undisturbed.shards)
    (config.shards / "zarr.json").write_bytes(whole["zarr.json"])
    images = sum(len(data) for name, data in whole.items() if "/image/c/" in name)
    ballast.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - images // 2))
    with command(config) as process:
        assert process.wait(120) == 1
    text = (config.out / "command.log").read_text()
    assert "No space left on device; mend it and run again" in text
    assert "Traceback" not in text
    assert not list(small_disk.rglob(".*.partial"))
    ballast.unlink()
    convert(config)
    assert contents(config.shards) == contents(undisturbed.shards)
    assert list(check_shards(config.shards)) == []


def test_an_interrupt_ends_the_tasks_too(large: Path, make_config: Make, tmp_path: Path):
    config = make_config(large, tmp_path / "out", shard_slices=2, workers=1)
    with command(config) as process:
        wait_for(lambda: bool(workers(process.pid)), "a shard task")
        at_work = workers(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
        _, alive = psutil.wait_procs(at_work, timeout=60)
        assert alive == []
    assert "Traceback" not in (config.out / "command.log").read_text()

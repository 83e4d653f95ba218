"""One small phantom archive and its shards, made once; a test that changes them takes a copy.

Eight patients of 4 slices of 48 x 48 in shards of 6, so every second series straddles two shards.
With this key, patients 0 and 5 are in test, 1 and 4 in val, the others in train, where 20 % is
patient 3, and 60 % is patients 3 and 6.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from launch.phantom import CLASSES, Phantom, write_archive
from medpsp.config import Config
from medpsp.identity import create_key

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")
KEY = "key of the tests 58"
# a shell starts what it runs in the background deaf to Ctrl-C, and all that this starts would be
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ("real_data", "slurm", "ranks", "canary", "crash", "faults", "docs")
"""Files of tests that take minutes: two processes end at about the same time if these go first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest first; the others stay in order."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def need(what: str, there: bool, hint: str) -> None:
    """Skip where something of the machine is missing; fail where MEDPSP_REQUIRE names it.

    Args:
        what: Its name in MEDPSP_REQUIRE, a list with commas.
        there: Whether it was found.
        hint: How to get it.
    """
    if there:
        return
    if what in os.environ.get("MEDPSP_REQUIRE", "").split(","):
        pytest.fail(f"{what}: missing, and MEDPSP_REQUIRE names it; {hint}")
    pytest.skip(f"{what}: missing; {hint}")


@pytest.fixture(scope="session", name="need")
def need_fixture() -> Callable[[str, bool, str], None]:
    return need


@pytest.fixture(scope="session")
def key() -> bytes:
    return KEY.encode()


@pytest.fixture(scope="session")
def phantom() -> Phantom:
    return Phantom(shape=(4, 48, 48))


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """Archive folder (with dicom, masks and key below it), out folder and changes to a Config."""

    def make(root: Path, out: Path, **data: Any) -> Config:
        if not (root / "key").exists():
            create_key(root / "key", KEY)
        tree = {
            "archive": root / "dicom",
            "labels": root / "masks",
            "classes": CLASSES,
            "key_file": root / "key",
            "split": {"val": 0.25, "test": 0.25},
            "shard_slices": 6,
            "max_reject_fraction": 0.1,
        }
        train = {"size": [32, 32], "batch_size": 4}
        return Config.model_validate({"out": out, "data": {**tree, **data}, "train": train})

    return make


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory, phantom: Phantom) -> Path:
    root = tmp_path_factory.mktemp("archive")
    write_archive(root, 8, phantom)
    return root


@pytest.fixture(scope="session")
def ray_once() -> Iterator[None]:
    """Ray takes seconds to start: `build_shards` uses one that runs, and starts its own if not."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def made(
    archive: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Callable[..., Config],
    ray_once: None,
) -> Config:
    """Configuration of shards that exist."""
    from shards.build import build_shards

    config = make_config(archive, tmp_path_factory.mktemp("made"))
    build_shards(config)
    return config


@pytest.fixture(scope="session")
def trained(made: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A few steps on the phantom, so that masks are not all of one class."""
    from launch.jobs import train_job

    tree = made.model_dump(mode="json")
    tree["train"] |= {"stages": [{"name": "only", "steps": 20, "lr": 3e-3}], "threads": 1}
    tree["train"] |= {"log_every": 5}
    tree["model"] |= {"backbone": "mobilenetv3_large_100"}
    tree["model"] |= {"psp_channels": 16, "decoder_channels": 16}
    tree["evaluate"] |= {"bootstrap": 100, "postprocess": "choose"}
    out = tmp_path_factory.mktemp("trained")
    (out / "shards").symlink_to(made.shards)
    config = Config.model_validate({**tree, "out": out})
    train_job(config)
    return config


@pytest.fixture
def copied(made: Config, tmp_path: Path) -> Config:
    """The same with shards of its own, free to be damaged."""
    config = made.model_copy(update={"out": tmp_path / "copied"})
    shutil.copytree(made.shards, config.shards)
    return config


@pytest.fixture
def no_nohup() -> Iterator[None]:
    """What a test starts hears that its terminal is closed, even where the tests do not."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Jobs that run in this process add handlers to the logger: take them off again."""
    logger = logging.getLogger("medpsp")
    before, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    for handler in set(logger.handlers) - set(before):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture
def own(
    archive: Path, make_config: Callable[..., Config], tmp_path: Path, ray_once: None
) -> Config:
    """An archive that may be changed, not converted: 8 patients of 4 slices, 6 slots a shard."""
    shutil.copytree(archive, tmp_path / "archive")
    data = {"index": tmp_path / "index", "workers": 1, "max_reject_fraction": 0.5}
    return make_config(tmp_path / "archive", tmp_path / "out", **data)

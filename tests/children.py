"""Processes that start with torch in them, forked by a server that never trains itself.

A child of a process that has run a backward pass cannot run one: torch refuses, and which tests ran
before in a process of pytest is a matter of chance.
"""

from __future__ import annotations

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "launch.train",
        "medpsp.train.loop",
        "medpsp.train.board",
        "tests.test_faults",
        "tests.test_restart",
        "timm",
    ]
)

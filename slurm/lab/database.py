"""Accounting: MariaDB of its own, and slurmdbd on it."""

from __future__ import annotations

import socket
from contextlib import suppress

from layout import Lab
from processes import LabError, run, start, wait_for

NEEDED = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")


def start_accounting(lab: Lab, password: str) -> Lab:
    """A database for slurmdbd alone, on loopback and with a password of this lab."""
    data, sock = lab.root / "db", lab.root / "run/mariadb.sock"
    run(
        lab,
        "mariadb-install-db",
        "--no-defaults",
        f"--datadir={data}",
        f"--user={lab.user}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
        seconds=60,
    )
    options = [
        "--no-defaults",
        f"--user={lab.user}",
        f"--datadir={data}",
        f"--socket={sock}",
        f"--pid-file={lab.root}/run/mariadbd.pid",
        "--bind-address=127.0.0.1",
        f"--port={lab.mariadb_port}",
        "--skip-name-resolve",
        "--innodb-buffer-pool-size=64M",
        "--innodb-log-file-size=16M",
    ]
    lab = start(lab, "mariadbd", ["mariadbd", *options])
    grant = (
        "CREATE DATABASE slurm_acct; "
        f"CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}'; "
        "GRANT ALL ON slurm_acct.* TO 'slurm'@'127.0.0.1'; "
        "DROP USER IF EXISTS 'root'@'127.0.0.1';"
    )
    client = ["mariadb", "--no-defaults", f"--socket={sock}", "-u", "root"]
    wait_for("mariadbd", lambda: run(lab, *client, "-e", "SELECT 1"), 30)
    run(lab, *client, "-e", grant)
    lab = start(lab, "slurmdbd", ["slurmdbd", "-D"])
    wait_for("slurmdbd", lambda: _listens(lab), 30)
    wait_for("the cluster in the database", lambda: _cluster(lab), 30)
    return lab


def _listens(lab: Lab) -> bool:
    with suppress(OSError), socket.create_connection((lab.address, lab.database_port), 1):
        return True
    return False


def _cluster(lab: Lab) -> bool:
    with suppress(LabError):
        run(lab, "sacctmgr", "-i", "add", "cluster", "lab")
    return "lab" in run(lab, "sacctmgr", "-n", "show", "cluster", "format=cluster").split()

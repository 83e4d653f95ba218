#!/usr/bin/env python3
"""A real SLURM cluster of several nodes on one machine, to try things out and for tests.

    python slurm/lab up [--cpu 1] [--gpu 3] [--accounting] [--ports]
    eval "$(python slurm/lab env)"      # now sinfo, sbatch, medpsp run --cluster see it
    python slurm/lab status
    python slurm/lab fail gpu1          # as if its power went; also: fail controller
    python slurm/lab heal gpu1
    python slurm/lab down

Needs Debian's slurmctld, slurmd, slurm-client and munge (with --accounting also slurmdbd and
mariadb-server), nothing else; no service of the system is touched. As root each node has network,
processes and host name of its own; else, or with --ports, nodes are daemons beside each other. All
files lie in one folder (--root), which `down` removes. Where a real cluster answers, `up` says so
and starts nothing (--force starts a lab all the same).
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import database
from before import real_cluster, require_place
from layout import GPUS, Lab, Node, files
from nodes import (
    can_have_namespaces,
    devices,
    drop_bridge,
    fail_node,
    free_network,
    free_port,
    heal_node,
    make_bridge,
    node_states,
    start_node,
    wait_ready,
)
from processes import LabError, alive, leftovers, run, start, stop, wait_for

CONTROLLER = "controller"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = "apt install --no-install-recommends slurmctld slurmd slurm-client munge"


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="slurm/lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["up", "down", "status", "env", "fail", "heal"])
    parser.add_argument("name", nargs="?", help="of a node, or controller; for fail and heal")
    parser.add_argument("--root", type=Path, default=_default_root())
    parser.add_argument("--cpu", type=int, default=1, help="nodes without GPUs")
    parser.add_argument("--gpu", type=int, default=3, help=f"nodes with {GPUS} made-up GPUs")
    parser.add_argument("--accounting", action="store_true", help="slurmdbd and MariaDB, too")
    parser.add_argument("--ports", action="store_true", help="no namespaces, even as root")
    parser.add_argument("--force", action="store_true", help="beside a real cluster, too")
    args = parser.parse_args()
    try:
        return _up(args) if args.what == "up" else _on(args, _known(args.root))
    except LabError as error:
        sys.stderr.write(f"lab: {error}\n")
        return 1


def _default_root() -> Path:
    return Path(tempfile.gettempdir()) / f"medpsp-lab-{os.geteuid()}"


def _known(root: Path) -> Lab:
    try:
        return Lab.load(root)
    except (OSError, ValueError, TypeError, KeyError):
        others = sorted(str(path.parent) for path in root.parent.glob("medpsp-lab-*/lab.json"))
        hint = f"--root {others[0]} is one (sudo?)" if others else "`up` makes one"
        raise LabError(f"{root}: no lab there that can be read; {hint}") from None


def _on(args: argparse.Namespace, lab: Lab) -> int:
    if args.what == "down":
        _down(lab)
    elif args.what == "env":
        sys.stdout.write(f"export SLURM_CONF={lab.conf}\n")
    elif args.what == "status":
        _status(lab)
    else:
        _fail_or_heal(lab, args.what, args.name)
    return 0


def _fail_or_heal(lab: Lab, what: str, name: str | None) -> None:
    names = [*(node.name for node in lab.nodes), CONTROLLER]
    if name not in names:
        raise LabError(f"{what} {name}: no such node; there are {', '.join(names)}")
    if name == CONTROLLER and what == "fail":
        stop(lab, "slurmctld", signal.SIGKILL)
    elif name == CONTROLLER:
        _start_controller(lab)
    elif what == "fail":
        fail_node(lab, lab.node(name))
    else:
        heal_node(lab, lab.node(name))


def _status(lab: Lab) -> None:
    kind = "namespaces" if lab.namespaces else "ports"
    sys.stdout.write(f"lab {lab.root} ({kind}), controller {lab.address}:{lab.port}\n")
    for name in ("munged", "mariadbd", "slurmdbd", "slurmctld"):
        if name in lab.processes:
            sys.stdout.write(f"  {name:10} {'up' if alive(lab, name) else 'down'}\n")
    states = {}
    if alive(lab, "slurmctld"):
        states = node_states(lab)
    for node in lab.nodes:
        here = "up" if alive(lab, node.name) else "down"
        gpus = f"{node.gpus} gpus" if node.gpus else ""
        state = states.get(node.name, "unknown")
        sys.stdout.write(f"  {node.name:10} {here:5} {state:12} {node.address} {gpus}\n")


def _up(args: argparse.Namespace) -> int:
    if not args.force and (found := real_cluster()):
        sys.stdout.write(f"lab: a real cluster is there ({found}); use that one, or --force\n")
        return 0
    needed = (*NEEDED, *(database.NEEDED if args.accounting else ()))
    if missing := [name for name in needed if not shutil.which(name, path=_path())]:
        more = " slurmdbd mariadb-server" if args.accounting else ""
        raise LabError(f"no {missing[0]} here; on Debian: {PACKAGES}{more}")
    os.environ["PATH"] = _path()
    root: Path = args.root.resolve()
    require_place(root)
    if args.cpu + args.gpu < 1 or args.cpu < 0 or args.gpu < 0 or args.cpu + args.gpu > 200:
        raise LabError(f"--cpu {args.cpu} --gpu {args.gpu}: expected 1 to 200 nodes together")
    began = time.monotonic()
    lab = _laid_out(args, root)
    try:
        _start_all(lab)
    except (LabError, OSError, subprocess.SubprocessError) as error:
        tails = _tails(lab)
        _down(Lab.load(root))
        raise LabError(f"{error}\n{tails}") from None
    except BaseException:
        _down(Lab.load(root))
        raise
    sys.stdout.write(
        f"lab: {len(lab.nodes)} nodes up in {time.monotonic() - began:.1f} s\n"
        f"export SLURM_CONF={lab.conf}\n"
    )
    return 0


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _laid_out(args: argparse.Namespace, root: Path) -> Lab:
    """Folders and files, nothing started."""
    why_not = "asked for ports" if args.ports else can_have_namespaces()
    bridge, address = ("", "127.0.0.1") if why_not else free_network()
    names = [*(f"cpu{n}" for n in range(args.cpu)), *(f"gpu{n}" for n in range(args.gpu))]
    nodes = []
    for number, name in enumerate(names):
        gpus = GPUS if name.startswith("gpu") else 0
        own = f"{address.rsplit('.', 1)[0]}.{number + 10}"
        port = free_port() if why_not else 6818
        nodes.append(Node(name, address if why_not else own, port, gpus))
    lab = Lab(
        root=root,
        host=socket.gethostname().split(".")[0],
        address=address,
        port=free_port(),
        database_port=free_port() if args.accounting else 0,
        mariadb_port=free_port() if args.accounting else 0,
        namespaces=not why_not,
        bridge=bridge,
        user=pwd.getpwuid(os.geteuid()).pw_name,
        nodes=tuple(nodes),
    )
    root.mkdir(parents=True, exist_ok=True)
    lab.save()  # first: `down` removes what is half made
    for folder in ("etc", "run", "log", "state", "spool", "db"):
        (root / folder).mkdir()
    devices(root)
    return lab


def _start_all(lab: Lab) -> None:
    password = os.urandom(16).hex()
    for name, (text, mode) in files(lab, password).items():
        path = lab.root / "etc" / name
        path.touch(mode=mode)
        path.write_text(text, encoding="utf-8")
    if lab.bridge:
        make_bridge(lab)
    lab = _start_munge(lab)
    if lab.database_port:
        lab = database.start_accounting(lab, password)
    lab = _start_controller(lab)
    for node in lab.nodes:
        lab = start_node(lab, node)
    wait_ready(lab, [node.name for node in lab.nodes])


def _start_munge(lab: Lab) -> Lab:
    key = lab.root / "etc/munge.key"
    key.touch(mode=0o400)
    key.chmod(0o600)
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    where = lab.root / "run"
    options = [
        f"--socket={where}/munge.sock",
        f"--key-file={key}",
        f"--pid-file={where}/munged.pid",
        f"--seed-file={where}/munge.seed",
        f"--log-file={lab.log('munged')}",
    ]
    lab = start(lab, "munged", ["munged", "--foreground", "--force", *options])
    probe = f"munge -S {where}/munge.sock -n | unmunge -S {where}/munge.sock"
    wait_for("munged", lambda: run(lab, "sh", "-c", probe), 10)
    return lab


def _start_controller(lab: Lab) -> Lab:
    if not alive(lab, "slurmctld"):
        # under this very name: slurmctld-wlm, what Debian's link leads to, loses all GPUs
        lab = start(lab, "slurmctld", ["slurmctld", "-D", "-f", str(lab.conf)])
    wait_for("slurmctld", lambda: "is UP" in run(lab, "scontrol", "ping"), 20)
    return lab


def _tails(lab: Lab) -> str:
    """The last lines of every log."""
    parts = []
    for path in sorted((lab.root / "log").glob("*")):
        if lines := path.read_text(encoding="utf-8", errors="replace").splitlines()[-4:]:
            parts.append(f"-- {path.name}\n" + "\n".join(lines))
    return "\n".join(parts)


def _down(lab: Lab) -> None:
    """End everything that was started, and remove the folder."""
    for node in lab.nodes:
        stop(lab, node.name, signal.SIGKILL if lab.namespaces else signal.SIGTERM)
    for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
        stop(lab, name, signal.SIGTERM, 10)
    for pid in leftovers(lab):  # steps of jobs outlive their slurmd
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    drop_bridge(lab)
    wait_for("the end of its processes", lambda: not list(leftovers(lab)), 10)
    shutil.rmtree(lab.root, ignore_errors=True)
    if lab.root.exists():
        raise LabError(f"{lab.root}: cannot be removed")


if __name__ == "__main__":
    sys.exit(main())

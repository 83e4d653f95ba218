"""What a lab consists of, and the text of its configuration files: pure, nothing is started.

The settings that matter to tests, and why they are there:

- ``AuthInfo=cred_expire``: a requeued job waits as long as a credential lives, 120 s by default.
- ``SlurmdTimeout``: a dead node is seen after about this long.
- ``DependencyParameters=kill_invalid_depend``: what can never run is cancelled, not left pending.
- ``SlurmdParameters=config_overrides``: nodes may claim more cores than the machine has.
- a GPU of ``gres.conf`` needs a device file: a link to /dev/null is one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CPUS, MEMORY_MB, GPUS = 8, 70_000, 2
"""What a node claims, whatever the machine has: enough for the shipped profiles."""


@dataclass(frozen=True)
class Node:
    """One logical node.

    Attributes:
        name: Its host name, too, where nodes have namespaces.
        address: IPv4 address.
        port: Of its slurmd.
        gpus: Made-up devices.
    """

    name: str
    address: str
    port: int
    gpus: int = 0


@dataclass(frozen=True)
class Lab:
    """One cluster; what ``lab.json`` in its folder holds.

    Attributes:
        root: Folder of everything that it writes.
        host: Host name of the controller.
        address: Where the controller listens.
        port: Of the controller.
        database_port: Of slurmdbd; 0 for no accounting.
        mariadb_port: Of the database below it.
        namespaces: Whether each node has network, processes and host name of its own.
        bridge: Network device that the nodes hang on.
        user: Who runs all daemons.
        nodes: CPU nodes first.
        processes: Name to pid and start time.
    """

    root: Path
    host: str
    address: str
    port: int
    database_port: int
    mariadb_port: int
    namespaces: bool
    bridge: str
    user: str
    nodes: tuple[Node, ...]
    processes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        """What SLURM_CONF must be."""
        return self.root / "etc/slurm.conf"

    @property
    def state(self) -> Path:
        """This, as JSON."""
        return self.root / "lab.json"

    def log(self, name: str) -> Path:
        """Of a daemon."""
        return self.root / "log" / f"{name}.log"

    def node(self, name: str) -> Node:
        """By name.

        Raises:
            KeyError: There is none.
        """
        found = {node.name: node for node in self.nodes}
        return found[name]

    def save(self) -> None:
        """Write ``lab.json``."""
        tree = {**asdict(self), "root": str(self.root)}
        partial = self.state.with_suffix(".partial")
        partial.write_text(json.dumps(tree, indent=1), encoding="utf-8")
        partial.replace(self.state)

    @classmethod
    def load(cls, root: Path) -> Lab:
        """Read ``lab.json``.

        Raises:
            OSError: There is no lab.
            ValueError, TypeError, KeyError: What is there is none.
        """
        tree: dict[str, Any] = json.loads((root / "lab.json").read_text(encoding="utf-8"))
        nodes = tuple(Node(**node) for node in tree.pop("nodes"))
        processes = {name: (pid, began) for name, (pid, began) in tree.pop("processes").items()}
        return cls(**{**tree, "root": root, "nodes": nodes, "processes": processes})


def files(lab: Lab, password: str) -> dict[str, tuple[str, int]]:
    """Name below ``etc`` to text and mode."""
    found = {
        "slurm.conf": (slurm_conf(lab), 0o644),
        "gres.conf": (gres_conf(lab), 0o644),
        "cgroup.conf": ("ConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n", 0o644),
        "plugstack.conf": ("", 0o644),
        "hosts": (hosts(lab), 0o644),
        # without this each connection waits for a name server that a namespace cannot reach
        "nsswitch.conf": ("passwd: files\ngroup: files\nshadow: files\nhosts: files\n", 0o644),
    }
    if lab.database_port:
        found["slurmdbd.conf"] = (slurmdbd_conf(lab, password), 0o600)
    return found


def slurm_conf(lab: Lab) -> str:
    """The controller's configuration, which all nodes share."""
    root = lab.root
    accounting = "slurmdbd" if lab.database_port else "none"
    lines = [
        "ClusterName=lab",
        f"SlurmctldHost={lab.host}({lab.address})",
        f"SlurmctldPort={lab.port}",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        f"AuthInfo=socket={root}/run/munge.sock,cred_expire=10",
        f"SlurmUser={lab.user}",
        f"SlurmdUser={lab.user}",
        f"StateSaveLocation={root}/state",
        f"SlurmdSpoolDir={root}/spool/%n",
        f"SlurmctldPidFile={root}/run/slurmctld.pid",
        f"SlurmdPidFile={root}/run/%n.pid",
        f"SlurmctldLogFile={lab.log('slurmctld')}",
        f"SlurmdLogFile={root}/log/%n.log",
        f"PlugStackConfig={root}/etc/plugstack.conf",
        "MpiDefault=none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/linux",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "SlurmdTimeout=10",
        "SlurmctldTimeout=20",
        "KillWait=5",
        "MinJobAge=600",
        "JobRequeue=1",
        "DependencyParameters=kill_invalid_depend",
        "SchedulerParameters=bf_interval=2,sched_interval=2,bf_continue",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=200",
        "GresTypes=gpu",
        "JobCompType=jobcomp/filetxt",
        f"JobCompLoc={root}/log/jobcomp.txt",
        f"AccountingStorageType=accounting_storage/{accounting}",
    ]
    if lab.database_port:
        lines += [
            f"AccountingStorageHost={lab.address}",
            f"AccountingStoragePort={lab.database_port}",
            f"AccountingStoragePass={root}/run/munge.sock",  # the socket, whatever its name says
            "AccountingStorageTRES=gres/gpu",
        ]
    for node in lab.nodes:
        name = node.name if lab.namespaces else lab.host
        gres = f" Gres=gpu:fake:{node.gpus}" if node.gpus else ""
        lines.append(
            f"NodeName={node.name} NodeHostname={name} NodeAddr={node.address} Port={node.port} "
            f"CPUs={CPUS} RealMemory={MEMORY_MB}{gres} State=UNKNOWN"
        )
    cpu = ",".join(node.name for node in lab.nodes if not node.gpus)
    gpu = ",".join(node.name for node in lab.nodes if node.gpus)
    if cpu:
        lines.append(f"PartitionName=cpu Nodes={cpu} Default=YES MaxTime=INFINITE State=UP")
    if gpu:
        default = "NO" if cpu else "YES"
        lines.append(f"PartitionName=gpu Nodes={gpu} Default={default} MaxTime=INFINITE State=UP")
    return "\n".join(lines) + "\n"


def gres_conf(lab: Lab) -> str:
    """The made-up GPUs."""
    return "".join(
        f"NodeName={node.name} Name=gpu Type=fake File={lab.root}/dev/gpu[0-{node.gpus - 1}]\n"
        for node in lab.nodes
        if node.gpus
    )


def slurmdbd_conf(lab: Lab, password: str) -> str:
    """The accounting daemon's configuration; mode 0600, or it refuses it."""
    root = lab.root
    return "\n".join(
        [
            f"DbdHost={lab.host}",
            f"DbdAddr={lab.address}",
            f"DbdPort={lab.database_port}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={root}/run/munge.sock",
            f"SlurmUser={lab.user}",
            f"LogFile={lab.log('slurmdbd')}",
            f"PidFile={root}/run/slurmdbd.pid",
            "StorageType=accounting_storage/mysql",
            "StorageHost=127.0.0.1",
            f"StoragePort={lab.mariadb_port}",
            "StorageUser=slurm",
            f"StoragePass={password}",
            "StorageLoc=slurm_acct",
            "",
        ]
    )


def hosts(lab: Lab) -> str:
    """For /etc/hosts of the nodes."""
    known = [("127.0.0.1", "localhost"), (lab.address, lab.host)]
    known += [(node.address, node.name) for node in lab.nodes]
    return "".join(f"{address} {name}\n" for address, name in known)

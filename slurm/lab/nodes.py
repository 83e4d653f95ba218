"""Logical nodes: with namespaces each has its own network, processes, mounts and host name."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from layout import GPUS, Lab, Node
from processes import LabError, alive, children, run, start, stop, wait_for

# bash is PID 1 of the node: when it dies, everything on the node does, and the network with it
NODE = r"""
set -eu
hostname "$NAME"
mount --bind "$ROOT/etc/hosts" /etc/hosts
mount --bind "$ROOT/etc/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$GATEWAY"
slurmd -D -N "$NAME" -f "$SLURM_CONF" &
wait
"""
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc")


def can_have_namespaces() -> str:
    """Empty where nodes may have namespaces, else why not."""
    if os.geteuid():
        return "not root"
    if missing := [name for name in ("ip", "unshare") if not shutil.which(name)]:
        return f"no {missing[0]} command (Debian: apt install iproute2 util-linux)"
    probe = [*UNSHARE, "--kill-child=KILL", "hostname", "probe"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    link = subprocess.run(
        ["ip", "link", "add", "mlabprobe", "type", "bridge"], capture_output=True, check=False
    )
    subprocess.run(["ip", "link", "del", "mlabprobe"], capture_output=True, check=False)
    return "" if link.returncode == 0 else "network devices cannot be made"


def free_network() -> tuple[str, str]:
    """Name of a bridge that is not there, and the first address of a network nobody routes."""
    text = subprocess.run(
        ["ip", "-4", "-o", "address"], capture_output=True, text=True, check=True
    ).stdout
    taken = [
        ipaddress.ip_interface(word).network
        for line in text.splitlines()
        for word in line.split()
        if "/" in word and word[0].isdecimal()
    ]
    for number in range(1, 250):
        network = ipaddress.ip_network(f"10.213.{number}.0/24")
        if not any(network.overlaps(other) for other in taken):
            return f"mlab{number}", f"10.213.{number}.1"
    raise LabError("no free network among 10.213.1.0 to 10.213.249.0")


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_bridge(lab: Lab) -> None:
    """The network of all nodes."""
    _ip("link", "add", lab.bridge, "type", "bridge")
    _ip("address", "add", f"{lab.address}/24", "dev", lab.bridge)
    _ip("link", "set", lab.bridge, "up")


def drop_bridge(lab: Lab) -> None:
    """Take it away, if it is there."""
    if lab.bridge:
        with suppress(LabError):
            _ip("link", "del", lab.bridge)


def start_node(lab: Lab, node: Node) -> Lab:
    """Bring one node up; the lab that knows it."""
    if not lab.namespaces:
        return start(lab, node.name, ["slurmd", "-D", "-N", node.name, "-f", str(lab.conf)])
    given = {
        "NAME": node.name,
        "ROOT": str(lab.root),
        "ADDRESS": node.address,
        "GATEWAY": lab.address,
    }
    words = [f"{key}={value}" for key, value in given.items()]
    command = ["env", *words, *UNSHARE, "--kill-child=KILL", "bash", "-c", NODE]
    lab = start(lab, node.name, command)
    outer = lab.processes[node.name][0]
    wait_for(f"node {node.name}", lambda: children(outer), 10)
    # both ends get names of their own: those of the bridge's side are seen outside
    here = f"{lab.bridge}n{lab.nodes.index(node)}"
    with suppress(LabError):  # of a node that died, a moment ago
        _ip("link", "del", here)
    inner = str(children(outer)[0])
    _ip("link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", inner)
    _ip("link", "set", here, "master", lab.bridge)
    _ip("link", "set", here, "up")
    return lab


def fail_node(lab: Lab, node: Node) -> None:
    """As if the power went: all its processes are gone at once."""
    stop(lab, node.name, signal.SIGKILL)


def heal_node(lab: Lab, node: Node) -> Lab:
    """Start a node again, and give it back to the scheduler."""
    if not alive(lab, node.name):
        lab = start_node(lab, node)
    wait_ready(lab, [node.name], give_back=True)
    return lab


def wait_ready(lab: Lab, names: list[str], give_back: bool = False) -> None:
    """Until the controller may use the nodes, 30 s at most.

    Args:
        lab: Of the nodes.
        names: Theirs.
        give_back: Also those that the controller has set down or drained.

    Raises:
        LabError: It may not.
    """

    def ready() -> bool:
        states = node_states(lab)
        for name in names:
            if give_back and states[name].startswith(("down", "drain")):
                run(lab, "scontrol", "update", f"NodeName={name}", "State=RESUME")
        return all(states[name] in ("idle", "mixed", "allocated") for name in names)

    wait_for(f"nodes {', '.join(names)}", ready, 30)


def node_states(lab: Lab) -> dict[str, str]:
    """Name to SLURM's word; ``*`` behind it: does not answer."""
    text = run(lab, "sinfo", "-N", "-h", "-o", "%N %T", seconds=10)
    return dict(line.split()[:2] for line in text.splitlines() if line.strip())  # type: ignore[misc]


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def devices(root: Path) -> None:
    """What stands for GPUs: SLURM wants a device, and takes a link to one."""
    folder = root / "dev"
    folder.mkdir()
    for number in range(GPUS):
        (folder / f"gpu{number}").symlink_to("/dev/null")

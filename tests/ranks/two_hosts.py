"""Two hosts on one machine: network namespaces with an address each, joined by a cable (a veth pair)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = ("10.231.77.1", "10.231.77.2")
CABLE = "cable0"
CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """Why this machine cannot have two hosts, or ``None`` if it can."""
    if shutil.which("ip") is None:
        return "no command 'ip' (iproute2)"
    name = f"dp-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"'ip netns add' is not allowed here: {tried.stderr.strip()}"
    ip("netns", "del", name)
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces, which can reach each other and nothing else."""
    hosts = (f"dp-a-{os.getpid()}", f"dp-b-{os.getpid()}")
    try:
        for host in hosts:
            ip("netns", "add", host)
        ip("-n", hosts[0], "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", hosts[1])
        for host, address in zip(hosts, ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", host, "link", "set", CABLE, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def move_to(host: str) -> None:
    """Let this process, and what it starts, live on ``host``."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/var/run/netns/{host}").open() as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {host}")
    os.environ["GLOO_SOCKET_IFNAME"] = CABLE

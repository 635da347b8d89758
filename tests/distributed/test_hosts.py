"""Namespaces as hosts: they reach each other, keep to their rate, and leave nothing behind however their maker ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cofire.errors import CofireError
from cofire.testing.hosts import INTERFACE, Hosts, missing, sweep

why = missing()
needs_hosts = pytest.mark.skipif(why is not None, reason=why or "")
NAMESPACES = Path("/var/run/netns")

SERVE = """
import socket
with socket.create_server(("0.0.0.0", 5005)) as server:
    print("ready", flush=True)
    peer, _ = server.accept()
    total = 0
    while data := peer.recv(1 << 20):
        total += len(data)
    print(total, flush=True)
"""
SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5005), timeout=20) as peer:
    peer.sendall(bytes(int(sys.argv[2])))
"""
# Makes hosts, starts a process in one, says so, and waits to be killed.
LEAVE = """
import subprocess, time
from cofire.testing.hosts import Hosts
with Hosts(2) as hosts:
    process = hosts.start(1, ["sleep", "1000"])
    print(hosts._prefix, process.pid, flush=True)
    time.sleep(1000)
"""


def mine() -> list[str]:
    return [path.name for path in NAMESPACES.glob(f"cofire-{os.getpid()}-*")]


@needs_hosts
def test_hosts_reach_each_other_and_are_gone_afterwards():
    with Hosts(2, 12.5e6) as hosts:
        assert len(mine()) == 3
        server = hosts.start(0, [sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        sender = hosts.start(1, [sys.executable, "-c", SEND, hosts.address(0), "1000000"])
        assert sender.wait(30) == 0
        assert server.stdout.readline() == "1000000\n"
        left = hosts.start(0, ["sleep", "1000"])
        shown = subprocess.run(
            ["ip", "netns", "exec", hosts._name(1), "tc", "-s", "qdisc", "show", "dev", INTERFACE],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        # The kernel's own count: what was sent has passed the limit.
        assert "tbf" in shown
        assert "rate 100Mbit" in shown
        assert int(shown.split("Sent ")[1].split()[0]) > 1_000_000
    assert left.wait(5) == -signal.SIGKILL
    assert mine() == []


@needs_hosts
def test_what_a_killed_maker_left_is_swept_and_its_processes_end_with_it():
    maker = subprocess.Popen([sys.executable, "-c", LEAVE], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    prefix, inside = maker.stdout.readline().split()
    assert len(list(NAMESPACES.glob(f"{prefix}-*"))) == 3
    assert not [name for name in sweep() if name.startswith(prefix)], "hosts in use were swept"
    maker.kill()
    maker.wait()
    # Another test's hosts may have swept them before.
    sweep()
    assert not list(NAMESPACES.glob(f"{prefix}-*"))
    until = time.monotonic() + 10
    while is_running(int(inside)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(int(inside))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_switch_with_no_host_is_refused_in_a_line():
    with pytest.raises(CofireError, match="num_hosts = 0: from 1 to 250"):
        Hosts(0)

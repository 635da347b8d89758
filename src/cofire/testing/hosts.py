"""Network namespaces as hosts: each with an interface of its own, all on one switch, at a rate that one can choose.

A stand-in for several machines on one: processes of different hosts share processors and memory, but reach each other
over the wire alone. Needs root, ``ip``, ``tc`` and ``setpriv``. Everything lives in namespaces whose names carry the
process that made them; what one that was killed has left is removed by the next. Left out: latency and loss.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cofire.errors import CofireError

INTERFACE = "eth0"
_TOOLS = ("ip", "tc", "setpriv")
_FOLDER = Path("/var/run/netns")
_NAME = re.compile(r"cofire-(?P<pid>\d+)-(?P<start>\d+)-(switch|\d+)")


def missing() -> str | None:
    """Return what this machine lacks to make hosts; none: nothing."""
    lacking = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"network namespaces are not allowed: {probe.stderr.strip()}"


class Hosts:
    """Hosts for the time of a ``with`` block; processes that run in them then end."""

    def __init__(self, num_hosts: int, rate_bytes_per_s: float | None = None) -> None:
        """Say how many and how fast; they are made on entry.

        Args:
            num_hosts: From 1 to 250.
            rate_bytes_per_s: Of each host, in each direction; none: as fast as the machine is.

        Raises:
            CofireError: There cannot be so many.
        """
        if not 1 <= num_hosts <= 250:
            raise CofireError(f"num_hosts = {num_hosts}: from 1 to 250 hosts share a switch")
        self.num_hosts, self.rate_bytes_per_s = num_hosts, rate_bytes_per_s
        self._prefix = f"cofire-{os.getpid()}-{_start_time(os.getpid())}"
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Hosts:
        """Make the hosts.

        Raises:
            CofireError: This machine cannot; :func:`missing` says why.
        """
        if (why := missing()) is not None:
            raise CofireError(f"cannot make {self.num_hosts} hosts: {why}")
        sweep()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what still runs in the hosts, and remove them."""
        self._remove()

    def address(self, host: int) -> str:
        """Return a host's IPv4 address."""
        return f"10.213.0.{host + 1}"

    def start(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command in a host; it is killed when this process ends, however it ends.

        Args:
            host: Below ``num_hosts``.
            command: Program and arguments.
            options: Of ``subprocess.Popen``.
        """
        before = ["ip", "netns", "exec", self._name(host), "setpriv", "--pdeathsig", "KILL", "--"]
        process = subprocess.Popen([*before, *command], **options)
        self._processes.append(process)
        return process

    def _name(self, host: int | str) -> str:
        return f"{self._prefix}-{host}"

    def _make(self) -> None:
        switch = self._name("switch")
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for host in range(self.num_hosts):
            name, port = self._name(host), f"port{host}"
            _run("ip", "netns", "add", name)
            # A pair of ends in two namespaces is gone when either of these is.
            ends = ["link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", switch]
            _run("ip", "-n", name, *ends)
            _run("ip", "-n", name, "addr", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            if self.rate_bytes_per_s is not None:
                for namespace, end in ((name, INTERFACE), (switch, port)):
                    _run("tc", "-n", namespace, "qdisc", "add", "dev", end, "root", *_limit(self.rate_bytes_per_s))

    def _remove(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        for host in (*range(self.num_hosts), "switch"):
            _remove(self._name(host))


def sweep() -> list[str]:
    """Remove the namespaces whose makers have ended; return their names."""
    stale = []
    for path in sorted(_FOLDER.glob("cofire-*")):
        match = _NAME.fullmatch(path.name)
        if match is not None and _start_time(int(match["pid"])) != int(match["start"]):
            _remove(path.name)
            stale.append(path.name)
    return stale


def _limit(rate_bytes_per_s: float) -> list[str]:
    """Return the queue of a wire: 2 ms of its rate at once, and room for 20 ms."""
    burst = max(16 << 10, int(rate_bytes_per_s * 2e-3))
    return ["tbf", "rate", f"{round(8 * rate_bytes_per_s)}bit", "burst", str(burst), "latency", "20ms"]


def _remove(name: str) -> None:
    if not (_FOLDER / name).exists():
        return
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in inside.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CofireError(
            f"{' '.join(command)}: {done.stderr.strip() or done.returncode}; run hosts on a machine of your own"
        )


def _start_time(pid: int) -> int:
    """Return when a process began, in ticks since the machine did; 0 if there is none. Tells it from a later one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])

"""Messages between nodes: torch.distributed's point-to-point, several connections, a chosen interface.

Made for gloo over TCP, which has no way to stop a wait: who waits here waits on a thread that can be left behind
(``between_nodes.py``), and learns from the :class:`FailureBoard` that the group has failed elsewhere. Tensors travel as
bytes, so that types which a backend does not know do too. The same code runs over any torch backend with ``send`` and
``recv``. Left out: retries; a connection that broke stays broken.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from cofire.errors import CollectiveError

_POLL_S = 0.25
_FAILED = "failed"


class Pending:
    """A send or receive under way."""

    __slots__ = ("_peer", "_tensor", "_transport", "_verb", "_work")

    def __init__(self, transport: Transport, work: Any, tensor: torch.Tensor, peer: int, verb: str) -> None:
        self._transport, self._work, self._tensor, self._peer, self._verb = transport, work, tensor, peer, verb

    def wait(self) -> None:
        """Wait until the tensor was sent, or holds what was received.

        Raises:
            CollectiveError: The peer is gone, or the group's time-out is over.
        """
        transport = self._transport
        transport.waits_for[threading.get_ident()] = self._peer
        try:
            self._work.wait()
        except RuntimeError as error:
            raise transport.failure(error, self._peer, self._verb) from None


class Transport:
    """What one node sends to and receives from the others of a group.

    Attributes:
        node: This one's number.
        num_nodes: In the group.
        hosts: Name of each node.
        num_connections: Between each two nodes; messages of one connection arrive in the order of sending.
        timeout_s: Of each wait.
        doing: What errors say is under way, such as "all_reduce".
        waits_for: Of each thread that has waited, the node it waited for last.
    """

    def __init__(
        self, backend: Any, node: int, num_nodes: int, hosts: Sequence[str], num_connections: int, timeout_s: float
    ) -> None:
        """Take a torch.distributed backend or process group whose ranks are the nodes; see :meth:`connect`."""
        self._backend: Any = backend
        self.node, self.num_nodes, self.hosts = node, num_nodes, tuple(hosts)
        self.num_connections, self.timeout_s = num_connections, timeout_s
        self.doing = "a collective"
        self.waits_for: dict[int, int] = {}

    @classmethod
    def connect(
        cls,
        store: Store,
        node: int,
        num_nodes: int,
        timeout_s: float,
        hosts: Sequence[str] = (),
        num_connections: int = 1,
        interface: str | None = None,
    ) -> Transport:
        """Connect the nodes of a group over TCP; all of them call it.

        Args:
            store: That all share, for this group alone.
            node: This one's number.
            num_nodes: In the group.
            timeout_s: For this, and for each wait.
            hosts: Name of each node, for messages; empty: their numbers alone.
            num_connections: Between each two nodes.
            interface: Network interface, such as eth0; none: that of the host's own name.

        Raises:
            CollectiveError: There is no such interface, or a node does not come.
        """
        options: Any = getattr(ProcessGroupGloo, "_Options")()  # noqa: B009 - PyTorch's stubs do not know it
        options._timeout = timedelta(seconds=timeout_s)
        try:
            # Gloo takes the device with the number "tag modulo devices"; each has sockets and a thread of its own.
            options._devices = [_device(interface) for _ in range(num_connections)]
            backend = ProcessGroupGloo(PrefixStore("between_nodes", store), node, num_nodes, options)
        except RuntimeError as error:
            where = f"interface {interface!r}" if interface else "the default interface"
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise CollectiveError(
                f"node {node} of {num_nodes} cannot connect over {where}: {reason}; name another interface"
            ) from None
        return cls(backend, node, num_nodes, hosts or [""] * num_nodes, num_connections, timeout_s)

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> Pending:
        """Send a contiguous CPU tensor, ``[count]``; it must stay as it is until the wait is over.

        Args:
            tensor: One element or more.
            peer: To which node.
            tag: The receiver's; its remainder by ``num_connections`` is the connection.

        Raises:
            CollectiveError: The peer is gone.
        """
        data = tensor.view(torch.uint8)
        try:
            return Pending(self, self._backend.send([data], peer, tag), data, peer, "took")
        except RuntimeError as error:
            raise self.failure(error, peer, "took") from None

    def post_receive(self, tensor: torch.Tensor, peer: int, tag: int) -> Pending:
        """Name a contiguous CPU tensor, ``[count]``, for a message that is to come; see :meth:`send`.

        Raises:
            CollectiveError: The peer is gone.
        """
        data = tensor.view(torch.uint8)
        try:
            return Pending(self, self._backend.recv([data], peer, tag), data, peer, "sent")
        except RuntimeError as error:
            raise self.failure(error, peer, "sent") from None

    def name(self, node: int) -> str:
        """Return a node as errors name it."""
        return f"node {node} ({self.hosts[node]})" if self.hosts[node] else f"node {node}"

    def failure(self, error: RuntimeError, peer: int, verb: str) -> CollectiveError:
        """Return the error that a failed send or receive is to a user."""
        if "imed out" in str(error):
            return CollectiveError(
                f"{self.name(peer)} {verb} nothing for {self.timeout_s:g} s during {self.doing}; "
                f"see what it does, or raise the timeout"
            )
        return CollectiveError(
            f"{self.name(peer)} closed its connection during {self.doing}; see why it ended, and make a new group"
        )

    def close(self) -> None:
        """Close the connections; a thread that waits keeps them until its time-out."""
        self._backend = None


def _device(interface: str | None) -> Any:
    if interface is None:
        return ProcessGroupGloo.create_default_device()
    return ProcessGroupGloo.create_device(interface=interface)


class FailureBoard:
    """Where the first failure in a group is written, for all its nodes to read.

    A thread looks at it every 0.25 s while something has been under way for 0.5 s, so that a short collective never
    asks the store. A store that does not answer counts as a failure.
    """

    def __init__(self, store: Store, patience_s: float = 0.5) -> None:
        """Start the thread.

        Args:
            store: That all nodes share, for this group alone.
            patience_s: How long something is under way before the board is read.
        """
        self._writer = store
        # One client does one thing at a time; the board must not wait behind a rank that waits for a key.
        self._reader: Any = getattr(store, "clone")()  # noqa: B009 - PyTorch's stubs do not know it
        self._patience_s = patience_s
        self._watched: tuple[float, Callable[[str], None]] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="cofire-failure-board", daemon=True).start()

    def post(self, message: str) -> str:
        """Write a failure unless there is one already; return the one that stands there."""
        try:
            return bytes(self._writer.compare_set(_FAILED, "", message)).decode() or message
        except (RuntimeError, ValueError):
            return message

    def begin(self, now_s: float, on_failure: Callable[[str], None]) -> None:
        """Call ``on_failure`` with the message if a failure is found before :meth:`end`.

        Args:
            now_s: By ``time.monotonic``.
            on_failure: Called on the board's thread.
        """
        self._watched = (now_s, on_failure)

    def end(self) -> None:
        """Watch no longer."""
        self._watched = None

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def read(self) -> str | None:
        """Return the failure that stands on the board, if any."""
        try:
            if not self._reader.check([_FAILED]):
                return None
            return bytes(self._reader.get(_FAILED)).decode() or None
        except (RuntimeError, ValueError):
            return "the store of the group is gone; the process that keeps it has ended: make a new group"

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            watched = self._watched
            if watched is None or time.monotonic() - watched[0] < self._patience_s:
                continue
            message = self.read()
            # Only what is still under way fails; the next operation finds the board by itself.
            if message is not None and self._watched is watched:
                watched[1](message)

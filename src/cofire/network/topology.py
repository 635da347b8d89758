"""A network as a graph: endpoints (NIC ports), switches, and links with a capacity each way.

Vertices are numbered: first the endpoints 0 .. num_endpoints - 1, then the switches. Every cable is two directed
links, 2i and 2i + 1, so that the opposite of link e is ``e ^ 1``. Builders are in ``cofire.network.builders``.

The fast links inside a node are a switch of level ``SCALE_UP`` beside the node's ports. A path through the network
never passes such a switch unless a port of another plane is wanted (``cofire.network.routing.device_routes``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SCALE_UP = -1


@dataclass(frozen=True, eq=False)
class Network:
    """A built network.

    Attributes:
        name: For people.
        num_endpoints: NIC ports; vertices ``0 .. num_endpoints - 1``.
        num_switches: The vertices after them.
        tail: ``[num_links]``, vertex that a directed link leaves.
        head: ``[num_links]``, vertex that it enters.
        capacity_bytes_per_s: ``[num_links]``.
        latency_s: ``[num_links]``, of the cable and of the switch that it enters.
        plane: ``[num_endpoints + num_switches]``, plane (or rail, zone, dragonfly group) of each
            vertex.
        node: ``[num_endpoints]``, the host that a port belongs to.
        level: ``[num_endpoints + num_switches]``: 0 endpoints, 1 leaves or routers, 2 spines, 3 cores, ``SCALE_UP`` the
            switch of a node's fast links (these come last).
        cables: ``[num_links]``, parallel cables that a link bundles (capacity is their sum); empty: one each. Two
            vertices may also have several links between them.
    """

    name: str
    num_endpoints: int
    num_switches: int
    tail: Ints
    head: Ints
    capacity_bytes_per_s: Floats
    latency_s: Floats
    plane: Ints
    node: Ints
    level: Ints
    cables: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def num_vertices(self) -> int:
        """Endpoints and switches."""
        return self.num_endpoints + self.num_switches

    @property
    def num_links(self) -> int:
        """Directed links; two per cable."""
        return len(self.tail)

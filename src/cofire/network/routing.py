"""Which links a flow uses: ECMP, static and adaptive routing, and plane-affine forwarding inside a node."""

from __future__ import annotations

from dataclasses import dataclass

from cofire.network.topology import Floats, Ints


@dataclass(frozen=True, eq=False)
class Routes:
    """The links of each flow, as a sparse matrix of flows by links in compressed rows.

    A flow that is split over several paths has a fraction below one on the links that not all of it takes.

    Attributes:
        start: ``[num_flows + 1]``; flow f has entries ``start[f] .. start[f + 1] - 1``.
        link: ``[num_entries]``, the directed link of each entry.
        fraction: ``[num_entries]``, the part of the flow that takes it.
        latency_s: ``[num_flows]``, of the flow's longest path.
    """

    start: Ints
    link: Ints
    fraction: Floats
    latency_s: Floats

    @property
    def num_flows(self) -> int:
        """Rows."""
        return len(self.latency_s)

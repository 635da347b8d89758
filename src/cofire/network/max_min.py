"""Max-min fair rates: progressive filling over flows and links, all at once.

All rates rise together until a link is full; its flows keep that rate and the rest go on (Bertsekas and Gallager, Data
Networks, 6.5.2). Here every link whose flows are all slowest at that very link is filled in the same round, so that
the number of rounds is the length of the longest chain of bottlenecks and not their number.

Traffic classes (virtual lanes) have shares: each lane is first given its part of every link that it has flows on, then
what is left is offered again by shares, and at last to all flows alike. So a share is a guarantee and no link idles
that a flow could use. Left out: queues, losses and pauses; a rate is what fair sharing settles at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cofire.network.topology import Floats, Ints

# Rates that differ by less are one bottleneck level: far above rounding, far below anything that a network shows.
_TIE = 1e-12
# Offers of left-over capacity by shares; each leaves at most the part that lanes without need for it would take.
_OFFERS = 4
_EMPTY = 1e-9


@dataclass(frozen=True, eq=False)
class Uses:
    """Which flow uses how much of which link: a sparse matrix, entries in any order.

    Attributes:
        flow: ``[num_entries]``.
        link: ``[num_entries]``.
        load: ``[num_entries]``, bytes on the link per byte of the flow; above zero.
    """

    flow: Ints
    link: Ints
    load: Floats

    def of(self, keep: NDArray[np.bool_]) -> Uses:
        """Return the entries where ``keep [num_entries]`` is true."""
        return Uses(self.flow[keep], self.link[keep], self.load[keep])

    def on_links(self, rate: Floats, num_links: int) -> Floats:
        """Return the load of each link at these rates, in bytes per second."""
        return np.bincount(self.link, self.load * rate[self.flow], num_links).astype(np.float64)


def max_min_rates(uses: Uses, capacity_bytes_per_s: Floats, num_flows: int) -> Floats:
    """Return the max-min fair rate of each flow.

    Args:
        uses: Entries of the flows that send; a flow without entries uses no link.
        capacity_bytes_per_s: ``[num_links]``; zero: the link is dead, and so are the flows on it.
        num_flows: Rows of the result.

    Returns:
        ``[num_flows]`` in bytes per second; infinite for a flow without entries.
    """
    num_links = len(capacity_bytes_per_s)
    rate = np.full(num_flows, np.inf)
    left = capacity_bytes_per_s.astype(np.float64)
    while len(uses.flow):
        wanted = np.bincount(uses.link, uses.load, num_links)
        with np.errstate(divide="ignore", invalid="ignore"):
            fair = np.where(wanted > 0, np.maximum(left, 0.0) / wanted, np.inf)
        here = fair[uses.link]
        slowest = np.full(num_flows, np.inf)
        np.minimum.at(slowest, uses.flow, here)
        elsewhere = slowest[uses.flow] < here * (1 - _TIE)
        is_level = np.bincount(uses.link[elsewhere], minlength=num_links) == 0
        frozen = np.zeros(num_flows, bool)
        frozen[uses.flow[is_level[uses.link]]] = True
        rate[frozen] = slowest[frozen]
        done = frozen[uses.flow]
        left = left - uses.of(done).on_links(rate, num_links)
        uses = uses.of(~done)
    return rate


def shared_rates(
    uses: Uses, capacity_bytes_per_s: Floats, num_flows: int, lane: Ints, lane_shares: tuple[float, ...]
) -> Floats:
    """Return rates where traffic classes share each link in proportion and flows of a class share fairly.

    Args:
        uses: Entries of the flows that send.
        capacity_bytes_per_s: ``[num_links]``.
        num_flows: Rows of the result.
        lane: ``[num_flows]``, the class of each flow.
        lane_shares: Of each class; only their proportions count.

    Returns:
        ``[num_flows]`` in bytes per second; infinite for a flow without entries.
    """
    if len(lane_shares) < 2 or not len(uses.flow) or (lane[uses.flow] == lane[uses.flow[0]]).all():
        return max_min_rates(uses, capacity_bytes_per_s, num_flows)
    num_links, num_lanes = len(capacity_bytes_per_s), len(lane_shares)
    shares = np.asarray(lane_shares, np.float64)
    rate = np.full(num_flows, np.inf)
    rate[uses.flow] = 0.0
    left, open_uses = capacity_bytes_per_s.astype(np.float64), uses
    for offer in range(_OFFERS + 1):
        full = left <= _EMPTY * capacity_bytes_per_s
        blocked = np.zeros(num_flows, bool)
        blocked[open_uses.flow[full[open_uses.link]]] = True
        open_uses = open_uses.of(~blocked[open_uses.flow])
        if not len(open_uses.flow):
            break
        if offer < _OFFERS:
            # One link per lane, with that lane's part of what is left.
            slot = open_uses.link * num_lanes + lane[open_uses.flow]
            there = (np.bincount(slot, minlength=num_links * num_lanes) > 0).reshape(num_links, num_lanes)
            total = there @ shares
            part = there * shares / np.where(total > 0, total, 1.0)[:, None]
            parts = Uses(open_uses.flow, slot, open_uses.load)
            more = max_min_rates(parts, (part * left[:, None]).ravel(), num_flows)
        else:
            more = max_min_rates(open_uses, left, num_flows)
        more[~np.isfinite(more)] = 0.0
        rate = rate + more
        left = np.maximum(left - open_uses.on_links(more, num_links), 0.0)
    return rate

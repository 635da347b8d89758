"""Places boxes in layers, so that edges cross little, run straight where they can, and pass through no box.

The steps of Sugiyama, Tagawa and Toda (1981): an edge over several layers gets a *bend* in each layer that it passes;
layers are ordered by the mean place of their neighbours, upwards and downwards in turn, and neighbours are swapped
while that removes a crossing, from several starts; then every layer is placed by weighted least squares against the
layers beside it with its order kept, which pooling of adjacent violators solves exactly (Ayer and others, 1955). Equal
input gives equal places in every process.

Left out: which layer a box is in, which the caller says, and edges within a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

_STARTS = 8
_SWEEPS = 12
_TIED_SWAPS = 4
_PLACINGS = 200
_BEND_WIDTH = 10.0
_GAP = 22.0
# A bend is pulled harder than a box: a long edge that is not straight is what the eye follows worst.
_BEND_PULL = 20.0


@dataclass(frozen=True)
class Placement:
    """Where boxes and edges lie. All values are horizontal, in pixels from the left.

    Attributes:
        centres: Middle of each box.
        routes: Of each edge its place in every layer from its lower box to its upper one: first and last are the
            ports, at the top of the lower box and at the bottom of the upper one; those between are bends.
        width: All boxes and bends lie within [0, width].
    """

    centres: tuple[float, ...]
    routes: tuple[tuple[float, ...], ...]
    width: float


def place(widths: Sequence[float], layers: Sequence[int], edges: Sequence[tuple[int, int]]) -> Placement:
    """Place boxes side by side in their layers.

    Args:
        widths: Of each box, in pixels.
        layers: Of each box, from 0 at the bottom; no layer is empty.
        edges: Pairs of a lower and an upper box, by number; a pair may come twice.
    """
    return _Drawing(widths, layers, edges).placement()


class _Drawing:
    """Boxes and bends, both called nodes: boxes come first, under their own numbers."""

    def __init__(self, widths: Sequence[float], layers: Sequence[int], edges: Sequence[tuple[int, int]]) -> None:
        self.boxes = len(widths)
        self.widths = list(widths)
        self.rows: list[list[int]] = [[] for _ in range(max(layers, default=-1) + 1)]
        for box, layer in enumerate(layers):
            self.rows[layer].append(box)
        # Of each edge the nodes that it passes; of each node the pieces of edges that end in it from above and below.
        self.paths: list[list[int]] = []
        for lower, upper in edges:
            path = [lower]
            for layer in range(layers[lower] + 1, layers[upper]):
                path.append(len(self.widths))
                self.rows[layer].append(path[-1])
                self.widths.append(_BEND_WIDTH)
            self.paths.append([*path, upper])
        self.pieces = [piece for path in self.paths for piece in pairwise(path)]
        self.above: list[list[int]] = [[] for _ in self.widths]
        self.below: list[list[int]] = [[] for _ in self.widths]
        for low, high in self.pieces:
            self.above[low].append(high)
            self.below[high].append(low)

    def placement(self) -> Placement:
        """Order the layers and place them."""
        self._order()
        leaving, entering = self._ports()
        centres = self._place(leaving, entering)
        left = min((x - width / 2 for x, width in zip(centres, self.widths, strict=True)), default=0.0)
        right = max((x + width / 2 for x, width in zip(centres, self.widths, strict=True)), default=0.0)
        routes, piece = [], 0
        for path in self.paths:
            last = piece + len(path) - 2
            ends = centres[path[0]] + leaving[piece], centres[path[-1]] + entering[last]
            routes.append(tuple(x - left for x in (ends[0], *(centres[node] for node in path[1:-1]), ends[1])))
            piece = last + 1
        return Placement(tuple(x - left for x in centres[: self.boxes]), tuple(routes), right - left)

    # -- order -----------------------------------------------------------------------------------------------------

    def _order(self) -> None:
        """Keep the order with the fewest crossings of several starts: as given, and shuffled."""
        given = [list(row) for row in self.rows]
        best, fewest = given, self._crossings()
        for start in range(_STARTS):
            self.rows = [list(row) for row in given]
            if start:
                draw = Random(start)
                for row in self.rows:
                    draw.shuffle(row)
            for sweep in range(_SWEEPS):
                self._sweep(is_rising=sweep % 2 == 0, is_turned=sweep % 4 >= 2)
                crossings = self._crossings()
                if crossings < fewest:
                    best, fewest = [list(row) for row in self.rows], crossings
        # The mirror image crosses as little: take the one whose lowest layer is nearer to the order given.
        lowest = best[0] if best else []
        turned = sum(1 if a > b else -1 for k, a in enumerate(lowest) for b in lowest[k + 1 :])
        self.rows = [row[::-1] for row in best] if turned > 0 else best

    def _sweep(self, is_rising: bool, is_turned: bool) -> None:
        """Sort every layer by the one before it, then swap neighbours.

        Args:
            is_rising: From the bottom upwards.
            is_turned: Ties turn their order, for one that keeps every tie stays where no single swap helps.
        """
        near = self.below if is_rising else self.above
        for layer in range(1, len(self.rows)) if is_rising else range(len(self.rows) - 2, -1, -1):
            if is_turned:
                self.rows[layer].reverse()
            self._sort(layer, near, layer - 1 if is_rising else layer + 1)
        for _ in range(_TIED_SWAPS):
            # A swap that removes nothing may open the way to one that does.
            self._swap(gain=0)
            while self._swap(gain=1):
                pass

    def _sort(self, layer: int, near: list[list[int]], beside: int) -> None:
        """Sort a layer by the mean place of each node's neighbours in the layer beside it."""
        place = {node: k for k, node in enumerate(self.rows[beside])}
        means = {
            node: sum(place[other] for other in near[node]) / len(near[node]) if near[node] else float(k)
            for k, node in enumerate(self.rows[layer])
        }
        self.rows[layer].sort(key=means.__getitem__)

    def _swap(self, gain: int) -> int:
        """Swap neighbours where that removes so many crossings at least; return how many were removed."""
        places = {node: k for row in self.rows for k, node in enumerate(row)}
        removed = 0
        for row in self.rows:
            for k in range(len(row) - 1):
                left, right = row[k], row[k + 1]
                now = sum(_inversions(near[left], near[right], places) for near in (self.above, self.below))
                then = sum(_inversions(near[right], near[left], places) for near in (self.above, self.below))
                if now - then >= gain:
                    row[k], row[k + 1] = right, left
                    places[left], places[right] = k + 1, k
                    removed += now - then
        return removed

    def _crossings(self) -> int:
        places = {node: k for row in self.rows for k, node in enumerate(row)}
        return sum(
            _inversions(self.above[left], self.above[right], places)
            for row in self.rows
            for k, left in enumerate(row)
            for right in row[k + 1 :]
        )

    # -- places ----------------------------------------------------------------------------------------------------

    def _ports(self) -> tuple[list[float], list[float]]:
        """Return where each piece leaves its lower node and enters its upper one, from the node's middle."""
        places = {node: k for row in self.rows for k, node in enumerate(row)}
        leaving, entering = [0.0] * len(self.pieces), [0.0] * len(self.pieces)
        for ports, near, far in ((leaving, 0, 1), (entering, 1, 0)):
            ends: dict[int, list[int]] = {}
            for piece in sorted(range(len(self.pieces)), key=lambda p: (places[self.pieces[p][far]], p)):
                ends.setdefault(self.pieces[piece][near], []).append(piece)
            for node, found in ends.items():
                for k, piece in enumerate(found):
                    ports[piece] = self.widths[node] * ((k + 1) / (len(found) + 1) - 0.5)
        return leaving, entering

    def _place(self, leaving: list[float], entering: list[float]) -> list[float]:
        """Return the middle of every node."""
        pulls: list[list[tuple[int, float, float]]] = [[] for _ in self.widths]
        for piece, (low, high) in enumerate(self.pieces):
            shift = leaving[piece] - entering[piece]
            strength = _BEND_PULL ** ((low >= self.boxes) + (high >= self.boxes))
            pulls[low].append((high, -shift, strength))
            pulls[high].append((low, shift, strength))
        centres = [0.0] * len(self.widths)
        for row in self.rows:
            self._settle(row, centres, [0.0] * len(row), [1.0] * len(row))
        for placing in range(_PLACINGS):
            for row in self.rows if placing % 2 == 0 else self.rows[::-1]:
                weights = [sum(strength for *_, strength in pulls[node]) for node in row]
                wanted = [
                    sum((centres[other] + shift) * strength for other, shift, strength in pulls[node]) / weight
                    if weight
                    else centres[node]
                    for node, weight in zip(row, weights, strict=True)
                ]
                self._settle(row, centres, wanted, [weight or 1.0 for weight in weights])
        return centres

    def _settle(self, row: list[int], centres: list[float], wanted: list[float], weights: list[float]) -> None:
        """Place a layer as near to what is wanted as its order and the widths of its nodes allow."""
        offsets = [0.0]
        for left, right in pairwise(row):
            offsets.append(offsets[-1] + (self.widths[left] + self.widths[right]) / 2 + _GAP)
        # Pools of nodes that touch: weight, weighted mean, and how many.
        pools: list[tuple[float, float, int]] = []
        for want, weight, offset in zip(wanted, weights, offsets, strict=False):
            pools.append((weight, want - offset, 1))
            while len(pools) > 1 and pools[-2][1] > pools[-1][1]:
                (w1, x1, n1), (w2, x2, n2) = pools[-2:]
                pools[-2:] = [(w1 + w2, (w1 * x1 + w2 * x2) / (w1 + w2), n1 + n2)]
        fitted = [mean for _, mean, count in pools for _ in range(count)]
        for node, x, offset in zip(row, fitted, offsets, strict=False):
            centres[node] = x + offset


def _inversions(left: list[int], right: list[int], places: dict[int, int]) -> int:
    """Count crossings of the edges of two nodes, the first of which stands further left."""
    return sum(places[a] > places[b] for a in left for b in right)

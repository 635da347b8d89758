"""Designs by several measures at once: which no other beats, which is a fair compromise, and which show the range.

A design beats another if it is no worse in every measure and better in one; the front is what nothing beats (Pareto).
Values here are costs: whoever maximises a measure passes it with its sign turned. The knee is the member of the front
closest to the ideal, the best of each measure at once, with each measure scaled by its range over the front and in its
logarithm where it is positive. Left out: approximations; every answer is exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cofire.errors import PlanError

Costs = NDArray[np.float64]  # of shape [designs, measures]

_CELLS = 4_000_000  # of a comparison held in memory at once


def pareto_front(costs: Costs) -> list[int]:
    """Return the designs that no other beats, in their order; of equal designs all or none.

    In lexicographic order whatever beats a design comes before it, and something on the front beats it too, so each
    design is compared with the front so far: time grows with designs x front x measures.

    Args:
        costs: Of shape [designs, measures], finite; less is better.

    Raises:
        PlanError: A cost is not finite.
    """
    costs = _checked(costs)
    if not len(costs):
        return []
    order = np.lexsort(costs.T[::-1])
    kept = np.empty_like(costs)
    members: list[int] = []
    for index in order:
        row, front = costs[index], kept[: len(members)]
        no_worse = (front <= row).all(axis=1)
        if not (no_worse & (front < row).any(axis=1)).any():
            kept[len(members)] = row
            members.append(int(index))
    return sorted(members)


def num_beaten(costs: Costs, members: list[int]) -> list[int]:
    """Return for each of the members how many designs it beats.

    Args:
        costs: Of shape [designs, measures]; less is better.
        members: Indices into the designs.
    """
    costs = _checked(costs)
    rows = max(1, _CELLS // max(1, costs.size))
    counts: list[int] = []
    for start in range(0, len(members), rows):
        some = costs[members[start : start + rows], None, :]
        beaten = (some <= costs).all(axis=2) & (some < costs).any(axis=2)
        counts += beaten.sum(axis=1).tolist()
    return counts


def scaled(costs: Costs) -> Costs:
    """Return each measure between 0 (best) and 1 (worst) of these designs, a positive or negative one by its logarithm.

    A measure that is equal everywhere is 0 everywhere.
    """
    costs = _checked(costs).copy()
    for measure in range(costs.shape[1]):
        column = costs[:, measure]
        if len(column) and (column > 0).all():
            costs[:, measure] = np.log(column)
        elif len(column) and (column < 0).all():
            costs[:, measure] = -np.log(-column)
    low = costs.min(axis=0, initial=np.inf)
    span = costs.max(axis=0, initial=-np.inf) - low
    # Rounding of a logarithm is no range.
    return np.where(span > 1e-12, (costs - low) / np.where(span > 1e-12, span, 1.0), 0.0)


def knee(costs: Costs, members: list[int]) -> int:
    """Return the member of a front that is closest to the best of every measure; the first of equally close ones.

    Args:
        costs: Of shape [designs, measures]; less is better.
        members: The front; at least one.
    """
    distance = np.square(scaled(np.asarray(costs, np.float64)[members])).sum(axis=1)
    return members[int(np.argmin(distance))]


def spread(costs: Costs, members: list[int], limit: int) -> list[int]:
    """Return at most ``limit`` members of a front that show its range, in their order.

    First the knee, then the best of each measure, then always the member farthest from those taken.
    """
    if len(members) <= limit:
        return list(members)
    places = scaled(np.asarray(costs, np.float64)[members])
    taken = [members.index(knee(costs, members))]
    for measure in range(places.shape[1]):
        best = int(np.argmin(places[:, measure]))
        if best not in taken:
            taken.append(best)
    taken = taken[:limit]
    distance = np.square(places[:, None, :] - places[None, taken, :]).sum(axis=2).min(axis=1)
    while len(taken) < limit:
        distance[taken] = -1.0
        taken.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.square(places - places[taken[-1]]).sum(axis=1))
    return sorted(members[index] for index in taken)


def _checked(costs: Costs) -> Costs:
    costs = np.asarray(costs, np.float64)
    wrong = np.argwhere(~np.isfinite(costs))
    if len(wrong):
        design, measure = wrong[0]
        raise PlanError(
            f"design {design} has {costs[design, measure]} as measure {measure}; leave out what has no finite value"
        )
    return costs

"""Where the replicas of experts go, so that no device has more to do than it must.

DeepSeek-V3 technical report (arXiv 2412.19437), section 3.4: heavily loaded experts get redundant replicas, which are
arranged inside a node, so that traffic between nodes does not grow. The greedy plan is that of the public
expert-parallelism load balancer: pack groups onto nodes, replicate the expert with the largest load per replica, pack
replicas onto devices, the heaviest first. Here it is the starting point: swaps of groups and of replicas improve it,
and per layer the better plan stays. :func:`update_placement` plans anew from a placement in use, with few moves.

All steps work on all layers at once. Left out: which expert's tokens come from where, and routing among replicas,
which is assumed to be even.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cofire.errors import PlanError
from cofire.spec.spec_type import nearest_divisor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Policy = Literal["auto", "hierarchical", "global"]

# A swap has to gain this part of the load of a device, or rounding could make swaps go in circles.
_LEAST_GAIN = 1e-9
# Candidate thresholds of replication reach this far below, so that rounding never hides a tie.
_TIE_MARGIN = 1e-6
# An incremental step lowers the sum of loads to this power: nearly the maximum, but it also sees ties.
_POWER = 16
_LARGEST_BITS = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class Placement:
    """Physical replicas of logical experts on devices.

    Attributes:
        num_devices: Devices; device d holds slots ``d * R / D .. (d + 1) * R / D - 1``.
        num_nodes: Nodes that experts are bound to: 1 where any expert may be anywhere.
        num_groups: Groups of experts that stay on one node.
        distinct: Whether no device holds two replicas of an expert.
        physical_to_logical: ``[L, R]``, the expert in each slot.
        logical_to_physical: ``[L, E, X]``, slots of each expert in ascending order, then -1.
        replica_count: ``[L, E]``.
        device_load: ``[L, D]``, in the unit of the load that was planned for.
        moves: Slots that load an expert their device did not hold; 0 for a first plan.
    """

    num_devices: int
    num_nodes: int
    num_groups: int
    distinct: bool
    physical_to_logical: Ints
    logical_to_physical: Ints
    replica_count: Ints
    device_load: Floats
    moves: int = 0

    @property
    def num_replicas(self) -> int:
        """R, replicas per layer."""
        return self.physical_to_logical.shape[1]

    @property
    def imbalance(self) -> Floats:
        """``[L]``: largest over mean load of a device; 1 is even, and a layer without load counts as even."""
        return _imbalance(self.device_load)


def place_experts(
    load: ArrayLike,
    num_replicas: int,
    num_devices: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    policy: Policy = "auto",
    distinct: bool = False,
    refine: bool = True,
) -> Placement:
    """Place replicas of experts on devices.

    Args:
        load: ``[L, E]`` (or ``[E]``), tokens or any other measure of each expert's load; finite, not negative.
        num_replicas: R, physical experts of a layer; a multiple of ``num_devices``, at least E.
        num_devices: D; a multiple of ``num_nodes``.
        num_nodes: Nodes of equal size.
        num_groups: Groups of experts, as node-limited routing has them; divides E.
        policy: ``hierarchical`` keeps each group on one node, which needs groups to be a multiple of nodes;
            ``global`` ignores nodes; ``auto`` is hierarchical where that is possible.
        distinct: Never put two replicas of an expert on one device.
        refine: Improve the greedy plan by swaps; without, the plan is that of the public script.

    Returns:
        The placement. Its imbalance is never above the greedy plan's.

    Raises:
        PlanError: Counts do not divide, there are too few or too many replicas, or a load is not a number.
    """
    weights = _check_load(load)
    nodes, groups = _check_counts(weights.shape[1], num_replicas, num_devices, num_nodes, num_groups, policy)
    if distinct and num_replicas > weights.shape[1] * (num_devices // nodes) // nodes * nodes:
        raise PlanError(
            f"num_replicas = {num_replicas} cannot be distinct: {num_devices} devices in {nodes} node(s) hold at most "
            f"{weights.shape[1] * (num_devices // nodes)} replicas of {weights.shape[1]} experts"
        )
    shape = (num_replicas, num_devices, nodes)
    by_node = _pack_groups(weights, groups, nodes)
    chosen = _plan(weights, by_node, shape, distinct, refine)
    if refine and by_node is not None and nodes > 1:
        packed = by_node.reshape(len(weights), nodes, -1)
        again = _swap_groups(weights, packed, groups)
        changed = np.flatnonzero((again != packed).any((1, 2)))
        if len(changed):
            other = _plan(weights[changed], again[changed], shape, distinct, refine)
            better = _peak(weights[changed], other, num_devices) < _peak(weights[changed], chosen[changed], num_devices)
            chosen[changed[better]] = other[better]
    return _placement(weights, chosen, num_devices, (nodes, groups), distinct)


def evaluate_placement(placement: Placement, load: ArrayLike) -> Placement:
    """Return the same placement with the loads that its devices have under ``load [L, E]``.

    Raises:
        PlanError: The load has another shape than the placement.
    """
    weights = _check_load(load)
    if weights.shape != placement.replica_count.shape:
        raise PlanError(
            f"load has shape {list(weights.shape)}, but the placement has {list(placement.replica_count.shape)} "
            "(layers, experts); take the load of the same model"
        )
    loads = _device_loads(weights, placement.physical_to_logical, placement.num_devices)
    return replace(placement, device_load=loads, moves=0)


def update_placement(
    previous: Placement, load: ArrayLike, min_gain: float = 0.05, max_moves: int | None = None
) -> Placement:
    """Plan anew from a placement in use, with few moves.

    A layer keeps its placement unless a plan from nothing lowers its largest device load by more than ``min_gain``.
    Then replicas are swapped or replaced one at a time, the step that gains most per move first, until the layer is
    within ``min_gain`` of that plan. Where steps do not get there, the layer takes the plan from nothing, with its
    devices renumbered so that most replicas stay.

    Args:
        previous: The placement in use.
        load: ``[L, E]``, the load to plan for.
        min_gain: Hysteresis, a fraction of the largest device load.
        max_moves: Most moves per layer; none: no limit. With a limit a layer goes as far as steps get it.

    Returns:
        The new placement; ``moves`` counts slots over all layers.

    Raises:
        PlanError: The load does not fit the placement, or a limit is negative.
    """
    if min_gain < 0 or (max_moves is not None and max_moves < 0):
        raise PlanError(f"min_gain = {min_gain} and max_moves = {max_moves} must not be negative; take 0")
    stale = evaluate_placement(previous, load)
    weights = _check_load(load)
    devices, nodes = previous.num_devices, previous.num_nodes
    fresh = place_experts(
        weights, previous.num_replicas, devices, nodes, previous.num_groups, distinct=previous.distinct
    )
    old_peak, new_peak = stale.device_load.max(1), fresh.device_load.max(1)
    chosen = previous.physical_to_logical.copy()
    for layer in np.flatnonzero(old_peak > new_peak + min_gain * old_peak):
        goal = new_peak[layer] * (1 + min_gain)
        stepped = _step_by_step(weights[layer], chosen[layer], previous, float(goal), max_moves)
        peak = _peak(weights[layer : layer + 1], stepped[None], devices)[0]
        if max_moves is None and peak > goal:
            chosen[layer] = _align(fresh.physical_to_logical[layer], chosen[layer], devices, nodes)
        elif peak < old_peak[layer]:
            chosen[layer] = stepped
    result = _placement(weights, chosen, devices, (nodes, previous.num_groups), previous.distinct)
    return replace(result, moves=count_moves(previous.physical_to_logical, chosen, devices))


def count_moves(before: Ints, after: Ints, num_devices: int) -> int:
    """Count replicas of ``after [L, R]`` on devices that did not hold as many of that expert in ``before [L, R]``."""
    num_experts = int(max(before.max(), after.max())) + 1
    held = _holdings(before, num_devices, num_experts)
    return int(np.maximum(_holdings(after, num_devices, num_experts) - held, 0).sum())


# -- checks --------------------------------------------------------------------------------------------------------


def _check_load(load: ArrayLike) -> Floats:
    weights = np.atleast_2d(np.asarray(load, dtype=np.float64))
    if weights.ndim != 2 or not weights.size:
        raise PlanError(f"load has shape {list(weights.shape)}; it must be layers by experts, neither of them 0")
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        layer, expert = (int(index) for index in np.argwhere(wrong)[0])
        raise PlanError(
            f"load[{layer}, {expert}] = {weights[layer, expert]:g} must be finite and not negative; use 0 for no load"
        )
    return weights


def _check_counts(
    num_experts: int, num_replicas: int, num_devices: int, num_nodes: int, num_groups: int, policy: str
) -> tuple[int, int]:
    """Return the nodes and groups that a policy plans with."""
    for name, count in (("num_devices", num_devices), ("num_nodes", num_nodes), ("num_groups", num_groups)):
        if count < 1:
            raise PlanError(f"{name} = {count} must be at least 1")
    if policy not in ("auto", "hierarchical", "global"):
        raise PlanError(f"policy = {policy!r} is not one of auto, hierarchical, global")
    if num_replicas % num_devices or num_replicas < num_experts:
        fit = max(round(num_replicas / num_devices), -(-num_experts // num_devices)) * num_devices
        raise PlanError(
            f"num_replicas = {num_replicas} must be a multiple of num_devices = {num_devices} and at least the "
            f"{num_experts} experts; nearest: {fit}"
        )
    if policy == "hierarchical" and num_groups % num_nodes:
        raise PlanError(
            f"num_groups = {num_groups} must be a multiple of num_nodes = {num_nodes} for the hierarchical policy; "
            f"nearest number of nodes: {nearest_divisor(num_groups, num_nodes)}, or take policy = global"
        )
    if policy == "global" or num_groups % num_nodes:
        return 1, 1
    if num_experts % num_groups:
        raise PlanError(
            f"num_groups = {num_groups} must divide the {num_experts} experts; "
            f"nearest: {nearest_divisor(num_experts, num_groups)}"
        )
    if num_devices % num_nodes:
        raise PlanError(
            f"num_nodes = {num_nodes} must divide num_devices = {num_devices}; "
            f"nearest: {nearest_divisor(num_devices, num_nodes)}"
        )
    return num_nodes, num_groups


# -- the greedy plan -----------------------------------------------------------------------------------------------


def _plan(weights: Floats, by_node: Ints | None, shape: tuple[int, int, int], distinct: bool, refine: bool) -> Ints:
    """Replicate and pack inside each node; ``by_node`` lists experts node after node. Returns ``[L, R]``."""
    num_replicas, num_devices, nodes = shape
    local = weights
    if by_node is not None:
        local = np.take_along_axis(weights, by_node.reshape(len(weights), -1), 1).reshape(len(weights) * nodes, -1)
    packs = num_devices // nodes
    replica, count = _replicate(local, num_replicas // nodes - local.shape[1], packs if distinct else None)
    placed = replica
    if packs < replica.shape[1]:
        # The public script computes in single precision, and its ties are part of its plan.
        single = np.take_along_axis(local.astype(np.float32) / count.astype(np.float32), replica, 1)
        slots = _pack(single, packs, replica if distinct else None)
        placed = np.take_along_axis(replica, slots, 1)
    if refine and 1 < packs < placed.shape[1]:
        placed = _swap_replicas(local / count, placed, packs, distinct)
    if by_node is not None:
        placed = np.take_along_axis(by_node.reshape(local.shape), placed, 1)
    return placed.reshape(len(weights), -1)


def _pack_groups(weights: Floats, num_groups: int, num_nodes: int) -> Ints | None:
    """Experts of each layer node after node, whole groups greedily on the emptiest node.

    Returns:
        ``[L, E]``; none where groups play no part, and experts stay in their order.
    """
    size = weights.shape[1] // num_groups
    if num_groups == 1:
        return None
    totals = weights.astype(np.float32).reshape(len(weights), num_groups, size).sum(2)
    groups = _pack(totals, num_nodes, None)
    return (groups[:, :, None] * size + np.arange(size)).reshape(weights.shape)


def _replicate(weights: Floats, num_extra: int, most: int | None) -> tuple[Ints, Ints]:
    """Give ``num_extra`` replicas, one after the other, to the expert with the largest load per replica.

    The k-th extra replica of an expert is given when its load over k is the largest number left, so the extras are
    the ``num_extra`` largest of all those quotients. A threshold finds them without a loop over replicas.

    Returns:
        ``[rows, n + num_extra]``, the expert of each replica in the order given; and replicas per expert.
    """
    rows, num_experts = weights.shape
    first = np.broadcast_to(np.arange(num_experts), weights.shape)
    if num_extra == 0:
        return first, np.ones(weights.shape, np.int64)
    single = weights.astype(np.float32)
    totals = single.sum(1, dtype=np.float64)
    if most is not None:
        largest = single.max(1, keepdims=True)
        single = np.maximum(single, np.where(largest > 0, largest * np.float32(1e-6), np.float32(1)))
        totals = single.sum(1, dtype=np.float64)
    elif not totals.all():
        single[totals == 0, 0] = 1
        totals[totals == 0] = 1
    limit = num_extra if most is None else min(num_extra, most - 1)
    # The floor of a quotient is on average half below it; a higher threshold leaves fewer candidates to sort.
    threshold = (totals / (num_extra + 0.4 * num_experts)).astype(np.float32)[:, None]
    while True:
        quotient = single / threshold
        short = np.minimum(quotient.astype(np.int32), limit).sum(1) < num_extra
        if not short.any():
            break
        threshold[short] *= np.float32(0.9)
    candidates = np.minimum((quotient * np.float32(1 + _TIE_MARGIN)).astype(np.int32), limit)
    has = np.flatnonzero(candidates)
    each = candidates.reshape(-1)[has]
    source = np.repeat(has, each)
    steps = np.arange(len(source))
    nth = steps - np.repeat(np.cumsum(each) - each, each) + 1
    row = source // num_experts
    per_row = np.bincount(row, minlength=rows)
    width = int(per_row.max())
    place = steps + (np.arange(rows) * width - np.cumsum(per_row) + per_row)[row]
    # One integer per candidate sorts quotients downward (the bits of positive floats have their order), then experts
    # upward, as the first of several largest is taken.
    bits = (single.reshape(-1)[source] / nth.astype(np.float32)).view(np.int32)
    keys = np.full((rows, width), np.iinfo(np.int64).max)
    keys.reshape(-1)[place] = (_LARGEST_BITS - bits.astype(np.int64) << 32) + source - row * num_experts
    keys.sort(axis=1)
    extra = keys[:, :num_extra] & (2**32 - 1)
    return np.concatenate([first, extra], 1), 1 + _counts(extra, num_experts)


def _pack(weights: NDArray[np.float32], packs: int, expert: Ints | None) -> Ints:
    """Put items, the heaviest first, onto the emptiest pack that has room; every pack gets as many.

    Args:
        weights: ``[rows, n]``.
        packs: Divides n.
        expert: ``[rows, n]``, of each item; no pack gets two items of one expert. None: it may.

    Returns:
        ``[rows, n]``, the item in each slot, pack after pack.
    """
    rows, items = weights.shape
    size = items // packs
    if size == 1:
        return np.broadcast_to(np.arange(items), weights.shape)
    order = np.argsort(-weights, axis=1, kind="stable")
    heaviest = np.take_along_axis(weights, order, 1).T.copy()
    totals, filled = np.zeros((rows, packs), np.float32), np.zeros(rows * packs, np.int64)
    flat, start, stuck = totals.reshape(-1), np.arange(rows) * packs, np.zeros(rows, bool)
    slots = np.empty((rows, packs, size), np.int64)
    held = None if expert is None else np.zeros((rows, int(expert.max()) + 1, packs), bool)
    for step in range(items):
        item = order[:, step]
        if held is None or expert is None:
            pick = totals.argmin(1)
        else:
            which = expert[np.arange(rows), item]
            allowed = np.where(held[np.arange(rows), which], np.inf, totals)
            pick = allowed.argmin(1)
            stuck |= np.isinf(allowed[np.arange(rows), pick])
            pick = np.where(stuck, totals.argmin(1), pick)
            held[np.arange(rows), which, pick] = True
        place = start + pick
        slots[np.arange(rows), pick, filled[place]] = item
        filled[place] += 1
        flat[place] = np.where(filled[place] == size, np.inf, flat[place] + heaviest[step])
    if expert is not None and stuck.any():
        slots[stuck] = _deal(order[stuck], expert[stuck], packs)
    return slots.reshape(rows, items)


def _deal(order: Ints, expert: Ints, packs: int) -> Ints:
    """Deal items out like cards, replicas of an expert in a row: with at most ``packs`` of them none meets another."""
    rank = np.argsort(order, axis=1)
    best = np.full((len(order), int(expert.max()) + 1), order.shape[1])
    np.minimum.at(best, (np.arange(len(order))[:, None], expert), rank)
    together = np.argsort(np.take_along_axis(best, expert, 1) * order.shape[1] + rank, axis=1)
    return together.reshape(len(order), -1, packs).transpose(0, 2, 1)


# -- refinement ----------------------------------------------------------------------------------------------------


def _swap_replicas(per_replica: Floats, placed: Ints, packs: int, distinct: bool) -> Ints:
    """Swap a replica of the fullest device with one of another while that makes the fuller of both less full.

    Args:
        per_replica: ``[rows, n]``, load of one replica of each expert.
        placed: ``[rows, slots]``, expert in each slot, device after device.
        packs: Devices of a row.
        distinct: Whether a swap may not make two replicas of an expert meet.

    Returns:
        ``[rows, slots]``; the largest device load of no row has grown.
    """
    placed = placed.copy()
    size = placed.shape[1] // packs
    active = np.arange(len(placed))
    for _ in range(4 * packs):
        experts = placed[active].reshape(-1, packs, size)
        loads = np.take_along_axis(per_replica[active], placed[active], 1).reshape(experts.shape)
        totals = loads.sum(2)
        rows, full = np.arange(len(active)), totals.argmax(1)
        peak, mine = totals[rows, full], loads[rows, full]
        # The fuller of two devices after a swap: |half of their gap - what the swap moves| above their mean.
        gap = (peak[:, None] - totals) / 2
        miss = np.abs(mine[:, :, None, None] - loads[:, None] - gap[:, None, :, None])
        gain = gap[:, None, :, None] - miss
        if distinct:
            gain = np.where(_meets(experts, full), -np.inf, gain)
        best = gain.reshape(len(active), -1).argmax(1)
        found = gain.reshape(len(active), -1)[rows, best] > _LEAST_GAIN * peak
        active, best, full = active[found], best[found], full[found]
        if not len(active):
            break
        mine_slot, their_slot = full * size + best // (packs * size), best % (packs * size)
        placed[active, mine_slot], placed[active, their_slot] = (
            placed[active, their_slot],
            placed[active, mine_slot],
        )
    return placed


def _meets(experts: Ints, full: Ints) -> NDArray[np.bool_]:
    """``[rows, a, device, b]``: whether swapping slot a of the full device with slot b of a device joins replicas."""
    mine = experts[np.arange(len(experts)), full]
    theirs_has = (mine[:, :, None, None] == experts[:, None]).any(3, keepdims=True)
    mine_has = (experts[:, None] == mine[:, :, None, None]).any(1, keepdims=True)
    return theirs_has | mine_has


def _swap_groups(weights: Floats, by_node: Ints, num_groups: int) -> Ints:
    """Swap whole groups between nodes as :func:`_swap_replicas` swaps replicas; ``[L, nodes, E / nodes]``."""
    layers, nodes, _ = by_node.shape
    size = weights.shape[1] // num_groups
    if nodes == num_groups:
        return by_node
    totals = weights.reshape(layers, num_groups, size).sum(2)
    groups = _swap_replicas(totals, by_node.reshape(layers, num_groups, size)[:, :, 0] // size, nodes, False)
    return (groups[:, :, None] * size + np.arange(size)).reshape(by_node.shape)


# -- few moves -----------------------------------------------------------------------------------------------------


def _step_by_step(weights: Floats, placed: Ints, previous: Placement, goal: float, max_moves: int | None) -> Ints:
    """Improve one layer ``[R]`` by single swaps and replacements until its largest load is at most ``goal``."""
    devices, nodes = previous.num_devices, previous.num_nodes
    packs = devices // nodes
    rows = placed.reshape(nodes, -1).copy()
    left = placed.size if max_moves is None else max_moves
    # The fullest node first: it is the one that a limit on moves must not keep waiting.
    fullest = np.argsort(-_device_loads(weights[None], placed[None], devices).reshape(nodes, packs).max(1))
    for node in fullest:
        while left > 0:
            experts = rows[node].reshape(packs, -1)
            count = np.bincount(rows[node], minlength=len(weights))
            loads = (weights / np.maximum(count, 1))[experts]
            if loads.sum(1).max() <= goal:
                break
            steps = [_best_replacement(weights, experts, count, previous.distinct)]
            if left > 1:
                steps.append(_best_swap(loads, experts, previous.distinct))
            rate, step = max(steps, key=lambda found: found[0])
            if rate <= _LEAST_GAIN:
                break
            for slot, expert in step:
                rows[node, slot] = expert
            left -= len(step)
    return rows.reshape(-1)


def _best_swap(loads: Floats, experts: Ints, distinct: bool) -> tuple[float, list[tuple[int, int]]]:
    """Return the swap with the fullest device that gains most, as gain per move and the slots that change."""
    totals = loads.sum(1)
    scale, size = totals.max(), experts.shape[1]
    full = int(totals.argmax())
    moved = loads[full][:, None, None] - loads[None]
    before = (totals / scale) ** _POWER
    after = ((totals[full] - moved) / scale) ** _POWER + ((totals[:, None] + moved) / scale) ** _POWER
    gain = before[full] + before[:, None] - after
    gain[:, full] = -np.inf
    if distinct:
        gain[_meets(experts[None], np.array([full]))[0]] = -np.inf
    best = int(gain.argmax())
    mine, theirs = full * size + best // experts.size, best % experts.size
    flat = experts.reshape(-1)
    return float(gain.reshape(-1)[best]) / 2, [(mine, int(flat[theirs])), (theirs, int(flat[mine]))]


def _best_replacement(
    weights: Floats, experts: Ints, count: Ints, distinct: bool
) -> tuple[float, list[tuple[int, int]]]:
    """Return the best change of one slot, from an expert with several replicas to one of the fullest device."""
    devices, size = experts.shape
    per_replica = weights / np.maximum(count, 1)
    totals = per_replica[experts].sum(1)
    scale, full = totals.max(), int(totals.argmax())
    victims = np.flatnonzero(count[experts.reshape(-1)] > 1)
    if not len(victims):
        return 0.0, []
    held = _holdings(experts.reshape(1, -1), devices, len(weights))[0]
    more = np.unique(experts[full])
    less = experts.reshape(-1)[victims]
    # [more, victims, devices]: what one replica more and one less change on every device that holds either.
    down = (weights[more] / (count[more] + 1) - per_replica[more])[:, None] * held[:, more].T
    up = (weights[less] / (count[less] - 1) - per_replica[less])[:, None] * held[:, less].T
    after = totals + down[:, None] + up[None]
    at = victims // size
    column = np.arange(len(victims))
    after[:, column, at] += (weights[more] / (count[more] + 1))[:, None] - (weights[less] / (count[less] - 1))
    gain = ((totals / scale) ** _POWER).sum() - ((after / scale) ** _POWER).sum(2)
    gain[more[:, None] == less] = -np.inf
    if distinct:
        gain[held[at][:, more].T > 0] = -np.inf
    best = int(gain.argmax())
    slot, expert = int(victims[best % len(victims)]), int(more[best // len(victims)])
    return float(gain.reshape(-1)[best]), [(slot, expert)]


def _align(fresh: Ints, placed: Ints, num_devices: int, num_nodes: int) -> Ints:
    """Renumber nodes and devices of a plan ``[R]`` so that most of its replicas lie where ``placed [R]`` has them."""
    num_experts = int(max(fresh.max(), placed.max())) + 1
    new = _holdings(fresh[None], num_devices, num_experts)[0]
    old = _holdings(placed[None], num_devices, num_experts)[0]
    packs = num_devices // num_nodes
    shared = np.minimum(old[:, None], new[None]).sum(2)
    by_node = shared.reshape(num_nodes, packs, num_nodes, packs).max(3).sum(1)
    result = np.empty_like(placed).reshape(num_devices, -1)
    slots, current = fresh.reshape(num_devices, -1), placed.reshape(num_devices, -1)
    for node, source in enumerate(_match(by_node)):
        block = shared[node * packs : (node + 1) * packs, source * packs : (source + 1) * packs]
        for device, origin in enumerate(_match(block)):
            target = node * packs + device
            result[target] = _keep_slots(slots[source * packs + origin], current[target])
    return result.reshape(-1)


def _match(score: Ints) -> Ints:
    """Return a column for each row: the best pair first, then exchanges while the sum grows."""
    size = len(score)
    column, left = np.zeros(size, np.int64), score.astype(np.float64)
    for _ in range(size):
        row, best = divmod(int(left.argmax()), size)
        column[row] = best
        left[row], left[:, best] = -np.inf, -np.inf
    while True:
        chosen = score[np.arange(size), column]
        other = score[:, column]
        gain = other + other.T - chosen[:, None] - chosen
        row, partner = divmod(int(gain.argmax()), size)
        if gain[row, partner] <= 0:
            return column
        column[row], column[partner] = column[partner], column[row]


def _keep_slots(experts: Ints, current: Ints) -> Ints:
    """Order a device's new experts so that those it already holds keep their slots."""
    waiting = [int(expert) for expert in experts]
    result = np.full(len(experts), -1, np.int64)
    for slot, expert in enumerate(current):
        if int(expert) in waiting:
            waiting.remove(int(expert))
            result[slot] = expert
    result[result < 0] = waiting
    return result


# -- results -------------------------------------------------------------------------------------------------------


def _holdings(placed: Ints, num_devices: int, num_experts: int) -> Ints:
    """``[L, D, E]``: replicas of each expert on each device."""
    layers, slots = placed.shape
    device = np.arange(slots) // (slots // num_devices)
    keys = (np.arange(layers)[:, None] * num_devices + device) * num_experts + placed
    found = np.bincount(keys.ravel(), minlength=layers * num_devices * num_experts)
    return found.reshape(layers, num_devices, num_experts)


def _counts(placed: Ints, num_experts: int) -> Ints:
    keys = placed + np.arange(len(placed))[:, None] * num_experts
    return np.bincount(keys.ravel(), minlength=len(placed) * num_experts).reshape(-1, num_experts)


def _device_loads(weights: Floats, placed: Ints, num_devices: int, count: Ints | None = None) -> Floats:
    per_replica = weights / (_counts(placed, weights.shape[1]) if count is None else count)
    flat = placed + np.arange(len(placed))[:, None] * weights.shape[1]
    loads = per_replica.reshape(-1)[flat].reshape(len(placed), num_devices, -1)
    return loads[:, :, 0] if loads.shape[2] == 1 else loads.sum(2)


def _peak(weights: Floats, placed: Ints, num_devices: int) -> Floats:
    return _device_loads(weights, placed, num_devices).max(1)


def _imbalance(device_load: Floats) -> Floats:
    mean = device_load.mean(1)
    return np.divide(device_load.max(1), mean, out=np.ones(len(mean)), where=mean > 0)


def _placement(
    weights: Floats, placed: Ints, num_devices: int, nodes_and_groups: tuple[int, int], distinct: bool
) -> Placement:
    layers, experts = weights.shape
    count = _counts(placed, experts)
    # Slots in the order of their expert. Expert and slot in one integer sort much faster than indices do.
    bits = placed.shape[1].bit_length()
    keys = (placed << bits) + np.arange(placed.shape[1])
    keys = keys.astype(np.int32) if experts << bits < 2**31 else keys
    keys.sort(axis=1)
    expert, order = keys >> bits, keys & ((1 << bits) - 1)
    expert = (expert + np.arange(layers)[:, None] * experts).ravel()
    most = int(count.max())
    slots = np.full((layers, experts, most), -1, np.int64)
    first = np.cumsum(count.ravel()) - count.ravel()
    slots.reshape(-1)[(np.arange(count.size) * most - first)[expert] + np.arange(placed.size)] = order.ravel()
    return Placement(
        num_devices=num_devices,
        num_nodes=nodes_and_groups[0],
        num_groups=nodes_and_groups[1],
        distinct=distinct,
        physical_to_logical=placed,
        logical_to_physical=slots,
        replica_count=count,
        device_load=_device_loads(weights, placed, num_devices, count),
    )

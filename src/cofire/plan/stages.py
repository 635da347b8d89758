"""How a model is cut into pipeline stages: contiguous runs of blocks, as even in time as contiguity allows.

The first stage also has the embedding; the last has the head, the loss, and the multi-token-prediction modules, each of
which passes through the head once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cofire.errors import PlanError
from cofire.plan.kernels import BlockKind
from cofire.spec.model import ModelSpec

_STEPS = 40  # of the bisection: far below the time of a kernel


@dataclass(frozen=True)
class Stage:
    """How many blocks of each kind a stage has."""

    blocks: tuple[tuple[BlockKind, int], ...]

    def total(self, per_block: Mapping[BlockKind, float]) -> float:
        """Return the sum over blocks of something that each kind of block has."""
        return sum(number * per_block[kind] for kind, number in self.blocks)

    def count(self, kind: BlockKind) -> int:
        """Blocks of one kind."""
        return dict(self.blocks).get(kind, 0)


def layer_kinds(model: ModelSpec) -> list[BlockKind]:
    """Return the feed-forward kind of each layer of the main model."""
    kinds: list[BlockKind] = ["dense"] * model.num_dense_layers
    return [*kinds, *("moe" for _ in range(model.num_moe_layers))]


def end_blocks(model: ModelSpec) -> Counter[BlockKind]:
    """Return the blocks after the last layer: heads, and the modules that predict further tokens."""
    depth = model.mtp.depth if model.mtp else 0
    blocks: Counter[BlockKind] = Counter()
    blocks["head"] = 1 + depth
    if depth:
        for kind in ("mtp_entry", "attention", "moe" if model.moe is not None else "dense"):
            blocks[kind] = depth
    return blocks


def cut_stages(model: ModelSpec, num_stages: int, block_s: Mapping[BlockKind, float]) -> list[Stage]:
    """Cut a model so that its slowest stage is as fast as it can be.

    Args:
        model: The model.
        num_stages: How many.
        block_s: Seconds of each kind of block, forward and backward.

    Raises:
        PlanError: There are more stages than layers.
    """
    kinds = layer_kinds(model)
    if num_stages > len(kinds):
        raise PlanError(
            f"{num_stages} pipeline stages are more than the {len(kinds)} layers of {model.name}; take at most "
            f"{len(kinds)} ranks x stages per rank"
        )
    times = [block_s["attention"] + block_s[kind] for kind in kinds]
    first = block_s["embedding"]
    last = sum(number * block_s[kind] for kind, number in end_blocks(model).items())
    sizes: list[int] = []
    # The stage with the head may be slower than any other can be; the others are evened out among themselves.
    while len(sizes) < num_stages:
        left = num_stages - len(sizes)
        found = _even(times, left, first, last)
        sizes.insert(0, found[-1])
        times, last = times[: len(times) - found[-1]], 0.0
        if left == num_stages:
            continue
        sizes = found[:-1] + sizes
        break
    return _stages(model, kinds, sizes)


def _even(times: Sequence[float], num_stages: int, first: float, last: float) -> list[int]:
    """Return the layers of each stage with the smallest maximum, by bisection."""
    low, high = max(times), (sum(times) + first + last) * (1 + 1e-9)
    best = _fill(times, num_stages, high, first, last)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        sizes = _fill(times, num_stages, middle, first, last)
        if sizes is None:
            low = middle
        else:
            best, high = sizes, middle
        if high - low < 1e-6 * high:
            break
    assert best is not None
    return best


def _fill(times: Sequence[float], num_stages: int, limit: float, first: float, last: float) -> list[int] | None:
    """Return the layers of each stage if none needs more than ``limit``; filled from the end, where the head is."""
    sizes, at = [], len(times)
    for stage in reversed(range(num_stages)):
        room = limit - (last if stage == num_stages - 1 else 0.0) - (first if stage == 0 else 0.0)
        size = 0
        while at > stage and (size == 0 or times[at - 1] <= room):  # each stage before keeps a layer
            at, size, room = at - 1, size + 1, room - times[at - 1]
        if room < 0:
            return None
        sizes.append(size)
    return sizes[::-1] if at == 0 else None


def _stages(model: ModelSpec, kinds: Sequence[BlockKind], sizes: Sequence[int]) -> list[Stage]:
    stages, at = [], 0
    for index, size in enumerate(sizes):
        blocks: Counter[BlockKind] = Counter(kinds[at : at + size])
        blocks["attention"] += size
        at += size
        if index == 0:
            blocks["embedding"] += 1
        if index == len(sizes) - 1:
            blocks += end_blocks(model)
        stages.append(Stage(tuple(sorted(blocks.items()))))
    return stages

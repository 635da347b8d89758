"""What quantising does to the tensors of a training step: lost values, noise, and how large the tiles are.

A :class:`Watch` looks at the operands of FP8 linear layers while it is active, which one step in many is, since it
costs some passes over each of them. With scales from the data at hand nothing overflows but what is not finite already,
so ``broken`` counts the values of tiles with an infinity or a NaN; ``underflow`` is what a trainer has to look at. Left
out: attention and other tensors that are not quantised.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.precision.survey import signal_to_noise_db

_TILE = 128


@dataclass(frozen=True)
class TensorHealth:
    """One tensor of one layer in one step.

    Attributes:
        layer: Its name in the decoder.
        tensor: ``input``, ``weight`` or ``gradient`` (of the output).
        underflow: Share of the values that are not zero and became zero.
        broken: Share of the values that are not finite, or became so with their tile.
        snr_db: Signal over noise; None where nothing is finite or nothing was lost.
        amax: How many tiles of 1 x 128 have their largest magnitude in [2 ** (e - 1), 2 ** e), by e; zeros aside.
    """

    layer: str
    tensor: str
    underflow: float
    broken: float
    snr_db: float | None
    amax: dict[int, int]


def tensor_health(layer: str, tensor: str, exact: Tensor, rounded: Tensor) -> TensorHealth:
    """Compare a tensor with what is left of it.

    Args:
        layer: Name.
        tensor: Which one.
        exact: [..., C], before.
        rounded: The same shape, after.
    """
    exact, rounded = exact.detach().float(), rounded.detach().float()
    finite = exact.isfinite() & rounded.isfinite()
    alive = finite & (exact != 0)
    lost = alive & (rounded == 0)
    snr = signal_to_noise_db(exact[finite], rounded[finite]) if bool(alive.any()) else float("inf")
    count = max(1, exact.numel())
    return TensorHealth(
        layer,
        tensor,
        underflow=float(lost.sum()) / max(1, int(alive.sum())),
        broken=float((~finite).sum()) / count,
        snr_db=snr if abs(snr) != float("inf") else None,
        amax=_exponents(exact.nan_to_num(0.0, 0.0, 0.0)),
    )


def _exponents(x: Tensor) -> dict[int, int]:
    rows = x.reshape(-1, x.shape[-1])
    tiles = F.pad(rows, (0, -x.shape[-1] % _TILE)).view(rows.shape[0], -1, _TILE)
    amax = tiles.abs().amax(-1).flatten()
    exponents, counts = torch.frexp(amax[amax > 0]).exponent.unique(return_counts=True)
    return dict(zip(exponents.tolist(), counts.tolist(), strict=True))


class Watch:
    """Collects the health of the tensors of one step.

    Attributes:
        active: Whether it looks at all.
    """

    def __init__(self) -> None:
        """Start inactive and empty."""
        self.active = False
        self._found: dict[tuple[str, str], TensorHealth] = {}

    def see(self, layer: str, tensor: str, exact: Tensor, rounded: Tensor) -> None:
        """Keep a tensor's health; that of an earlier micro-batch, or of a pass that is repeated, is replaced."""
        if self.active:
            self._found[layer, tensor] = tensor_health(layer, tensor, exact, rounded)

    def take(self) -> list[TensorHealth]:
        """Return what was seen, and forget it."""
        found, self._found = list(self._found.values()), {}
        return found


def summary(found: list[TensorHealth]) -> dict[str, Any]:
    """Return the worst figures by kind of tensor, and all of them, ready for a log."""
    values: dict[str, Any] = {}
    for kind in dict.fromkeys(row.tensor for row in found):
        rows = [row for row in found if row.tensor == kind]
        noisy = [row.snr_db for row in rows if row.snr_db is not None]
        values[f"{kind}_snr_min_db"] = min(noisy, default=None)
        values[f"{kind}_underflow_max"] = max(row.underflow for row in rows)
        values[f"{kind}_broken_max"] = max(row.broken for row in rows)
    values["tensors"] = [asdict(row) for row in found]
    return values

"""How one linear layer is quantised, and what multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from cofire.errors import PrecisionError
from cofire.precision.gemm import Backend
from cofire.precision.health import Watch
from cofire.precision.quantize import TILE, Quantized, ScaleFormat, TileShape

Kept = Literal["fp8", "e5m6"]


@dataclass(frozen=True)
class FP8Recipe:
    """How one linear layer is quantised.

    Attributes:
        input_scale: Format of the input's scales.
        gradient_scale: Format of the scales of the output's gradient.
        gradient_tile: Of the output's gradient for Dgrad: ``TILE``; ``BLOCK`` is what the report found to diverge.
        kept: Format in which the input waits for Wgrad; ``e5m6`` has scales that are powers of two, whatever
            ``input_scale`` says. Layers behind SwiGLU keep another tensor, always in FP8.
        backend: What multiplies FP8 operands (``gemm.py``); none: products run on dequantised ones.
        layer: Its name, for the watch.
        watch: Sees the operands; none: nobody does.
    """

    input_scale: ScaleFormat = "fp32"
    gradient_scale: ScaleFormat = "fp32"
    gradient_tile: TileShape = TILE
    kept: Kept = "fp8"
    backend: Backend | None = None
    layer: str = ""
    watch: Watch | None = None

    def __post_init__(self) -> None:
        """Check the formats.

        Raises:
            PrecisionError: There is no such format.
        """
        for name, value in (("input_scale", self.input_scale), ("gradient_scale", self.gradient_scale)):
            if value not in get_args(ScaleFormat):
                raise PrecisionError(f"{name} {value!r} is neither 'fp32' nor 'ue8m0'")
        if self.kept not in get_args(Kept):
            raise PrecisionError(f"kept {self.kept!r} is neither 'fp8' nor 'e5m6'")
        if self.backend is not None and self.backend not in get_args(Backend):
            raise PrecisionError(f"backend {self.backend!r} is not one of {', '.join(get_args(Backend))}, or None")

    def see(self, tensor: str, exact: Tensor, rounded: Quantized | Tensor) -> None:
        """Show the watch, if it looks, an operand before and after."""
        if self.watch is not None and self.watch.active:
            values = rounded if isinstance(rounded, Tensor) else rounded.dequantize()
            self.watch.see(self.layer, tensor, exact, values)

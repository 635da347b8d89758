"""Which number formats a run computes in."""

from __future__ import annotations

from typing import Literal

from cofire.spec.spec_type import Spec


class PrecisionSpec(Spec):
    """Number formats of training.

    ``recipe``: ``bf16`` is autocast to bfloat16 over FP32 master weights, ``fp32`` is plain FP32, and
    ``auto`` takes the one of these whose matrix products are measured to be faster on the device at hand.
    ``fp8`` multiplies in FP8 with scales of tiles and blocks, as DeepSeek-V3 (technical report, section 3.3); the
    rest is what ``auto`` takes. A CPU emulates FP8.
    ``moments``: storage of AdamW's two moments; ``auto`` is bf16 with the recipe ``fp8`` (DeepSeek-V3 technical report,
    section 3.3.2), else fp32.
    ``gradient_tile``: of ``fp8``: what shares a scale in the gradient of a layer's output where it is multiplied by the
    weight, 1 x 128 values or a ``block`` of 128 x 128, which the report found to diverge (appendix B.2).
    ``products``: of ``fp8``: ``auto`` multiplies FP8 operands where the device can, which is a Hopper GPU with Triton
    or PyTorch's own kernels; ``emulated`` dequantises them first, as every other device does.
    ``combine``: in what the outputs of routed experts, and the gradients of their inputs, would travel to other devices
    (ISCA'25, section 3.2); training on one device then sees what would arrive. ``exact``: they do not travel.
    """

    recipe: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    moments: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_tile: Literal["tile", "block"] = "tile"
    products: Literal["auto", "emulated"] = "auto"
    combine: Literal["exact", "bf16", "e4m3", "e5m2", "logfmt6", "logfmt8", "logfmt10"] = "exact"

    @property
    def moment_format(self) -> Literal["fp32", "bf16"]:
        """How AdamW's moments are stored."""
        if self.moments != "auto":
            return self.moments
        return "bf16" if self.recipe == "fp8" else "fp32"

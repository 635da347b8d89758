"""Which number formats a run computes in."""

from __future__ import annotations

from typing import Literal

from cofire.spec.spec_type import Spec


class PrecisionSpec(Spec):
    """Number formats of training.

    ``recipe``: ``bf16`` is autocast to bfloat16 over FP32 master weights, ``fp32`` is plain FP32, and
    ``auto`` takes the one of these whose matrix products are measured to be faster on the device at hand.
    ``fp8`` multiplies in FP8 with scales of tiles and blocks, as DeepSeek-V3 (technical report, section 3.3); the
    rest is BF16 on a GPU and FP32 on a CPU, where FP8 is emulated.
    ``moments``: storage of AdamW's two moments; ``auto`` is bf16 with the recipe ``fp8`` (DeepSeek-V3 technical report,
    section 3.3.2), else fp32.
    ``gradient_tile``: of ``fp8``: what shares a scale in the gradient of a layer's output where it is multiplied by the
    weight, 1 x 128 values or a ``block`` of 128 x 128, which the report found to diverge (appendix B.2).
    """

    recipe: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    moments: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_tile: Literal["tile", "block"] = "tile"

    @property
    def moment_format(self) -> Literal["fp32", "bf16"]:
        """How AdamW's moments are stored."""
        if self.moments != "auto":
            return self.moments
        return "bf16" if self.recipe == "fp8" else "fp32"

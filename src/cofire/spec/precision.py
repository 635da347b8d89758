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
    ``moments``: storage of AdamW's two moments (DeepSeek-V3 technical report, section 3.3.2, uses bf16).
    """

    recipe: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    moments: Literal["fp32", "bf16"] = "fp32"

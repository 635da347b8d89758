"""Which layers of a decoder compute in FP8, and how (DeepSeek-V3 technical report, 3.3).

Every linear layer of the blocks and of MTP, and the experts, take FP8 operands in all three of their products. The
embedding, the output head, the router, norms and the attention core stay as they are. Scales are powers of two for what
a dispatch would carry to other devices (the experts' input, and the gradient of their output) and for the input of the
layer after attention; SwiGLU keeps its input in FP8. Left out: E5M6 for that input, recomputing norms and MLA's
up-projections.
"""

from __future__ import annotations

from dataclasses import replace

from cofire.model.decoder import Decoder
from cofire.model.linear import Linear
from cofire.model.moe import MoELayer, SwiGLU
from cofire.precision.health import Watch
from cofire.precision.linear import FP8Recipe


def use_fp8(decoder: Decoder, recipe: FP8Recipe | None = None, watch: Watch | None = None) -> int:
    """Let a decoder compute in FP8 from now on; its weights stay as they are.

    Args:
        decoder: Whose layers change.
        recipe: Of all layers, but for the scales that are powers of two; none: DeepSeek-V3's.
        watch: Sees the operands of all of these layers, each under its name.

    Returns:
        How many weights are multiplied in FP8.
    """
    count = 0
    for name, module in decoder.named_modules():
        chosen = replace(recipe or FP8Recipe(), layer=name, watch=watch)
        if isinstance(module, Linear) and module is not decoder.head:
            after_attention = name.endswith("attention.output")
            module.fp8 = replace(chosen, input_scale="ue8m0") if after_attention else chosen
            count += module.weight.numel()
        elif isinstance(module, SwiGLU):
            module.keeps_fp8 = True
        elif isinstance(module, MoELayer):
            up = replace(chosen, input_scale="ue8m0", layer=f"{name}.gate_up")
            module.fp8 = up, replace(chosen, gradient_scale="ue8m0", layer=f"{name}.down")
            count += module.gate_up.numel() + module.down.numel()
    return count

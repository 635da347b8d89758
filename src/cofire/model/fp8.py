"""Which layers of a decoder compute in FP8, and how (DeepSeek-V3 technical report, 3.3).

Every linear layer of the blocks, those of MTP's blocks too, and the experts, take FP8 operands in all three of their
products. The embedding, the output head, the router, norms and the attention core stay as they are, and so does MTP's
projection: the report does not name it, but the released FP8 weights have it in BF16. Scales are powers of two for what
a dispatch would carry to other devices (the experts' input, and the gradient of their output) and for the input of the
layer after attention, which is kept in E5M6; SwiGLU keeps its input alone, in FP8. Left out: recomputing norms and
MLA's up-projections.
"""

from __future__ import annotations

from dataclasses import replace

from cofire.errors import PrecisionError
from cofire.model.decoder import Decoder
from cofire.model.linear import Linear
from cofire.model.moe import LocalDispatcher, MoELayer
from cofire.precision.codec import ExpertCodecs
from cofire.precision.gemm import Backend
from cofire.precision.health import Watch
from cofire.precision.recipe import FP8Recipe


def use_fp8(
    decoder: Decoder,
    recipe: FP8Recipe | None = None,
    watch: Watch | None = None,
    expert_backend: Backend | None = None,
) -> int:
    """Let a decoder compute in FP8 from now on; its weights stay as they are.

    Args:
        decoder: Whose layers change.
        recipe: Of all layers, but for the scales that are powers of two, and for what the layer after attention keeps;
            none: DeepSeek-V3's.
        watch: Sees the operands of all of these layers, each under its name.
        expert_backend: What multiplies for routed experts; none: what does for all layers.

    Returns:
        How many weights are multiplied in FP8.
    """
    exact = {decoder.head, *(module.projection for module in decoder.mtp)}
    count = 0
    for name, module in decoder.named_modules():
        chosen = replace(recipe or FP8Recipe(), layer=name, watch=watch)
        if isinstance(module, Linear) and module not in exact:
            after_attention = name.endswith("attention.output")
            module.fp8 = replace(chosen, input_scale="ue8m0", kept="e5m6") if after_attention else chosen
            count += module.weight.numel()
        elif isinstance(module, MoELayer):
            chosen = replace(chosen, backend=expert_backend or chosen.backend)
            up = replace(chosen, input_scale="ue8m0", layer=f"{name}.gate_up")
            module.fp8 = up, replace(chosen, gradient_scale="ue8m0", layer=f"{name}.down")
            count += module.gate_up.numel() + module.down.numel()
    return count


def use_codecs(decoder: Decoder, codecs: ExpertCodecs | None = None) -> int:
    """Let what travels between tokens and experts be what a codec makes of it, with all experts on one device.

    Args:
        decoder: Whose mixture-of-experts layers change.
        codecs: Of activations, outputs and gradients; none: DeepSeek-V3's.

    Returns:
        How many layers changed.

    Raises:
        PrecisionError: A layer has another dispatcher than the local one, which has codecs of its own.
    """
    layers = [module for module in decoder.modules() if isinstance(module, MoELayer)]
    for layer in layers:
        if type(layer.dispatcher) is not LocalDispatcher:
            raise PrecisionError(
                f"a {type(layer.dispatcher).__name__} really sends its rows; give it the codecs itself"
            )
    for layer in layers:
        layer.dispatcher = LocalDispatcher(layer.moe.num_routed_experts, codecs or ExpertCodecs())
    return len(layers)

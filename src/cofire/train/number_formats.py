"""What a run's number formats make of its decoder: FP8 products, and what travels between tokens and experts."""

from __future__ import annotations

import torch

from cofire.errors import PrecisionError
from cofire.model.decoder import Decoder
from cofire.model.fp8 import use_codecs, use_fp8
from cofire.precision.codec import GRADIENT_FLOOR, BF16Codec, Codec, ExpertCodecs, FP8Codec, LogFMTCodec
from cofire.precision.gemm import Backend, fastest
from cofire.precision.health import Watch
from cofire.precision.quantize import BLOCK, TILE
from cofire.precision.recipe import FP8Recipe
from cofire.spec import PrecisionSpec

_COMBINE: dict[str, Codec] = {
    "bf16": BF16Codec(),
    "e4m3": FP8Codec("fp32", GRADIENT_FLOOR),
    "e5m2": FP8Codec("fp32", GRADIENT_FLOOR, torch.float8_e5m2),
    "logfmt6": LogFMTCodec(6),
    "logfmt8": LogFMTCodec(8),
    "logfmt10": LogFMTCodec(10),
}


def set_formats(decoder: Decoder, spec: PrecisionSpec, recipe: str, watch: Watch) -> str:
    """Let a decoder compute as a spec says.

    Args:
        decoder: On the device where it stays.
        spec: What the run was told.
        recipe: ``spec.recipe``, or what ``auto`` chose.
        watch: Sees the operands of FP8 products.

    Returns:
        What multiplies: the backends of ``precision.gemm`` for linear layers and for experts, ``emulated``, or
        ``recipe`` where nothing is in FP8.
    """
    if spec.combine != "exact":
        use_codecs(decoder, ExpertCodecs(None, _COMBINE[spec.combine], None))
    if recipe != "fp8":
        return recipe
    device = decoder.embedding.weight.device
    tile = BLOCK if spec.gradient_tile == "block" else TILE
    backends = _backends(device) if spec.products == "auto" else None
    if backends is None:
        use_fp8(decoder, FP8Recipe(gradient_tile=tile), watch)
        return "emulated"
    use_fp8(decoder, FP8Recipe(gradient_tile=tile, backend=backends[0]), watch, backends[1])
    return ", ".join(dict.fromkeys(backends))


def _backends(device: torch.device) -> tuple[Backend, Backend] | None:
    """Return what multiplies FP8 operands on a GPU, for linear layers and for experts; None where nothing does."""
    if device.type != "cuda":
        return None
    try:
        return fastest(device), fastest(device, experts=True)
    except PrecisionError:
        return None

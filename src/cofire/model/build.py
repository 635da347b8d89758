"""From a spec to a decoder with fresh weights."""

from __future__ import annotations

import torch
from torch import nn

from cofire.model.decoder import Decoder
from cofire.model.norm import RMSNorm
from cofire.model.router import Router
from cofire.spec import ModelSpec


def build(
    spec: ModelSpec,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
) -> Decoder:
    """Return a decoder with freshly initialised weights.

    Matrices are drawn from a normal distribution of deviation ``spec.init_std`` (DeepSeek-V3 technical
    report, section 4.2), norms start at one, biases at zero.

    Args:
        spec: The model.
        device: Where it is allocated; ``meta`` allocates and initialises nothing.
        dtype: Of its parameters; routers' selection biases stay FP32.
        seed: Of the initial weights, independent of the global generator; none: drawn from that.
    """
    with torch.device(device or "cpu"):
        decoder = Decoder(spec).to(dtype)
    if torch.device(device or "cpu").type != "meta":
        initialize(decoder, seed)
    return decoder


@torch.no_grad()
def initialize(decoder: Decoder, seed: int | None = None) -> None:
    """Draw all weights of a decoder anew; see :func:`build`."""
    drawn_seed = int(torch.randint(2**62, ())) if seed is None else seed
    generator = torch.Generator().manual_seed(drawn_seed)
    for module in decoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            elif isinstance(module, nn.Linear) and name == "bias":
                parameter.zero_()
            elif not (decoder.spec.tie_embeddings and module is decoder.head):
                drawn = torch.empty(parameter.shape).normal_(0.0, decoder.spec.init_std, generator=generator)
                parameter.copy_(drawn)
        if isinstance(module, Router) and module.bias is not None:
            module.bias.copy_(module.initial_bias())

"""A few lines of text from a model that was just trained, for the report.

The plainest decoding there is: the whole sequence runs through the model for every token, without a cache.
``cofire generate`` does it properly.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from cofire.model import Decoder

_WINDOW = 128


@torch.no_grad()
def sample_text(
    decoder: Decoder, tokenizer: Tokenizer, prompt: str, max_tokens: int = 64, temperature: float = 0.8, seed: int = 0
) -> str:
    """Return the text that follows ``prompt``.

    Args:
        decoder: On any device.
        tokenizer: Of the run.
        prompt: May be empty.
        max_tokens: Generated tokens.
        temperature: Divides the logits; 0 takes the likeliest token.
        seed: Of the draws.
    """
    device = decoder.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    start = tokenizer.encode(prompt, add_special_tokens=False).ids or [0]
    tokens = list(start)
    for _ in range(max_tokens):
        window = torch.tensor([tokens[-_WINDOW:]], device=device)
        logits = decoder.logits(decoder(window).hidden[0, -1]).float().cpu()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            tokens.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
    return tokenizer.decode(tokens[len(start) :])

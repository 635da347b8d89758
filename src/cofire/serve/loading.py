"""A model and its tokenizer from a folder, after a look at the memory that they will need."""

from __future__ import annotations

import os

import torch
from tokenizers import Tokenizer

from cofire.errors import ServeError
from cofire.model import Decoder
from cofire.model.memory import available_memory_bytes, keep_freed_memory
from cofire.model.weights import load_decoder, load_spec
from cofire.plan import count_parameters, kv_bytes_per_token
from cofire.serve.text import load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(
    folder: str | os.PathLike[str],
    slots_max: int = 1,
    context_max: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tokenizer, Decoder]:
    """Load what generates text.

    Args:
        folder: A run, a checkpoint or a Hugging Face folder.
        slots_max: Sequences that the cache will hold.
        context_max: Tokens of each; none: the model's longest sequence.
        dtype: Of weights and cache.
        device: Where to put them.

    Raises:
        ServeError: There is no whole model in the folder, or too little memory for it and its cache.
    """
    tokenizer = load_tokenizer(folder)
    spec = load_spec(folder)
    context = spec.max_sequence_length if context_max is None else context_max
    weights = count_parameters(spec).total_with_mtp * dtype.itemsize
    cache = kv_bytes_per_token(spec, dtype.itemsize, include_mtp=True) * slots_max * context
    free = available_memory_bytes(torch.device(device))
    if weights + cache > free:
        raise ServeError(
            f"{spec.name} needs {weights / 1e9:,.2f} GB for its weights and {cache / 1e9:,.2f} GB for a cache of "
            f"{slots_max} x {context} tokens (modelled), but {free / 1e9:,.2f} GB are free on {device}; take a shorter "
            "context, fewer sequences or bf16"
        )
    keep_freed_memory()
    return tokenizer, load_decoder(folder, dtype=dtype, device=device)

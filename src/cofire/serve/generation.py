"""Text from prompts: tokenise, decode all prompts together, and hand out text as it becomes whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tokenizers import Tokenizer

from cofire.errors import ServeError
from cofire.model import Decoder
from cofire.serve.batch import Batch
from cofire.serve.sampling import SamplingParameters
from cofire.serve.text import TextOutput, encode_prompt


@dataclass(frozen=True)
class Generation:
    """What was generated for the prompts, and how fast.

    ``tokens_per_s`` counts decoding only, prompts excluded. ``acceptance`` is the share of drafts that the main model
    kept; none without speculation.
    """

    texts: list[str]
    token_ids: list[list[int]]
    finish_reasons: list[str]
    prompt_seconds: float
    decode_seconds: float
    tokens_per_s: float
    acceptance: float | None


def _encode(tokenizer: Tokenizer, prompts: Sequence[str], limit: int) -> list[list[int]]:
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not 0 < len(ids) < limit:
            raise ServeError(
                f"the prompt {prompt[:20]!r} has {len(ids)} tokens; this model takes between 1 and {limit - 1}"
            )
    return encoded


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    parameters: Sequence[SamplingParameters],
    max_tokens: int = 128,
    speculative: bool = False,
    show: Callable[[int, str], None] | None = None,
) -> Generation:
    """Generate text for every prompt at once.

    Args:
        decoder: In evaluation mode.
        tokenizer: Of the model.
        prompts: An empty one starts a new text.
        parameters: One per prompt.
        max_tokens: New tokens per prompt, at most; less where the model's longest sequence ends first.
        speculative: Draft with the MTP modules.
        show: Called with a prompt's number and its next piece of text.

    Raises:
        ServeError: A prompt is too long, or there is no MTP module to draft with.
    """
    limit = decoder.spec.max_sequence_length
    encoded = _encode(tokenizer, prompts, limit)
    batch = Batch(decoder, slots_max=len(prompts), speculative=speculative)
    show_piece = show or (lambda number, text: None)
    outputs = [
        TextOutput(tokenizer, min(max_tokens, limit - len(ids)), partial(show_piece, number))
        for number, ids in enumerate(encoded)
    ]
    started = time.perf_counter()
    in_slot: list[TextOutput] = []
    for output, ids, chosen in zip(outputs, encoded, parameters, strict=True):
        if output.take([batch.add(ids, chosen)]):
            in_slot.append(output)
        else:
            batch.remove(len(batch) - 1)
    prompted = time.perf_counter()
    before = sum(len(output.ids) for output in outputs)
    while in_slot:
        going = [output.take(new) for output, new in zip(in_slot, batch.step(), strict=True)]
        for slot in reversed([i for i, goes_on in enumerate(going) if not goes_on]):
            batch.remove(slot)
            in_slot[slot] = in_slot[-1]
            in_slot.pop()
    seconds = time.perf_counter() - prompted
    return Generation(
        texts=[output.text for output in outputs],
        token_ids=[output.ids for output in outputs],
        finish_reasons=[output.reason for output in outputs],
        prompt_seconds=prompted - started,
        decode_seconds=seconds,
        tokens_per_s=(sum(len(output.ids) for output in outputs) - before) / seconds if seconds else 0.0,
        acceptance=batch.accepted / batch.drafted if batch.drafted else None,
    )

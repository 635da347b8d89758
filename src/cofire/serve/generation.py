"""Text from prompts: tokenise, decode all prompts together, and hand out text as it becomes whole.

Byte-level tokens may end in the middle of a UTF-8 character; such bytes are held back until the character is whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from cofire.errors import ServeError
from cofire.model import Decoder
from cofire.serve.batch import Batch
from cofire.serve.sampling import SamplingParameters

END_OF_TEXT = "<|endoftext|>"
_REPLACEMENT = chr(0xFFFD)  # what a decoder puts for bytes that are no character


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


class TextStream:
    """Turns the tokens of one sequence into text, piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def feed(self, ids: Sequence[int], last: bool = False) -> str:
        """Add tokens and return the text that is now certain; ``last`` gives out what is left."""
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids)
        end = len(text)
        if not last:
            end -= len(text) - len(text.rstrip(_REPLACEMENT))
        new, self._shown = text[self._shown : end], max(end, self._shown)
        return new


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Load ``tokenizer.json`` from a run, a checkpoint's run, or a Hugging Face folder.

    Raises:
        ServeError: There is none, or it cannot be read.
    """
    root = Path(folder)
    for path in (root / "tokenizer.json", root.parent.parent / "tokenizer.json"):
        if path.is_file():
            try:
                return Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises bare Exceptions
                raise ServeError(f"{path} is no tokenizer: {str(error).splitlines()[0]}") from None
    raise ServeError(f"{root} has no tokenizer.json; put the one that the model was trained with there")


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
    end = tokenizer.token_to_id(END_OF_TEXT)
    start_ids = [] if end is None else [end]
    encoded = [tokenizer.encode(p, add_special_tokens=False).ids or start_ids for p in prompts]
    limit = decoder.spec.max_sequence_length
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not 0 < len(ids) < limit:
            raise ServeError(
                f"the prompt {prompt[:20]!r} has {len(ids)} tokens; this model takes between 1 and {limit - 1}"
            )
    batch = Batch(decoder, slots_max=len(prompts), speculative=speculative)
    started = time.perf_counter()
    outputs: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    streams = [TextStream(tokenizer) for _ in prompts]
    in_slot: list[int] = []

    def take(number: int, new: Sequence[int]) -> bool:
        """Append tokens to an output; return whether it goes on."""
        room = min(max_tokens, limit - len(encoded[number])) - len(outputs[number])
        kept = list(new)[:room]
        if end is not None and end in kept:
            kept = kept[: kept.index(end)]
            reasons[number] = "stop"
        outputs[number].extend(kept)
        goes_on = reasons[number] != "stop" and len(kept) < room
        text = streams[number].feed(kept, last=not goes_on)
        if show is not None and text:
            show(number, text)
        return goes_on

    for number, ids in enumerate(encoded):
        if take(number, [batch.add(ids, parameters[number])]):
            in_slot.append(number)
        else:
            batch.remove(len(batch) - 1)
    prompted = time.perf_counter()
    before = sum(map(len, outputs))
    while in_slot:
        going = [take(number, new) for number, new in zip(list(in_slot), batch.step(), strict=True)]
        for slot in reversed([i for i, goes_on in enumerate(going) if not goes_on]):
            batch.remove(slot)
            in_slot[slot] = in_slot[-1]
            in_slot.pop()
    seconds = time.perf_counter() - prompted
    return Generation(
        texts=[tokenizer.decode(ids) for ids in outputs],
        token_ids=outputs,
        finish_reasons=reasons,
        prompt_seconds=prompted - started,
        decode_seconds=seconds,
        tokens_per_s=(sum(map(len, outputs)) - before) / seconds if seconds else 0.0,
        acceptance=batch.accepted / batch.drafted if batch.drafted else None,
    )

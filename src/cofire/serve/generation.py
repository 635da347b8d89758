"""Text from prompts: tokenise, decode all prompts together, and hand out text as it becomes whole.

Byte-level tokens may end in the middle of a UTF-8 character; such bytes are held back until the character is whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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


class _Output:
    """The text of one prompt while it grows."""

    def __init__(self, tokenizer: Tokenizer, room: int, show: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self.reason = "length"
        self._room = room
        self._end = tokenizer.token_to_id(END_OF_TEXT)
        self._stream = TextStream(tokenizer)
        self._show = show

    def take(self, new: Sequence[int]) -> bool:
        """Append tokens; return whether the text goes on."""
        kept = list(new)[: self._room - len(self.ids)]
        if self._end is not None and self._end in kept:
            kept = kept[: kept.index(self._end)]
            self.reason = "stop"
        self.ids.extend(kept)
        goes_on = self.reason != "stop" and len(self.ids) < self._room
        text = self._stream.feed(kept, last=not goes_on)
        if text:
            self._show(text)
        return goes_on


def _encode(tokenizer: Tokenizer, prompts: Sequence[str], limit: int) -> list[list[int]]:
    end = tokenizer.token_to_id(END_OF_TEXT)
    start = [] if end is None else [end]
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids or start for prompt in prompts]
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
        _Output(tokenizer, min(max_tokens, limit - len(ids)), partial(show_piece, number))
        for number, ids in enumerate(encoded)
    ]
    started = time.perf_counter()
    in_slot: list[_Output] = []
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
        texts=[tokenizer.decode(output.ids) for output in outputs],
        token_ids=[output.ids for output in outputs],
        finish_reasons=[output.reason for output in outputs],
        prompt_seconds=prompted - started,
        decode_seconds=seconds,
        tokens_per_s=(sum(len(output.ids) for output in outputs) - before) / seconds if seconds else 0.0,
        acceptance=batch.accepted / batch.drafted if batch.drafted else None,
    )

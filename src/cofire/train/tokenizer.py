"""Byte-level BPE tokenizers: trained through ``tokenizers``, or the user's own.

Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2; DeepSeek-V3's report, section 4.1, uses it): the
text's UTF-8 bytes are the first 256 symbols, so every text has an encoding and decoding gives it back exactly.
The vocabulary is ``<|endoftext|>`` (id 0), the 256 bytes, and then merges in the order in which they were learnt.
Text is first split by GPT-2's pattern; DeepSeek-V3's own pattern, and its splitting of random tokens, are left out.

Training is deterministic: the same documents in the same order give the same file, whatever the number of threads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cofire.errors import TrainError
from cofire.model import special_tokens
from cofire.model.special_tokens import END_OF_TEXT

VOCAB_SIZE_MIN = 257


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of exactly ``vocab_size`` tokens.

    Args:
        documents: Training text; read once, in order.
        vocab_size: Tokens in all, with the 256 bytes and the end-of-text token.

    Returns:
        The tokenizer; special token ``<|endoftext|>`` has id 0.

    Raises:
        TrainError: ``vocab_size`` is below 257, or the text has too few distinct pairs to reach it.
    """
    if vocab_size < VOCAB_SIZE_MIN:
        raise TrainError(
            f"vocab_size = {vocab_size} must be at least {VOCAB_SIZE_MIN}: 256 bytes and the end-of-text token; "
            f"set model.vocab_size={VOCAB_SIZE_MIN} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise TrainError(
            f"vocab_size = {vocab_size} cannot be reached: the training text gives {reached} tokens; "
            f"set model.vocab_size={reached} or less, or use more text"
        )
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """Read a ``tokenizer.json`` and check that a model of ``vocab_size`` can be trained on its ids.

    Raises:
        TrainError: The file is missing or foreign, has an id that the model has not, or has no end-of-text token.
    """
    if not Path(path).is_file():
        raise TrainError(f"data.tokenizer: no file {str(path)!r}; name a tokenizer.json, or leave the field out")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())[:200]
        raise TrainError(f"{path}: not a tokenizer.json: {reason}; save one with Tokenizer.save") from None
    tokenizer.no_truncation()  # a file saved for inference may cut or pad every document
    tokenizer.no_padding()
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if needed > vocab_size:
        raise TrainError(
            f"{path}: has token ids up to {needed - 1}, but model.vocab_size = {vocab_size}; "
            f"set model.vocab_size={needed} or more"
        )
    end_of_text_id(tokenizer)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends a document.

    Raises:
        TrainError: The tokenizer has none.
    """
    found = special_tokens.end_of_text_id(tokenizer)
    if found is None:
        raise TrainError(f"the tokenizer has no end-of-text token; add {END_OF_TEXT} to its special tokens")
    return found


def tokenizer_hash(text: str) -> str:
    """Return the hexadecimal BLAKE2b-256 of a tokenizer's JSON text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=32).hexdigest()


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str], end_id: int) -> np.ndarray:
    """Encode documents in parallel and pack them, each followed by ``end_id``.

    Special tokens spelt out in a document are text like any other: a corpus cannot forge a document's end.

    Returns:
        Token ids [N], uint32.
    """
    tokenizer.encode_special_tokens = True
    try:
        encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = False
    parts = [np.array([*encoding.ids, end_id], dtype=np.uint32) for encoding in encodings]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)

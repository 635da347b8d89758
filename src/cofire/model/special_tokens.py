"""Which token of a tokenizer ends a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# What published tokenizers call it. DeepSeek's has full-width bars and U+2581.
_NAMES = (
    END_OF_TEXT,
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "</s>",
    "<eos>",
)


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the token that ends a document: 0 in ours, by its usual names in others; none if it has none."""
    return next((found for name in _NAMES if (found := tokenizer.token_to_id(name)) is not None), None)

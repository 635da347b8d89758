"""Between text and tokens: prompts and chats in, pieces of whole characters out, ends found.

Byte-level tokens may end in the middle of a UTF-8 character; such bytes are held back until the character is whole.
So is text that may be the beginning of a stop string.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from cofire.errors import ServeError
from cofire.model.special_tokens import end_of_text_id

_REPLACEMENT = chr(0xFFFD)  # what a decoder puts for bytes that are no character
_WINDOW = 32  # tokens that are decoded again with the next one; cut back to half when all of them are shown


class TextStream:
    """Turns the tokens of one sequence into text, piece by piece, in constant time per token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0

    def feed(self, ids: Sequence[int], last: bool = False) -> str:
        """Add tokens and return the text that is now certain; ``last`` gives out what is left."""
        self._window.extend(ids)
        text = self._tokenizer.decode(self._window)
        end = len(text) if last else len(text.rstrip(_REPLACEMENT))
        new, self._shown = text[self._shown : end], max(end, self._shown)
        if len(self._window) > _WINDOW and end == len(text):
            # Some tokens stay: a decoder may treat the first token of a text differently.
            self._window = self._window[-_WINDOW // 2 :]
            self._shown = len(self._tokenizer.decode(self._window))
        return new


class TextOutput:
    """The text of one request while it grows.

    Args:
        tokenizer: Of the model.
        room: Tokens it may have.
        show: Called with each piece of text.
        stop: Strings at whose first occurrence the text ends, themselves excluded.

    Attributes:
        ids: Tokens so far, without the one that ends a text.
        text: Shown so far.
        reason: Why it ended: "stop" at its own end or a stop string, "length" when the room was full.
    """

    def __init__(
        self, tokenizer: Tokenizer, room: int, show: Callable[[str], None] | None = None, stop: Sequence[str] = ()
    ) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.reason = "length"
        self._room = room
        self._end = end_of_text_id(tokenizer)
        self._stream = TextStream(tokenizer)
        self._show = show
        self._stop = tuple(stop)
        self._held = ""

    def take(self, new: Sequence[int]) -> bool:
        """Append tokens; return whether the text goes on."""
        for token in new:
            ends = token == self._end
            if not ends:
                self.ids.append(token)
            last = ends or len(self.ids) >= self._room
            if self._add(self._stream.feed(() if ends else (token,), last), last) or ends:
                self.reason = "stop"
                return False
            if last:
                return False
        return True

    def _add(self, text: str, last: bool) -> bool:
        """Show what is certain of ``text``; return whether a stop string was met."""
        self._held += text
        found = min((at for stop in self._stop if (at := self._held.find(stop)) >= 0), default=-1)
        if found >= 0:
            certain = found
        elif last:
            certain = len(self._held)
        else:
            certain = len(self._held) - _overlap(self._held, self._stop)
        piece, self._held = self._held[:certain], self._held[certain:]
        self.text += piece
        if piece and self._show is not None:
            self._show(piece)
        return found >= 0


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of ``text`` that begins one of the stop strings."""
    longest = min(len(text), max(map(len, stop), default=0))
    return next((n for n in range(longest, 0, -1) if any(one.startswith(text[-n:]) for one in stop)), 0)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Load ``tokenizer.json`` from a run, a checkpoint of a run, or a Hugging Face folder.

    Where ``tokenizer_config.json`` asks for a token at the beginning of each text (``add_bos_token``) and
    ``tokenizer.json`` does not put one there, it is put there.

    Raises:
        ServeError: The folder is none, holds no tokenizer, or one that cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ServeError(f"{str(folder)!r} is not a folder; name a run, a checkpoint or a Hugging Face folder")
    for path in (root / "tokenizer.json", root.parent.parent / "tokenizer.json"):
        if path.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises bare Exceptions
                raise ServeError(f"{path} is no tokenizer: {str(error).splitlines()[0]}") from None
            tokenizer.no_truncation()  # a file saved for training may cut or pad every text
            tokenizer.no_padding()
            return _with_beginning(tokenizer, _config(path.parent))
    raise ServeError(f"{root} has no tokenizer.json; put the one that the model was trained with there")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ServeError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ServeError(f"{path} holds no JSON object")
    return value


def _token_text(config: Mapping[str, Any], name: str) -> str:
    token = config.get(name) or ""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _with_beginning(tokenizer: Tokenizer, config: Mapping[str, Any]) -> Tokenizer:
    beginning = _token_text(config, "bos_token")
    token_id = tokenizer.token_to_id(beginning) if config.get("add_bos_token") and beginning else None
    if token_id is not None and token_id not in tokenizer.encode("").ids:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=[beginning, "$A"], special_tokens=[(beginning, token_id)]
        )
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str, special_tokens: bool = True) -> list[int]:
    """Return the tokens of a prompt; an empty one starts a new text after the token that ends one.

    Args:
        tokenizer: Of the model.
        prompt: Text.
        special_tokens: Add what the tokenizer puts around a text; a rendered chat has it already.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=special_tokens).ids
    end = end_of_text_id(tokenizer)
    return ids if ids or end is None else [end]


class ChatTemplate:
    """Writes a chat as the text that the model goes on from.

    The model's own Jinja template, as Hugging Face keeps it, in a sandbox; without one, a plain form:
    ``User: ...``, ``Assistant: ...`` in paragraphs, which also ends an answer where the next ``User:`` would begin.

    Attributes:
        stop: Strings that end an answer.
    """

    def __init__(self, source: str | None = None, variables: Mapping[str, str] | None = None) -> None:
        self._template = None if source is None else _compile(source)
        self._variables = dict(variables or {})
        self.stop = ("\n\nUser:", "\n\nSystem:") if source is None else ()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt for ``messages``, each with "role" and "content".

        Raises:
            ServeError: The template refuses them.
        """
        if self._template is None:
            lines = [f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages]
            return "".join(lines) + "Assistant:"
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._variables)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise ServeError(f"the model's chat template refuses the messages: {error}") from None


def _compile(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ServeError(f"the model's chat template is no Jinja template: {error}") from None


def load_chat_template(folder: str | os.PathLike[str]) -> ChatTemplate:
    """Load ``chat_template.jinja``, or the entry of ``tokenizer_config.json``; the plain form if there is neither.

    Raises:
        ServeError: There is one and it is no template.
    """
    root = Path(folder)
    config = _config(root)
    variables = {name: _token_text(config, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    path = root / "chat_template.jinja"
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    return ChatTemplate(source, variables)

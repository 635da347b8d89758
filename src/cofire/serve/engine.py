"""Continuous batching: requests join and leave the batch between decode steps.

One thread owns the batch. Requests wait in order of arrival; between two steps at most one prompt is computed, so that
the requests that decode already never wait for more than one of them. Results reach the caller through a function that
the thread calls, which must not block.

Left out: preemption (a request that was admitted runs to its end), sharing of common prefixes, chunked prefill.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from cofire.errors import ServeError
from cofire.model import Decoder
from cofire.serve.batch import Batch
from cofire.serve.sampling import SamplingParameters
from cofire.serve.text import TextOutput


@dataclass(frozen=True)
class Event:
    """What happened to a request: text, its end, or a failure.

    Attributes:
        text: Next piece; may be empty.
        tokens: Generated so far.
        finish_reason: "stop" or "length" in the last event; none before.
        error: Why the request failed; it is the last event.
    """

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        """Whether none follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Request:
    """One sequence to generate.

    Attributes:
        prompt: Token ids, at least one.
        receive: Called by the engine's thread with each event.
        parameters: Of the sampling.
        max_tokens: New tokens, at most.
        stop: Strings that end the text.
    """

    prompt: Sequence[int]
    receive: Callable[[Event], None]
    parameters: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int = 16
    stop: Sequence[str] = ()
    cancelled: bool = field(default=False, init=False)


@dataclass
class Statistics:
    """Counts since the engine started, and what it does now."""

    running: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(eq=False)
class _Active:
    request: Request
    output: TextOutput
    pieces: list[str]


class Engine:
    """Generates for many requests at once.

    Args:
        decoder: In evaluation mode.
        tokenizer: Of the model.
        slots_max: Sequences that decode together, at most.
        context_max: Tokens of a sequence, prompt and output; none: what the model takes.
        queue_max: Requests that wait, at most.
        speculative: Draft with the MTP modules.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        slots_max: int = 8,
        context_max: int | None = None,
        queue_max: int = 64,
        speculative: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.slots_max, self.queue_max = slots_max, queue_max
        self.batch = Batch(decoder, slots_max, context_max, speculative)
        self.context_max = self.batch.context_max
        self.vocab_size = decoder.spec.vocab_size
        self.fault: str | None = None
        self._statistics = Statistics()
        self._waiting: deque[Request] = deque()
        self._active: list[_Active] = []  # by slot
        self._closing = False
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name="cofire-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Put requests into the queue, all of them or none.

        Raises:
            ServeError: One can never be served (reason "invalid"), the queue has no room for all ("busy"), or the
                engine shuts down or failed ("stopped").
        """
        for request in requests:
            self._check(request)
        with self._changed:
            if self.fault is not None:
                raise ServeError(f"the engine failed: {self.fault}; restart the server", "stopped")
            if self._closing:
                raise ServeError("the server is shutting down", "stopped")
            free = self.slots_max - len(self._active)
            if len(self._waiting) + len(requests) > self.queue_max + free:
                raise ServeError(
                    f"{len(self._waiting)} requests wait already and the queue takes {self.queue_max}; try again later",
                    "busy",
                )
            self._waiting.extend(requests)
            self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """End a request before the next step; it receives nothing more. Does nothing to one that has ended."""
        with self._changed:
            request.cancelled = True
            self._changed.notify_all()

    def statistics(self) -> Statistics:
        """Return a copy of the counts."""
        with self._changed:
            counts = Statistics(**vars(self._statistics))
            counts.running, counts.waiting = len(self._active), len(self._waiting)
            counts.drafted_tokens, counts.accepted_tokens = self.batch.drafted, self.batch.accepted
            return counts

    def close(self, timeout_s: float | None = None) -> None:
        """Refuse new requests, finish the ones there are, and stop; after ``timeout_s`` those left fail."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._changed:
                self.fault = self.fault or "it was stopped"
                self._changed.notify_all()
            self._thread.join()

    def _check(self, request: Request) -> None:
        length = len(request.prompt)
        if length == 0:
            raise ServeError("the prompt has no tokens; give it at least one")
        if request.max_tokens < 1:
            raise ServeError(f"max_tokens = {request.max_tokens} must be at least 1")
        if length + request.max_tokens > self.context_max:
            raise ServeError(
                f"the prompt has {length} tokens and max_tokens = {request.max_tokens}, together more than the "
                f"{self.context_max} tokens of context; shorten the prompt or ask for at most "
                f"{max(self.context_max - length, 0)}"
            )
        wrong = next((token for token in request.prompt if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise ServeError(f"token id {wrong} must be between 0 and {self.vocab_size - 1}")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._drop_cancelled()
                while not (self._waiting or self._active or self._closing or self.fault):
                    self._changed.wait()
                request = None if self.fault else self._next()
                done = self.fault is not None or (self._closing and request is None and not self._active)
            if done:
                break
            try:
                if request is not None:
                    self._admit(request)
                if self._active:
                    self._advance()
            except Exception as error:  # whatever it is, callers must hear of it
                with self._changed:
                    self.fault = _line(error)
        self._fail_all()

    def _next(self) -> Request | None:
        """Return the request to admit now. The caller holds the lock."""
        while self._waiting and self._waiting[0].cancelled:
            self._waiting.popleft()
            self._statistics.cancelled += 1
        return self._waiting.popleft() if self._waiting and len(self._active) < self.slots_max else None

    def _admit(self, request: Request) -> None:
        pieces: list[str] = []
        output = TextOutput(self.tokenizer, request.max_tokens, pieces.append, request.stop)
        try:
            first = self.batch.add(request.prompt, request.parameters)
        except Exception as error:  # its prompt alone: the others go on
            self._statistics.failed += 1
            request.receive(Event(error=_line(error)))
            return
        self._statistics.prompt_tokens += len(request.prompt)
        active = _Active(request, output, pieces)
        with self._changed:
            self._active.append(active)
        if not self._give(active, [first]):
            self._remove(len(self._active) - 1)

    def _advance(self) -> None:
        new = self.batch.step()
        self._statistics.steps += 1
        goes_on = [self._give(active, tokens) for active, tokens in zip(self._active, new, strict=True)]
        for slot in reversed(range(len(goes_on))):
            if not goes_on[slot]:
                self._remove(slot)

    def _give(self, active: _Active, new: Sequence[int]) -> bool:
        """Hand new tokens on; return whether the request goes on."""
        before = len(active.output.ids)
        goes_on = active.output.take(new)
        text = "".join(active.pieces)
        active.pieces.clear()
        tokens = len(active.output.ids)
        self._statistics.generated_tokens += tokens - before
        self._statistics.finished += not goes_on
        if not active.request.cancelled and (text or not goes_on):
            active.request.receive(Event(text, tokens, None if goes_on else active.output.reason))
        return goes_on

    def _drop_cancelled(self) -> None:
        """End the cancelled requests. The caller holds the lock, which its thread may take again."""
        for slot in reversed(range(len(self._active))):
            if self._active[slot].request.cancelled:
                self._remove(slot)
                self._statistics.cancelled += 1

    def _remove(self, slot: int) -> None:
        self.batch.remove(slot)
        with self._changed:
            self._active[slot] = self._active[-1]
            self._active.pop()

    def _fail_all(self) -> None:
        with self._changed:
            left = [active.request for active in self._active] + list(self._waiting)
            self._active.clear()
            self._waiting.clear()
            self._statistics.failed += len(left)
        for request in left:
            if not request.cancelled:
                request.receive(Event(error=self.fault or "the server stopped"))


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

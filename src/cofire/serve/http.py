"""OpenAI's completions and chat completions over HTTP, one model per server.

What a request may say and how it is answered follows the OpenAI API reference (completions, chat completions, models);
``top_k`` is an extension. A field that would change the result and that is not implemented here is refused unless it
has the value that changes nothing. Besides: ``/health``, and ``/metrics`` in Prometheus' text format.

A stream that its client leaves, and a request whose client hangs up, end at the next decode step.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cofire.errors import ServeError
from cofire.serve.engine import Engine, Event, Request
from cofire.serve.sampling import SamplingParameters
from cofire.serve.text import ChatTemplate, encode_prompt

BODY_BYTES_MAX = 4 * 2**20
_SEQUENCES_MAX = 128  # of one HTTP request: prompts times n
_CLIENT_CLOSED = 499

# Fields of OpenAI's API that say nothing about the text.
_IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)
# Fields that would change the text and are not implemented, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class _GenerationFields(BaseModel):
    """What both kinds of completion take."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    n: int = Field(1, ge=1, le=_SEQUENCES_MAX)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: _StreamOptions = Field(default_factory=_StreamOptions)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("the body must be a JSON object")
        for name, given in value.items():
            if name in cls.model_fields or name in _IGNORED or given is None:
                continue
            if name not in _NEUTRAL:
                near = difflib.get_close_matches(name, [*cls.model_fields, *_NEUTRAL], n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; the fields are {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown field {name!r}{hint}")
            if given not in _NEUTRAL[name]:
                raise ValueError(f"{name} is not implemented here; leave it out")
        # A null is a field left out.
        return {name: given for name, given in value.items() if given is not None}

    def stop_strings(self) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stop) > 4 or not all(stop):
            raise ServeError("stop takes at most 4 strings, none of them empty")
        return stop

    def sampling(self, choice: int) -> SamplingParameters:
        values: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return (
            SamplingParameters(**values) if self.seed is None else SamplingParameters(**values, seed=self.seed + choice)
        )


class CompletionFields(_GenerationFields):
    """Body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=1)


class _ChatPart(BaseModel):
    type: str
    text: str = ""


class _ChatMessage(BaseModel):
    role: str = Field(min_length=1, max_length=64)
    content: str | list[_ChatPart]

    def as_text(self) -> dict[str, str]:
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        wrong = next((part.type for part in self.content if part.type != "text"), None)
        if wrong is not None:
            raise ServeError(f"content of type {wrong!r} is not implemented here; this model reads text")
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class ChatFields(_GenerationFields):
    """Body of ``/v1/chat/completions``. Without a limit an answer may fill the context."""

    messages: list[_ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


@dataclass
class _Job:
    """The sequences of one HTTP request, and the events of all of them in one queue."""

    engine: Engine
    requests: list[Request]
    events: asyncio.Queue[tuple[int, Event]]
    prompt_tokens: int

    @classmethod
    def start(
        cls,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        fields: _GenerationFields,
        max_tokens: Callable[[int], int],
        stop: Sequence[str] = (),
    ) -> _Job:
        if not 1 <= len(prompts) * fields.n <= _SEQUENCES_MAX:
            raise ServeError(
                f"prompts times n = {len(prompts) * fields.n} must be between 1 and {_SEQUENCES_MAX}; "
                "send several requests"
            )
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def receiver(index: int) -> Callable[[Event], None]:
            def receive(event: Event) -> None:
                try:
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))
                except RuntimeError:  # the loop is closed: nobody listens any more
                    return

            return receive

        strings = (*fields.stop_strings(), *stop)
        requests = [
            Request(ids, receiver(i * fields.n + k), fields.sampling(k), max_tokens(len(ids)), strings)
            for i, ids in enumerate(prompts)
            for k in range(fields.n)
        ]
        engine.submit(requests)
        return cls(engine, requests, events, sum(map(len, prompts)))

    async def stream(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield events until every sequence has ended; whoever stops listening cancels them."""
        left = len(self.requests)
        try:
            while left:
                index, event = await self.events.get()
                left -= event.last
                yield index, event
        finally:
            for request in self.requests:
                self.engine.cancel(request)

    def usage(self, completion_tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": total,
        }


@dataclass
class _Form:
    """How one kind of completion looks in JSON."""

    prefix: str
    kind: str
    stream_kind: str
    whole: Callable[[str], dict[str, Any]]
    piece: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None = None

    def choice(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}


_COMPLETION = _Form("cmpl", "text_completion", "text_completion", lambda t: {"text": t}, lambda t: {"text": t})
_CHAT = _Form(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"content": text} if text else {}},
    {"delta": {"role": "assistant", "content": ""}},
)


async def _whole(job: _Job, form: _Form, head: dict[str, Any]) -> JSONResponse:
    texts, reasons, tokens = ([""] * len(job.requests), [""] * len(job.requests), [0] * len(job.requests))
    async for index, event in job.stream():
        if event.error is not None:
            return _error(500, event.error, "server_error")
        texts[index] += event.text
        tokens[index], reasons[index] = event.tokens, event.finish_reason or ""
    choices = [form.choice(i, form.whole(text), reasons[i]) for i, text in enumerate(texts)]
    return JSONResponse({**head, "choices": choices, "usage": job.usage(sum(tokens))})


def _line(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _pieces(job: _Job, form: _Form, head: dict[str, Any], include_usage: bool) -> AsyncIterator[str]:
    tokens = [0] * len(job.requests)
    events = job.stream()
    try:
        if form.opening is not None:
            for index in range(len(job.requests)):
                yield _line({**head, "choices": [form.choice(index, form.opening, None)]})
        async for index, event in events:
            if event.error is not None:
                yield _line(_error_body(event.error, "server_error"))
                return
            tokens[index] = event.tokens
            yield _line({**head, "choices": [form.choice(index, form.piece(event.text), event.finish_reason)]})
        if include_usage:
            yield _line({**head, "choices": [], "usage": job.usage(sum(tokens))})
        yield "data: [DONE]\n\n"
    finally:
        await events.aclose()  # type: ignore[attr-defined]
        for request in job.requests:  # also where the first event was never asked for
            job.engine.cancel(request)


async def _until_disconnected(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer(request: HTTPRequest, job: _Job, form: _Form, fields: _GenerationFields, model: str) -> Response:
    head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
    if fields.stream:
        head["object"] = form.stream_kind
        lines = _pieces(job, form, head, fields.stream_options.include_usage)
        return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    head["object"] = form.kind
    work = asyncio.ensure_future(_whole(job, form, head))
    gone = asyncio.ensure_future(_until_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=_CLIENT_CLOSED)
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        for sequence in job.requests:
            job.engine.cancel(sequence)


def _error_body(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _error(status: int, message: str, kind: str = "invalid_request_error", **headers: str) -> JSONResponse:
    return JSONResponse(_error_body(message, kind), status, {name.replace("_", "-"): v for name, v in headers.items()})


class _Gate:
    """Lets a request in: the token first, then the size of the body, before anything is read or parsed."""

    def __init__(self, app: ASGIApp, token: str | None, body_bytes_max: int) -> None:
        self.app = app
        self.token = None if token is None else token.encode()
        self.body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.body_bytes_max:
                raise HTTPException(413, f"the body has more than {self.body_bytes_max} bytes")
            return message

        await self.app(scope, counted, send)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        if self.token is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), self.token):
                return _error(401, "a valid token is needed: Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.body_bytes_max:
            return _error(413, f"the body has {length} bytes; at most {self.body_bytes_max} are taken")
        return None


def _prompts(engine: Engine, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
    if isinstance(prompt, str):
        prompt = [prompt]
    if prompt and isinstance(prompt[0], int):
        prompt = [prompt]  # type: ignore[list-item]
    return [encode_prompt(engine.tokenizer, one) if isinstance(one, str) else list(one) for one in prompt]  # type: ignore[arg-type]


def create_app(
    engine: Engine, model: str, template: ChatTemplate | None = None, token: str | None = None, loopback: bool = True
) -> FastAPI:
    """Return the ASGI application; it starts the engine, and closes it when it is shut down.

    Args:
        engine: Not started.
        model: Name that the API gives it.
        template: Of chats; none: the plain form.
        token: That requests must carry; none: they need none.
        loopback: Without a token, refuse requests that a browser sends for another host (DNS rebinding).
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close, 0.0)

    app = FastAPI(title="Cofire", lifespan=lifespan, docs_url=None, redoc_url=None)
    if token is None and loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "::1"])
    app.add_middleware(_Gate, token=token, body_bytes_max=BODY_BYTES_MAX)
    _add_errors(app)

    _add_completions(app, engine, model, template or ChatTemplate())
    _add_state(app, engine, model)
    return app


def _check_model(name: str | None, served: str) -> None:
    if name not in (None, served):
        raise StarletteHTTPException(404, f"model {name!r} is not here; this server has {served!r}")


def _add_completions(app: FastAPI, engine: Engine, model: str, template: ChatTemplate) -> None:
    @app.post("/v1/completions")
    async def completions(request: HTTPRequest, fields: CompletionFields) -> Response:
        _check_model(fields.model, model)
        job = _Job.start(engine, _prompts(engine, fields.prompt), fields, lambda length: fields.max_tokens)
        return await _answer(request, job, _COMPLETION, fields, model)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: HTTPRequest, fields: ChatFields) -> Response:
        _check_model(fields.model, model)
        prompt = template.render([message.as_text() for message in fields.messages])
        ids = encode_prompt(engine.tokenizer, prompt, special_tokens=False)
        limit = fields.max_completion_tokens or fields.max_tokens

        def max_tokens(length: int) -> int:
            return limit or max(engine.context_max - length, 1)

        job = _Job.start(engine, [ids], fields, max_tokens, template.stop)
        return await _answer(request, job, _CHAT, fields, model)


def _add_state(app: FastAPI, engine: Engine, model: str) -> None:
    entry = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "cofire"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: Annotated[str, "as listed"]) -> dict[str, Any]:
        _check_model(name, model)
        return entry

    @app.get("/health")
    async def health() -> Response:
        if engine.fault is not None:
            return JSONResponse({"status": "failed", "reason": engine.fault}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(_exposition(engine), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = str(first["msg"]).removeprefix("Value error, ")
        return _error(400, f"{place}: {message}" if place else message)

    @app.exception_handler(ServeError)
    async def refused(_: HTTPRequest, error: ServeError) -> JSONResponse:
        if error.reason == "busy":
            return _error(429, str(error), "rate_limit_error", Retry_After="1")
        if error.reason == "stopped":
            return _error(503, str(error), "server_error", Retry_After="5")
        return _error(400, str(error))

    @app.exception_handler(StarletteHTTPException)
    async def failed(request: HTTPRequest, error: StarletteHTTPException) -> JSONResponse:
        message = error.detail
        if error.status_code == 404 and message == "Not Found":
            message = (
                f"no {request.url.path} here; there are /v1/completions, /v1/chat/completions, /v1/models, /health"
            )
        return _error(error.status_code, message)


def _exposition(engine: Engine) -> str:
    lines: list[str] = []
    for name, value in vars(engine.statistics()).items():
        kind = "gauge" if name in ("running", "waiting") else "counter"
        full = f"cofire_{name}" if kind == "gauge" else f"cofire_{name}_total"
        lines += [f"# TYPE {full} {kind}", f"{full} {value}"]
    return "\n".join(lines) + "\n"

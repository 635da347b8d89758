"""``cofire serve``: a trained model behind OpenAI's HTTP interface."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cofire.cli.options import JsonOption
from cofire.cli.output import print_json, print_note
from cofire.errors import ServeError

if TYPE_CHECKING:
    from fastapi import FastAPI

TOKEN_VARIABLE = "COFIRE_TOKEN"
_GRACE_S = 30  # that running requests have when the server is told to stop


def register(app: typer.Typer) -> None:
    """Add ``cofire serve``."""
    app.command("serve")(serve)


def serve(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Folder of a run, a checkpoint or a Hugging Face model; its name is the model's."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on. Any but this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the token that requests must carry; or set {TOKEN_VARIABLE}."),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Sequences that decode together.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are told to come again.")] = 64,
    context: Annotated[int | None, typer.Option(min=2, help="Longest sequence; the model's own if left out.")] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of weights and cache.")] = "fp32",
    speculative: Annotated[bool, typer.Option("--speculative", help="Draft with the model's MTP modules.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Serve /v1/completions and /v1/chat/completions; end it with Ctrl-C or SIGTERM."""
    token = _read_token(token_file)
    listener = _bind(host, port, token)
    with listener:
        import torch

        from cofire.serve.engine import Engine
        from cofire.serve.http import create_app
        from cofire.serve.loading import DTYPES, load
        from cofire.serve.text import load_chat_template

        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer, decoder = load(run, slots, context, DTYPES[dtype], device)
        engine = Engine(decoder, tokenizer, slots, context, queue, speculative)
        model = run.resolve().name
        template = load_chat_template(run)
        app = create_app(engine, model, template, token, loopback=_is_loopback(listener))
        _serve(app, listener, model, as_json)


def _read_token(path: Path | None) -> str | None:
    if path is None:
        token = os.environ.get(TOKEN_VARIABLE)
        source = TOKEN_VARIABLE
    else:
        source = str(path)
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ServeError(f"--token-file {path}: {reason}; name a file that holds the token") from None
    if token is not None and (not token.strip() or not token.isascii() or len(token.split()) != 1):
        raise ServeError(f"{source} holds no token: one word of ASCII characters is needed")
    return token


def _bind(host: str, port: int, token: str | None) -> socket.socket:
    """Take the port before the model is loaded, so that one in use is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ServeError(f"--host {host!r} is no address of a machine; try 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        if token is None and not _is_loopback(listener):
            raise ServeError(
                f"--host {host} can be reached from other machines and needs a token; give --token-file, "
                f"set {TOKEN_VARIABLE}, or listen on 127.0.0.1"
            )
    except OSError as error:
        listener.close()
        raise ServeError(f"port {port} of {host} cannot be used: {error.strerror}; try --port 0") from None
    except ServeError:
        listener.close()
        raise
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    import ipaddress

    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _serve(app: FastAPI, listener: socket.socket, model: str, as_json: bool) -> None:
    import contextlib
    import signal
    from collections.abc import Iterator

    import uvicorn

    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """End in order at the first signal and return; uvicorn's own would raise the signal again."""
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and as_json:
                print_json({"url": url, "model": model})
            elif self.started:
                print_note(f"{model} at {url}/v1 (completions, chat/completions); Ctrl-C ends it")
            import sys

            sys.stdout.flush()

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_S,
        lifespan="on",
        server_header=False,
    )
    server = Server(config)
    server.run(sockets=[listener])
    if not server.started:
        raise ServeError("the server could not start; see the lines above")

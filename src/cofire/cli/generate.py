"""``cofire generate``: text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cofire.cli.options import JsonOption
from cofire.cli.output import print_json, print_note


def register(app: typer.Typer) -> None:
    """Add ``cofire generate``."""
    app.command("generate")(generate)


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, a checkpoint or a Hugging Face model.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to go on from. Repeat it for a batch.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this share.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws; the same seed gives the same text.")] = 0,
    speculative: Annotated[bool, typer.Option("--speculative", help="Draft with the model's MTP modules.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode without drafts too, and print both speeds.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Generate text and print how fast it went."""
    from dataclasses import asdict

    from cofire.serve.generation import generate as run_generation
    from cofire.serve.loading import load
    from cofire.serve.sampling import SamplingParameters

    prompts = prompt or [""]
    parameters = [
        SamplingParameters(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed + i)
        for i in range(len(prompts))
    ]
    tokenizer, decoder = load(run, slots_max=len(prompts))

    def show(_: int, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    single = len(prompts) == 1 and not as_json
    if single:
        sys.stdout.write(prompts[0])
    result = run_generation(
        decoder, tokenizer, prompts, parameters, max_tokens, speculative or compare, show if single else None
    )
    plain = run_generation(decoder, tokenizer, prompts, parameters, max_tokens) if compare else None
    if as_json:
        values = asdict(result)
        if plain is not None:
            values["plain_tokens_per_s"] = plain.tokens_per_s
            values["same_tokens_as_plain"] = plain.token_ids == result.token_ids
        print_json(values)
        return
    if not single:
        for text, start in zip(result.texts, prompts, strict=True):
            sys.stdout.write(f"--- {start!r}\n{start}{text}\n")
    sys.stdout.write("\n")
    print_note(f"{sum(map(len, result.token_ids))} tokens, {result.tokens_per_s:,.1f} tokens/s decoding")
    cut = [len(ids) for ids, why in zip(result.token_ids, result.finish_reasons, strict=True) if why == "length"]
    if cut and min(cut) < max_tokens:
        print_note(f"the model's {decoder.spec.max_sequence_length} tokens of context were full before --max-tokens")
    if result.acceptance is not None:
        print_note(f"drafts kept by the main model: {result.acceptance:.1%}")
    if plain is not None:
        same = "the same tokens" if plain.token_ids == result.token_ids else "other tokens"
        speed_up = result.tokens_per_s / plain.tokens_per_s
        print_note(f"without drafts {plain.tokens_per_s:,.1f} tokens/s and {same}: speed-up {speed_up:.2f}")

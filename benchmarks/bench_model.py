"""Training and decoding speed of one preset against transformers' DeepseekV3ForCausalLM, in one process.

Both sides have the same weights (written by cofire.model.huggingface, loaded by transformers) and see the same tokens;
before anything is timed their logits are compared. MTP is off on both sides; our cost with MTP is a row of its own.
Sides take turns within each repeat, so that a slow moment of the machine hits both; the first call of a turn is
not timed. Figures are medians with the interquartile range.

    training   forward, backward and AdamW (torch's fused one on both sides) over batch x sequence tokens
    decoding   greedy, with --context tokens in the cache before the clock starts

The peer runs eagerly with SDPA attention, with each of its own implementations of experts, and under
torch.compile where that works; the fastest of them counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cofire.model import build, huggingface
from cofire.model.memory import keep_freed_memory
from cofire.plan import training_flops_per_token
from cofire.serve.batch import Batch
from cofire.serve.sampling import SamplingParameters
from cofire.spec import ModelSpec, load_as
from cofire.train.metrics import measure_matrix_peak

_DECODE_STEPS = 30  # of a turn: text is decoded in a row, so one cold step must not weigh a tenth
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def autocast(dtype: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")


def load_peer(folder: Path, experts: str, dtype: torch.dtype):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
    )


def train_step(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, dtype: str) -> Callable[[], None]:
    def step() -> None:
        with autocast(dtype):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_sides(spec: ModelSpec, folder: Path, tokens: torch.Tensor, dtype: str, peers: list[str]):
    """Return name -> step. All start from the same weights."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    sides: dict[str, Callable[[], None]] = {}
    ours = huggingface.load(folder).train()
    sides["cofire"] = train_step(
        lambda: ours.loss(tokens).loss, torch.optim.AdamW(ours.parameters(), fused=True), dtype
    )
    if spec.mtp is not None:
        full = build(spec, seed=0).train()
        adamw = torch.optim.AdamW(full.parameters(), fused=True)
        sides["cofire with MTP"] = train_step(lambda: full.loss(tokens).loss, adamw, dtype)
    for name in peers:
        experts, compiled = name.removesuffix("+compile"), name.endswith("+compile")
        peer = load_peer(folder, experts, torch.float32).train()
        run = torch.compile(peer) if compiled else peer

        def loss(run=run) -> torch.Tensor:
            logits = run(input_ids=inputs, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.reshape(-1))

        sides[f"transformers {name}"] = train_step(loss, torch.optim.AdamW(peer.parameters(), fused=True), dtype)
    return sides


def decoding_sides(folder: Path, prompts: torch.Tensor, dtype: str, peers: list[str]):
    """Return name -> one greedy decode step of all sequences, each behind a filled cache."""
    sides: dict[str, Callable[[], Any]] = {}
    batch = Batch(huggingface.load(folder, dtype=DTYPES[dtype]).eval(), slots_max=len(prompts))
    for prompt in prompts.tolist():
        batch.add(prompt, SamplingParameters(temperature=0.0))
    sides["cofire"] = batch.step
    for name in peers:
        peer = load_peer(folder, name, DTYPES[dtype]).eval()
        sides[f"transformers {name}"] = PeerDecoder(peer, prompts).step
    return sides


class PeerDecoder:
    """transformers' own forward pass over its own DynamicCache, without generate()'s bookkeeping."""

    def __init__(self, peer, prompts: torch.Tensor) -> None:
        from transformers import DynamicCache

        self.peer, self.cache = peer, DynamicCache(config=peer.config)
        with torch.inference_mode():
            out = peer(input_ids=prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.next = out.logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def step(self) -> None:
        out = self.peer(input_ids=self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next = out.logits[:, -1].argmax(-1, keepdim=True)


def interleave(sides: dict[str, Callable[[], Any]], repeats: int, per_repeat: int) -> dict[str, list[float]]:
    """Time every side in turn; return seconds per call, one per repeat. A side that fails is dropped and said so."""
    seconds: dict[str, list[float]] = {}
    for name, call in list(sides.items()):
        try:
            call()
            call()
            seconds[name] = []
        except Exception as error:  # an implementation that the peer does not support here
            print(f"  {name}: does not run here ({type(error).__name__}: {str(error).splitlines()[0][:90]})")
            del sides[name]
    for _ in range(repeats):
        for name, call in sides.items():
            call()  # not timed: the other sides have taken the caches, that of compiled kernels too
            start = time.perf_counter()
            for _ in range(per_repeat):
                call()
            seconds[name].append((time.perf_counter() - start) / per_repeat)
    return seconds


def check_equal(folder: Path, tokens: torch.Tensor) -> float:
    """Return the largest difference of the two sides' logits in FP32."""
    ours, peer = huggingface.load(folder).eval(), load_peer(folder, "eager", torch.float32).eval()
    with torch.no_grad():
        difference = (ours.logits(ours(tokens).hidden) - peer(tokens).logits).abs().max()
    if difference > 5e-6:
        sys.exit(f"the two sides' logits differ by {float(difference):.3g}; nothing is timed")
    return float(difference)


def rows(what: str, tokens: int, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    found = []
    for name, values in seconds.items():
        rates = sorted(tokens / value for value in values)
        low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else (rates[0],) * 3
        found.append({"what": what, "side": name, "tokens_per_s": statistics.median(rates), "iqr": [low, high]})
    best = max((r["tokens_per_s"] for r in found if r["side"].startswith("transformers")), default=float("nan"))
    for row in found:
        row["against_best_peer"] = row["tokens_per_s"] / best
    return found


def peak_memory(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return each side's peak resident memory of three training steps, in a process of its own, GB."""
    found = {}
    for side in ("cofire", "transformers"):
        code = (
            "import sys;sys.path.insert(0,sys.argv[1]);import bench_model as b,torch;from pathlib import Path;"
            "torch.manual_seed(0);o=b.parse(sys.argv[4:]);s=b.bare(o);f=Path(sys.argv[2]);"
            "t=torch.randint(0,s.vocab_size,(o.batch,o.sequence+1));"
            "p=[] if sys.argv[3]=='cofire' else ['grouped_mm'];"
            "d=b.training_sides(s,f,t,'bf16',p);"
            "d={k:v for k,v in d.items() if k.startswith(sys.argv[3])};c=next(iter(d.values()));c();c();c();"
            "hwm=[x for x in open('/proc/self/status') if x.startswith('VmHWM')];"  # ru_maxrss survives exec
            "print(float(hwm[0].split()[1])*1024/1e9)"
        )
        words = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder), side, *options.words]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[side] = float(done.stdout.split()[-1])
    return found


def bare(options: argparse.Namespace) -> ModelSpec:
    """The preset without MTP."""
    return load_as(ModelSpec, options.model).model_copy(update={"mtp": None})


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also time the peer under torch.compile")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    options.words = words
    return options


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    torch.manual_seed(0)
    keep_freed_memory()  # of the process: both sides profit
    full, spec = load_as(ModelSpec, options.model), bare(options)
    peaks = {name: measure_matrix_peak(torch.device("cpu"), dtype) for name, dtype in DTYPES.items()}
    notes = [f"matrix peak {name}: {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items()]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        huggingface.save(build(spec, seed=0), folder)
        tokens = torch.randint(0, spec.vocab_size, (options.batch, options.sequence + 1))
        notes.append(f"largest difference of logits before timing: {check_equal(folder, tokens[:2, :64]):.2g}")
        for dtype in DTYPES:
            peers = ["eager", "grouped_mm", "batched_mm"] + (["grouped_mm+compile"] if options.compile else [])
            print(f"training, {dtype}", file=sys.stderr)
            sides = training_sides(full, folder, tokens, dtype, peers)
            if options.batch * options.sequence > 1024:
                sides.pop("transformers batched_mm")  # it copies an expert's weights for every token: tens of GB
            table = rows(f"training {dtype}", options.batch * options.sequence, interleave(sides, options.repeats, 2))
            for row in table:
                with_mtp = row["side"].endswith("MTP")
                flops = training_flops_per_token(full if with_mtp else spec, options.sequence).total
                row["of_peak"] = row["tokens_per_s"] * flops / peaks[dtype]
            found += table
        for dtype in DTYPES:
            for batch in (1, 8):
                print(f"decoding, {dtype}, batch {batch}", file=sys.stderr)
                prompts = torch.randint(0, spec.vocab_size, (batch, options.context))
                sides = decoding_sides(folder, prompts, dtype, ["eager", "grouped_mm", "batched_mm"])
                seconds = interleave(sides, options.repeats, _DECODE_STEPS)
                found += rows(f"decoding {dtype}, batch {batch}", batch, seconds)
        if not options.skip_memory:
            for side, size in peak_memory(options, folder).items():
                notes.append(f"peak resident memory of bf16 training, {side}: {size:.2f} GB")
    return found, notes


def table_text(found: list[dict[str, Any]]) -> str:
    lines = ["| what | side | tokens/s (median) | interquartile range | against the best peer | of the matrix peak |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found:
        share = f"{row['of_peak']:.1%}" if "of_peak" in row else "-"
        low, high = row["iqr"]
        lines.append(
            f"| {row['what']} | {row['side']} | {row['tokens_per_s']:,.0f} | {low:,.0f} to {high:,.0f} | "
            f"{row['against_best_peer']:.2f} | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = parse(sys.argv[1:])
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    found, notes = measure(options)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    import transformers

    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    head = [
        f"# Speed of `{options.model}` against transformers {transformers.__version__}, *measured*",
        "",
        f"Commit {commit.stdout.strip()}; {machine}; n = {options.repeats} interleaved repeats; command "
        f"`python benchmarks/bench_model.py {' '.join(options.words)}`.",
        "",
    ]
    text = "\n".join([*head, table_text(found), "", *(f"- {note}" for note in notes), ""])
    print(json.dumps({"rows": found, "notes": notes}, indent=2) if options.json else text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()

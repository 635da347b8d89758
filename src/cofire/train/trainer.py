"""The training loop: from a RunSpec to a folder with a trained model.

One optimiser step: the batch's micro-batches run forward and backward, gradients add up, the router loads of all
of them are summed; then clip, AdamW, and one move of every selection bias by the summed load (Loss-Free
Balancing, arXiv 2408.15664, algorithm 1). Everything that decides the next step is in the checkpoint, so a resumed
run repeats an uninterrupted one bit for bit.

Left out: more than one process; placement comes with ``cofire.parallel``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cofire.errors import TrainError
from cofire.model import build
from cofire.model.balance import max_violation, update_biases
from cofire.model.memory import keep_freed_memory
from cofire.plan import Plan, estimate
from cofire.precision.health import Watch, summary
from cofire.spec import RunSpec, diff, dump, load_as
from cofire.spec.units import format_quantity
from cofire.train import metrics
from cofire.train.atomic import replace_file
from cofire.train.checkpoint import CheckpointStore
from cofire.train.data import PackedData, prepare
from cofire.train.loader import Loader, validation_batches
from cofire.train.number_formats import set_formats
from cofire.train.optimizer import AdamW
from cofire.train.schedule import learning_rate
from cofire.train.suspend import FileSuspend, SignalSuspend, SuspendSignal, first_request
from cofire.train.view import Progress, View, make_view

# Fields that a resumed run may change: they do not alter what the steps so far have computed.
_CHANGEABLE = ("steps", "name", "description", "checkpoint.", "validate_every_steps", "validation_sequences")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LOAD_EVERY = 10
# What PyTorch, oneDNN and the allocator take beside the tensors that the plan counts (measured: docs/lab/LOG.md).
_PROCESS_BYTES = 1_000_000_000
_RECENT_STEPS = 20


@dataclass(frozen=True)
class RunResult:
    """What a run ended with. Losses in nats per token; ``reason`` is ``finished`` or who asked it to stop."""

    folder: str
    reason: str
    step: int
    tokens: int
    seconds: float
    tokens_per_s: float
    mfu: float
    validation_loss: float | None
    bits_per_byte: float | None
    unigram_entropy: float
    max_violation_global: list[float]
    peak_memory_bytes: int


def fit(
    run: RunSpec,
    out: str | os.PathLike[str],
    resume: bool = False,
    view: View | None = None,
    signals: Sequence[SuspendSignal] = (),
) -> RunResult:
    """Train a model into a folder.

    Args:
        run: What to train, on what, for how long.
        out: The run's folder; made if missing.
        resume: Go on from the newest whole checkpoint in ``out``, if there is one.
        view: Where progress is shown; none: nowhere.
        signals: Further sources of requests to stop, beside SIGTERM, SIGINT and ``COFIRE_SUSPEND_FILE``.

    Returns:
        The result; ``reason`` says whether all steps were made.

    Raises:
        TrainError: The folder, the data, the memory or a checkpoint does not allow it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError("WORLD_SIZE > 1, but training runs in one process so far; start it without torchrun")
    folder = Path(out)
    view = view or make_view(quiet=True)
    check_folder(folder, run, resume)
    with contextlib.ExitStack() as stack:
        handlers: list[SuspendSignal] = [FileSuspend(), *signals]
        with contextlib.suppress(ValueError):  # not in the main thread: signals belong to somebody else
            handlers.append(stack.enter_context(SignalSuspend()))
        trainer = Trainer(run, folder, resume, view)
        try:
            return trainer.train(handlers)
        finally:
            trainer.close()


def check_folder(folder: Path, run: RunSpec, resume: bool) -> None:
    """Say why a folder cannot be this run's, if it cannot; nothing is written yet."""
    saved = folder / "run.toml"
    if saved.exists():
        if not resume:
            raise TrainError(f"{folder} already holds a run; add --resume to go on with it, or name another --out")
        rows = [row for row in diff(load_as(RunSpec, saved), run) if not row[0].startswith(_CHANGEABLE)]
        if rows:
            path, old, new = rows[0]
            raise TrainError(
                f"{folder} holds a run with {path} = {old!r}, not {new!r}; resume it with its own settings, or name "
                "another --out"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrainError(f"{folder} is not empty and holds no run; name another --out")


class Trainer:
    """The state of one run and the steps that change it."""

    def __init__(self, run: RunSpec, folder: Path, resume: bool, view: View) -> None:
        self.run, self.folder, self.view = run, folder, view
        self.device = _device(run.device)
        keep_freed_memory()
        self.plan = estimate(run)
        self._check_memory()
        self.data = self._prepare()
        self._claim_folder()
        self.store = CheckpointStore(folder, run.model, run.checkpoint.keep)
        newest = self.store.newest() if resume else None
        saved = {} if newest is None else json.loads((newest / "state.json").read_text("utf-8"))
        recipe = saved.get("recipe") or run.precision.recipe
        self.recipe = metrics.choose_recipe(self.device) if recipe == "auto" else recipe
        # Beside FP8 products the model is in the type that the device is made for.
        self.rest = self.recipe
        if self.recipe == "fp8":
            self.rest = saved.get("rest") or metrics.choose_recipe(self.device)
        self.compute_dtype = _DTYPES[self.rest]
        self.peak_flops_per_s = metrics.measure_matrix_peak(self.device, self.compute_dtype)
        torch.manual_seed(run.seed)
        random.seed(run.seed)
        self.decoder = build(run.model, device=self.device, seed=run.seed).train()
        self.watch = Watch()
        self.products = set_formats(self.decoder, run.precision, self.recipe, self.watch)
        self.decoder.recompute = run.recompute
        self.loss: Callable[[Tensor], Any] = torch.compile(self.decoder.loss) if run.compile else self.decoder.loss
        self.optimizer = AdamW(self.decoder.named_parameters(), run.optimizer, _DTYPES[run.precision.moment_format])
        self.ema = {} if run.ema_decay is None else _copy_weights(self.decoder)
        self.loader = Loader(self.data.train, run.data.sequence_length, run.batch_size, run.seed)
        self.validation = validation_batches(
            self.data.validation, run.data.sequence_length, run.micro_batch_size, run.validation_sequences
        )
        self.step, self.seconds_before = 0, 0.0
        if newest is not None:
            self._restore(newest)
        self.log = metrics.MetricsLog(folder, self.step if resume else None)
        self.started = time.perf_counter()
        self.recent: list[float] = []
        self.last_validation: dict[str, Any] = {}
        self._announce(newest)

    # -- before the first step ------------------------------------------------------------------------

    def _check_memory(self) -> None:
        needed = self.plan.training_memory.total + _PROCESS_BYTES
        free = metrics.available_memory_bytes(self.device)
        if needed > free:
            raise TrainError(
                f"training {self.run.model.name} needs about {format_quantity(needed, 'B')} (modelled), but "
                f"{format_quantity(free, 'B')} are free on {self.device}; lower micro_batch_size, set "
                "recompute=full, or take a smaller model"
            )

    def _prepare(self) -> PackedData:
        last = ""

        def progress(phase: str, fraction: float) -> None:
            nonlocal last
            if phase != last:
                self.view.note(f"data: {phase}")
                last = phase

        return prepare(self.run.data, self.run.model.vocab_size, progress)

    def _claim_folder(self) -> None:
        """Write what says whose folder this is, once nothing but the disk can refuse the run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_text(self.folder / "tokenizer.json", self.data.tokenizer_path.read_text("utf-8"))
            _write_text(self.folder / "run.toml", dump(self.run))
        except OSError as error:
            raise TrainError(f"cannot write to {self.folder}: {error.strerror}") from None

    def _announce(self, newest: Path | None) -> None:
        count = self.plan.parameters
        self.plan.save(self.folder / "plan.json")
        if newest is None:
            self.log.write(
                "start",
                step=0,
                time_s=0.0,
                run_name=self.run.name,
                parameters_total=count.total_with_mtp,
                parameters_activated=count.activated_head_only,
                matrix_peak_flops_per_s=self.peak_flops_per_s,
                dtype=self.recipe,
                products=self.products,
                rest=self.rest,
                device=str(self.device),
                machine=_machine(self.device),
                unigram_entropy_nats=self.data.unigram_entropy,
                bytes_per_token=self.data.bytes_per_token,
                train_tokens=self.data.train.num_tokens,
                validation_tokens=self.data.validation.num_tokens,
            )
        else:
            self.log.write("resume", step=self.step, time_s=self.seconds_before)
            self.view.note(f"resumed after step {self.step} from {newest.name}")
        self.view.note(
            f"{self.run.model.name}: {count.total_with_mtp:,} parameters, {self.recipe} on {self.device}, matrix peak "
            f"{format_quantity(self.peak_flops_per_s, 'FLOP/s')} (measured), unigram entropy "
            f"{self.data.unigram_entropy:.3f} nats/token"
        )

    # -- the loop -------------------------------------------------------------------------------------

    def train(self, signals: Sequence[SuspendSignal]) -> RunResult:
        """Make the steps that are left; save, report and return."""
        reason = first_request(signals)
        while self.step < self.run.steps and reason is None:
            self._train_step()
            if self.step % self.run.validate_every_steps == 0 or self.step == self.run.steps:
                self._validate()
            if self.step % self.run.checkpoint.every_steps == 0 and self.step < self.run.steps:
                self._save(self.run.checkpoint.asynchronous)
            reason = first_request(signals)
        self.store.wait()
        newest = self.store.newest()
        if newest is None or not newest.name.endswith(f"-{self.step:08d}"):
            self._save(asynchronous=False)
        reason = "finished" if self.step >= self.run.steps else f"stopped by {reason}"
        self.log.write(
            "end",
            step=self.step,
            time_s=self.seconds,
            reason=reason,
            peak_memory_bytes=metrics.peak_memory_bytes(self.device),
        )
        result = self._result(reason)
        if reason == "finished":
            self._publish()
        return result

    def close(self) -> None:
        """Leave threads and files in order."""
        try:
            self.store.wait()
        finally:
            self.log.close()
            self.view.close()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, summed over resumes."""
        return self.seconds_before + time.perf_counter() - self.started

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def _train_step(self) -> None:
        start = time.perf_counter()
        batch = self.loader.next_batch().to(self.device)
        parts = batch.split(self.run.micro_batch_size)
        outputs = []
        self.watch.active = (self.step + 1) % self.run.validate_every_steps == 0
        for tokens in parts:
            with self._autocast():
                output = self.loss(tokens)
            (output.loss / len(parts)).backward()
            outputs.append([value.detach() for value in output])
        _, main_loss, mtp_losses, balance_loss, counts = (torch.stack(values) for values in zip(*outputs, strict=True))
        load = counts.sum(0)
        norm = self.optimizer.clip()
        rate = learning_rate(self.run.schedule, self.run.optimizer.learning_rate, self.step + 1, self.run.steps)
        if not bool(torch.isfinite(norm)):
            raise TrainError(
                f"the gradient of step {self.step + 1} is not finite; start again in a new --out with a lower "
                f"optimizer.learning_rate (now {self.run.optimizer.learning_rate:g}) or more schedule.warmup_steps "
                f"(now {self.run.schedule.warmup_steps})"
            )
        self.optimizer.step(rate)
        self.optimizer.zero_grad()
        if self.run.model.moe is not None:
            update_biases(self.decoder.moe_routers(), load, self.run.model.moe.balance)
        self._update_ema()
        self.step += 1
        self.recent = [*self.recent[1 - _RECENT_STEPS :], time.perf_counter() - start]
        losses = (main_loss.mean().item(), mtp_losses.mean(0).tolist(), balance_loss.mean().item())
        self._log_step(losses, load, rate, norm.item())

    def _log_step(
        self, losses: tuple[float, list[float], float], load: Tensor, learning_rate: float, grad_norm: float
    ) -> None:
        main_loss, mtp_losses, balance_loss = losses
        violation = max_violation(load).tolist()
        tokens_per_s = self.run.tokens_per_step / self.recent[-1]
        mtp_weight = 0.0 if self.run.model.mtp is None else self.run.model.mtp.loss_weight
        mtp = sum(mtp_losses) / max(1, len(mtp_losses))
        values = {
            "step": self.step,
            "time_s": self.seconds,
            "loss": main_loss + mtp_weight * mtp + balance_loss,
            "main_loss": main_loss,
            "mtp_losses": mtp_losses,
            "balance_loss": balance_loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": self.step * self.run.tokens_per_step,
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
            "max_violation": violation,
        }
        shares = (load / load.sum(-1, keepdim=True).clamp_min(1)).tolist()
        if self.step % _LOAD_EVERY == 0 or self.step == 1:
            values["expert_load"] = [[round(share, 6) for share in layer] for layer in shares]
        self.log.write("step", **values)
        if seen := self.watch.take():
            self.watch.active = False
            self.log.write("precision", step=self.step, time_s=self.seconds, **summary(seen))
        rate = metrics.recent_rate(self.run.tokens_per_step, self.recent)
        self.view.show(
            Progress(
                step=self.step,
                steps=self.run.steps,
                main_loss=main_loss,
                validation_loss=self.last_validation.get("loss"),
                bits_per_byte=self.last_validation.get("bits_per_byte"),
                tokens_per_s=rate,
                mfu=self._mfu(rate),
                seconds_left=(self.run.steps - self.step) * self.run.tokens_per_step / rate,
                max_violation=violation,
                expert_load=shares,
            )
        )

    def _mfu(self, tokens_per_s: float) -> float:
        return tokens_per_s * self.plan.training_flops.total / self.peak_flops_per_s

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.run.ema_decay is not None:
            weights = [p.detach().to("cpu", torch.float32) for p in self.decoder.parameters()]
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - self.run.ema_decay)

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Let the decoder have the moving average of its weights for a while."""
        own = {name: parameter.data for name, parameter in self.decoder.named_parameters()}
        try:
            for name, parameter in self.decoder.named_parameters():
                parameter.data = self.ema[name].to(parameter.device, parameter.dtype)
            yield
        finally:
            for name, parameter in self.decoder.named_parameters():
                parameter.data = own[name]

    def _validate(self) -> None:
        found = self._validation_losses()
        if self.run.ema_decay is not None:
            with self._averaged_weights():
                found["ema_loss"] = self._validation_losses()["loss"]
        self.last_validation = found
        self.log.write("validation", step=self.step, time_s=self.seconds, **found)

    @torch.no_grad()
    def _validation_losses(self) -> dict[str, Any]:
        losses, mtp_losses, counts, weights = [], [], [], []
        self.decoder.eval()
        for tokens in self.validation:
            with self._autocast():
                output = self.decoder.loss(tokens.to(self.device))
            losses.append(output.main_loss.item())
            mtp_losses.append(output.mtp_losses.tolist())
            counts.append(output.expert_counts)
            weights.append(tokens.shape[0])
        self.decoder.train()
        total = sum(weights)
        loss = sum(w * value for w, value in zip(weights, losses, strict=True)) / total
        return {
            "loss": loss,
            "bits_per_byte": loss / self.data.bytes_per_token / math.log(2),
            "max_violation_global": max_violation(torch.stack(counts).sum(0)).tolist(),
            "mtp_losses": [
                sum(w * value for w, value in zip(weights, column, strict=True)) / total
                for column in zip(*mtp_losses, strict=True)
            ],
        }

    # -- state ----------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Any]:
        return {
            "model": self.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
            "rng": {"torch": torch.get_rng_state()},
        }

    def _save(self, asynchronous: bool) -> None:
        start = time.perf_counter()
        rest = {
            "step": self.step,
            "seconds": self.seconds,
            "recipe": self.recipe,
            "rest": self.rest,
            "loader": self.loader.state_dict(),
            "python_rng": random.getstate(),
            "last_validation": self.last_validation,
        }
        self.store.save(self.step, self._tensors(), rest, asynchronous)
        self.log.write("checkpoint", step=self.step, seconds=time.perf_counter() - start)

    def _restore(self, folder: Path) -> None:
        tensors = self._tensors()
        rest = self.store.restore(folder, tensors)
        self.decoder.load_state_dict(tensors["model"])
        torch.set_rng_state(tensors["rng"]["torch"])
        version, internal, gauss = rest["python_rng"]
        random.setstate((version, tuple(internal), gauss))
        self.loader.load_state_dict(rest["loader"])
        self.step, self.seconds_before = rest["step"], rest["seconds"]
        self.last_validation = rest["last_validation"]

    # -- after the last step --------------------------------------------------------------------------

    def _publish(self) -> None:
        """Write the model for other programs, sample text, and the report."""
        from tokenizers import Tokenizer

        from cofire.model import huggingface
        from cofire.train.report import write_report
        from cofire.train.sample import sample_text

        self.decoder.eval()
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        samples = [
            {"step": self.step, "prompt": prompt, "text": sample_text(self.decoder, tokenizer, prompt)}
            for prompt in ("", "def ", "class ", "import ")
        ]
        _write_text(self.folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
        huggingface.save(self.decoder, self.folder / "model")
        _write_text(self.folder / "model" / "tokenizer.json", (self.folder / "tokenizer.json").read_text("utf-8"))
        _write_text(self.folder / "model" / "model.toml", dump(self.run.model))
        self.view.note(f"report: {write_report(self.folder)}")

    def _result(self, reason: str) -> RunResult:
        rate = metrics.recent_rate(self.run.tokens_per_step, self.recent) if self.recent else 0.0
        return RunResult(
            folder=str(self.folder),
            reason=reason,
            step=self.step,
            tokens=self.step * self.run.tokens_per_step,
            seconds=self.seconds,
            tokens_per_s=rate,
            mfu=self._mfu(rate),
            validation_loss=self.last_validation.get("loss"),
            bits_per_byte=self.last_validation.get("bits_per_byte"),
            unigram_entropy=self.data.unigram_entropy,
            max_violation_global=self.last_validation.get("max_violation_global", []),
            peak_memory_bytes=metrics.peak_memory_bytes(self.device),
        )


def comparison(plan: Plan, result: RunResult) -> list[tuple[str, str, str]]:
    """Return rows (what, planned, measured) for the end of a run."""
    memory = plan.training_memory.total
    return [
        ("memory", f"{format_quantity(memory, 'B')} (modelled)", f"{format_quantity(result.peak_memory_bytes, 'B')}"),
        (
            "rate of operations",
            "100% of the matrix peak at best",
            f"{result.mfu:.1%} at {result.tokens_per_s:,.0f} tokens/s",
        ),
        ("loss", f"{result.unigram_entropy:.3f} without context", _or_none(result.validation_loss)),
    ]


def result_dict(result: RunResult) -> dict[str, Any]:
    """Return a result as plain values, for JSON."""
    return asdict(result)


def _or_none(value: float | None) -> str:
    return "not validated" if value is None else f"{value:.3f}"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise TrainError(f"device = {name!r}, but PyTorch sees no CUDA device; set device=cpu or device=auto")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise TrainError(f"device = {name!r}, but there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device(name)


def _copy_weights(decoder: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in decoder.named_parameters()}


def _machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine for the report."""
    import platform

    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return gpu | {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _write_text(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write(text.encode())

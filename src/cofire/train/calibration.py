"""Measures this machine: matrix products by shape and format, passes over memory, calls, all-reduce, and memory.

Products and kernels run in the forms in which ``cofire.model`` runs them, single, and on operands that change from call
to call until they no longer fit the cache. No model is built and no training step is timed, so a prediction from these
figures can be compared with one. Each figure is the median of several samples with its quartiles.

What was measured is written to a journal in the cache at once: a calibration that was stopped goes on where it was.

Left out: accelerators, and how rates change with the temperature or with other programs on the machine.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cofire.errors import TrainError
from cofire.model.linear import grouped_linear
from cofire.model.memory import keep_freed_memory
from cofire.model.moe import silu_product
from cofire.model.rope import Rotation, rotate
from cofire.plan.machine import device_of, figure_of, machine_file
from cofire.plan.step_machine import PASSES, Form
from cofire.precision.product import matrix_product
from cofire.spec.figure import Figure
from cofire.spec.hardware import ClusterSpec, KernelRate, MatrixRate, ScaleUpSpec

Progress = Callable[[str, float], None]
"""Called with what is measured and the fraction that is done, 0 to 1."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SIZES = {"fp32": (32, 64, 256, 1024, 4096), "bf16": (64, 256, 1024)}
_FLOPS_MAX = {"fp32": 2.2e9, "bf16": 3e8}
_FORMS: tuple[Form, ...] = ("forward", "input_gradient", "weight_gradient")
_BATCHES, _BATCHED_SIZES = (8, 32), (64, 128, 512)
_KERNEL_NUMBERS = (1 << 14, 1 << 17, 1 << 20, 1 << 22)
_SAMPLES, _SAMPLE_S_MIN, _WARM_S_MAX = 5, 2e-3, 0.05
_SLOW_S = 0.2  # of a call; more than two samples of it are not worth the wait
# Operands of successive calls: as many sets as pass through the last level of a cache, but no more than eight.
_ROTATED_BYTES, _SETS_MAX = 48 << 20, 8
_CHILD_TIMEOUT_S = 120

# Of the loads of rehearsed experts, as a Dirichlet distribution's concentration: a load strays by a quarter.
_EVENNESS = 16.0

Call = Callable[[], object]


def calibrate(progress: Progress | None = None, again: bool = False) -> ClusterSpec:
    """Measure this machine and return it as a cluster of one device.

    Args:
        progress: Told about each measurement.
        again: Throw away what a stopped calibration has measured.

    Raises:
        TrainError: The journal cannot be written.
    """
    keep_freed_memory()
    report = progress or (lambda _what, _part: None)
    journal = Journal(machine_file().with_suffix(".partial.jsonl"), again)
    tasks = [*_product_tasks(), *_kernel_tasks()]
    found: dict[str, Figure] = {}
    for i, (key, make, work) in enumerate(tasks):
        report(key, i / (len(tasks) + 3))
        found[key] = journal.figure(key, lambda make=make, work=work: [work / t for t in seconds(make())])
    report("call", len(tasks) / (len(tasks) + 3))
    latency_s = journal.figure("call", _call_seconds)
    report("memory of a process", (len(tasks) + 1) / (len(tasks) + 3))
    memory = [journal.values(f"memory {seed}", lambda seed=seed: _child("memory", seed)) for seed in ("0", "1", "2")]
    report("all-reduce of two processes", (len(tasks) + 2) / (len(tasks) + 3))
    reduced = journal.values("all-reduce", _all_reduce)
    report("done", 1.0)
    device = device_of(
        [_matrix_rate(key, figure) for key, figure in found.items() if key.startswith("product ")],
        [_kernel_rate(key, figure) for key, figure in found.items() if key.startswith("kernel ")],
        latency_s,
        figure_of([found["reserved_bytes"] for found in memory], journal.source).value,
        figure_of([found["retained_share"] for found in memory], journal.source),
    )
    cluster = ClusterSpec(
        name="this-machine",
        description=f"{socket.gethostname()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}",
        devices_per_node=1,
        device=device,
        scale_up=_scale_up(reduced, journal.source),
    )
    journal.remove()
    return cluster


class Journal:
    """Keeps samples as lines of JSON; those of another machine state are thrown away."""

    def __init__(self, path: Path, again: bool = False) -> None:
        self.path = path
        self.source = f"{_SAMPLES} samples, {datetime.date.today().isoformat()}"
        state = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": socket.gethostname()}
        self._samples: dict[str, Any] = {}
        lines = [] if again or not path.exists() else path.read_text("utf-8", errors="replace").splitlines()
        records = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the half line of a killed process
                records.append(json.loads(line))
        if records and records[0] == {"state": state}:
            self._samples = {r["key"]: r["samples"] for r in records[1:] if isinstance(r, dict) and "samples" in r}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            head = [{"state": state}, *({"key": k, "samples": v} for k, v in self._samples.items())]
            path.write_text("".join(json.dumps(record) + "\n" for record in head), "utf-8")
        except OSError as error:
            raise TrainError(f"cannot write {path}: {error.strerror}; set COFIRE_CACHE to a folder") from None

    def values(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the samples of ``key``, measured now if they are not known."""
        if key not in self._samples:
            self._samples[key] = measure()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "samples": self._samples[key]}) + "\n")
        return self._samples[key]

    def figure(self, key: str, measure: Callable[[], Sequence[float]]) -> Figure:
        """Return median and quartiles of the samples of ``key``."""
        return figure_of(self.values(key, measure), self.source)

    def remove(self) -> None:
        """Delete the file: everything is measured."""
        self.path.unlink(missing_ok=True)


def seconds(calls: Sequence[Call]) -> list[float]:
    """Time calls in turn, in samples of 2 ms at least; the first round of calls is not timed.

    Returns:
        Seconds per call, one value per sample.
    """
    calls = calls[: _warm(calls)]
    start = time.perf_counter()
    calls[0]()
    once_s = max(time.perf_counter() - start, 1e-7)
    repeats = max(1, round(_SAMPLE_S_MIN / once_s))
    turns = itertools.cycle(calls)
    found = [once_s] if once_s > _SLOW_S else []
    for _ in range(1 if found else _SAMPLES):
        chosen = [next(turns) for _ in range(repeats)]
        start = time.perf_counter()
        for call in chosen:
            call()
        found.append((time.perf_counter() - start) / repeats)
    return found


def _warm(calls: Sequence[Call]) -> int:
    """Make each call once, as long as that takes little, and return how many were made."""
    start = time.perf_counter()
    for i, call in enumerate(calls, start=1):
        call()
        if time.perf_counter() - start > _WARM_S_MAX:
            return i
    return len(calls)


# -- matrix products --------------------------------------------------------------------------------

Task = tuple[str, Callable[[], list[Call]], float]


def _product_tasks() -> Iterator[Task]:
    """Yield key, calls and FLOP of every product of the grids."""
    shapes: list[tuple[str, int, int, int, int]] = []
    for name, sizes in _SIZES.items():
        shapes += [(name, 1, m, n, k) for m, n, k in itertools.product(sizes, sizes, sizes)]
    grid = itertools.product(_BATCHES, _BATCHED_SIZES, _BATCHED_SIZES, _BATCHED_SIZES)
    shapes += [("bf16", batch, m, n, k) for batch, m, n, k in grid]
    for form in _FORMS:
        for name, batch, m, n, k in shapes:
            flops = 2.0 * batch * m * n * k
            if flops <= _FLOPS_MAX[name]:
                task = functools.partial(product_calls, name, form, batch, m, n, k)
                yield f"product {name} {form} {batch} {m} {n} {k}", task, flops


def product_calls(name: str, form: Form, batch: int, m: int, n: int, k: int) -> list[Call]:
    """Return calls of one product over changing operands, as a linear layer makes it."""
    dtype = _DTYPES[name]
    sets = _sets(dtype.itemsize * batch * (m * k + k * n + m * n))
    shape = () if batch == 1 else (batch,)
    calls: list[Call] = []
    for _ in range(sets):
        if form == "forward":
            a, b = _random(dtype, *shape, m, k), _random(dtype, *shape, n, k)
            calls.append(lambda a=a, b=b: matrix_product(a, b))
        elif form == "input_gradient":
            a, b = _random(dtype, *shape, m, k), _random(dtype, *shape, k, n)
            calls.append(lambda a=a, b=b: matrix_product(a, b.mT))
        else:
            a, b = _random(dtype, *shape, k, m), _random(dtype, *shape, k, n)
            calls.append(lambda a=a, b=b: matrix_product(a.mT, b.mT))
    return calls


def _matrix_rate(key: str, figure: Figure) -> MatrixRate:
    _, name, form, *numbers = key.split()
    batch, m, n, k = (int(x) for x in numbers)
    fields = {"format": name, "form": form, "batch": batch, "m": m, "n": n, "k": k, "flops_per_s": figure}
    return MatrixRate.model_validate(fields)


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _sets(size_bytes: float) -> int:
    return max(1, min(_SETS_MAX, round(_ROTATED_BYTES / size_bytes)))


# -- passes over memory -----------------------------------------------------------------------------


def _kernel_tasks() -> Iterator[Task]:
    """Yield key, calls and bytes of every kernel at every size."""
    for kernel, numbers in itertools.product(PASSES, _KERNEL_NUMBERS):
        moved = 4.0 * numbers * PASSES[kernel]
        yield f"kernel {kernel} {moved:.0f}", functools.partial(kernel_calls, kernel, numbers), moved


def _kernel_rate(key: str, figure: Figure) -> KernelRate:
    _, kernel, size = key.split()
    return KernelRate(kernel=kernel, size_bytes=float(size), bytes_per_s=figure)


def kernel_calls(kernel: str, numbers: int) -> list[Call]:
    """Return calls of one kernel over changing tensors of so many FP32 numbers; see ``PASSES``."""
    make = _BACKWARD.get(kernel) or _FORWARD[kernel]
    return [make(numbers) for _ in range(_sets(8.0 * numbers))]


def _rows(numbers: int, width: int) -> Tensor:
    return torch.randn(numbers // width, width)


def _add(numbers: int) -> Call:
    a, b = torch.randn(numbers), torch.randn(numbers)
    return lambda: a + b


def _copy(numbers: int) -> Call:
    a = _rows(numbers, 64)
    return lambda: torch.cat((a[:, :32], a[:, 32:]), dim=-1)


def _turn(numbers: int) -> Call:
    a = torch.randn(max(1, numbers // (4 * 64 * 64)), 64, 4, 64)  # positions before heads, to heads before positions
    return lambda: a.transpose(1, 2).contiguous()


def _fill(numbers: int) -> Call:
    return lambda: torch.zeros(numbers)


def _rms_norm(numbers: int) -> Call:
    x, weight = _rows(numbers, 256), torch.ones(256)
    return lambda: F.rms_norm(x, (256,), weight, 1e-6)


def _turning(numbers: int) -> tuple[Tensor, Rotation]:
    x = torch.randn(1, numbers // 64, 4, 16)
    angle = torch.randn(1, numbers // 64, 1, 8)
    return x, Rotation(angle.cos(), angle.sin())


def _rotate(numbers: int) -> Call:
    x, turn = _turning(numbers)
    return lambda: rotate(x, turn, True)


def _silu(numbers: int) -> Call:
    x = _rows(2 * numbers, 256)
    return lambda: silu_product(x)


def _softmax(numbers: int) -> Call:
    x = _rows(numbers, 512)
    return lambda: x.softmax(-1)


def _softmax_backward(numbers: int) -> Call:
    slope, weights = _rows(numbers, 512), _rows(numbers, 512).softmax(-1)
    return lambda: torch._softmax_backward_data(slope, weights, -1, weights.dtype)


def _log_softmax(numbers: int) -> Call:
    x = _rows(numbers, 4096)
    return lambda: x.log_softmax(-1)


def _exp(numbers: int) -> Call:
    x = -torch.rand(numbers)
    return lambda: x.exp_().neg_()


def _gather(numbers: int) -> Call:
    x = _rows(numbers, 256)
    index = torch.randperm(x.shape[0])
    return lambda: x.index_select(0, index)


def _mixture(numbers: int) -> tuple[Tensor, Tensor]:
    return torch.randn(numbers // 1024, 1, 4), torch.randn(numbers // 1024, 4, 256)


def _combine(numbers: int) -> Call:
    gates, rows = _mixture(numbers)
    return lambda: torch.bmm(gates, rows)


def _top_k(numbers: int) -> Call:
    x = _rows(numbers, 32)
    return lambda: x.topk(4, dim=-1, sorted=False)


def _sort(numbers: int) -> Call:
    x = torch.randint(0, 32, (numbers,))
    return lambda: x.argsort(stable=True)


def _adamw(numbers: int) -> Call:
    parameter, grad, first, second = torch.randn(4, numbers).unbind(0)
    second.abs_()
    steps = torch.ones(())

    def update() -> None:
        torch._fused_adamw_(
            [parameter],
            [grad],
            [first],
            [second],
            [],
            [steps],
            lr=1e-3,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    return update


_FORWARD: dict[str, Callable[[int], Call]] = {
    "add": _add,
    "copy": _copy,
    "turn": _turn,
    "fill": _fill,
    "rms_norm": _rms_norm,
    "rotate": _rotate,
    "silu_product": _silu,
    "softmax": _softmax,
    "softmax_backward": _softmax_backward,
    "log_softmax": _log_softmax,
    "exp": _exp,
    "gather": _gather,
    "combine": _combine,
    "top_k": _top_k,
    "sort": _sort,
    "adamw": _adamw,
}


def _backward(make: Callable[[int], tuple[list[Tensor], Callable[..., Tensor]]]) -> Callable[[int], Call]:
    """Time the backward pass alone: the graph is built once and kept."""

    def prepared(numbers: int) -> Call:
        inputs, function = make(numbers)
        inputs = [x.requires_grad_() for x in inputs]
        y = function(*inputs)
        grad = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)

    return prepared


def _rms_norm_graph(numbers: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    return [_rows(numbers, 256), torch.ones(256)], lambda x, w: F.rms_norm(x, (256,), w, 1e-6)


def _rotate_graph(numbers: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    x, turn = _turning(numbers)
    return [x], lambda x: rotate(x, turn, True)


def _silu_graph(numbers: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    return [_rows(2 * numbers, 256)], silu_product


def _combine_graph(numbers: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    return list(_mixture(numbers)), torch.bmm


_BACKWARD: dict[str, Callable[[int], Call]] = {
    "rms_norm_backward": _backward(_rms_norm_graph),
    "rotate_backward": _backward(_rotate_graph),
    "silu_product_backward": _backward(_silu_graph),
    "combine_backward": _backward(_combine_graph),
}


# -- calls, memory, all-reduce ----------------------------------------------------------------------


def _call_seconds() -> list[float]:
    """A call of the framework that does no work: a view of a tensor that has gradients."""
    x = torch.randn(8, 8, requires_grad=True)
    return seconds([lambda: x[2:4]])


def _child(name: str, *arguments: str) -> Any:
    """Run a measurement of this module in a process of its own and return what it prints."""
    code = f"import sys; from cofire.train import calibration as c; c.{_CHILDREN[name]}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        detail = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        raise TrainError(f"the measurement of {name} failed: {detail}; run cofire plan calibrate again") from None


_CHILDREN = {"memory": "print_memory", "all-reduce": "print_all_reduce"}
_REHEARSALS, _LAYERS, _EXPERTS, _ROWS, _HIDDEN, _WIDTH = 32, 8, 16, 8192, 256, 128


def print_memory(seed: str = "0") -> None:
    """Print what a training process holds beside tensors, and what is kept beside the tensors that come and go.

    The second is rehearsed: rows run through layers of experts and back, to other experts in each round. Tensors of
    other sizes leave holes among those that are kept, and oneDNN keeps a kernel for each new number of rows.
    """
    import tokenizers
    import torch.utils.tensorboard

    import cofire.train.trainer

    del tokenizers, cofire
    keep_freed_memory()
    torch.manual_seed(int(seed))
    x = torch.randn(_ROWS, _HIDDEN)
    weights = [
        (torch.randn(_EXPERTS, 2 * _WIDTH, _HIDDEN) / 16, torch.randn(_EXPERTS, _HIDDEN, _WIDTH) / 16)
        for _ in range(_LAYERS)
    ]
    weights = [(up.requires_grad_(), down.requires_grad_()) for up, down in weights]
    state = 4 * (x.numel() + sum(up.numel() + down.numel() for up, down in weights))
    before = _resident_bytes()
    # A layer keeps its input, what it projects it to, and the gated product; then the gradients of its matrices.
    passing = 4 * _LAYERS * _ROWS * (_HIDDEN + 3 * _WIDTH) + state - 4 * x.numel()
    for _ in range(_REHEARSALS):
        rehearse_step(x, weights)
    share = max(0.0, (_resident_bytes() - before) / passing - 1)
    print(json.dumps({"reserved_bytes": before - state, "retained_share": share}))


def rehearse_step(x: Tensor, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Send rows [M, D] through layers of experts ([E, 2F, D], [E, D, F]), at random, forward and backward."""
    for up, down in weights:
        experts = torch.distributions.Dirichlet(torch.full((up.shape[0],), _EVENNESS)).sample()
        chosen = torch.multinomial(experts, x.shape[0], replacement=True)
        counts = torch.bincount(chosen, minlength=up.shape[0])
        x = x + grouped_linear(silu_product(grouped_linear(x, up, counts)), down, counts)
    x.sum().backward()
    for up, down in weights:
        up.grad = down.grad = None


def _resident_bytes() -> float:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


_REDUCED_NUMBERS = (16, 1 << 22)


def print_all_reduce(rank: str, file: str) -> None:
    """Print the seconds of all-reduces of two processes over loopback, as one of them."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=int(rank), world_size=2)
    found: dict[str, list[float]] = {}
    for numbers in _REDUCED_NUMBERS:
        x = torch.zeros(numbers)
        times = []
        for _ in range(_SAMPLES + 1):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(x)
            times.append(time.perf_counter() - start)
        found[str(numbers)] = times[1:]
    dist.destroy_process_group()
    print(json.dumps(found))


def _all_reduce() -> dict[str, list[float]]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        code = "import sys; from cofire.train import calibration as c; c.print_all_reduce(*sys.argv[1:])"
        other = subprocess.Popen(
            [sys.executable, "-c", code, "1", meeting], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            return _child("all-reduce", "0", meeting)
        finally:
            other.kill()
            other.wait()


def _scale_up(times: dict[str, list[float]], source: str) -> ScaleUpSpec:
    """Of an all-reduce between two, each sends as many bytes as the tensor has, in two messages."""
    small, large = (times[str(numbers)] for numbers in _REDUCED_NUMBERS)
    rate = figure_of([4.0 * _REDUCED_NUMBERS[1] / t for t in large], source)
    whole = Figure(value=1.0, low=rate.low / rate.value, high=rate.high / rate.value, label="measured", source=source)
    return ScaleUpSpec(
        name="loopback, gloo",
        bandwidth_bytes_per_s=rate.value,
        efficiency=whole,
        latency_s=figure_of([t / 2 for t in small], source),
        domain_size=2,
    )

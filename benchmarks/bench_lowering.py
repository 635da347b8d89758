"""How fast the optimised lowering is, beside the gather, torch's own function and the machine's limit.

Each operator is run forward, and forward and backward (gradients to input and weights), eager, by ``torch.compile``
with ``cofire.search.lowering.COMPILE_OPTIONS`` and with its own defaults, on up to three sides: ``optimised``,
``gather`` (the naive lowering; only eager, unless asked) and ``torch``, which is torch's own function where there is
one, with its weight stored as torch wants it, and else the dense convolution or projection that the operator replaces.

The sides take turns within one process; a table gives each side's median and quartiles over the rounds, and
the ratio of sides is the median of the rounds' ratios. Results of the sides that are the same function are compared
first. The limit is the larger of multiply-adds (staged) over the process's fastest product (of matrices, or a
convolution of 128 channels: oneDNN's may be faster than MKL's) and the bytes of input, weights and output over its
fastest copy; thrice that with backward. The allocator of C is told to keep freed memory: page faults of large
results would else take as long as the products and vary more. With one thread its CPU time is taken, which others on
the machine disturb little; with more, the time of the clock.

    .venv/bin/python benchmarks/bench_lowering.py --threads 1
    .venv/bin/python benchmarks/bench_lowering.py --quick --only "conv2d k=3" --json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.search import Assembler, Operator, Symbols
from cofire.search.cost import cost
from cofire.search.lowering import COMPILE_OPTIONS, lower

Function = Callable[..., Tensor]
Call = Callable[[], object]
HOWS = ("eager", "compiled", "default")
MODES = tuple(f"{how} {what}" for how in HOWS for what in ("forward", "both"))


@dataclass(frozen=True)
class Contest:
    """An operator and what torch has for it.

    Attributes:
        operator: The operator.
        function: Torch's function of the input and its weights.
        weights: Shapes of its weights.
        convert: Makes torch's weights of the operator's; none: torch's function is another, dense one.
    """

    operator: Operator
    function: Function
    weights: tuple[tuple[int, ...], ...] = ()
    convert: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = lambda weights: weights


def begin(primary: str, coefficient: str = "", **numbers: int) -> Assembler:
    return Assembler(Symbols.of(primary.split(), coefficient.split(), [{"B": 8, **numbers}]))


def linear() -> Contest:
    build = begin("B L C D", L=512, C=128, D=128)
    b, s, d = build.output("B", "L", "D")
    (c,) = build.reduce("C")
    (c,) = build.contract([c], [d])
    return Contest(build.finish(b, s, c), F.linear, ((128, 128),), lambda w: [w[0].T])


def convolution_1d() -> Contest:
    build = begin("B C D H", "k", C=128, D=128, H=784, k=3)
    b, d, h = build.output("B", "D", "H")
    c, a = build.reduce("C", "k")
    c, a = build.contract([c, a], [d])
    operator = build.finish(b, c, build.unfold(h, a))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.conv1d(x, w, padding=1)

    return Contest(operator, function, ((128, 128, 3),), lambda w: [w[0].permute(2, 0, 1)])


def convolution_2d(k: int, side: int, s: int = 1, channels: int = 64) -> Contest:
    """A convolution; dilated by s with Syno's zeros, which torch's own padding cannot say."""
    build = begin("B C D H W", "k s", C=channels, D=channels, H=side, W=side, k=k, s=s)
    b, d, h, w = build.output("B", "D", "H", "W")
    if k == 1:
        (c,) = build.reduce("C")
        (c,) = build.contract([c], [d])
        return Contest(
            build.finish(b, c, h, w), F.conv2d, ((channels, channels, 1, 1),), lambda w: [w[0].T[:, :, None, None]]
        )
    c, i, j = build.reduce("C", "k", "k")
    c, i, j = build.contract([c, i, j], [d])
    if s > 1:
        i, j = build.stride(i, "s"), build.stride(j, "s")
    operator = build.finish(b, c, build.unfold(h, i), build.unfold(w, j))

    before, behind = s * k // 2, s * (k - 1) - s * k // 2

    def function(x: Tensor, w: Tensor) -> Tensor:
        if before == behind:
            return F.conv2d(x, w, padding=before)
        return F.conv2d(F.pad(x, (before, behind) * 2), w, dilation=s)

    return Contest(operator, function, ((channels, channels, k, k),), lambda w: [w[0].permute(3, 0, 1, 2)])


def grouped_convolution() -> Contest:
    build = begin("B C D H W", "k g", C=128, D=128, H=28, W=28, k=3, g=4)
    b, d, h, w = build.output("B", "D", "H", "W")
    group, d = build.merge(d, "D/g")
    c, i, j = build.reduce("C/g", "k", "k")
    group, c, i, j = build.contract([group, c, i, j], [d])
    operator = build.finish(b, build.split(group, c), build.unfold(h, i), build.unfold(w, j))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1, groups=4)

    return Contest(operator, function, ((128, 32, 3, 3),), lambda w: [w[0].permute(0, 4, 1, 2, 3).flatten(0, 1)])


def depthwise_convolution() -> Contest:
    build = begin("B C H W", "k", C=128, H=28, W=28, k=3)
    b, c, h, w = build.output("B", "C", "H", "W")
    i, j = build.reduce("k", "k")
    c, i, j = build.contract([c, i, j])
    operator = build.finish(b, c, build.unfold(h, i), build.unfold(w, j))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1, groups=128)

    return Contest(operator, function, ((128, 1, 3, 3),), lambda w: [w[0][:, None]])


def patch_embedding() -> Contest:
    build = begin("B C D H W", "p", C=64, D=128, H=14, W=14, p=4)
    b, d, h, w = build.output("B", "D", "H", "W")
    c, i, j = build.reduce("C", "p", "p")
    c, i, j = build.contract([c, i, j], [d])
    operator = build.finish(b, c, build.split(h, i), build.split(w, j))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, stride=4)

    return Contest(operator, function, ((128, 64, 4, 4),), lambda w: [w[0].permute(3, 0, 1, 2)])


def average_pooling() -> Contest:
    build = begin("B C H W", "k", C=64, H=28, W=28, k=2)
    b, c, h, w = build.output("B", "C", "H", "W")
    i, j = build.reduce("k", "k")
    operator = build.finish(b, c, build.split(h, i), build.split(w, j))
    return Contest(operator, lambda x: F.avg_pool2d(x, 2, divisor_override=1))


def sliding_average_pooling() -> Contest:
    build = begin("B C H W", "k", C=64, H=28, W=28, k=3)
    b, c, h, w = build.output("B", "C", "H", "W")
    i, j = build.reduce("k", "k")
    operator = build.finish(b, c, build.unfold(h, i), build.unfold(w, j))
    return Contest(operator, lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, divisor_override=1))


def pixel_shuffle() -> Contest:
    build = begin("B C H W", "s", C=16, H=28, W=28, s=2)
    b, c, h, w = build.output("B", "C", "s*H", "s*W")
    h, i = build.merge(h, "s")
    w, j = build.merge(w, "s")
    operator = build.finish(b, build.split(c, build.split(i, j)), h, w)
    return Contest(operator, lambda x: F.pixel_shuffle(x, 2))


def dense(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1)


def operator_1() -> Contest:
    """Syno's first operator for ResNet-18, against the convolution that it replaces."""
    build = begin("B C D H W", "g k R", C=128, D=128, H=28, W=28, g=32, k=3, R=2)
    b, d, h, w = build.output("B", "D", "H", "W")
    group, i, j, rank, c = build.reduce("g", "k", "k", "R", "C/g")
    group, i, j, rank = build.contract([group, i, j, rank], [d])
    c, j = build.contract([c, j], [rank])
    operator = build.finish(b, build.split(group, c), build.unfold(h, i), build.unfold(w, j))
    return Contest(operator, dense, ((128, 128, 3, 3),), None)


def operator_2() -> Contest:
    """Syno's second operator for ResNet-18, against the convolution that it replaces."""
    build = begin("B C D H W", "g k R", C=128, D=128, H=28, W=28, g=32, k=3, R=2)
    b, d, h, w = build.output("B", "D", "H", "W")
    group, i, rank, c, j = build.reduce("g", "k", "R", "C/g", "k")
    group, i, rank = build.contract([group, i, rank], [d])
    c, j = build.contract([c, j], [rank])
    operator = build.finish(b, build.split(group, c), build.shift(build.unfold(h, i), 1), build.unfold(w, j))
    return Contest(operator, dense, ((128, 128, 3, 3),), None)


def gpt2_operator() -> Contest:
    """Syno's operator for GPT-2's queries, keys and values, against the projection that it replaces."""
    build = begin("B L C", "q p t", L=64, C=384, q=2, p=72, t=16)
    b, s, out = build.output("B", "L", "p*q*t")
    p, qt = build.merge(out, "q*t")
    q, t = build.merge(qt, "t")
    (c,) = build.reduce("C")
    (c,) = build.contract([c], [p, t])
    return Contest(build.finish(b, s, build.split(q, c)), F.linear, ((2304, 768),), None)


CONTESTS: dict[str, Callable[[], Contest]] = {
    "linear": linear,
    "conv1d k=3": convolution_1d,
    "conv2d k=1": lambda: convolution_2d(1, 56),
    "conv2d k=3": lambda: convolution_2d(3, 56),
    "conv2d k=5": lambda: convolution_2d(5, 28),
    "conv2d k=7": lambda: convolution_2d(7, 28),
    "conv2d k=3 C=512": lambda: convolution_2d(3, 7, channels=512),
    "grouped": grouped_convolution,
    "depthwise": depthwise_convolution,
    "dilated": lambda: convolution_2d(3, 28, 2),
    "patch embedding": patch_embedding,
    "average pooling": average_pooling,
    "sliding pooling": sliding_average_pooling,
    "pixel shuffle": pixel_shuffle,
    "operator 1": operator_1,
    "operator 2": operator_2,
    "gpt-2": gpt2_operator,
}


class Torch(nn.Module):
    """Torch's side of a contest."""

    def __init__(self, contest: Contest) -> None:
        super().__init__()
        self.function = contest.function
        self.weights = nn.ParameterList([torch.randn(shape) for shape in contest.weights])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


def sides(contest: Contest, names: Sequence[str], x: Tensor) -> dict[str, nn.Module]:
    """Return the sides with one set of weights; they agree to 1e-4 of the largest output wherever they should."""
    found: dict[str, nn.Module] = {"optimised": lower(contest.operator)}
    weights = [weight.detach() for weight in found["optimised"].parameters()]
    with torch.no_grad():
        expected = found["optimised"](x)
        if "gather" in names:
            found["gather"] = lower(contest.operator, backend="gather")
            found["gather"].load_state_dict(found["optimised"].state_dict())
        if "torch" in names:
            found["torch"] = Torch(contest)
            if contest.convert is not None:
                for parameter, weight in zip(found["torch"].parameters(), contest.convert(weights), strict=True):
                    parameter.copy_(weight)
        for name, side in found.items():
            if name != "torch" or contest.convert is not None:
                error = float((side(x) - expected).abs().max() / expected.abs().max())
                if not error < 1e-4:
                    raise SystemExit(f"{contest.operator}: {name} is off by {error:.1e} of the largest output")
    return found


def runs(side: Function, parameters: Sequence[Tensor], x: Tensor, is_backward: bool) -> Call:
    """Return what is timed: a forward pass without gradients, or one with gradients to everything."""
    if not is_backward:

        def forward() -> None:
            with torch.no_grad():
                side(x)

        return forward
    wanted = [x.clone().requires_grad_(), *parameters]
    upstream = torch.randn_like(side(x))
    return lambda: torch.autograd.grad(side(wanted[0]), wanted, upstream)


def seconds(call: Call, repeats: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def in_turns(calls: dict[str, Call], rounds: int, duration_s: float) -> dict[str, list[float]]:
    """Return seconds per call of each side and round.

    Each side runs ``duration_s`` a round, once at least; one that takes ten times that runs twice and no more.
    """
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        call()
        once = seconds(call, 1)
        repeats[name] = max(1, int(duration_s / once))
        times[name] = [once] if once > 10 * duration_s else []
    for number in range(rounds):
        # Whoever begins finds the caches of the one before: the first place goes round.
        order = list(calls)[number % len(calls) :] + list(calls)[: number % len(calls)]
        for name in order:
            if number == 0 or times[name][0] <= 10 * duration_s:
                times[name].append(seconds(calls[name], repeats[name]))
    return times


def keep_memory() -> bool:
    """Have the C library keep what is freed; say whether it could be told (glibc can)."""
    library = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    values = ((trim_threshold, 1 << 30), (top_pad, 1 << 28), (mmap_max, 0))
    return hasattr(library, "mallopt") and sum(library.mallopt(option, value) for option, value in values) == 3


def limits() -> tuple[float, float]:
    """Return multiply-adds per second of the fastest product and bytes per second of the fastest copy."""
    a, b, big = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.randn(1 << 23)
    image, kernel, copy = torch.randn(4, 128, 28, 28), torch.randn(128, 128, 3, 3), torch.empty_like(big)
    with torch.no_grad():
        product = min(seconds(lambda: torch.mm(a, b), 2) for _ in range(8))
        convolution = min(seconds(lambda: dense(image, kernel), 2) for _ in range(8))
    moved = min(seconds(lambda: copy.copy_(big), 2) for _ in range(8))
    fastest = max(1024**3 / product, image.numel() * kernel[0].numel() / convolution)
    return fastest, 2 * big.numel() * big.element_size() / moved


def contend(contest: Contest, arguments: argparse.Namespace, limit: tuple[float, float]) -> dict[str, dict]:
    """Return one row per mode."""
    torch.manual_seed(0)
    x = torch.randn([size.value(0) for size in contest.operator.input_shape])
    price = cost(contest.operator)
    moved = 4 * (price.parameters + price.input_elements + price.output_elements)
    bound_s = max(price.multiply_adds / limit[0], moved / limit[1])
    rows = {}
    found = sides(contest, arguments.sides, x)
    for mode in arguments.modes:
        how, what = mode.split()
        left_out = {"gather"} if how != "eager" and not arguments.compile_gather else set()
        ran: dict[str, Function] = {name: side for name, side in found.items() if name not in left_out}
        if how != "eager":
            torch._dynamo.reset()
            options = COMPILE_OPTIONS if how == "compiled" else {}
            ran = {
                name: torch.compile(side, fullgraph=True, dynamic=False, options=options) for name, side in ran.items()
            }
        calls = {name: runs(side, list(found[name].parameters()), x, what == "both") for name, side in ran.items()}
        times = in_turns(calls, arguments.rounds, arguments.seconds)
        row: dict = {"limit_ms": 1e3 * bound_s * (3 if what == "both" else 1)}
        for name, samples in times.items():
            # A side that is very slow has one round.
            low, middle, high = quantiles(samples, n=4) if len(samples) > 1 else samples * 3
            row[f"{name}_ms"] = [1e3 * middle, 1e3 * low, 1e3 * high]
        row["part_of_limit"] = row["limit_ms"] / row["optimised_ms"][0]
        for name in times:
            if name != "optimised":
                ratios = [other / mine for other, mine in zip(times[name], times["optimised"], strict=False)]
                row[f"speed_over_{name}"] = median(ratios)
        if "torch" in times and contest.convert is None:
            row["multiply_adds_of_torch"] = _dense_multiply_adds(contest, x) / price.multiply_adds
        rows[mode] = row
    return rows


def _dense_multiply_adds(contest: Contest, x: Tensor) -> float:
    """Return the multiply-adds of torch's dense function: each output element sums over one filter."""
    (weight,) = contest.weights
    with torch.no_grad():
        return contest.function(x, torch.zeros(weight)).numel() * torch.Size(weight[1:]).numel()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(CONTESTS), help="an operator; may be repeated")
    parser.add_argument("--sides", nargs="*", default=["gather", "torch"], choices=["gather", "torch"])
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--compile-gather", action="store_true", help="run the gather compiled too, for minutes")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side, 2 at least")
    parser.add_argument("--seconds", type=float, default=0.02, help="of each side's turn")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if left out")
    parser.add_argument("--quick", action="store_true", help="eager and without the gather, fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    found = parser.parse_args()
    if found.rounds < 2 or found.seconds <= 0:
        parser.error("--rounds must be 2 or more and --seconds above 0")
    if found.quick:
        found.rounds, found.sides, found.modes = min(found.rounds, 5), ["torch"], list(MODES[:2])
    return found


def print_row(name: str, mode: str, row: dict) -> None:
    cells = []
    for side in ("optimised", "torch", "gather"):
        if f"{side}_ms" in row:
            middle, low, high = row[f"{side}_ms"]
            cells.append(f"{middle:.3g} ({low:.3g}..{high:.3g})")
        else:
            cells.append("-")
    for side in ("torch", "gather"):
        cells.append(f"{row[f'speed_over_{side}']:.2f}" if f"speed_over_{side}" in row else "-")
    promise = f"{row['multiply_adds_of_torch']:.2f}" if "multiply_adds_of_torch" in row else "1"
    print(f"| {name} | {mode} | {' | '.join(cells)} | {promise} | {row['part_of_limit']:.2f} |", flush=True)


def main() -> None:
    chosen = arguments()
    keeps = keep_memory()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    limit = limits()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    facts = {
        "machine": machine,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "allocator_keeps_memory": keeps,
        "multiply_adds_per_s": limit[0],
        "copied_bytes_per_s": limit[1],
    }
    if not chosen.json:
        print(", ".join(f"{name} {value}" for name, value in facts.items()) + f"; FP32, {chosen.rounds} rounds\n")
        print(
            "| operator | mode | optimised ms (quartiles) | torch ms | gather ms | speed over torch | over gather "
            "| multiply-adds of torch | part of limit |\n|" + "---|" * 9
        )
    rows = {}
    for name in chosen.only or CONTESTS:
        rows[name] = contend(CONTESTS[name](), chosen, limit)
        if not chosen.json:
            for mode, row in rows[name].items():
                print_row(name, mode, row)
    if chosen.json:
        print(json.dumps({**facts, "rounds": chosen.rounds, "operators": rows}, indent=2))


if __name__ == "__main__":
    main()

"""The operations that one optimiser step of ``cofire.train`` makes on a CPU: matrix products and passes over memory.

A product has the form that it has in a linear layer (forward, gradient of the input, gradient of the weight); a pass is
a kernel of :data:`PASSES` over so many numbers. Attention is that of ``cofire.model.causal_attention``: blocks of
queries, and scores formed again in the backward pass; experts run over windows of padded rows; the head runs in chunks.

Left out: routing that is uneven, beyond half a step of padding per expert; full recomputation; sequences below 128
tokens, which take PyTorch's own attention, count as one block; grouped-query attention's copies of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cofire.errors import PlanError
from cofire.plan.parameters import count_parameters
from cofire.spec.model import MLASpec, ModelSpec
from cofire.spec.run import RunSpec

Form = Literal["forward", "input_gradient", "weight_gradient"]
Recipe = Literal["fp32", "bf16"]

# Kernels and how many times each reads or writes its tensor; a pass of n numbers moves 4 n times that many bytes.
PASSES: dict[str, int] = {
    "add": 3,
    "copy": 2,
    "turn": 2,
    "fill": 1,
    "rms_norm": 2,
    "rms_norm_backward": 4,
    "rotate": 2,
    "rotate_backward": 2,
    "silu_product": 3,
    "silu_product_backward": 5,
    "softmax": 2,
    "softmax_backward": 3,
    "log_softmax": 2,
    "exp": 2,
    "gather": 2,
    "combine": 1,
    "combine_backward": 2,
    "top_k": 1,
    "sort": 2,
    "adamw": 7,
}

_BLOCK_QUERIES = {"fp32": 256, "bf16": 128}
_LOSS_CHUNK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """``count`` times ``batch`` products of [m, k] with [k, n]; ``useful`` is the part that is not padding."""

    part: str
    form: Form
    m: int
    n: int
    k: int
    batch: int = 1
    count: float = 1
    useful: float = 1.0
    format: Recipe = "fp32"

    @property
    def flops(self) -> float:
        """All operations, padding included."""
        return 2.0 * self.m * self.n * self.k * self.batch * self.count


@dataclass(frozen=True, slots=True)
class MemoryPass:
    """``count`` calls of a kernel over ``numbers`` each."""

    part: str
    kernel: str
    numbers: float
    count: float = 1

    @property
    def size_bytes(self) -> float:
        """Bytes that one call reads and writes, in FP32."""
        return 4.0 * self.numbers * PASSES[self.kernel]


Operation = MatrixProduct | MemoryPass


def padded_rows(rows: int) -> int:
    """Return the rows over which an expert's product runs: eight sizes per octave, as in ``precision.product``."""
    step = _padding_step(rows)
    return -(-rows // step) * step


def training_operations(
    run: RunSpec, recipe: Recipe, expert_rows: tuple[tuple[int, ...], ...] | None = None
) -> list[Operation]:
    """Return what one optimiser step computes.

    Args:
        run: The run; micro-batches follow one another.
        recipe: Format of the products.
        expert_rows: Rows of each expert in each mixture layer of one micro-batch, modules of multi-token prediction
            last; none: even loads, and half a step of padding.

    Raises:
        PlanError: The run recomputes activations.
    """
    if run.recompute != "none":
        raise PlanError(f"recompute = {run.recompute!r}: a step is predicted without it; set recompute=none")
    model, length, batch = run.model, run.data.sequence_length, run.micro_batch_size
    lister = _Lister(model, batch, recipe, list(expert_rows or ()))
    micro = list(lister.micro_batch(length))
    repeats = run.batch_size // run.micro_batch_size
    scaled = [_times(operation, repeats) for operation in micro]
    return [*scaled, *_optimizer(run, repeats)]


def _times(operation: Operation, repeats: int) -> Operation:
    if isinstance(operation, MemoryPass):
        return MemoryPass(operation.part, operation.kernel, operation.numbers, operation.count * repeats)
    o = operation
    return MatrixProduct(o.part, o.form, o.m, o.n, o.k, o.batch, o.count * repeats, o.useful, o.format)


def _padding_step(rows: int) -> int:
    return 1 << max(0, rows.bit_length() - 4)


def _optimizer(run: RunSpec, repeats: int) -> Iterator[MemoryPass]:
    """Norm and clipping of the gradients, AdamW, and what adding micro-batches' gradients costs."""
    parameters = count_parameters(run.model).total_with_mtp
    yield MemoryPass("optimizer", "fill", parameters)
    yield MemoryPass("optimizer", "copy", parameters)
    yield MemoryPass("optimizer", "adamw", parameters)
    if run.precision.moment_format == "bf16":
        yield MemoryPass("optimizer", "copy", parameters, 4)
    if repeats > 1:
        yield MemoryPass("optimizer", "add", parameters, repeats - 1)
    if run.ema_decay is not None:
        yield MemoryPass("optimizer", "add", parameters)


class _Lister:
    """Lists one micro-batch; ``rows`` are the expert loads that are left to use."""

    def __init__(self, model: ModelSpec, batch: int, recipe: Recipe, rows: list[tuple[int, ...]]) -> None:
        self.model, self.batch, self.rows = model, batch, rows
        self.recipe: Recipe = recipe

    def micro_batch(self, length: int) -> Iterator[Operation]:
        """Embedding, layers, head, and modules of multi-token prediction, forward and backward."""
        model, hidden = self.model, self.model.hidden_size
        yield from self._embedding(length)
        for layer in range(model.num_layers):
            yield from self._block(length, layer < model.num_dense_layers)
        yield from self._norm("loss", self.batch * length, hidden)
        yield from self._head(self.batch * length)
        for depth in range(1, (model.mtp.depth if model.mtp else 0) + 1):
            tokens = self.batch * (length - depth)
            yield from self._embedding(length - depth)
            for _ in range(3):
                yield from self._norm("mtp", tokens, hidden)
            yield from self._passes("mtp", tokens * 2 * hidden, copy=2)
            yield from self._linear("mtp", tokens, 2 * hidden, hidden)
            yield from self._block(length - depth, model.moe is None)
            yield from self._head(tokens)

    # -- building blocks ----------------------------------------------------------------------------

    def _linear(self, part: str, tokens: int, inputs: int, outputs: int) -> Iterator[Operation]:
        """Forward, gradient of the input and of the weight."""
        small, large = sorted((inputs, outputs))
        yield MatrixProduct(part, "forward", tokens, outputs, inputs, format=self.recipe)
        yield MatrixProduct(part, "input_gradient", tokens, inputs, outputs, format=self.recipe)
        yield MatrixProduct(part, "weight_gradient", small, large, tokens, format=self.recipe)
        if self.recipe == "bf16":  # the weight, the input and the gradient of the weight change format
            yield from self._passes(part, inputs * outputs, copy=2)
            yield from self._passes(part, tokens * inputs, copy=2)

    @staticmethod
    def _passes(part: str, numbers: float, **kernels: float) -> Iterator[MemoryPass]:
        for kernel, count in kernels.items():
            yield MemoryPass(part, kernel, numbers, count)

    def _norm(self, part: str, tokens: int, width: int) -> Iterator[Operation]:
        yield from self._passes(part, tokens * width, rms_norm=1, rms_norm_backward=1)

    def _embedding(self, length: int) -> Iterator[Operation]:
        hidden = self.model.hidden_size
        yield from self._passes("embedding", self.batch * length * hidden, gather=1, add=1)
        yield from self._passes("embedding", self.model.vocab_size * hidden, fill=1, add=1)

    def _head(self, tokens: int) -> Iterator[Operation]:
        """The head and its cross entropy in chunks; gradients are formed beside the logits."""
        hidden, vocabulary = self.model.hidden_size, self.model.vocab_size
        chunks = [min(_LOSS_CHUNK_TOKENS, tokens - start) for start in range(0, tokens, _LOSS_CHUNK_TOKENS)]
        for rows in chunks:
            yield from self._linear("loss", rows, hidden, vocabulary)
            yield from self._passes("loss", rows * vocabulary, log_softmax=1, exp=1)
            yield from self._passes("loss", vocabulary * hidden, add=1)
        yield from self._passes("loss", vocabulary * hidden, fill=1, copy=1)
        yield from self._passes("loss", tokens * hidden, copy=2)

    # -- a block ------------------------------------------------------------------------------------

    def _block(self, length: int, dense: bool) -> Iterator[Operation]:
        tokens, hidden = self.batch * length, self.model.hidden_size
        yield from self._norm("attention", tokens, hidden)
        yield from self._projections(tokens)
        yield from self._core(length)
        yield from self._passes("attention", tokens * hidden, add=2)
        yield from self._norm("feed_forward", tokens, hidden)
        if dense or self.model.moe is None:
            yield from self._swiglu("feed_forward", tokens, self.model.intermediate_size)
        else:
            yield from self._experts(tokens)
        yield from self._passes("feed_forward", tokens * hidden, add=2)

    def _projections(self, tokens: int) -> Iterator[Operation]:
        spec, hidden, part = self.model.attention, self.model.hidden_size, "attention"
        if not isinstance(spec, MLASpec):
            for outputs in (spec.num_heads, spec.num_key_value_heads, spec.num_key_value_heads):
                yield from self._linear(part, tokens, hidden, outputs * spec.head_dim)
            rotated = (spec.num_heads + spec.num_key_value_heads) * spec.head_dim
            yield from self._linear(part, tokens, spec.num_heads * spec.head_dim, hidden)
            yield from self._passes(part, tokens * rotated, rotate=1, rotate_backward=1)
            return
        heads = spec.num_heads
        if spec.q_lora_rank is None:
            yield from self._linear(part, tokens, hidden, heads * spec.qk_head_dim)
        else:
            yield from self._linear(part, tokens, hidden, spec.q_lora_rank)
            yield from self._norm(part, tokens, spec.q_lora_rank)
            yield from self._linear(part, tokens, spec.q_lora_rank, heads * spec.qk_head_dim)
        yield from self._linear(part, tokens, hidden, spec.cache_width)
        yield from self._norm(part, tokens, spec.kv_lora_rank)
        yield from self._linear(part, tokens, spec.kv_lora_rank, heads * (spec.qk_nope_head_dim + spec.v_head_dim))
        yield from self._linear(part, tokens, heads * spec.v_head_dim, hidden)
        yield from self._passes(part, tokens * heads * spec.qk_rope_head_dim, rotate=1, rotate_backward=1)
        yield from self._passes(part, tokens * spec.qk_rope_head_dim, rotate=1, rotate_backward=1)
        # Latent and rotated key are joined, and the latent copied out again; key and query are joined by head.
        yield from self._passes(part, tokens * spec.cache_width, copy=4, add=1)
        yield from self._passes(part, tokens * heads * spec.qk_head_dim, copy=4)
        yield from self._passes(part, tokens * heads * (spec.qk_nope_head_dim + spec.v_head_dim), copy=1)
        yield from self._passes(part, tokens * hidden, add=1)

    def _core(self, length: int) -> Iterator[Operation]:
        """Blocks of queries; in FP32 head by head, in BF16 all heads at once."""
        spec, part = self.model.attention, "attention core"
        groups, qk, v = self.batch * spec.num_heads, spec.qk_head_dim, spec.v_head_dim
        batch, count = (1, groups) if self.recipe == "fp32" else (groups, 1)
        yield from self._passes(part, groups * length * qk, copy=2, turn=4)
        yield from self._passes(part, groups * length * v, turn=4, fill=1)
        yield from self._passes(part, groups * length * qk, fill=1)
        block = _BLOCK_QUERIES[self.recipe]
        for start in range(0, length, block):
            seen = min(start + block, length)
            rows = seen - start

            def product(form: Form, m: int, n: int, k: int, repeats: int = 1) -> MatrixProduct:
                return MatrixProduct(part, form, m, n, k, batch, count * repeats, format=self.recipe)

            yield product("forward", rows, seen, qk, 2)
            yield product("input_gradient", rows, v, seen)
            yield product("weight_gradient", seen, v, rows)
            yield product("forward", rows, seen, v)
            yield product("input_gradient", rows, qk, seen)
            yield product("weight_gradient", seen, qk, rows)
            scores, diagonal = batch * rows * seen, batch * rows * rows
            yield MemoryPass(part, "softmax", scores, 2 * count)
            yield MemoryPass(part, "softmax_backward", scores, count)
            yield MemoryPass(part, "add", diagonal, 2 * count)
            yield MemoryPass(part, "fill", rows * rows, 4 * count)
            yield MemoryPass(part, "add", batch * seen * v, count)
            yield MemoryPass(part, "add", batch * seen * qk, count)
            yield MemoryPass(part, "copy", batch * rows * v, count)
            yield MemoryPass(part, "copy", batch * rows * qk, count)

    def _swiglu(self, part: str, tokens: int, width: int) -> Iterator[Operation]:
        hidden = self.model.hidden_size
        yield from self._linear(part, tokens, hidden, 2 * width)
        yield from self._linear(part, tokens, width, hidden)
        yield from self._passes(part, tokens * width, silu_product=1, silu_product_backward=1)

    def _experts(self, tokens: int) -> Iterator[Operation]:
        moe, hidden = self.model.moe, self.model.hidden_size
        assert moe is not None
        experts, chosen, width = moe.num_routed_experts, moe.num_experts_per_token, moe.expert_intermediate_size
        pairs = tokens * chosen
        yield MatrixProduct("router", "forward", tokens, experts, hidden)
        yield MatrixProduct("router", "input_gradient", tokens, hidden, experts)
        yield MatrixProduct("router", "weight_gradient", min(experts, hidden), max(experts, hidden), tokens)
        # Scores, bias, masks of groups, gates, and the sequence-wise loss; four selections; the order of the rows.
        yield from self._passes("router", tokens * experts, copy=12, top_k=3)
        yield from self._passes("router", pairs, sort=1, copy=8)
        # Rows go to their experts and back, forward and backward.
        yield from self._passes("experts", pairs * hidden, gather=4, combine=1, combine_backward=1)
        yield from self._passes("experts", pairs * hidden, copy=0.5)  # the sum over a token's copies
        yield from self._grouped(pairs, hidden, 2 * width)
        yield from self._passes("experts", pairs * width, silu_product=1, silu_product_backward=1)
        yield from self._grouped(pairs, width, hidden)
        if self.rows:
            self.rows.pop(0)
        if moe.num_shared_experts:
            yield from self._swiglu("shared experts", tokens, moe.num_shared_experts * width)
            yield from self._passes("shared experts", tokens * hidden, add=2)
        yield from self._passes("experts", tokens * hidden, add=1)

    def _grouped(self, pairs: int, inputs: int, outputs: int) -> Iterator[Operation]:
        """One product per expert with rows, each over a window; results are copied out of the windows."""
        assert self.model.moe is not None
        experts, part = self.model.moe.num_routed_experts, "experts"
        small, large = sorted((inputs, outputs))
        for rows, window, count in self._windows(pairs):
            useful = rows / window
            yield MatrixProduct(part, "forward", window, outputs, inputs, 1, count, useful, self.recipe)
            yield MatrixProduct(part, "input_gradient", window, inputs, outputs, 1, count, useful, self.recipe)
            yield MatrixProduct(part, "weight_gradient", small, large, window, 1, count, useful, self.recipe)
            for numbers in (rows * outputs, rows * inputs, window * outputs):
                yield MemoryPass(part, "copy", numbers, count)
        yield from self._passes(part, inputs * outputs, copy=experts)
        if self.recipe == "bf16":
            yield from self._passes(part, experts * inputs * outputs, copy=2)

    def _windows(self, pairs: int) -> Iterator[tuple[float, int, int]]:
        """Yield (rows, rows of the window, experts that have so many)."""
        assert self.model.moe is not None
        experts = self.model.moe.num_routed_experts
        if self.rows:
            for rows in self.rows[0]:
                if rows:
                    yield rows, min(padded_rows(rows), pairs), 1
            return
        even = max(1, round(pairs / experts))
        yield pairs / experts, min(even + _padding_step(even) // 2, pairs), experts

"""What a device computes for one micro-batch of one block: kernels with operations and bytes.

A block is half a layer (attention, or a feed-forward part), the embedding or the head. Each kernel says the work of its
three passes: forward, gradient of the input, gradient of the weights. A matrix product does its own operations once in
each; gradients of weights are added to FP32 sums. A flash-attention kernel recomputes its scores in the backward pass,
2.5 times the forward operations.

Formats follow the DeepSeek-V3 technical report, section 3.3: with ``fp8`` the products of attention projections,
feed-forward parts and experts are FP8, each input cast in tiles; head, router and attention core stay BF16.

Left out: tile and wave quantisation of products, fused kernels' register limits, dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cofire.spec.hardware import Format
from cofire.spec.model import MLASpec, ModelSpec
from cofire.spec.parallel import ParallelSpec

BlockKind = Literal["embedding", "attention", "dense", "moe", "mtp_entry", "head"]
Work = Literal["matrix", "attention", "memory"]

# FP8 casts, bytes per element: forward reads BF16 and writes a tile; backward casts the output's gradient along both
# dims and turns the saved input's tiles round (DeepSeek-V3 technical report, sections 3.3.2 and 3.3.3).
_CAST_FORWARD = 3
_CAST_GRADIENT = 4
_CAST_TURN = 2
# Where scores are kept, bytes per score: the products write it and read its weight; softmax and dropout each read and
# write it and write a mask (arXiv 2205.05198, section 4.1).
_SCORE_PRODUCTS = 4
_SCORE_SOFTMAX = 9
_FLASH_BACKWARD_RATIO = 2.5
_SUM_BYTES = 8  # an FP32 sum of gradients is read and written


@dataclass(frozen=True, slots=True)
class Kernel:
    """Work of one kernel in the forward pass of one micro-batch on one device.

    Attributes:
        name: As in the model's equations.
        work: Which roof bounds it: matrix units, the attention kernel, or memory alone.
        flops: Operations of the forward pass, of the input's gradient, of the weights' gradients.
        size_bytes: Read and written, of the same three.
        number_format: Of the product.
        selective: Selective recomputation runs it again.
        experts: Its rows are those of routed experts, which an uneven load makes longer.
    """

    name: str
    work: Work
    flops: tuple[float, float, float]
    size_bytes: tuple[float, float, float]
    number_format: Format = "bf16"
    selective: bool = False
    experts: bool = False

    def stretched(self, factor: float) -> Kernel:
        """Return the kernel with ``factor`` times the rows; the weights' bytes are little beside them."""
        flops, size = ([factor * x for x in values] for values in (self.flops, self.size_bytes))
        return replace(self, flops=(flops[0], flops[1], flops[2]), size_bytes=(size[0], size[1], size[2]))


def block_kernels(model: ModelSpec, kind: BlockKind, layout: ParallelSpec, sequence_length: int) -> list[Kernel]:
    """Return the forward kernels of a block on one device, for one micro-batch.

    Args:
        model: The model.
        kind: Which block; ``mtp_entry`` is what a multi-token-prediction module does before its layer.
        layout: Degrees, micro-batch, formats.
        sequence_length: Tokens per sequence.
    """
    maker = _Maker(model, layout, sequence_length)
    return getattr(maker, kind)()


class _Maker:
    """The sizes that all kernels of a layout share."""

    def __init__(self, model: ModelSpec, layout: ParallelSpec, sequence_length: int) -> None:
        self.model, self.layout, self.length = model, layout, sequence_length
        self.tokens = layout.micro_batch_size * sequence_length
        self.tp = layout.tp
        # Where the sequence is split too, norms and residuals work on a share of the tokens.
        self.split_tokens = self.tokens / (layout.tp if layout.sequence_parallel else 1)
        self.format: Format = layout.precision
        self.width = 4 if layout.precision == "fp32" else 2
        self.flash = layout.attention_kernel == "flash"

    def product(
        self,
        name: str,
        rows: float,
        inner: float,
        outer: float,
        selective: bool = False,
        plain: bool = False,
        experts: float = 0,
    ) -> list[Kernel]:
        """A product ``[rows, inner] x [inner, outer]`` (of ``experts`` matrices, if any) and, in FP8, its casts."""
        fp8 = self.format == "fp8" and not plain
        number_format: Format = self.format if fp8 or self.format != "fp8" else "bf16"
        read, write, elements = 1 if fp8 else self.width, self.width, max(experts, 1) * inner * outer
        size = (
            read * (rows * inner + elements) + write * rows * outer,
            read * (rows * outer + elements) + write * rows * inner,
            read * rows * (inner + outer) + _SUM_BYTES * elements,
        )
        flops = 2 * rows * inner * outer
        kernels = [Kernel(name, "matrix", (flops, flops, flops), size, number_format, selective, experts > 0)]
        if fp8:
            back = rows * (_CAST_GRADIENT * outer + _CAST_TURN * inner)
            kernels.append(self.moved(f"cast for {name}", _CAST_FORWARD * rows * inner, back, experts=experts > 0))
        return kernels

    def moved(
        self, name: str, size_bytes: float, backward_bytes: float, selective: bool = False, experts: bool = False
    ) -> Kernel:
        """A kernel that only moves memory."""
        return Kernel(name, "memory", (0.0, 0.0, 0.0), (size_bytes, backward_bytes, 0.0), "bf16", selective, experts)

    def norm(self, tokens: float, width: float) -> Kernel:
        size = self.width * tokens * width
        return self.moved("norm", 2 * size, 3 * size, selective=self.flash)

    def residual(self) -> Kernel:
        size = 3 * self.width * self.split_tokens * self.model.hidden_size
        return self.moved("residual", size, size)

    def embedding(self) -> list[Kernel]:
        size = 2 * self.width * self.split_tokens * self.model.hidden_size
        return [self.moved("embedding", size, 2 * size)]

    def mtp_entry(self) -> list[Kernel]:
        hidden = self.model.hidden_size
        return [
            *(self.norm(self.split_tokens, hidden) for _ in range(2)),
            *self.product("MTP projection", self.tokens / self.tp, 2 * hidden, hidden),
        ]

    def head(self) -> list[Kernel]:
        vocabulary, tokens = self.model.vocab_size / self.tp, self.tokens
        # FP32 logits are written, read for the maximum and the sum, and read again for their gradient.
        return [
            self.norm(self.split_tokens, self.model.hidden_size),
            *self.product("head", tokens, self.model.hidden_size, vocabulary, plain=True),
            self.moved("loss", 3 * 4 * tokens * vocabulary, 4 * tokens * vocabulary),
        ]

    def attention(self) -> list[Kernel]:
        attention, hidden, tokens = self.model.attention, self.model.hidden_size, self.tokens
        heads = attention.num_heads / self.tp
        kernels = [self.norm(self.split_tokens, hidden)]
        if isinstance(attention, MLASpec):
            kernels += self._mla_inputs(attention, heads)
        else:
            keys = max(1.0, attention.num_key_value_heads / self.tp)
            kernels += self.product("QKV projection", tokens, hidden, (heads + 2 * keys) * attention.head_dim)
            turned = 2 * self.width * tokens * (heads + keys) * attention.head_dim
            kernels.append(self.moved("RoPE", turned, turned))
        kernels += self._core(heads)
        kernels += self.product("output projection", tokens, heads * attention.v_head_dim, hidden)
        return [*kernels, self.residual()]

    def _mla_inputs(self, attention: MLASpec, heads: float) -> list[Kernel]:
        """Down-projections whole on each device, up-projections by head (DeepSeek-V3 report, eq. 1-9)."""
        hidden, tokens, rank = self.model.hidden_size, self.tokens, attention.q_lora_rank
        kernels: list[Kernel] = []
        queries = heads * attention.qk_head_dim
        if rank is None:
            kernels += self.product("query projection", tokens, hidden, queries)
        else:
            kernels += self.product("query down-projection", tokens, hidden, rank)
            kernels.append(self.norm(tokens, rank))
            kernels += self.product("query up-projection", tokens, rank, queries, selective=True)
        kernels += self.product("latent projection", tokens, hidden, attention.cache_width)
        kernels.append(self.norm(tokens, attention.kv_lora_rank))
        wide = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        kernels += self.product("latent up-projection", tokens, attention.kv_lora_rank, wide, selective=True)
        turned = 2 * attention.qk_rope_head_dim + attention.qk_nope_head_dim + attention.qk_head_dim
        size = self.width * tokens * heads * turned
        kernels.append(self.moved("RoPE", size, size, selective=True))
        return kernels

    def _core(self, heads: float) -> list[Kernel]:
        """Scores and their sum over values: half of the square where the kernel is causal, all of it where not."""
        attention, tokens = self.model.attention, self.tokens
        widths = attention.qk_head_dim + attention.v_head_dim
        ends = self.width * tokens * heads * 2 * widths
        if self.flash:
            flops = tokens * self.length * heads * widths
            back = _FLASH_BACKWARD_RATIO * flops
            return [Kernel("attention core", "attention", (flops, back, 0.0), (ends, 2.5 * ends, 0.0))]
        scores = tokens * self.length * heads
        flops, size = 2 * scores * widths, _SCORE_PRODUCTS * scores + ends
        return [
            Kernel("attention core", "attention", (flops, 2 * flops, 0.0), (size, 2 * size, 0.0), selective=True),
            self.moved("softmax of scores", _SCORE_SOFTMAX * scores, _SCORE_SOFTMAX * scores, selective=True),
        ]

    def _swiglu(self, name: str, rows: float, hidden: float, width: float, experts: float = 0) -> list[Kernel]:
        size = self.width * rows * width
        return [
            *self.product(f"{name} gate and up", rows, hidden, 2 * width, experts=experts),
            self.moved(f"{name} SwiGLU", 3 * size, 5 * size, selective=self.flash, experts=experts > 0),
            *self.product(f"{name} down", rows, width, hidden, experts=experts),
        ]

    def dense(self) -> list[Kernel]:
        hidden = self.model.hidden_size
        return [
            self.norm(self.split_tokens, hidden),
            *self._swiglu("dense", self.tokens, hidden, self.model.intermediate_size / self.tp),
            self.residual(),
        ]

    def moe(self) -> list[Kernel]:
        """Rows sorted by expert; without expert parallelism each expert is cut over the tensor axis."""
        moe, hidden = self.model.moe, self.model.hidden_size
        assert moe is not None
        spread = self.layout.ep > 1
        tokens = self.tokens / (self.tp if spread else 1)
        rows = tokens * moe.num_experts_per_token
        width = moe.expert_intermediate_size / (1 if spread else self.tp)
        kernels = [self.norm(self.split_tokens, hidden)]
        kernels += self.product("router", self.split_tokens, hidden, moe.num_routed_experts, plain=True)
        sorted_bytes = 2 * self.width * rows * hidden
        kernels.append(self.moved("sort by expert", sorted_bytes, sorted_bytes, experts=True))
        kernels += self._swiglu("experts", rows, hidden, width, moe.num_routed_experts / self.layout.ep)
        summed_bytes = self.width * (rows + tokens) * hidden
        kernels.append(self.moved("weighted sum", summed_bytes, summed_bytes, experts=True))
        if moe.num_shared_experts:
            shared = moe.num_shared_experts * moe.expert_intermediate_size / (1 if spread else self.tp)
            kernels += self._swiglu("shared", tokens, hidden, shared)
        return [*kernels, self.residual()]

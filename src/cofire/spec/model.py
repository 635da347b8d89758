"""What a model is: the shape of a decoder, dense or mixture-of-experts.

One decoder serves every family; what differs between DeepSeek-V3, DeepSeek-V2, DeepSeekMoE, Qwen2.5
and LLaMA-3.1 is the value of a field here. Names are those of the DeepSeek-V3 technical report
(arXiv 2412.19437, section 2) and of its released ``config.json``.

Left out: everything about how a model is trained (``spec.run``) or placed (later ``spec.parallel``).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cofire.spec.spec_type import NonNegative, Positive, Spec, nearest_divisor


class MLASpec(Spec):
    """Multi-head latent attention (DeepSeek-V3 technical report, equations 1-11).

    Per token and layer it caches ``kv_lora_rank + qk_rope_head_dim`` numbers.
    """

    kind: Literal["mla"] = "mla"
    num_heads: Positive
    q_lora_rank: Positive | None = Field(
        default=None, description="rank of the query compression; none: full-rank queries"
    )
    kv_lora_rank: Positive
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Positive
    v_head_dim: Positive

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim = {self.qk_rope_head_dim} must be even (RoPE rotates pairs)")
        return self

    @property
    def qk_head_dim(self) -> int:
        """Query and key width per head, without and with position."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def rope_dim(self) -> int:
        """Width that RoPE rotates."""
        return self.qk_rope_head_dim


class GQASpec(Spec):
    """Grouped-query attention; ``num_key_value_heads = num_heads`` is plain multi-head attention."""

    kind: Literal["gqa"] = "gqa"
    num_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    qkv_bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} must divide num_heads = {self.num_heads}; "
                f"nearest: {nearest_divisor(self.num_heads, self.num_key_value_heads)}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even (RoPE rotates pairs)")
        return self

    @property
    def qk_head_dim(self) -> int:
        """Query and key width per head."""
        return self.head_dim

    @property
    def v_head_dim(self) -> int:
        """Value width per head."""
        return self.head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def rope_dim(self) -> int:
        """Width that RoPE rotates."""
        return self.head_dim


AttentionSpec = Annotated[MLASpec | GQASpec, Field(discriminator="kind")]


class YarnSpec(Spec):
    """YaRN context extension (arXiv 2309.00071), with DeepSeek's two attention-temperature terms."""

    factor: float = Field(gt=1.0, description="ratio of the extended to the original context")
    original_length: Positive = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = Field(default=1.0, ge=0)
    mscale_all_dim: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(f"beta_slow = {self.beta_slow} must be above 0 and below beta_fast = {self.beta_fast}")
        return self


class RopeSpec(Spec):
    """Rotary position embedding.

    ``interleaved`` rotates adjacent elements (DeepSeek's complex view); otherwise element i pairs with
    i + dim/2 (LLaMA's and Qwen's Hugging Face form).
    """

    theta: float = Field(default=10_000.0, gt=0)
    interleaved: bool = True
    yarn: YarnSpec | None = None


class BalanceSpec(Spec):
    """How expert load is kept even.

    The bias rules are those of Loss-Free Balancing (arXiv 2408.15664): ``sign`` adds u*sign(e),
    ``proportional`` adds u*e/mean(c), ``multiplicative`` scales a bias that starts at one, where
    e = mean(c) - c and c is the load of one whole optimiser step. The losses are the sequence-wise
    loss of DeepSeek-V3 (eq. 17-20) and the expert- and device-level losses of DeepSeekMoE (eq. 12-17).
    """

    bias_rule: Literal["none", "sign", "proportional", "multiplicative"] = "none"
    bias_update_rate: float = Field(default=1e-3, ge=0)
    sequence_loss_weight: float = Field(default=0.0, ge=0)
    expert_loss_weight: float = Field(default=0.0, ge=0)
    device_loss_weight: float = Field(default=0.0, ge=0)
    num_device_groups: Positive = 1


class MoESpec(Spec):
    """A DeepSeekMoE layer (arXiv 2401.06066; DeepSeek-V3 technical report, eq. 12-16)."""

    num_routed_experts: Positive
    num_shared_experts: NonNegative = 0
    num_experts_per_token: Positive
    expert_intermediate_size: Positive = Field(description="hidden width of one expert")
    num_first_dense_layers: NonNegative = 0
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    num_expert_groups: Positive = 1
    num_limited_groups: Positive = 1
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    normalize_gates: bool = True
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    selection_bias: bool = Field(default=True, description="an FP32 bias per expert, used for selection only")
    balance: BalanceSpec = BalanceSpec()

    @model_validator(mode="after")
    def _check(self) -> Self:
        experts, groups, limited = self.num_routed_experts, self.num_expert_groups, self.num_limited_groups
        if experts % groups:
            raise ValueError(
                f"num_expert_groups = {groups} must divide num_routed_experts = {experts}; "
                f"nearest: {nearest_divisor(experts, groups)}"
            )
        if limited > groups:
            raise ValueError(f"num_limited_groups = {limited} must be at most num_expert_groups = {groups}")
        reachable = experts // groups * limited
        if self.num_experts_per_token > reachable:
            raise ValueError(
                f"num_experts_per_token = {self.num_experts_per_token} must be at most the {reachable} experts "
                f"in {limited} of {groups} groups"
            )
        if self.group_score == "top2_sum" and groups > 1 and experts // groups < 2:
            raise ValueError(f"group_score = top2_sum needs at least 2 experts in each of {groups} groups; use max")
        if self.balance.bias_rule != "none" and not self.selection_bias:
            raise ValueError(f"balance.bias_rule = {self.balance.bias_rule} needs selection_bias = true")
        if experts % self.balance.num_device_groups:
            raise ValueError(
                f"balance.num_device_groups = {self.balance.num_device_groups} must divide "
                f"num_routed_experts = {experts}; nearest: {nearest_divisor(experts, self.balance.num_device_groups)}"
            )
        return self


class MTPSpec(Spec):
    """Multi-token prediction (DeepSeek-V3 technical report, eq. 21-25): ``depth`` sequential modules."""

    depth: Positive = 1
    loss_weight: float = Field(default=0.3, ge=0, description="lambda of eq. 25")


class ModelSpec(Spec):
    """A decoder-only language model."""

    kind: Literal["model"] = "model"
    name: str
    description: str = ""
    vocab_size: Positive
    hidden_size: Positive
    num_layers: Positive
    intermediate_size: Positive = Field(description="hidden width of a dense feed-forward layer")
    max_sequence_length: Positive = 4096
    attention: AttentionSpec
    moe: MoESpec | None = None
    mtp: MTPSpec | None = None
    rope: RopeSpec = RopeSpec()
    norm_epsilon: float = Field(default=1e-6, gt=0)
    init_std: float = Field(default=0.006, gt=0)
    tie_embeddings: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.moe is not None and self.moe.num_first_dense_layers > self.num_layers:
            raise ValueError(
                f"moe.num_first_dense_layers = {self.moe.num_first_dense_layers} must be at most "
                f"num_layers = {self.num_layers}"
            )
        return self

    @property
    def num_dense_layers(self) -> int:
        """Layers whose feed-forward part is one dense SwiGLU."""
        return self.num_layers if self.moe is None else self.moe.num_first_dense_layers

    @property
    def num_moe_layers(self) -> int:
        """Layers of the main model whose feed-forward part is a mixture of experts (MTP not counted)."""
        return self.num_layers - self.num_dense_layers

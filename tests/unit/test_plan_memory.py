"""Memory formulas against the bytes that a real training step holds.

The activation ledger is *modelled*; it must lie within -10 % and +25 % of the measured peak. Most cases are within 3 %.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.plan import activation_parts, count_parameters, inference_memory, training_memory
from cofire.spec import ModelSpec, WorkloadSpec, load_as
from cofire.testing.strategies import model_specs

torch = pytest.importorskip("torch")
LOWEST, HIGHEST = 0.90, 1.25

DENSE = "moe=none"
GQA = 'attention={kind="gqa",num_heads=8,num_key_value_heads=2,head_dim=32}'


def measured_peak(spec: ModelSpec, workload: WorkloadSpec) -> int:
    """Return the most bytes of tensors that exist at once in forward and backward, weights and gradients apart."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from cofire.model import build

    class LiveBytes(TorchDispatchMode):
        def __init__(self, own: list[Any]) -> None:
            super().__init__()
            self.live = {tensor.untyped_storage()._cdata for tensor in own}
            self.now = self.peak = 0

        def forget(self, key: int, size: int) -> None:
            self.live.discard(key)
            self.now -= size

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                    storage = tensor.untyped_storage()
                    self.live.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
            self.peak = max(self.peak, self.now)
            return out

    decoder = build(spec, seed=0)
    decoder.recompute = workload.recompute
    tokens = torch.randint(0, spec.vocab_size, (workload.micro_batch_size, workload.sequence_length + 1))
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    mixed = workload.recipe == "bf16"
    own = [*decoder.parameters(), *decoder.buffers(), *(p.grad for p in decoder.parameters())]
    with LiveBytes(own) as live:
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            loss = decoder.loss(tokens).loss
        loss.backward()
    return live.peak


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("preset", "batch", "length", "changes"),
    [
        ("tiny", 4, 256, []),
        ("small", 2, 512, []),
        ("small", 2, 256, [DENSE]),
        ("small", 2, 256, ["mtp=none", GQA]),
        ("small", 2, 256, ["mtp.depth=2", "attention.q_lora_rank=none", "vocab_size=512"]),
        ("small", 4, 512, ["vocab_size=512", "moe.num_shared_experts=0"]),
    ],
)
def test_activations_are_those_of_a_real_step(
    preset: str, batch: int, length: int, changes: list[str], recompute: str, recipe: str
) -> None:
    spec = load_as(ModelSpec, preset, changes)
    workload = WorkloadSpec.model_validate(
        {"sequence_length": length, "micro_batch_size": batch, "recipe": recipe, "recompute": recompute}
    )
    memory = training_memory(spec, workload)
    # The BF16 copies of the weights are made inside the step; FP32 weights are there before it.
    planned = memory.activations + (memory.weights if recipe == "bf16" else 0)
    assert LOWEST <= planned / measured_peak(spec, workload) <= HIGHEST


@settings(max_examples=60, deadline=None)
@given(model_specs(), st.sampled_from(["fp32", "bf16"]), st.sampled_from(["fp32", "bf16"]), st.booleans())
def test_roles_sum_to_the_total(spec: ModelSpec, recipe: str, moments: str, ema: bool) -> None:
    workload = WorkloadSpec.model_validate(
        {"sequence_length": 8, "context_length": 8, "recipe": recipe, "moments": moments, "ema": ema}
    )
    memory = training_memory(spec, workload)
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations
    assert sum(memory.activation_parts.values()) == memory.activations
    assert all(size >= 0 for size in memory.activation_parts.values())
    assert memory.gradients == 4 * count_parameters(spec).total_with_mtp


def test_optimizer_bytes_per_parameter_follow_the_formats() -> None:
    spec = load_as(ModelSpec, "small")
    parameters = count_parameters(spec).total_with_mtp
    per_parameter = {
        (recipe, moments, ema): training_memory(
            spec, WorkloadSpec.model_validate({"recipe": recipe, "moments": moments, "ema": ema})
        ).optimizer
        / parameters
        for recipe in ("fp32", "bf16")
        for moments in ("fp32", "bf16")
        for ema in (False, True)
    }
    assert per_parameter == {
        ("fp32", "fp32", False): 8,
        ("fp32", "fp32", True): 12,
        ("fp32", "bf16", False): 4,
        ("fp32", "bf16", True): 8,
        ("bf16", "fp32", False): 12,
        ("bf16", "fp32", True): 16,
        ("bf16", "bf16", False): 8,
        ("bf16", "bf16", True): 12,
    }


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_activations_grow_with_the_batch_and_shrink_with_recomputation(recipe: str) -> None:
    spec = load_as(ModelSpec, "small")
    sizes = [
        sum(
            activation_parts(
                spec,
                WorkloadSpec.model_validate(
                    {"sequence_length": 512, "micro_batch_size": batch, "recipe": recipe, "recompute": recompute}
                ),
            ).values()
        )
        for recompute in ("full", "none")
        for batch in (1, 2, 8)
    ]
    assert sizes == sorted(sizes[:3]) + sorted(sizes[3:])
    assert sizes[2] < 0.5 * sizes[5]


def test_decoding_holds_weights_and_cache() -> None:
    spec = load_as(ModelSpec, "deepseek-v3")
    memory = inference_memory(spec, WorkloadSpec(batch_size=32, context_length=1000))
    assert memory.weights == 2 * 671_026_419_200
    assert memory.cache == 32 * 1000 * 70_272
    assert memory.total == memory.weights + memory.cache


def test_fp8_weights_keep_embedding_head_router_and_norms_in_bf16() -> None:
    spec = load_as(ModelSpec, "deepseek-v3")
    count = count_parameters(spec)
    kept = count.embedding + count.head + count.router + count.norms
    memory = inference_memory(spec, WorkloadSpec(weight_format="fp8"))
    assert memory.weights == pytest.approx(count.total + kept, rel=3e-4)
    assert memory.weights > count.total + kept

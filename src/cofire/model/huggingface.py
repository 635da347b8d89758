"""Hugging Face folders of DeepSeek-V3 and DeepSeek-V2, read and written shard by shard.

A folder holds ``config.json`` and either ``model.safetensors`` or shards with ``model.safetensors.index.json``. Reading
takes one tensor at a time into a decoder that was allocated empty; every tensor must find its place and every
place its tensor, but a file without its MTP layers is accepted (then the decoder has none). FP8 checkpoints store a
weight as E4M3 with ``<name>_scale_inv``, one FP32 factor per 128 x 128 block by which it is multiplied; they
are widened while they are read. In such a file as DeepSeek releases it, and as it is written here, the linear layers of
attention, feed-forward layers and experts are FP8; embedding, head, router, norms and MTP's projection are not.

Released MTP modules lie behind the last layer as ``model.layers.<num_layers + k>`` (README_WEIGHTS of
DeepSeek-V3), with their own copies of embedding and head, which repeat the main model's and are skipped.

Left out: every other model family.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cofire.errors import ServeError, SpecError
from cofire.model.build import build
from cofire.model.decoder import Decoder
from cofire.model.moe import MoELayer
from cofire.precision.quantize import BLOCK, Quantized, ScaleFormat, quantize
from cofire.spec import MLASpec, ModelSpec, MoESpec, MTPSpec, RopeSpec, YarnSpec

FP8_BLOCK = 128
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 5_000_000_000
_SUPPORTED = ("deepseek_v3", "deepseek_v2")

# Ours -> theirs, below a layer.
_ATTENTION = {
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.query_down.weight": "self_attn.q_a_proj.weight",
    "attention.query_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.query_up.weight": "self_attn.q_b_proj.weight",
    "attention.kv_down.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up.weight": "self_attn.kv_b_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
    "feed_forward.router.weight": "mlp.gate.weight",
    "feed_forward.router.bias": "mlp.gate.e_score_correction_bias",
    "feed_forward.shared.down.weight": "mlp.shared_experts.down_proj.weight",
}
_GATE_UP = {"feed_forward.gate_up.weight": "mlp.", "feed_forward.shared.gate_up.weight": "mlp.shared_experts."}
_MTP = {
    "embedding_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "projection.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


# -- config.json ------------------------------------------------------------------------------------


def spec_from_config(config: dict[str, Any]) -> ModelSpec:
    """Return the spec of a parsed ``config.json``.

    Raises:
        SpecError: Another model family, or a field that Cofire does not know how to honour.
    """
    family = config.get("model_type")
    if family not in _SUPPORTED:
        raise SpecError(f"model_type = {family!r} is not supported; supported: {', '.join(_SUPPORTED)}")
    try:
        return _spec(config, family)
    except KeyError as error:
        raise SpecError(f"config.json lacks {error.args[0]!r}, which a {family} model has") from None
    except ValueError as error:
        raise SpecError(f"config.json: {' '.join(str(error).split())}") from None


def _spec(config: dict[str, Any], family: str) -> ModelSpec:
    depth = config.get("num_nextn_predict_layers") or 0
    return ModelSpec(
        name=str(config.get("_name_or_path") or family),
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        intermediate_size=config["intermediate_size"],
        max_sequence_length=config["max_position_embeddings"],
        attention=MLASpec(
            num_heads=config["num_attention_heads"],
            q_lora_rank=config.get("q_lora_rank"),
            kv_lora_rank=config["kv_lora_rank"],
            qk_nope_head_dim=config["qk_nope_head_dim"],
            qk_rope_head_dim=config["qk_rope_head_dim"],
            v_head_dim=config["v_head_dim"],
        ),
        moe=_moe_spec(config, family),
        mtp=MTPSpec(depth=depth) if depth else None,
        rope=_rope_spec(config),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        init_std=config.get("initializer_range", 0.02),
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def _moe_spec(config: dict[str, Any], family: str) -> MoESpec | None:
    if not config.get("n_routed_experts"):
        return None
    v3 = family == "deepseek_v3"
    grouped = v3 or config.get("topk_method") == "group_limited_greedy"
    return MoESpec(
        num_routed_experts=config["n_routed_experts"],
        num_shared_experts=config.get("n_shared_experts") or 0,
        num_experts_per_token=config["num_experts_per_tok"],
        expert_intermediate_size=config["moe_intermediate_size"],
        num_first_dense_layers=config.get("first_k_dense_replace", 0),
        score_function="sigmoid" if v3 else "softmax",
        num_expert_groups=(config.get("n_group") or 1) if grouped else 1,
        num_limited_groups=(config.get("topk_group") or 1) if grouped else 1,
        group_score="top2_sum" if v3 else "max",
        # DeepSeek-V2's own code and transformers' never normalise on this path.
        normalize_gates=bool(config.get("norm_topk_prob", True)) if v3 else False,
        routed_scaling_factor=config.get("routed_scaling_factor", 1.0),
        selection_bias=v3,
    )


def _rope_spec(config: dict[str, Any]) -> RopeSpec:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise SpecError(f"config.json: rope_type = {kind!r} is not one of default, yarn")
    yarn = None
    if kind == "yarn":
        yarn = YarnSpec(
            factor=rope["factor"],
            original_length=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast", 32.0),
            beta_slow=rope.get("beta_slow", 1.0),
            mscale=rope.get("mscale", 1.0),
            mscale_all_dim=rope.get("mscale_all_dim", 0.0),
        )
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    return RopeSpec(theta=theta, interleaved=config.get("rope_interleave", True), yarn=yarn)


def config_from_spec(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the ``config.json`` of a spec, for transformers.

    Raises:
        SpecError: No DeepSeek-V3 or -V2 model has this shape.
    """
    attention, moe = spec.attention, spec.moe
    if not isinstance(attention, MLASpec) or moe is None:
        raise SpecError(f"{spec.name} has no MLA or no experts; only DeepSeek-V3 and -V2 models can be written")
    v3 = moe.score_function == "sigmoid"
    rule = ("top2_sum", True) if v3 else ("max", False)
    if moe.num_expert_groups > 1 and moe.group_score != rule[0]:
        raise SpecError(
            f"moe.group_score = {moe.group_score!r} with {moe.score_function} scores is no DeepSeek model's"
        )
    if moe.selection_bias != v3 or moe.balance.bias_rule == "multiplicative" or not moe.num_shared_experts:
        raise SpecError(
            f"{spec.name}: a {moe.score_function} router with this bias or no shared expert cannot be written"
        )
    if not v3 and moe.normalize_gates:
        raise SpecError(
            f"{spec.name}: DeepSeek-V2 does not normalise gates, so normalize_gates = true cannot be written"
        )
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_sequence_length,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "n_routed_experts": moe.num_routed_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "moe_intermediate_size": moe.expert_intermediate_size,
        "first_k_dense_replace": moe.num_first_dense_layers,
        "scoring_func": moe.score_function,
        "topk_method": "noaux_tc" if v3 else ("group_limited_greedy" if moe.num_expert_groups > 1 else "greedy"),
        "n_group": moe.num_expert_groups,
        "topk_group": moe.num_limited_groups,
        "norm_topk_prob": moe.normalize_gates,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "num_nextn_predict_layers": 0 if spec.mtp is None else spec.mtp.depth,
        "rms_norm_eps": spec.norm_epsilon,
        "initializer_range": spec.init_std,
        "tie_word_embeddings": spec.tie_embeddings,
        "rope_interleave": spec.rope.interleaved,
        "rope_theta": spec.rope.theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if spec.rope.yarn is not None:
        yarn = spec.rope.yarn
        config["rope_scaling"] = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return config


# -- names ------------------------------------------------------------------------------------------


def named_slots(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(their name, our storage)`` for every tensor of a decoder, as views of it."""
    tied = decoder.spec.tie_embeddings
    for ours, theirs in _TOP.items():
        if not (tied and ours == "head.weight"):
            yield theirs, decoder.get_parameter(ours).data
    for i, layer in enumerate(decoder.layers):
        yield from _block_slots(layer, f"model.layers.{i}.")
    for k, module in enumerate(decoder.mtp, start=decoder.spec.num_layers):
        for ours, theirs in _MTP.items():
            yield f"model.layers.{k}.{theirs}", module.get_parameter(ours).data
        yield from _block_slots(module.get_submodule("block"), f"model.layers.{k}.")


def _block_slots(block: torch.nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    for ours, theirs in _ATTENTION.items():
        if ours in tensors:
            yield prefix + theirs, tensors[ours].data
    for ours, theirs in _GATE_UP.items():
        if ours in tensors:
            gate, up = tensors[ours].data.chunk(2)
            yield f"{prefix}{theirs}gate_proj.weight", gate
            yield f"{prefix}{theirs}up_proj.weight", up
    feed_forward = block.get_submodule("feed_forward")
    if isinstance(feed_forward, MoELayer):
        for e, (gate_up, down) in enumerate(zip(feed_forward.gate_up.data, feed_forward.down.data, strict=True)):
            gate, up = gate_up.chunk(2)
            yield f"{prefix}mlp.experts.{e}.gate_proj.weight", gate
            yield f"{prefix}mlp.experts.{e}.up_proj.weight", up
            yield f"{prefix}mlp.experts.{e}.down_proj.weight", down


# -- reading ----------------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Decoder:
    """Load a DeepSeek-V3 or -V2 folder.

    Args:
        folder: With ``config.json`` and safetensors.
        dtype: Of the parameters; none: the one that ``config.json`` names, FP32 if it names none.
        device: Where to put them; none: the CPU.

    Raises:
        SpecError: ``config.json`` is of another family or broken.
        ServeError: A shard is missing, damaged or foreign.
    """
    root = Path(folder)
    config = _read_json(root / "config.json")
    spec = spec_from_config(config)
    homes = _tensor_files(root)
    if spec.mtp is not None and f"model.layers.{spec.num_layers}.eh_proj.weight" not in homes:
        spec = spec.model_copy(update={"mtp": None})
    named = str(config.get("torch_dtype") or config.get("dtype") or "float32")
    stored = getattr(torch, named, None)
    chosen = dtype or (stored if isinstance(stored, torch.dtype) else torch.float32)
    decoder = build(spec, device="meta", dtype=chosen).to_empty(device=device or "cpu")
    slots = dict(named_slots(decoder))
    _fill(slots, homes, _skipped(spec))
    return decoder


def _skipped(spec: ModelSpec) -> tuple[str, ...]:
    """Names (or their beginnings) that a file may hold beyond our slots."""
    names = ["lm_head.weight"] if spec.tie_embeddings else []
    depth = 0 if spec.mtp is None else spec.mtp.depth
    for k in range(spec.num_layers, spec.num_layers + depth):
        names += [f"model.layers.{k}.embed_tokens.", f"model.layers.{k}.shared_head.head."]
    if not depth:
        names.append(f"model.layers.{spec.num_layers}.")
    return tuple(names)


def _fill(slots: dict[str, Tensor], homes: dict[str, Path], skipped: tuple[str, ...]) -> None:
    scales = {name for name in homes if name.endswith("_scale_inv")}
    missing = [name for name in slots if name not in homes]
    foreign = [name for name in homes if name not in slots and name not in scales and not name.startswith(skipped)]
    if missing or foreign:
        what, name = ("lacks", missing[0]) if missing else ("holds the unknown tensor", foreign[0])
        more = len(missing or foreign) - 1
        raise ServeError(f"the checkpoint {what} {name}" + (f" (and {more} more)" if more else ""))
    for path in sorted(set(homes.values())):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in slots:
                        _copy(slots[name], file.get_tensor(name), name, homes)
        except FileNotFoundError:
            raise ServeError(f"shard {path.name} is missing from {path.parent}") from None
        except (SafetensorError, OSError) as error:
            raise ServeError(f"shard {path} cannot be read: {error}") from None


def _copy(slot: Tensor, value: Tensor, name: str, homes: dict[str, Path]) -> None:
    if slot.shape != value.shape:
        raise ServeError(f"{name} has shape {list(value.shape)}, but config.json asks for {list(slot.shape)}")
    if value.dtype == torch.float8_e4m3fn:
        home = homes.get(f"{name}_scale_inv")
        if home is None:
            raise ServeError(f"{name} is FP8, but {name}_scale_inv is missing")
        with safe_open(home, framework="pt") as file:
            value = dequantize_blocks(value, file.get_tensor(f"{name}_scale_inv"), name)
    slot.copy_(value)


def dequantize_blocks(weight: Tensor, scale: Tensor, name: str = "weight") -> Tensor:
    """Widen an FP8 weight [O, I] by its factors [ceil(O / 128), ceil(I / 128)] to FP32.

    Raises:
        ServeError: The factors' shape does not fit.
    """
    rows, columns = weight.shape
    expected = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    if tuple(scale.shape) != expected:
        raise ServeError(
            f"{name}_scale_inv has shape {list(scale.shape)}, but {list(expected)} blocks of 128 x 128 need one each"
        )
    return Quantized(weight.contiguous(), scale.float().contiguous(), BLOCK).dequantize()


def _tensor_files(root: Path) -> dict[str, Path]:
    """Return the file of every tensor in a folder."""
    if (root / _INDEX).is_file():
        index = _read_json(root / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(Path(str(name)).name == name for name in index.values()):
            raise ServeError(f"{root / _INDEX} has no usable weight_map")
        return {name: root / file for name, file in index.items()}
    if not (root / _SINGLE).is_file():
        raise ServeError(f"{root} holds neither {_SINGLE} nor {_INDEX}")
    try:
        with safe_open(root / _SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), root / _SINGLE)
    except (SafetensorError, OSError) as error:
        raise ServeError(f"{root / _SINGLE} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ServeError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ServeError(f"{path} holds no JSON object")
    return value


# -- writing ----------------------------------------------------------------------------------------


def save(
    decoder: Decoder,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    shard_bytes: int = _SHARD_BYTES,
    fp8: ScaleFormat | None = None,
) -> None:
    """Write a folder that ``transformers.AutoModelForCausalLM`` loads; an older one of that name is replaced.

    Args:
        decoder: DeepSeek-V3- or -V2-shaped.
        folder: Appears whole or not at all.
        dtype: Of the weights in the file; none: as they are. Selection biases stay FP32.
        shard_bytes: A new file begins before one would pass this size.
        fp8: Write linear layers in FP8 with one factor a block of 128 x 128, in FP32 or as powers of two (which
            are FP32 numbers in the file all the same); none: in ``dtype``.

    Raises:
        SpecError: The decoder's shape is no DeepSeek model's.
        ServeError: The folder cannot be written.
    """
    root = Path(folder)
    dtype = dtype or decoder.embedding.weight.dtype
    config = config_from_spec(decoder.spec, dtype)
    if fp8 is not None:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        } | ({"scale_fmt": "ue8m0"} if fp8 == "ue8m0" else {})
    hidden = root.with_name(f".{root.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        (hidden / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
        _write_shards(decoder, hidden, dtype, shard_bytes, fp8)
        for path in hidden.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(root, ignore_errors=True)
        os.replace(hidden, root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise ServeError(f"cannot write {root}: {getattr(error, 'strerror', None) or error}") from None


def _is_fp8(name: str) -> bool:
    """Return whether a tensor is FP8 in an FP8 checkpoint: the matrices of linear layers inside the blocks."""
    return (".self_attn." in name and "_proj" in name) or (".mlp." in name and name.endswith("_proj.weight"))


def _stored(name: str, slot: Tensor, dtype: torch.dtype, fp8: ScaleFormat | None) -> dict[str, Tensor]:
    """Return what a file holds of one of our tensors, by name."""
    if fp8 is not None and _is_fp8(name):
        # No floor worth the name: a block of small weights keeps its digits.
        q = quantize(slot.cpu().float(), BLOCK, scale_format=fp8, amax_floor=1e-30)
        return {name: q.data, f"{name}_scale_inv": q.scale.float()}
    kept = torch.float32 if name.endswith("_bias") else dtype
    return {name: slot.to(kept, copy=True).cpu().contiguous()}


def _stored_bytes(name: str, slot: Tensor, dtype: torch.dtype, fp8: ScaleFormat | None) -> int:
    if fp8 is not None and _is_fp8(name):
        return slot.numel() + 4 * math.prod(-(-size // FP8_BLOCK) for size in slot.shape)
    return slot.numel() * (4 if name.endswith("_bias") else dtype.itemsize)


def _write_shards(
    decoder: Decoder, folder: Path, dtype: torch.dtype, shard_bytes: int, fp8: ScaleFormat | None
) -> None:
    shards: list[list[str]] = [[]]
    slots, size, total = dict(named_slots(decoder)), 0, 0
    for name, slot in slots.items():
        bytes_ = _stored_bytes(name, slot, dtype, fp8)
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + bytes_, total + bytes_
    files = {}
    for i, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= _stored(name, slots[name], dtype, fp8)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / _INDEX).write_text(json.dumps(index, indent=1), "utf-8")

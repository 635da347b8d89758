"""How much a model costs: parameters, cache, operations and memory, as formulas over specs. No torch."""

from cofire.plan.bounds import Bounds, DecodeBound, TrainingBound, expected_distinct_experts
from cofire.plan.estimate import default_workload, estimate, run_workload
from cofire.plan.flops import (
    DecodeFlops,
    TrainingFlops,
    decode_attention_flops_per_layer,
    decode_core_intensity,
    decode_flops_per_token,
    deepseekmoe_flops_per_token,
    ffn_units,
    training_flops_per_token,
)
from cofire.plan.inference import ExpertParallelLimit, expert_parallel_limit, mtp_speed_up
from cofire.plan.kv_cache import KVCacheSize, expanded_kv_bytes_per_token, kv_bytes_per_token, kv_cache_size
from cofire.plan.memory import InferenceMemory, MemoryEstimate, activation_parts, inference_memory, training_memory
from cofire.plan.parameters import MTPParameterCount, ParameterCount, count_parameters
from cofire.plan.pipeline import SCHEDULES, Schedule, make_schedule
from cofire.plan.report import Plan, RunCost, note
from cofire.plan.timeline import (
    ChunkTimes,
    ScheduleCost,
    Timeline,
    bubble_formula_s,
    compare_schedules,
    run_schedule,
    simulate,
    trace_events,
)

__all__ = [
    "SCHEDULES",
    "Bounds",
    "ChunkTimes",
    "DecodeBound",
    "DecodeFlops",
    "ExpertParallelLimit",
    "InferenceMemory",
    "KVCacheSize",
    "MTPParameterCount",
    "MemoryEstimate",
    "ParameterCount",
    "Plan",
    "RunCost",
    "Schedule",
    "ScheduleCost",
    "Timeline",
    "TrainingBound",
    "TrainingFlops",
    "activation_parts",
    "bubble_formula_s",
    "compare_schedules",
    "count_parameters",
    "decode_attention_flops_per_layer",
    "decode_core_intensity",
    "decode_flops_per_token",
    "deepseekmoe_flops_per_token",
    "default_workload",
    "estimate",
    "expanded_kv_bytes_per_token",
    "expected_distinct_experts",
    "expert_parallel_limit",
    "ffn_units",
    "inference_memory",
    "kv_bytes_per_token",
    "kv_cache_size",
    "make_schedule",
    "mtp_speed_up",
    "note",
    "run_schedule",
    "run_workload",
    "simulate",
    "trace_events",
    "training_flops_per_token",
    "training_memory",
]

"""What a model costs, how a cluster trains and serves it, and what binds: formulas and simulations. No torch."""

from cofire.plan.bounds import Bounds, DecodeBound, TrainingBound, expected_distinct_experts
from cofire.plan.device_memory import RankMemory
from cofire.plan.estimate import estimate
from cofire.plan.expert_placement import Placement, evaluate_placement, place_experts, update_placement
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
from cofire.plan.layouts import LayoutRanking, SearchSpec, rank_layouts
from cofire.plan.memory import InferenceMemory, MemoryEstimate, activation_parts, inference_memory, training_memory
from cofire.plan.parameters import MTPParameterCount, ParameterCount, count_parameters
from cofire.plan.pipeline import SCHEDULES, Schedule, count_stages, make_schedule
from cofire.plan.pipeline_cost import PipelineCost, schedule_cost, schedule_costs
from cofire.plan.report import Plan, RunCost, note
from cofire.plan.serving import ServingPlan, ServingSpec, largest_batch, plan_serving, sweep_batch
from cofire.plan.step import StepEstimate, StepModel
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
from cofire.plan.training import TrainingPlan, plan_training
from cofire.plan.uncertainty import Interval, Sensitivity, interval
from cofire.plan.workloads import default_workload, run_workload

__all__ = [
    "SCHEDULES",
    "Bounds",
    "ChunkTimes",
    "DecodeBound",
    "DecodeFlops",
    "ExpertParallelLimit",
    "InferenceMemory",
    "Interval",
    "KVCacheSize",
    "LayoutRanking",
    "MTPParameterCount",
    "MemoryEstimate",
    "ParameterCount",
    "PipelineCost",
    "Placement",
    "Plan",
    "RankMemory",
    "RunCost",
    "Schedule",
    "ScheduleCost",
    "SearchSpec",
    "Sensitivity",
    "ServingPlan",
    "ServingSpec",
    "StepEstimate",
    "StepModel",
    "Timeline",
    "TrainingBound",
    "TrainingFlops",
    "TrainingPlan",
    "activation_parts",
    "bubble_formula_s",
    "compare_schedules",
    "count_parameters",
    "count_stages",
    "decode_attention_flops_per_layer",
    "decode_core_intensity",
    "decode_flops_per_token",
    "deepseekmoe_flops_per_token",
    "default_workload",
    "estimate",
    "evaluate_placement",
    "expanded_kv_bytes_per_token",
    "expected_distinct_experts",
    "expert_parallel_limit",
    "ffn_units",
    "inference_memory",
    "interval",
    "kv_bytes_per_token",
    "kv_cache_size",
    "largest_batch",
    "make_schedule",
    "mtp_speed_up",
    "note",
    "place_experts",
    "plan_serving",
    "plan_training",
    "rank_layouts",
    "run_schedule",
    "run_workload",
    "schedule_cost",
    "schedule_costs",
    "simulate",
    "sweep_batch",
    "trace_events",
    "training_flops_per_token",
    "training_memory",
    "update_placement",
]

"""Lowers an operator to code that runs: an oracle in loops, a gather that is always right, and a fast plan of views."""

from cofire.search.lowering.gather import GatherKernel
from cofire.search.lowering.loop_nest import loop_nest, loop_nest_gradients
from cofire.search.lowering.module import COMPILE_OPTIONS, LoweredOperator, initial_deviations, lower
from cofire.search.lowering.optimised import OptimisedKernel
from cofire.search.lowering.planner import Plan, plan, plans
from cofire.search.lowering.source import write_source

__all__ = [
    "COMPILE_OPTIONS",
    "GatherKernel",
    "LoweredOperator",
    "OptimisedKernel",
    "Plan",
    "initial_deviations",
    "loop_nest",
    "loop_nest_gradients",
    "lower",
    "plan",
    "plans",
    "write_source",
]

"""The vocabulary: frozen, self-validating values that say what a model, a cluster, a run and an operator are."""

from cofire.spec.figure import Figure
from cofire.spec.hardware import (
    ClusterSpec,
    DeviceSpec,
    HostSpec,
    KernelRate,
    MatrixRate,
    NetworkSpec,
    ScaleUpSpec,
)
from cofire.spec.io import diff, dump, json_schema, load, load_as, parse, preset_names, save
from cofire.spec.kernels import KernelLimitsSpec, KernelSamplingSpec, KernelSpec, KernelsSpec, KernelWindowSpec
from cofire.spec.model import (
    BalanceSpec,
    GQASpec,
    MLASpec,
    ModelSpec,
    MoESpec,
    MTPSpec,
    RopeSpec,
    YarnSpec,
)
from cofire.spec.operator import OperatorSpec, PrimitiveSpec
from cofire.spec.parallel import ParallelSpec
from cofire.spec.precision import PrecisionSpec
from cofire.spec.run import CheckpointSpec, DataSpec, OptimizerSpec, RunSpec, ScheduleSpec
from cofire.spec.search import LimitsSpec, SamplingSpec, SearchSpec, WindowSpec
from cofire.spec.spec_type import Spec
from cofire.spec.workload import PipelineSpec, WorkloadSpec

__all__ = [
    "BalanceSpec",
    "CheckpointSpec",
    "ClusterSpec",
    "DataSpec",
    "DeviceSpec",
    "Figure",
    "GQASpec",
    "HostSpec",
    "KernelLimitsSpec",
    "KernelRate",
    "KernelSamplingSpec",
    "KernelSpec",
    "KernelWindowSpec",
    "KernelsSpec",
    "LimitsSpec",
    "MLASpec",
    "MTPSpec",
    "MatrixRate",
    "MoESpec",
    "ModelSpec",
    "NetworkSpec",
    "OperatorSpec",
    "OptimizerSpec",
    "ParallelSpec",
    "PipelineSpec",
    "PrecisionSpec",
    "PrimitiveSpec",
    "RopeSpec",
    "RunSpec",
    "SamplingSpec",
    "ScaleUpSpec",
    "ScheduleSpec",
    "SearchSpec",
    "Spec",
    "WindowSpec",
    "WorkloadSpec",
    "YarnSpec",
    "diff",
    "dump",
    "json_schema",
    "load",
    "load_as",
    "parse",
    "preset_names",
    "save",
]

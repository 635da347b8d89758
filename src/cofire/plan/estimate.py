"""From specs to a plan: one function that asks every formula of this package."""

from __future__ import annotations

from typing import Any

from cofire.errors import PlanError
from cofire.plan.bounds import cluster_bounds
from cofire.plan.flops import decode_flops_per_token, training_flops_per_token
from cofire.plan.kv_cache import kv_cache_size
from cofire.plan.machine import predict_training_step
from cofire.plan.memory import inference_memory, training_memory
from cofire.plan.parameters import count_parameters
from cofire.plan.report import Plan, RunCost
from cofire.plan.training import TrainingPlan, plan_training
from cofire.plan.workloads import default_workload, run_workload
from cofire.spec.hardware import ClusterSpec
from cofire.spec.model import ModelSpec
from cofire.spec.parallel import ParallelSpec
from cofire.spec.run import RunSpec
from cofire.spec.workload import WorkloadSpec


def estimate(
    model: ModelSpec | RunSpec,
    cluster: ClusterSpec | None = None,
    parallel: ParallelSpec | dict[str, Any] | None = None,
    workload: WorkloadSpec | None = None,
) -> Plan:
    """Estimate what a model, or a training run, costs.

    Args:
        model: A model, or a run: then sequence length, micro-batch, formats and recomputation are the run's.
        cluster: Also bound training and decoding by this cluster's devices, and plan how all of them train.
        parallel: A layout over the cluster, or the fields of one that are fixed; the rest is searched.
        workload: Sizes and formats; none: the run's, or the defaults within the model's longest sequence.

    Returns:
        The plan.

    Raises:
        SpecError: The fields of a layout break one of its rules.
        PlanError: The layout cannot run, one is given without a cluster, the workload is longer than the model allows,
            or the cluster's device has no peak for a format.
    """
    if parallel is not None and cluster is None:
        raise PlanError("a layout needs devices to lie on; add a cluster, for example h800-2048")
    run = model if isinstance(model, RunSpec) else None
    decoder = model.model if isinstance(model, RunSpec) else model
    workload = workload or (run_workload(run) if run else default_workload(decoder))
    _check(decoder, workload)
    count = count_parameters(decoder)
    flops = training_flops_per_token(decoder, workload.sequence_length)
    memory = training_memory(decoder, workload)
    other = workload.model_copy(update={"recompute": "none" if workload.recompute == "full" else "full"})
    decode = decode_flops_per_token(decoder, workload.context_length)
    serving = inference_memory(decoder, workload)
    bounds = None
    if cluster is not None:
        bounds = cluster_bounds(decoder, workload, cluster, count, (flops, memory), (decode, serving))
    training, refused, machine = None, "", None
    if cluster is not None and run is not None and cluster.device.matrix_rates and parallel is None:
        machine = predict_training_step(run, cluster)
    elif cluster is not None:
        training, refused = _plan_training(decoder, cluster, workload, run, parallel)
    return Plan(
        model=decoder,
        run=run,
        workload=workload,
        cluster=cluster,
        parameters=count,
        kv_cache=kv_cache_size(decoder, workload.cache_bytes_per_number),
        training_flops=flops,
        training_memory=memory,
        training_memory_other=training_memory(decoder, other),
        run_cost=None if run is None else _run_cost(run, flops.total),
        decode_flops=decode,
        inference_memory=serving,
        bounds=bounds,
        training=training,
        training_refused=refused,
        machine=machine,
    )


def _plan_training(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: WorkloadSpec,
    run: RunSpec | None,
    parallel: ParallelSpec | dict[str, Any] | None,
) -> tuple[TrainingPlan | None, str]:
    """Plan the training; a layout that was asked for must work, one that was not may be none."""
    if run is not None and workload.global_batch_size is None:
        workload = workload.model_copy(update={"global_batch_size": run.batch_size})
    fixed = parallel
    if workload.recipe == "fp32" and not isinstance(parallel, ParallelSpec):
        fixed = {"precision": "fp32", **(parallel or {})}
    try:
        return plan_training(model, cluster, workload, fixed), ""
    except PlanError as error:
        if parallel is not None:
            raise
        return None, str(error)


def _run_cost(run: RunSpec, flops_per_token: int) -> RunCost:
    return RunCost(
        tokens_per_step=run.tokens_per_step,
        tokens=run.training_tokens,
        flops_per_step=run.tokens_per_step * flops_per_token,
        flops=run.training_tokens * flops_per_token,
    )


def _check(model: ModelSpec, workload: WorkloadSpec) -> None:
    for name in ("sequence_length", "context_length"):
        length = getattr(workload, name)
        if length > model.max_sequence_length:
            raise PlanError(
                f"workload.{name} = {length} must be at most the {model.max_sequence_length} tokens that "
                f"{model.name} is made for; set workload.{name}={model.max_sequence_length} or raise "
                "max_sequence_length"
            )

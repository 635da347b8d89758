"""Co-design: models and clusters varied together, each trained with its best layout and served, and their Pareto front.

Each design is a model on a cluster. Training: the layout that a search in three passes finds (``best_step``). Decoding:
``serving`` as the sweep gives it, on as many more devices (doubling) and tensor-parallel ones as it takes to fit; its
TPOT, and the most throughput of any batch under ``tpot_limit_s``. Price: device hours times the rent, which a
dearer or cheaper network than the rented one changes by its share. Designs that cannot be built, trained, served or
priced are counted with the reason.

Designs whose times cannot differ share one search; groups of them are the tasks of the worker processes. A result is
appended to a file of JSON lines, flushed to the disk, before the next one: a sweep that was killed goes on.

Left out: how good a model is. Parameters are not quality, and nothing here predicts a loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any, Literal, TypeAlias

import numpy as np

from cofire.errors import PlanError
from cofire.network.cost import cluster_network_cost
from cofire.plan.design_space import (
    DEFAULT_OBJECTIVES,
    MEASURES,
    Candidate,
    DesignSpecs,
    Objective,
    SweepSpec,
    candidate,
    check_fixed,
    chosen_indices,
    default_axes,
)
from cofire.plan.kv_cache import kv_bytes_per_token
from cofire.plan.layouts import SearchSpec, rank_layouts, with_batch
from cofire.plan.parameters import count_parameters
from cofire.plan.pareto import Costs, knee, num_beaten, pareto_front, spread
from cofire.plan.serving import ServingPlan, ServingSpec, largest_batch, plan_serving
from cofire.plan.step import StepEstimate, StepModel
from cofire.plan.sweep_file import SweepFile
from cofire.plan.uncertainty import interval
from cofire.spec.figure import Label
from cofire.spec.hardware import ClusterSpec
from cofire.spec.io import parse
from cofire.spec.model import ModelSpec
from cofire.spec.parallel import ParallelSpec
from cofire.spec.spec_type import Spec
from cofire.spec.workload import WorkloadSpec

Refusal = Literal["", "spec", "network", "training", "decoding", "price"]
Progress: TypeAlias = Callable[[int, int], None]

SHOWN = 20  # members of a front in a report, with the interval of their price

_MOST_POINTS = 10_000
_HOURS_PER_YEAR = 8760.0
_PRICED_PORT = 50e9  # bytes/s: the price list is one of 400 Gb/s ports
_DEGREES = 3  # sets of degrees that the second pass of a search looks into

# Degrees are found at a schedule and recomputation that are seldom far off, then these, then the rest.
_FIRST = SearchSpec(
    pp_max=16,
    ep=(1, 8, 16, 32, 64, 128, 256),
    micro_batch_size=(1,),
    schedule=("1f1b", "dualpipe"),
    recompute=("selective",),
    zero_stage=(1,),
)
_SECOND = SearchSpec(
    micro_batch_size=(1,),
    schedule=("1f1b", "interleaved", "dualpipe"),
    stages_per_rank=(2,),
    recompute=("none", "selective"),
    zero_stage=(1,),
)
_SHARDED = SearchSpec(
    pp_max=2,
    tp=(1,),
    ep=_FIRST.ep,
    micro_batch_size=(2, 4),
    schedule=("1f1b", "dualpipe"),
    recompute=("selective",),
    zero_stage=(3,),
)
_THIRD = SearchSpec(recompute=("none", "selective"))
_TIGHT = SearchSpec(micro_batch_size=(1,), schedule=("1f1b", "dualpipe"), recompute=("full",), zero_stage=(1, 3))


class DesignFigures(Spec):
    """What a design costs.

    ``rent_usd_per_device_hour`` includes what its network differs in price from the rented one.
    ``activated_parameters`` count input embedding and head. ``network_usd_per_device`` is the capital of switches and
    links; none: no network. Figures of decoding are those of an instance of ``decode_devices``; throughput and price
    are those of the best batch under the limit, none where no batch keeps it.
    """

    total_parameters: float
    activated_parameters: float
    kv_bytes_per_token: float
    layout: ParallelSpec
    num_devices: int
    step_s: float
    tokens_per_s: float
    mfu: float
    device_hours_per_trillion_tokens: float
    peak_memory_bytes: float
    binds: str
    rent_usd_per_device_hour: float | None
    usd_per_trillion_tokens: float | None
    network_usd_per_device: float | None
    tpot_s: float
    decode_binds: str
    decode_devices: int
    decode_tp: int
    decode_batch_tp: int | None
    decode_sequences_per_device: float | None
    decode_tokens_per_s_per_device: float | None
    decode_usd_per_million_tokens: float | None


class Design(Spec):
    """A point of a sweep: what it changes, and its figures, or why it has none."""

    index: int
    changed: tuple[tuple[str, str], ...]
    figures: DesignFigures | None = None
    refusal: Refusal = ""
    reason: str = ""

    @property
    def name(self) -> str:
        """Its place in the grid."""
        return f"d{self.index}"

    def value(self, measure: str) -> float | None:
        """A measure's value; none where the design has none."""
        return None if self.figures is None else getattr(self.figures, MEASURES[measure].field)


class PriceInterval(Spec):
    """Dollars per trillion tokens with what is known about them; the layout stays the same."""

    index: int
    value: float
    low: float
    high: float
    label: Label


class SweepResult(Spec):
    """A sweep: all designs, the front by its objectives, its knee and how many designs each member beats.

    ``front``, ``shown`` and ``knee`` are places in ``designs``. ``intervals`` are those of the shown members' price.
    """

    spec: SweepSpec
    designs: tuple[Design, ...]
    front: tuple[int, ...]
    shown: tuple[int, ...]
    knee: int
    num_beaten: tuple[int, ...]
    refused: dict[str, int]
    intervals: tuple[PriceInterval, ...]


def prepare(spec: SweepSpec) -> SweepSpec:
    """Return the sweep with axes, objectives and decoding, its own or the default ones.

    Raises:
        SpecError: A spec cannot be read or breaks a rule.
        PlanError: A path is varied twice, or the grid is too large.
    """
    bare = candidate(spec.model_copy(update={"axes": ()}), 0)
    if bare.specs is None:
        raise PlanError(bare.reason)
    check_fixed(spec.fixed)
    changes: dict[str, object] = {}
    if not spec.axes:
        changes["axes"] = default_axes(bare.specs.model, bare.specs.cluster)
    if not spec.objectives:
        changes["objectives"] = DEFAULT_OBJECTIVES
    if spec.serving == SweepSpec.model_fields["serving"].default:
        changes["serving"] = _fitting(spec.serving, bare.specs)
    spec = spec.model_copy(update=changes)
    paths = Counter(path for axis in spec.axes for path in axis.paths)
    twice = [path for path, count in paths.items() if count > 1]
    if twice:
        raise PlanError(f"{twice[0]} is varied twice; give its values in one --vary")
    number = spec.grid_size if spec.max_points is None else min(spec.max_points, spec.grid_size)
    if number > _MOST_POINTS:
        raise PlanError(f"the grid has {number:,} designs, more than {_MOST_POINTS:,}; add --max-points 500")
    return spec


def _fitting(serving: ServingSpec, specs: DesignSpecs) -> ServingSpec:
    """Return how to decode, with the batch halved until the design as given holds it: then all have the same batch."""
    size = serving.sequences_per_device
    while size >= 1:
        smaller = serving.model_copy(update={"sequences_per_device": size})
        try:
            decode(specs.model, specs.cluster, smaller)
        except PlanError:
            size /= 2
            continue
        return smaller
    return serving


def run_sweep(
    spec: SweepSpec, workers: int = 1, path: str | None = None, progress: Progress | None = None
) -> SweepResult:
    """Estimate every design of a sweep and draw the front.

    Args:
        spec: The sweep.
        workers: Processes.
        path: A file of JSON lines that takes each result as it comes; what it holds of this sweep is not done again.
        progress: Called with designs done and designs in all, first when the processes have started.

    Raises:
        SpecError: A spec cannot be read or breaks a rule.
        PlanError: All designs are refused, or the file is of another sweep or in use.
    """
    spec = prepare(spec)
    indices = chosen_indices(spec)
    if path is None:
        designs = _estimate_missing(spec, indices, {}, workers, None, progress)
    else:
        with SweepFile(path, fingerprint(spec)) as file:
            known = {one.index: one for one in (parse(Design, record, path) for record in file.records)}
            designs = _estimate_missing(spec, indices, known, workers, file, progress)
    return judge(spec, [designs[index] for index in indices], workers)


def fingerprint(spec: SweepSpec) -> str:
    """Return what two sweeps share only if a design of one is the same in the other.

    The sample does not matter: a larger one goes on where a smaller one ended. The specs behind all names are in it, so
    that an edited file begins another sweep.
    """
    asked = spec.model_copy(update={"max_points": None, "seed": 0})
    names = {("model", spec.model), ("cluster", spec.cluster)}
    for axis in spec.axes:
        names |= {pair for row in axis.values for pair in zip(axis.paths, row, strict=True) if "." not in pair[0]}
    bare = spec.model_copy(update={"axes": (), "budget": None})
    behind = [candidate(bare.model_copy(update={kind: name}), 0) for kind, name in sorted(names)]
    # Another version may estimate otherwise.
    text = json.dumps([version("cofire"), asked.model_dump_json(), *(f"{one.specs} {one.reason}" for one in behind)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _estimate_missing(
    spec: SweepSpec,
    indices: list[int],
    known: dict[int, Design],
    workers: int,
    file: SweepFile | None,
    progress: Progress | None,
) -> dict[int, Design]:
    designs = dict(known)
    groups = list(_groups(spec, [index for index in indices if index not in known]))
    done = sum(index in known for index in indices)
    with _mapping(workers, len(groups)) as run:
        results = run(partial(estimate_group, spec), groups)
        if progress is not None:
            progress(done, len(indices))
        for group in results:
            for design in group:
                designs[design.index] = design
            if file is not None:
                file.append([design.model_dump(mode="json") for design in group])
            done += len(group)
            if progress is not None:
                progress(done, len(indices))
    return designs


@contextlib.contextmanager
def _mapping(workers: int, tasks: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield a map over processes, or over this one; what still waits is dropped when the block is left early."""
    if workers <= 1 or tasks < 2:
        yield map
        return
    pool = ProcessPoolExecutor(min(workers, tasks), initializer=_start_worker, initargs=(os.getpid(),))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Leave an interrupt from the keyboard to the parent, and end when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True).start()


def _groups(spec: SweepSpec, indices: list[int]) -> Iterator[list[int]]:
    """Yield the designs that share a search together, in the order of their first ones."""
    groups: dict[object, list[int]] = {}
    for index in indices:
        found = candidate(spec, index)
        groups.setdefault(index if found.specs is None else timing_key(found.specs), []).append(index)
    yield from groups.values()


def timing_key(specs: DesignSpecs) -> str:
    """Return what two designs share only if no layout's step differs between them.

    Names and prices do not matter, nor does the shape of a network: a step reads the speed of its ports alone, taking
    its bisection to be whole (``oversubscription`` says where it is not).
    """
    shape = {"name", "topology", "switch_ports", "num_planes", "num_endpoints", "routing", "same_leaf_latency_s"}
    network = specs.cluster.network
    cluster = specs.cluster.model_dump_json(exclude={"name", "description", "device_hour_usd", "network"})
    ports = "" if network is None else network.model_dump_json(exclude=shape)
    model = specs.model.model_dump_json(exclude={"name", "description", "rope"})
    return f"{model}{cluster}{ports}{specs.workload.model_dump_json()}"


def estimate_group(spec: SweepSpec, indices: list[int]) -> list[Design]:
    """Return the figures of designs that share a search."""
    step: StepEstimate | PlanError | None = None
    designs: list[Design] = []
    for index in indices:
        found = candidate(spec, index)
        if found.specs is None:
            designs.append(_refused(found, "spec", found.reason))
            continue
        if step is None:
            try:
                step = best_step(found.specs.model, found.specs.cluster, found.specs.workload, spec.fixed)
            except PlanError as error:
                step = error
        designs.append(_design(spec, found, found.specs, step))
    return designs


def best_step(
    model: ModelSpec, cluster: ClusterSpec, workload: WorkloadSpec, fixed: dict[str, object] | None = None
) -> StepEstimate:
    """Return the step of the best layout that a search in three passes finds.

    The first pass varies the degrees, with selective recomputation, and looks at sharded weights on few stages; the
    second varies schedule and recomputation at the best degrees; the third micro-batch, recomputation, sharding and
    format at the best of both. Where nothing fits, layers are recomputed whole and weights sharded.

    Raises:
        PlanError: Nothing fits, or no layout can run.
    """
    fixed = dict(fixed or {})
    formats = ("fp8",) if "fp8" in cluster.device.peak_flops_per_s else ("bf16",)

    def search(space: SearchSpec, limit: int = 1, **kept: object) -> tuple[StepEstimate, ...]:
        space = space.model_copy(update={name: (value,) for name, value in kept.items()})
        return rank_layouts(model, cluster, workload, space, fixed, limit=limit).best

    try:
        found = search(_FIRST.model_copy(update={"precision": formats}), 4 * _DEGREES)
    except PlanError:
        return search(_TIGHT)[0]
    second = _SECOND.model_copy(update={"precision": formats})
    second = _SECOND.model_copy(update={"precision": formats})
    best = [found[0]]
    for pp, tp, ep in list(dict.fromkeys((s.layout.pp, s.layout.tp, s.layout.ep) for s in found))[:_DEGREES]:
        best += search(second, pp=pp, tp=tp, ep=ep)
    finalists = [max(best, key=lambda step: step.tokens_per_s)]
    with contextlib.suppress(PlanError):  # sharded weights need not fit, nor be what is fixed
        finalists += search(_SHARDED.model_copy(update={"precision": formats}))
    for layout in [step.layout for step in finalists]:
        kept = {name: getattr(layout, name) for name in ("pp", "tp", "ep", "schedule", "stages_per_rank")}
        finalists += search(_THIRD, **kept)
    return max(finalists, key=lambda step: step.tokens_per_s)


def decode(model: ModelSpec, cluster: ClusterSpec, serving: ServingSpec) -> ServingPlan:
    """Return the decoding of a batch on the smallest instance that holds it.

    Devices double from ``serving.num_devices`` up until it fits; of ``tp`` from ``serving.tp`` up the fastest is taken.
    Weights are FP8 where the device has it and ``serving`` says so, else BF16. A model that is made for less than
    ``context_length`` attends to its longest sequence.

    Raises:
        PlanError: Not even the largest instance holds it.
    """
    if serving.weight_format == "fp8" and "fp8" not in cluster.device.peak_flops_per_s:
        serving = serving.model_copy(update={"weight_format": "bf16"})
    length = min(serving.context_length, model.max_sequence_length)
    serving = serving.model_copy(update={"context_length": length})
    most = cluster.num_devices if cluster.network is not None else cluster.scale_up_size
    devices = min(serving.num_devices, most)
    refusal = PlanError(f"serving.tp = {serving.tp} is more than the {cluster.scale_up_size} devices on fast links")
    while devices <= most:
        fitting: list[ServingPlan] = []
        tp = serving.tp
        while tp <= min(cluster.scale_up_size, devices):
            try:
                fitting.append(
                    plan_serving(model, cluster, serving.model_copy(update={"num_devices": devices, "tp": tp}))
                )
            except PlanError as error:
                refusal = error
            tp *= 2
        if fitting:
            return min(fitting, key=lambda plan: plan.step_s.value)
        devices *= 2
    raise refusal


def most_throughput(
    model: ModelSpec, cluster: ClusterSpec, serving: ServingSpec, least_tp: int, limit_s: float
) -> ServingPlan | None:
    """Return the decoding with most tokens per second under a limit on TPOT, on devices as given; none keeps it: none.

    Of ``tp`` from ``least_tp`` up the best is taken: a split that shortens a step may leave less room for caches.
    """
    found: list[ServingPlan] = []
    tp = least_tp
    while tp <= min(cluster.scale_up_size, serving.num_devices):
        with contextlib.suppress(PlanError):  # this degree does not fit, or is too slow with any batch
            found.append(largest_batch(model, cluster, serving.model_copy(update={"tp": tp}), limit_s))
        tp *= 2
    return max(found, key=lambda plan: plan.tokens_per_s_per_device.value, default=None)


def _refused(found: Candidate, refusal: Refusal, reason: str) -> Design:
    return Design(index=found.index, changed=found.changed, refusal=refusal, reason=reason)


def _design(spec: SweepSpec, found: Candidate, specs: DesignSpecs, step: StepEstimate | PlanError) -> Design:
    try:
        network_usd = _network_usd_per_device(specs.cluster)
    except PlanError as error:
        return _refused(found, "network", str(error))
    if isinstance(step, PlanError):
        return _refused(found, "training", str(step))
    try:
        served = decode(specs.model, specs.cluster, spec.serving)
    except PlanError as error:
        return _refused(found, "decoding", str(error))
    figures = _figures(spec, specs, step, served, network_usd)
    design = Design(index=found.index, changed=found.changed, figures=figures)
    lacking = [one.measure for one in spec.objectives if design.value(one.measure) is None]
    if not lacking:
        return design
    why = {
        "usd": f"{specs.cluster.name} has no rent; set cluster.device_hour_usd=2, or take other objectives",
        "network": f"{specs.cluster.name} has no network to price; take other objectives",
        "throughput": f"no batch keeps tpot_limit_s = {spec.tpot_limit_s:g}; raise it",
    }[lacking[0]]
    return _refused(found, "decoding" if lacking[0] == "throughput" else "price", why)


def _figures(
    spec: SweepSpec, specs: DesignSpecs, step: StepEstimate, served: ServingPlan, network_usd: float | None
) -> DesignFigures:
    assert served.tpot_s is not None  # of decoding
    count, rent = count_parameters(specs.model), rent_usd_per_hour(spec, specs)
    hours = step.device_hours_per_trillion_tokens
    largest = most_throughput(specs.model, specs.cluster, served.serving, spec.serving.tp, spec.tpot_limit_s)
    throughput = None if largest is None else largest.tokens_per_s_per_device.value
    return DesignFigures(
        total_parameters=count.total,
        activated_parameters=count.activated_with_both_embeddings,
        kv_bytes_per_token=kv_bytes_per_token(specs.model, spec.serving.cache_bytes_per_number),
        layout=step.layout,
        num_devices=step.num_devices,
        step_s=step.step_s,
        tokens_per_s=step.tokens_per_s,
        mfu=step.mfu,
        device_hours_per_trillion_tokens=hours,
        peak_memory_bytes=step.peak_memory_bytes,
        binds=step.binds,
        rent_usd_per_device_hour=rent,
        usd_per_trillion_tokens=None if rent is None else hours * rent,
        network_usd_per_device=network_usd,
        tpot_s=served.tpot_s.value,
        decode_binds=served.binds,
        decode_devices=served.serving.num_devices,
        decode_tp=served.serving.tp,
        decode_batch_tp=None if largest is None else largest.serving.tp,
        decode_sequences_per_device=None if largest is None else largest.serving.sequences_per_device,
        decode_tokens_per_s_per_device=throughput,
        decode_usd_per_million_tokens=None if rent is None or not throughput else rent / 3600 / throughput * 1e6,
    )


def rent_usd_per_hour(spec: SweepSpec, specs: DesignSpecs) -> float | None:
    """Return the rent of a device with the design's network; none where the cluster has no rent.

    The rent as given stands for the reference's network. What the design's costs more or less, per device, is spread
    over ``network_years``.
    """
    rent = specs.cluster.device_hour_usd
    return None if rent is None else rent.value + _surcharge_usd_per_hour(spec, specs)


def _surcharge_usd_per_hour(spec: SweepSpec, specs: DesignSpecs) -> float:
    try:
        before = _network_usd_per_device(specs.reference)
    except PlanError:
        return 0.0  # what is rented cannot be priced, so neither can a difference
    after = _network_usd_per_device(specs.cluster)
    if before is None or after is None:
        return 0.0
    return (after - before) / (spec.network_years * _HOURS_PER_YEAR)


def _network_usd_per_device(cluster: ClusterSpec) -> float | None:
    """Return the capital of switches and links per device; assumed to grow with the speed of the ports.

    Raises:
        PlanError: The switches are too small for the cluster.
    """
    if cluster.network is None:
        return None
    cost = cluster_network_cost(cluster)
    return cost.total * cluster.network.bandwidth_bytes_per_s / _PRICED_PORT / cluster.num_devices


# -- the front -----------------------------------------------------------------------------------------------------


def costs_of(designs: list[Design], objectives: Iterable[Objective]) -> Costs:
    """Return the objectives of designs as costs, of shape [designs, objectives]."""
    rows = [[one.sign * float(design.value(one.measure) or 0.0) for one in objectives] for design in designs]
    return np.array(rows, np.float64).reshape(len(designs), -1)


def judge(spec: SweepSpec, designs: list[Design], workers: int = 1) -> SweepResult:
    """Draw the front of designs and say how sure the price of its shown members is.

    Raises:
        PlanError: All designs are refused; the message has the commonest kind of reason.
    """
    able = [place for place, design in enumerate(designs) if design.figures is not None]
    refused = Counter(design.refusal for design in designs if design.figures is None)
    if not able:
        kind = refused.most_common(1)[0][0]
        example = next(design for design in designs if design.refusal == kind)
        raise PlanError(f"all {len(designs)} designs are refused, {refused[kind]} by {kind}: {example.reason}")
    costs = costs_of([designs[place] for place in able], spec.objectives)
    front = pareto_front(costs)
    shown = [designs[able[place]] for place in spread(costs, front, SHOWN)]
    priced = [design for design in shown if design.value("usd") is not None]
    with _mapping(workers, len(priced)) as run:
        intervals = tuple(run(partial(price_interval, spec), priced))
    chosen = {design.index for design in shown}
    return SweepResult(
        spec=spec,
        designs=tuple(designs),
        front=tuple(able[place] for place in front),
        shown=tuple(able[place] for place in front if designs[able[place]].index in chosen),
        knee=able[knee(costs, front)],
        num_beaten=tuple(num_beaten(costs, front)),
        refused=dict(refused.most_common()),
        intervals=intervals,
    )


def price_interval(spec: SweepSpec, design: Design) -> PriceInterval:
    """Return the interval of a design's dollars per trillion tokens, its layout as found.

    Raises:
        PlanError: The design has no price.
    """
    specs, figures = candidate(spec, design.index).specs, design.figures
    if specs is None or figures is None:
        raise PlanError(f"{design.name} was refused, so that it has no price: {design.reason}")
    surcharge = _surcharge_usd_per_hour(spec, specs)

    def price(moved: dict[str, Spec]) -> float:
        cluster, workload = moved["cluster"], moved["workload"]
        assert isinstance(cluster, ClusterSpec)
        assert isinstance(workload, WorkloadSpec)
        assert cluster.device_hour_usd is not None
        step = StepModel(specs.model, cluster, workload).estimate(figures.layout)
        return step.device_hours_per_trillion_tokens * (cluster.device_hour_usd.value + surcharge)

    known = interval({"cluster": specs.cluster, "workload": with_batch(specs.workload, specs.cluster)}, price)
    return PriceInterval(index=design.index, value=known.value, low=known.low, high=known.high, label=known.label)

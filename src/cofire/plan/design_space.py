"""What a co-design sweep varies, what it asks of each design, and the designs themselves.

An axis is a path and its values, as on the command line: ``model.moe.num_routed_experts=128,256``. Paths joined by a
slash move together: ``a/b=1/2,3/4`` are two values. A range ``1:8:x2`` multiplies, ``1:9:4`` adds. The grid is the
product of the axes. A choice that breaks a rule of a spec is a design that is refused, with the reason.

Left out: continuous optimisation; a sweep sees the values it is given.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field

from cofire.errors import PlanError, SpecError
from cofire.plan.serving import ServingSpec
from cofire.plan.workloads import default_workload
from cofire.spec.hardware import ClusterSpec, PositiveFloat
from cofire.spec.io import load_as, override, parse, preset_names, read_table
from cofire.spec.messages import known_paths, nearest
from cofire.spec.model import GQASpec, MLASpec, ModelSpec
from cofire.spec.parallel import ParallelSpec
from cofire.spec.spec_type import Positive, Spec
from cofire.spec.workload import WorkloadSpec

_TYPES: dict[str, type[Spec]] = {"model": ModelSpec, "cluster": ClusterSpec, "workload": WorkloadSpec}
_RANGE_MOST = 1000  # values of a range

MeasureName = Literal["total", "activated", "usd", "tpot", "kv", "network", "throughput", "memory", "step"]


@dataclass(frozen=True)
class Measure:
    """A figure of a design that a front can be drawn by.

    Attributes:
        name: As on the command line.
        title: What it is called in a table.
        field: Of ``DesignFigures``.
        unit: SI, or ``$``.
        better: Which way, unless the user turns it round.
    """

    name: MeasureName
    title: str
    field: str
    unit: str
    better: Literal["lower", "higher"]


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("total", "total parameters", "total_parameters", "", "higher"),
        Measure("activated", "activated parameters", "activated_parameters", "", "higher"),
        Measure("usd", "$ per 1e12 tokens", "usd_per_trillion_tokens", "$", "lower"),
        Measure("tpot", "TPOT", "tpot_s", "s", "lower"),
        Measure("kv", "KV cache per token", "kv_bytes_per_token", "B", "lower"),
        Measure("network", "network per device", "network_usd_per_device", "$", "lower"),
        Measure("throughput", "decoded tokens/s per device", "decode_tokens_per_s_per_device", "tokens/s", "higher"),
        Measure("memory", "peak memory of training", "peak_memory_bytes", "B", "lower"),
        Measure("step", "training step", "step_s", "s", "lower"),
    )
}


class Objective(Spec):
    """A measure, and which way it is better."""

    measure: MeasureName
    better: Literal["lower", "higher"]

    @property
    def sign(self) -> float:
        """What turns the measure into a cost."""
        return 1.0 if self.better == "lower" else -1.0


class Axis(Spec):
    """Paths that move together, and the values they take, each a text per path as ``--set`` reads it."""

    paths: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """The paths, joined."""
        return "/".join(self.paths)


class SweepSpec(Spec):
    """A co-design sweep: what is varied, what is kept, and what is asked.

    ``model`` and ``cluster`` are presets or files; ``changes`` are ``path=value`` texts for every design, with
    ``model.``, ``cluster.`` or ``workload.`` before the path. ``fixed`` fields of the layout keep one value.
    ``budget`` devices, or the most whole nodes below, stand in for each cluster's own number. The rent is that of the
    cluster before its network is varied: a design's network adds or saves the difference of the networks' prices,
    spread over ``network_years``.
    """

    model: str
    cluster: str
    axes: tuple[Axis, ...] = ()
    changes: tuple[str, ...] = ()
    fixed: dict[str, Any] = Field(default_factory=dict)
    objectives: tuple[Objective, ...] = ()
    workload: WorkloadSpec | None = Field(default=None, description="none: the default one of each model")
    serving: ServingSpec = ServingSpec(num_devices=64, tp=1)
    tpot_limit_s: PositiveFloat = Field(default=0.05, description="of the batch with most throughput")
    network_years: PositiveFloat = Field(default=4.0, description="over which a network is paid")
    budget: Positive | None = None
    max_points: Positive | None = Field(default=None, description="a sample of the grid, drawn with seed")
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def grid_size(self) -> int:
        """Designs of the whole grid."""
        return math.prod(len(axis.values) for axis in self.axes)


@dataclass(frozen=True)
class DesignSpecs:
    """What a design is made of; ``reference`` is its cluster with whole clusters varied alone: its rent is known."""

    model: ModelSpec
    cluster: ClusterSpec
    reference: ClusterSpec
    workload: WorkloadSpec


@dataclass(frozen=True)
class Candidate:
    """A design before it is estimated: its specs, or why there are none."""

    index: int
    changed: tuple[tuple[str, str], ...]
    specs: DesignSpecs | None
    reason: str = ""


def parse_axis(text: str) -> Axis:
    """Read one ``path=value,value``.

    Raises:
        PlanError: It is not of this form, or a path is of no spec that can be varied.
    """
    name, separator, values = text.partition("=")
    paths = tuple(part.strip() for part in name.split("/"))
    if not separator or not values.strip() or not all(paths):
        raise PlanError(
            f"--vary {text!r} is not of the form path=value,value, for example cluster.network.num_planes=1,8"
        )
    for path in paths:
        _check_path(path, text)
    taken: list[tuple[str, ...]] = []
    for value in values.split(","):
        parts = [part.strip() for part in value.split("/")] if len(paths) > 1 else [value.strip()]
        if len(parts) != len(paths) or not all(parts):
            raise PlanError(f"--vary {text!r}: {value.strip()!r} must have {len(paths)} values, for {', '.join(paths)}")
        for one in [(number,) for number in _range(parts[0])] if len(paths) == 1 else [tuple(parts)]:
            if one not in taken:
                taken.append(one)
    return Axis(paths=paths, values=tuple(taken))


def _check_path(path: str, text: str) -> None:
    kind, dot, rest = path.partition(".")
    if kind in _TYPES and (dot or kind != "workload"):
        known = set(known_paths(_TYPES[kind]))
        # A table of peaks has keys that no spec lists.
        if not dot or rest in known or rest.startswith("device.peak_flops_per_s."):
            return
        match = nearest(rest, known).replace("nearest: ", f"nearest: {kind}.")
        raise PlanError(f"--vary {text!r}: {path} is no field of a {kind}{match or '; see cofire spec show'}")
    known = {f"{name}.{field}" for name, spec in _TYPES.items() for field in known_paths(spec)}
    raise PlanError(
        f"--vary {text!r}: {path} must be model, cluster, or begin with model., cluster. or workload."
        f"{nearest(path, known)}"
    )


def _range(text: str) -> list[str]:
    """Return the values of ``start:stop:step`` or ``start:stop:xfactor``; any other text stands for itself."""
    parts = text.split(":")
    if len(parts) != 3:
        return [text]
    try:
        start, stop, step = float(parts[0]), float(parts[1]), float(parts[2].removeprefix("x"))
    except ValueError:
        return [text]
    times = parts[2].startswith("x")
    if not (start < stop and (step > 1 and start > 0 if times else step > 0)):
        raise PlanError(f"range {text!r} must grow: take start < stop and a step above 0, or x2 from above 0")
    values = [start]
    while (following := values[-1] * step if times else values[-1] + step) <= stop * (1 + 1e-12):
        values.append(following)
        if len(values) > _RANGE_MOST:
            raise PlanError(f"range {text!r} has more than {_RANGE_MOST} values; take a larger step")
    return [str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value) for value in values]


def parse_objective(text: str) -> Objective:
    """Read one ``measure`` or ``measure:max`` or ``measure:min``.

    Raises:
        PlanError: There is no such measure or way.
    """
    name, colon, way = text.partition(":")
    if name not in MEASURES:
        raise PlanError(f"--objective {name!r} is not one of {', '.join(MEASURES)}{nearest(name, MEASURES)}")
    if colon and way not in ("min", "max"):
        raise PlanError(f"--objective {text!r}: {way!r} must be min or max, for example {name}:max")
    better = {"min": "lower", "max": "higher"}.get(way, MEASURES[name].better)
    return Objective.model_validate({"measure": name, "better": better})


# Both sizes are capacity and are maximised, both prices are minimised; docs/stages/sweep.md argues it.
DEFAULT_OBJECTIVES = tuple(parse_objective(name) for name in ("total", "activated", "usd", "tpot"))


def default_axes(model: ModelSpec, cluster: ClusterSpec) -> tuple[Axis, ...]:
    """Return what is worth varying around a model on a cluster where nobody says.

    Experts and their width (half and twice as many, of the same width and of the same sum), top-k, the rank or the
    heads of the cache, the shape of the network and the speed of its ports; of a dense model depth and width.
    """
    axes = list(_model_axes(model))
    network = cluster.network
    if network is not None:
        shapes = {(network.topology, str(network.num_planes)): None, ("fat_tree3", "1"): None}
        if network.nics_per_node % 8 == 0:
            shapes["multi_plane", "8"] = None
        paths = ("cluster.network.topology", "cluster.network.num_planes")
        axes.append(Axis(paths=paths, values=tuple(shapes)))
        speeds = [network.bandwidth_bytes_per_s * factor for factor in (0.5, 1, 2)]
        axes.append(_single("cluster.network.bandwidth_bytes_per_s", [f"{speed:g}" for speed in speeds]))
    return tuple(axes)


def _model_axes(model: ModelSpec) -> Iterator[Axis]:
    moe, attention = model.moe, model.attention
    if moe is None:
        yield _single("model.num_layers", _near(model.num_layers, 0.75, 1, 1.25))
        yield _single("model.intermediate_size", _near(model.intermediate_size, 0.75, 1, 1.25))
    else:
        experts, width = moe.num_routed_experts, moe.expert_intermediate_size
        pairs = [(0.5, 1), (1, 1), (2, 1), (0.5, 2), (2, 0.5)]
        yield Axis(
            paths=("model.moe.num_routed_experts", "model.moe.expert_intermediate_size"),
            values=tuple(dict.fromkeys((*_near(experts, a), *_near(width, b)) for a, b in pairs)),
        )
        yield _single("model.moe.num_experts_per_token", _near(moe.num_experts_per_token, 0.5, 1, 2))
    if isinstance(attention, MLASpec):
        yield _single("model.attention.kv_lora_rank", _near(attention.kv_lora_rank, 0.5, 1))
    elif isinstance(attention, GQASpec):
        yield _single("model.attention.num_key_value_heads", _near(attention.num_key_value_heads, 0.5, 1))


def _near(number: int, *factors: float) -> list[str]:
    return list(dict.fromkeys(str(max(1, round(number * factor))) for factor in factors))


def _single(path: str, values: list[str]) -> Axis:
    return Axis(paths=(path,), values=tuple((value,) for value in values))


def chosen_indices(spec: SweepSpec) -> list[int]:
    """Return the places in the grid that a sweep visits: all, or a sample that ``seed`` fixes."""
    size = spec.grid_size
    if spec.max_points is None or spec.max_points >= size:
        return list(range(size))
    return sorted(random.Random(spec.seed).sample(range(size), spec.max_points))


def candidate(spec: SweepSpec, index: int) -> Candidate:
    """Return a design of the grid; the last axis varies fastest.

    One that breaks a rule of a spec has a ``reason`` and no specs.
    """
    changed: list[tuple[str, str]] = []
    rest = index
    for axis in reversed(spec.axes):
        rest, place = divmod(rest, len(axis.values))
        changed[:0] = zip(axis.paths, axis.values[place], strict=True)
    try:
        return Candidate(index, tuple(changed), _build(spec, changed))
    except (SpecError, PlanError) as error:
        return Candidate(index, tuple(changed), None, str(error).replace("--set ", ""))


def _build(spec: SweepSpec, changed: list[tuple[str, str]]) -> DesignSpecs:
    sources = {"model": spec.model, "cluster": spec.cluster} | {p: v for p, v in changed if p in ("model", "cluster")}
    fields = [(path, value) for path, value in changed if "." in path]
    tables = {kind: _table(kind, source) for kind, source in sources.items()}
    tables["workload"] = {}
    for change in spec.changes:
        override(tables, change)
    if any(path == "cluster.num_nodes" for path, _ in fields) or spec.budget is not None:
        # A network is bought for the cluster as it is then, unless an axis says otherwise.
        network = tables["cluster"].get("network")
        if isinstance(network, dict):
            network.pop("num_endpoints", None)
    if spec.budget is not None:
        tables["cluster"]["num_nodes"] = _num_nodes(spec.budget, tables["cluster"], fields)
    reference = parse(ClusterSpec, tables["cluster"], sources["cluster"])
    for path, value in fields:
        override(tables, f"{path}={value}")
    cluster = parse(ClusterSpec, tables["cluster"], sources["cluster"])
    if cluster.num_devices != reference.num_devices:
        sizes = {"num_nodes": cluster.num_nodes, "devices_per_node": cluster.devices_per_node}
        reference = reference.model_copy(update=sizes)
    model = parse(ModelSpec, tables["model"], sources["model"])
    workload = (spec.workload or default_workload(model)).model_dump() | tables["workload"]
    return DesignSpecs(model, cluster, reference, parse(WorkloadSpec, workload, "workload"))


def _num_nodes(budget: int, table: dict[str, Any], fields: list[tuple[str, str]]) -> int:
    if any(path == "cluster.num_nodes" for path, _ in fields):
        raise PlanError(f"budget = {budget} sets cluster.num_nodes, which is varied too; leave one of them out")
    varied = dict(fields).get("cluster.devices_per_node")
    per_node = int(table.get("devices_per_node", 8) if varied is None else varied)
    if budget < per_node:
        raise PlanError(f"budget = {budget} devices are less than one node of {table.get('name')}; take {per_node}")
    return budget // per_node


def _table(kind: str, source: str) -> dict[str, Any]:
    table = _preset(source) if source in preset_names() else read_table(source)
    if table.get("kind") != kind:
        load_as(ModelSpec if kind == "model" else ClusterSpec, source)  # raises, and says what would do
    return copy.deepcopy(table)


@lru_cache(maxsize=64)
def _preset(name: str) -> dict[str, Any]:
    return read_table(name)  # presets stay the same; a file may be edited between two sweeps


def check_fixed(fixed: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a layout, checked one by one.

    Raises:
        SpecError: A field is unknown or its value breaks a rule.
    """
    for name, value in fixed.items():
        # On its own: what degrees must divide depends on the cluster, and is asked of each design.
        alone = {"ep": value, "dp": value} if name == "ep" else {name: value}
        if name == "stages_per_rank":
            alone["schedule"] = "interleaved"
        parse(ParallelSpec, alone, "parallel")
    return fixed

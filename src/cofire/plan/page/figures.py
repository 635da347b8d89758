"""What a plan's page shows, as values: frozen records that a planner fills and that :mod:`page` draws.

Each number may say how it is known: its label (measured, calibrated, assumed), its basis (modelled by a formula or
simulated), and an interval. A record refuses what could not be drawn: a negative duration, a value that is not
finite, an axis that is not there. Left out: where the numbers come from; that is the planner's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

from cofire.errors import PlanError
from cofire.spec.figure import Figure, Label

Basis = Literal["modelled", "simulated"]

MEMORY_ROLES = ("weights", "gradients", "optimiser", "activations", "buffers", "reserved")


@dataclass(frozen=True)
class Value:
    """A number with what is known about it.

    Attributes:
        value: In SI units; a share is a fraction.
        unit: ``s``, ``B``, ``B/s``, ``FLOP``, ``FLOP/s``, ``$``, ``%`` for a fraction, or any other; none: a count.
        label: How well its inputs are known; none: exact, a matter of counting.
        basis: A formula, or a simulation; none: neither, an input or a measurement.
        low: Lower bound.
        high: Upper bound.
        source: Where it comes from.
    """

    value: float
    unit: str = ""
    label: Label | None = None
    basis: Basis | None = None
    low: float | None = None
    high: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        bounds = [self.value if bound is None else bound for bound in (self.low, self.high)]
        _finite("a value of the page", self.value, *bounds)
        if not bounds[0] <= self.value <= bounds[1]:
            raise PlanError(f"value = {self.value:g} must lie between low = {bounds[0]:g} and high = {bounds[1]:g}")

    @classmethod
    def of(cls, figure: Figure, unit: str, basis: Basis | None = None) -> Self:
        """Return a spec's figure, with its interval, label and source."""
        return cls(figure.value, unit, figure.label, basis, figure.low, figure.high, figure.source)


@dataclass(frozen=True)
class Fact:
    """A tile at the top of the page: a number, or a word, and a remark."""

    name: str
    value: Value | str
    remark: str = ""


@dataclass(frozen=True)
class MemoryBar:
    """A bar of the memory stack: bytes by role, in the order in which they are stacked."""

    name: str
    parts: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        for role, size_bytes in self.parts:
            _not_negative(f"{self.name}: {role}", size_bytes)

    @property
    def total_bytes(self) -> float:
        """Sum of the roles."""
        return sum(size_bytes for _, size_bytes in self.parts)


@dataclass(frozen=True)
class MemoryStack:
    """Memory of a device by role, one bar a pipeline rank or a layout, and the device's capacity, if there is one."""

    title: str
    bars: tuple[MemoryBar, ...]
    capacity_bytes: float | None
    capacity_name: str = "capacity"
    caption: str = ""
    label: Label | None = None
    basis: Basis | None = "modelled"

    def __post_init__(self) -> None:
        _some("bars", self.title, self.bars)
        if self.capacity_bytes is not None:
            _positive("capacity_bytes", self.capacity_bytes)


@dataclass(frozen=True)
class TimeSpan:
    """A slot of a pipeline rank, from ``start_s`` to ``end_s``.

    ``chunks`` are (part, stage, micro-batch), two of them where a forward and a backward chunk overlap.
    """

    rank: int
    chunks: tuple[tuple[str, int, int], ...]
    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        _not_negative("start_s", self.start_s)
        if not self.chunks or self.end_s < self.start_s or self.rank < 0:
            raise PlanError(f"a span of rank {self.rank} from {self.start_s:g} to {self.end_s:g} s cannot be drawn")
        _finite("end_s", self.end_s)

    @property
    def kind(self) -> str:
        """Its parts: F, B, I, W, or two of them joined by ``&``."""
        return "&".join(part for part, _, _ in self.chunks)


@dataclass(frozen=True)
class TimeLine:
    """A pipeline schedule in time, a row a rank."""

    title: str
    spans: tuple[TimeSpan, ...]
    caption: str = ""
    label: Label | None = None
    basis: Basis | None = "simulated"

    def __post_init__(self) -> None:
        _some("spans", self.title, self.spans)
        _positive("the end of the last span", self.makespan_s)

    @property
    def makespan_s(self) -> float:
        """The end of the last span."""
        return max(span.end_s for span in self.spans)

    @property
    def num_ranks(self) -> int:
        """Rows."""
        return max(span.rank for span in self.spans) + 1


@dataclass(frozen=True)
class StepPart:
    """A part of a step: what it adds to the step's time, and how much of it other work hides."""

    name: str
    time: Value
    hidden_s: float = 0.0
    remark: str = ""

    def __post_init__(self) -> None:
        _not_negative(self.name, self.time.value)
        _not_negative(f"{self.name}: hidden_s", self.hidden_s)


@dataclass(frozen=True)
class StepBreakdown:
    """The time of a step, part after part; the parts add up to the total."""

    title: str
    parts: tuple[StepPart, ...]
    total: Value
    caption: str = ""

    def __post_init__(self) -> None:
        _some("parts", self.title, self.parts)
        _positive(f"{self.title}: the total", self.total.value)
        added_s = sum(part.time.value for part in self.parts)
        if not math.isclose(added_s, self.total.value, rel_tol=1e-3):
            raise PlanError(
                f"{self.title}: the parts add up to {added_s:g} s, the total is {self.total.value:g} s; add the part "
                "that is missing"
            )


@dataclass(frozen=True)
class Roof:
    """A limit of the roofline: a rate of computing (FLOP/s), or of moving bytes (B/s) over memory or network."""

    name: str
    rate: Value
    kind: Literal["compute", "memory", "network"]

    def __post_init__(self) -> None:
        _positive(self.name, self.rate.value)


@dataclass(frozen=True)
class RoofPoint:
    """An operation: FLOP per byte of memory or of network, and FLOP/s that it reaches."""

    name: str
    intensity_flop_per_byte: float
    rate: Value
    over: Literal["memory", "network"] = "memory"

    def __post_init__(self) -> None:
        _positive(f"{self.name}: intensity", self.intensity_flop_per_byte)
        _positive(f"{self.name}: rate", self.rate.value)


@dataclass(frozen=True)
class Roofline:
    """What binds each operation: FLOP/s against FLOP per byte, both logarithmic."""

    title: str
    roofs: tuple[Roof, ...]
    points: tuple[RoofPoint, ...]
    caption: str = ""

    def __post_init__(self) -> None:
        if not any(roof.kind == "compute" for roof in self.roofs):
            raise PlanError(f"{self.title}: a roofline needs a roof of kind compute")


@dataclass(frozen=True)
class SwitchLayer:
    """A layer of switches in each plane, and the links to the layer below."""

    name: str
    count_per_plane: int
    link: str = ""

    def __post_init__(self) -> None:
        _positive(f"{self.name}: count_per_plane", self.count_per_plane)


@dataclass(frozen=True)
class LayeredTopology:
    """A fat tree of any number of layers (top first) and planes, with hosts below.

    ``plane_name`` is what a plane is called. With ``split_hosts`` a host sits in one plane (a zone, say), else its
    NICs go round the planes.
    """

    title: str
    layers: tuple[SwitchLayer, ...]
    num_planes: int
    num_hosts: int
    devices_per_host: int
    nics_per_host: int
    device_name: str = "GPU"
    inside_link: str = ""
    plane_name: str = "plane"
    split_hosts: bool = False
    caption: str = ""

    def __post_init__(self) -> None:
        _some("layers", self.title, self.layers)
        for name in ("num_planes", "num_hosts", "devices_per_host", "nics_per_host"):
            _positive(f"{self.title}: {name}", getattr(self, name))


@dataclass(frozen=True)
class GroupedTopology:
    """Groups of routers that are joined all to all: a dragonfly, or a Slim Fly's two halves."""

    title: str
    num_groups: int
    routers_per_group: int
    hosts_per_router: int
    inside_link: str = ""
    between_link: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        for name in ("num_groups", "routers_per_group", "hosts_per_router"):
            _positive(f"{self.title}: {name}", getattr(self, name))


@dataclass(frozen=True)
class TorusTopology:
    """Hosts in a grid whose edges are joined."""

    title: str
    sizes: tuple[int, ...]
    link: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        _some("sizes", self.title, self.sizes)
        for size in self.sizes:
            _positive(f"{self.title}: a size", size)


@dataclass(frozen=True)
class SensitivityRow:
    """An input at the ends of its interval, and the result there."""

    name: str
    low_input: str
    high_input: str
    result_at_low: float
    result_at_high: float
    label: Label = "assumed"
    source: str = ""

    def __post_init__(self) -> None:
        _finite(self.name, self.result_at_low, self.result_at_high)


@dataclass(frozen=True)
class Sensitivity:
    """What the result becomes where one input is at either end of its interval: a tornado."""

    title: str
    result: Value
    rows: tuple[SensitivityRow, ...]
    caption: str = ""

    def __post_init__(self) -> None:
        _some("rows", self.title, self.rows)


@dataclass(frozen=True)
class Metric:
    """An axis of the Pareto figure."""

    name: str
    unit: str = ""
    better: Literal["lower", "higher"] = "lower"
    log: bool = False


@dataclass(frozen=True)
class DesignPoint:
    """A design: a value of each metric, what it changes, and whether no other is as good in all metrics."""

    name: str
    values: tuple[float, ...]
    changed: tuple[tuple[str, str], ...] = ()
    front: bool = False

    def __post_init__(self) -> None:
        _finite(self.name, *self.values)


@dataclass(frozen=True)
class ParetoPlot:
    """Designs by two of their metrics, which the reader chooses; ``x`` and ``y`` index the first choice."""

    title: str
    metrics: tuple[Metric, ...]
    points: tuple[DesignPoint, ...]
    x: int = 0
    y: int = 1
    caption: str = ""
    label: Label | None = None
    basis: Basis | None = "modelled"

    def __post_init__(self) -> None:
        _some("points", self.title, self.points)
        if not (0 <= self.x < len(self.metrics) and 0 <= self.y < len(self.metrics)):
            raise PlanError(f"{self.title}: x = {self.x} and y = {self.y} must index {len(self.metrics)} metrics")
        for point in self.points:
            if len(point.values) != len(self.metrics):
                raise PlanError(f"{point.name}: has {len(point.values)} values for {len(self.metrics)} metrics")
            for metric, value in zip(self.metrics, point.values, strict=True):
                if metric.log:
                    _positive(f"{point.name}: {metric.name} on a logarithmic axis", value)


Cell: TypeAlias = str | Value


@dataclass(frozen=True)
class SortableTable:
    """Rows that the reader sorts by a column; ``chosen`` marks a row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    chosen: int | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise PlanError(f"{self.title}: a row has {len(row)} cells for {len(self.columns)} columns")


@dataclass(frozen=True)
class Formula:
    """A formula by name, with its letters, with its numbers, and what it gives."""

    name: str
    formula: str
    substituted: str
    value: Cell


@dataclass(frozen=True)
class FormulaList:
    """The formulas behind a result."""

    title: str
    formulas: tuple[Formula, ...]
    caption: str = ""


@dataclass(frozen=True)
class Comparison:
    """A prediction beside a published or measured point; ``fitted`` ones are no test of the model."""

    name: str
    predicted: Value
    published: Value
    fitted: bool = False

    def __post_init__(self) -> None:
        if self.published.value == 0:
            raise PlanError(f"{self.name}: published = 0 has no relative error; leave the point out")

    @property
    def error(self) -> float:
        """Prediction over published value, less one."""
        return self.predicted.value / self.published.value - 1


@dataclass(frozen=True)
class ErrorTable:
    """Predictions beside published points."""

    title: str
    rows: tuple[Comparison, ...]
    caption: str = ""


Drawing: TypeAlias = (
    MemoryStack
    | TimeLine
    | StepBreakdown
    | Roofline
    | LayeredTopology
    | GroupedTopology
    | TorusTopology
    | Sensitivity
    | ParetoPlot
)
Item: TypeAlias = Drawing | SortableTable | FormulaList | ErrorTable


@dataclass(frozen=True)
class Section:
    """A heading, sentences, and what is shown under them."""

    title: str
    items: tuple[Item, ...] = ()
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanPage:
    """A page.

    Attributes:
        title: What is planned, for example ``deepseek-v3 on h800-2048``.
        subtitle: Its circumstances.
        verdict: Sentences; the first is the headline.
        facts: Tiles.
        sections: Figures and tables; one without any is left out.
        remarks: What the reader must know of the numbers.
    """

    title: str
    subtitle: str = ""
    verdict: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    sections: tuple[Section, ...] = ()
    remarks: tuple[str, ...] = ()


def _finite(name: str, *values: float) -> None:
    for value in values:
        if not math.isfinite(value):
            raise PlanError(f"{name} = {value} cannot be drawn: it must be finite; leave it out")


def _positive(name: str, value: float) -> None:
    _finite(name, value)
    if value <= 0:
        raise PlanError(f"{name} = {value:g} cannot be drawn: it must be above 0; leave it out")


def _not_negative(name: str, value: float) -> None:
    _finite(name, value)
    if value < 0:
        raise PlanError(f"{name} = {value:g} cannot be drawn: it must not be negative; use 0")


def _some(name: str, title: str, values: tuple[object, ...]) -> None:
    if not values:
        raise PlanError(f"{title}: has no {name}; leave the figure out")

"""What each axis of a co-design sweep moves by itself: main effects, as ratios against the knee's value.

For each value of an axis all pairs of designs are taken that differ in this axis alone, one with the value and one
with the knee's; the effect on a measure is the geometric mean of their ratios. On a full grid the axes are crossed, so
that an effect is not mixed up with another axis's. Left out: interactions, of which a mean knows nothing; the front
shows them.
"""

from __future__ import annotations

import math

from cofire.plan.design_space import Axis, MeasureName
from cofire.plan.sweep import Design, SweepResult
from cofire.spec.spec_type import Spec


class AxisEffect(Spec):
    """What a value of an axis does against a reference: a ratio for each measure, a mean over ``num_pairs`` pairs."""

    axis: str
    value: tuple[str, ...]
    reference: tuple[str, ...]
    num_pairs: int
    ratios: dict[MeasureName, float]


def axis_effects(result: SweepResult) -> list[AxisEffect]:
    """Return the effect of every value of every axis on the sweep's objectives; of a sample, what it has pairs for."""
    names: list[MeasureName] = [one.measure for one in result.spec.objectives]
    able = [design for design in result.designs if design.figures is not None]
    knee = result.designs[result.knee]
    effects = []
    for axis in result.spec.axes:
        reference = _place(axis, knee)
        others: dict[tuple[tuple[str, str], ...], dict[tuple[str, ...], Design]] = {}
        for design in able:
            rest = tuple(pair for pair in design.changed if pair[0] not in axis.paths)
            others.setdefault(rest, {})[_place(axis, design)] = design
        rows = [row for row in others.values() if reference in row]
        for value in axis.values:
            pairs = [(row[value], row[reference]) for row in rows if value in row]
            if value == reference or not pairs:
                continue
            ratios: dict[MeasureName, float] = {name: _mean_ratio(pairs, name) for name in names}
            effects.append(
                AxisEffect(axis=axis.name, value=value, reference=reference, num_pairs=len(pairs), ratios=ratios)
            )
    return effects


def _place(axis: Axis, design: Design) -> tuple[str, ...]:
    changed = dict(design.changed)
    return tuple(changed[path] for path in axis.paths)


def _mean_ratio(pairs: list[tuple[Design, Design]], name: MeasureName) -> float:
    """Return the geometric mean of a measure's ratios; each is positive."""
    logs = [math.log(_known(one, name) / _known(other, name)) for one, other in pairs]
    return math.exp(math.fsum(logs) / len(logs))


def _known(design: Design, name: MeasureName) -> float:
    value = design.value(name)
    assert value is not None  # a design without an objective is refused
    return value

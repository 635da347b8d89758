"""Intervals of results against closed forms: products, sums, ends one at a time, labels."""

from __future__ import annotations

import math
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from cofire.plan.uncertainty import figures, interval, with_figure
from cofire.spec import ClusterSpec, load_as
from cofire.spec.figure import LABELS, Figure, Label
from cofire.spec.spec_type import Spec


class Inner(Spec):
    """Two figures."""

    slow: Figure
    fast: Figure


class Outer(Spec):
    """A figure, a spec with figures, one that may be missing, a plain number, and a table."""

    first: Figure
    inner: Inner
    maybe: Figure | None = None
    size: Annotated[float, Field(gt=0)] = 2.0
    table: tuple[Figure, ...] = ()


def figure(value: float, low: float, high: float, label: Label = "assumed") -> Figure:
    return Figure(value=value, low=low, high=high, label=label, source=f"{label} {value}")


def outer(first: Figure, slow: Figure, fast: Figure, maybe: Figure | None = None) -> Outer:
    return Outer(first=first, inner=Inner(slow=slow, fast=fast), maybe=maybe)


def known(spec: Spec) -> Outer:
    assert isinstance(spec, Outer)
    return spec


@st.composite
def drawn(draw: st.DrawFn) -> Figure:
    value = draw(st.floats(0.1, 100))
    down, up = draw(st.floats(0, 0.9)), draw(st.floats(0, 0.9))
    return figure(value, value * (1 - down), value * (1 + up), draw(st.sampled_from(LABELS)))


SAMPLE = outer(figure(3, 2, 5, "measured"), figure(10, 9, 10, "calibrated"), figure(4, 4, 8))


@given(drawn(), drawn(), drawn(), st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5))
def test_interval_of_a_weighted_sum_is_the_root_of_the_sum_of_squares(
    first: Figure, slow: Figure, fast: Figure, a: float, b: float, c: float
) -> None:
    spec = outer(first, slow, fast)

    def weighted(specs: dict[str, Spec]) -> float:
        x = known(specs["s"])
        return a * x.first.value + b * x.inner.slow.value + c * x.inner.fast.value

    found = interval({"s": spec}, weighted)
    up = down = 0.0
    for weight, one in ((a, first), (b, slow), (c, fast)):
        moves = [weight * (one.low - one.value), weight * (one.high - one.value)]
        up += max(0.0, *moves) ** 2
        down += max(0.0, *(-move for move in moves)) ** 2
    assert found.value == pytest.approx(weighted({"s": spec}))
    assert found.high - found.value == pytest.approx(math.sqrt(up), rel=1e-6, abs=1e-9)
    assert found.value - found.low == pytest.approx(math.sqrt(down), rel=1e-6, abs=1e-9)


@given(drawn(), drawn(), drawn())
def test_each_figure_is_moved_to_its_ends_alone(first: Figure, slow: Figure, fast: Figure) -> None:
    spec = outer(first, slow, fast)
    found = interval({"s": spec}, lambda specs: known(specs["s"]).first.value * known(specs["s"]).inner.slow.value)
    rows = {row.path: row for row in found.sensitivities}
    assert "s.inner.fast" not in rows, "the result does not depend on it"
    for path, one, other in (("s.first", first, slow), ("s.inner.slow", slow, first)):
        if path in rows:
            row = rows[path]
            assert (row.at_low, row.at_high) == pytest.approx((one.low * other.value, one.high * other.value))
            assert (row.value, row.low, row.high) == (one.value, one.low, one.high)
            assert (row.label, row.source) == (one.label, one.source)
        else:
            assert one.low * other.value == one.high * other.value
    swings = [row.swing for row in found.sensitivities]
    assert swings == sorted(swings, reverse=True)
    assert found.low <= found.value <= found.high


def test_the_interval_is_one_sided_where_the_figure_is() -> None:
    found = interval({"s": SAMPLE}, lambda specs: known(specs["s"]).inner.slow.value)
    assert (found.low, found.value, found.high) == (9, 10, 10)
    found = interval({"s": SAMPLE}, lambda specs: 1 / known(specs["s"]).inner.fast.value)
    assert (found.low, found.value, found.high) == (0.125, 0.25, 0.25)


def test_a_label_is_that_of_the_weakest_figure_that_matters() -> None:
    def label(weight: float) -> Label:
        def result(specs: dict[str, Spec]) -> float:
            x = known(specs["s"])
            return x.first.value + weight * x.inner.fast.value  # measured, and assumed with a weight

        return interval({"s": SAMPLE}, result).label

    assert label(0) == "measured"
    assert label(1) == "assumed"
    # It swings by four times the weight, and a thousandth of the result is 0.003.
    assert label(0.00074) == "measured"
    assert label(0.00076) == "assumed"
    assert interval({"s": SAMPLE}, lambda specs: known(specs["s"]).inner.slow.value).label == "calibrated"


def test_a_result_that_hangs_on_nothing_is_exact() -> None:
    found = interval({"s": SAMPLE}, lambda _: 7.0)
    assert (found.low, found.value, found.high, found.label) == (7, 7, 7, "measured")
    assert found.sensitivities == ()


def test_figures_are_found_at_their_paths_and_tables_are_left_out() -> None:
    spec = SAMPLE.model_copy(update={"maybe": figure(1, 1, 2), "table": (figure(5, 4, 6),)})
    assert [path for path, _ in figures(spec)] == ["first", "inner.slow", "inner.fast", "maybe"]
    assert [path for path, _ in figures(SAMPLE)] == ["first", "inner.slow", "inner.fast"]
    assert [path for path, _ in figures(spec, "s.")][1] == "s.inner.slow"


def test_replacing_a_figure_leaves_all_else_and_the_old_spec_as_they_are() -> None:
    before = SAMPLE.model_dump()
    moved = known(with_figure(SAMPLE, "inner.fast", figure(1, 1, 1)))
    assert moved.inner.fast.value == 1
    assert SAMPLE.model_dump() == before
    after = moved.model_dump()
    after["inner"]["fast"] = before["inner"]["fast"]
    assert after == before


def test_figures_of_several_specs_move_the_result_together() -> None:
    other = outer(figure(2, 1, 3), figure(1, 1, 1), figure(1, 1, 1))
    found = interval(
        {"a": SAMPLE, "b": other}, lambda specs: known(specs["a"]).first.value + known(specs["b"]).first.value
    )
    assert [row.path for row in found.sensitivities] == ["a.first", "b.first"]
    assert found.high == pytest.approx(5 + math.hypot(2, 1))
    assert found.low == pytest.approx(5 - math.hypot(1, 1))


def test_every_figure_of_a_cluster_can_be_replaced_where_it_was_found() -> None:
    cluster = load_as(ClusterSpec, "h800-2048")
    paths = dict(figures(cluster))
    assert {"device.matrix_efficiency", "network.efficiency", "scale_up.latency_s", "device_hour_usd"} <= set(paths)
    for path, one in paths.items():
        moved = with_figure(cluster, path, one.at(one.high))
        assert dict(figures(moved)) == paths | {path: one.at(one.high)}

"""Published figures that mislead, in rooms that have no code yet: references for what will be built there.

Each reference is slow and plain. Network, pipeline schedules and number formats are to agree with it.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pytest

# -- trap 7: NVLink to InfiniBand --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nvlink", "infiniband", "ratio"),
    [(160e9, 50e9, 3.2), (200e9, 50e9, 4.0), (160e9, 40e9, 4.0)],
    ids=["DeepSeek-V3: effective to nominal", "ISCA'25: nominal", "ISCA'25: effective"],
)
def test_both_papers_ratios_follow_from_the_h800s_figures(nvlink: float, infiniband: float, ratio: float) -> None:
    """3.2 divides an effective by a nominal figure; like by like it is 4 (8 links of 25 GB/s, one port of 400G)."""
    assert nvlink in (8 * 25e9, 0.8 * 8 * 25e9)
    assert infiniband in (400e9 / 8, 0.8 * 400e9 / 8)
    assert nvlink / infiniband == pytest.approx(ratio)


# -- trap 8: 14 bits or 13 of the accumulator --------------------------------------------------------


def keep_fraction_bits(x: np.ndarray, bits: int) -> np.ndarray:
    """Cut FP32 numbers towards zero to so many fraction bits."""
    return (x.astype(np.float32).view(np.uint32) & np.uint32(-(1 << (23 - bits)) & 0xFFFFFFFF)).view(np.float32)


def test_thirteen_fraction_bits_are_fourteen_significant_ones() -> None:
    """1-8-13 of ISCA'25 and the 14 bits of the V3 report are one format: the leading bit is implicit."""
    one = np.float32(1)
    assert keep_fraction_bits(np.array(one + np.float32(2**-13)), 13) == one + np.float32(2**-13)
    assert keep_fraction_bits(np.array(one + np.float32(2**-14)), 13) == one
    integers = np.arange(2**14, dtype=np.float32)  # every integer of 14 bits survives, of 15 only the even ones
    assert np.array_equal(keep_fraction_bits(integers, 13), integers)
    longer = np.arange(2**14, 2**15, dtype=np.float32)
    assert np.array_equal(keep_fraction_bits(longer, 13), longer - longer % 2)
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    error = np.abs(keep_fraction_bits(x, 13) - x) / np.abs(x)
    assert 2**-14 < error.max() < 2**-13


def round_fraction_bits(x: np.ndarray, bits: int) -> np.ndarray:
    """Round FP32 numbers to the nearest with so many fraction bits, ties to even."""
    cut = 23 - bits
    code = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    code += (1 << (cut - 1)) - 1 + (code >> cut & 1)
    return (code >> cut << cut).astype(np.uint32).view(np.float32)


def test_rounding_to_thirteen_fraction_bits_errs_by_half_of_the_last_one() -> None:
    one = np.float32(1)
    assert round_fraction_bits(np.array(one + np.float32(2**-13)), 13) == one + np.float32(2**-13)
    assert round_fraction_bits(np.array(one + np.float32(2**-14)), 13) == one
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    error = np.abs(round_fraction_bits(x, 13).astype(np.float64) - x) / np.abs(x)
    assert 2**-15 < error.max() <= 2**-14


# -- trap 10: the paper's dragonfly is not the largest balanced one ------------------------------------


def dragonfly(p: int, a: int, h: int, g: int) -> tuple[int, int, int]:
    """Return endpoints, switches and links between switches, by formula."""
    return a * p * g, a * g, g * (a * (a - 1) // 2) + g * a * h // 2


def dragonfly_graph(a: int, h: int, groups: int) -> int:
    """Count links one by one: each pair of groups shares one, and spare ports go to the groups next in a ring."""
    links = [((i, s), (i, t)) for i in range(groups) for s, t in combinations(range(a), 2)]
    ports = dict.fromkeys(product(range(groups), range(a)), h)
    pairs = list(combinations(range(groups), 2))
    for step in range((a * h - (groups - 1)) // 2):
        pairs += [(i, (i + step + 1) % groups) for i in range(groups)]
    for pair in pairs:
        ends = [max(product([group], range(a)), key=lambda end: ports[end]) for group in pair]
        for end in ends:
            ports[end] -= 1
        links.append((ends[0], ends[1]))
    assert set(ports.values()) == {0}, "every global port is used, none twice"
    return len(links)


@pytest.mark.parametrize(
    ("p", "a", "h", "spare"), [(1, 2, 1, 0), (2, 4, 2, 0), (3, 6, 3, 0), (2, 4, 2, 2), (3, 6, 3, 2)]
)
def test_dragonfly_formula_counts_a_real_graph(p: int, a: int, h: int, spare: int) -> None:
    """Two groups fewer than fit, as in the paper, leave two ports per group, which the formula counts as used."""
    groups = a * h + 1 - spare
    switches = list(product(range(groups), range(a)))
    endpoints = [(switch, port) for switch in switches for port in range(p)]
    assert dragonfly(p, a, h, groups) == (len(endpoints), len(switches), dragonfly_graph(a, h, groups))


def test_no_dragonfly_has_more_groups_than_ports_of_a_group_and_one() -> None:
    with pytest.raises(AssertionError, match="every global port"):
        dragonfly_graph(4, 2, 4 * 2 + 2)


def test_table_3_has_511_groups_where_513_would_fit() -> None:
    assert dragonfly(16, 32, 16, 511) == (261_632, 16_352, 384_272)
    assert dragonfly(16, 32, 16, 32 * 16 + 1) == (262_656, 16_416, 385_776)


# -- trap 12: the bubble of DualPipe -----------------------------------------------------------------


class Times(NamedTuple):
    """Of a chunk: forward, full backward, its weight part, an overlapped pair."""

    F: float
    B: float
    W: float
    FB: float


Part = tuple[str, int]  # F, B (full), I (input part) or W; and direction: 0 enters at rank 0, 1 at the last
Slot = tuple[Part, ...]  # parts that run at the same time


def dualpipe_order(ranks: int, micro: int, rank: int) -> list[Slot]:
    """The eight phases of DualPipe (public code), in the directions of ranks of the first half."""
    half, near = ranks // 2, min(rank, ranks - 1 - rank)
    inner = half - near - 1
    order: list[Slot] = [(("F", 0),)] * (2 * inner)
    order += [(("F", 0),), (("F", 1),)] * (near + 1)
    order += [(("I", 1),), (("W", 0),), (("F", 1),)] * inner
    steady: list[Slot] = [(("F", 0), ("B", 1)), (("F", 1), ("B", 0))] * (micro // 2 - ranks + near + 1)
    if inner == 0:  # the middle ranks run their first pair one after the other
        steady[:1] = [(("F", 0),), (("B", 1),)]
    order += steady
    order += [(("B", 1),), (("F", 1), ("B", 0))] * inner
    last = [("B", 1), ("B", 0)] * (near + 1)
    order += [((kind if i <= near else "I", way),) for i, (kind, way) in enumerate(last)]
    order += [(("W", 0),), (("I", 0),)] * inner
    order += [(("W", 0),)] * (near + 1)
    if rank < half:
        return order
    return [tuple((kind, 1 - way) for kind, way in slot) for slot in order]


def one_f_one_b_order(ranks: int, micro: int, rank: int) -> list[Slot]:
    warm = min(ranks - 1 - rank, micro)
    steady = [slot for _ in range(micro - warm) for slot in ((("F", 0),), (("B", 0),))]
    return [(("F", 0),)] * warm + steady + [(("B", 0),)] * warm


def simulate(orders: list[list[Slot]], times: Times) -> tuple[float, list[float], list[int]]:
    """Return makespan, idle time and most activations held of each rank. A chunk waits for its neighbour's."""
    ranks = len(orders)
    done: dict[tuple[str, int, int, int], float] = {}  # (F or B, way, micro-batch, rank) -> time
    free, busy, place = [0.0] * ranks, [0.0] * ranks, [0] * ranks
    counts: list[dict[tuple[str, int], int]] = [defaultdict(int) for _ in orders]
    pending, held, peak = [0] * ranks, [0] * ranks, [0] * ranks
    while any(place[r] < len(orders[r]) for r in range(ranks)):
        progressed = False
        for r, order in enumerate(orders):
            while place[r] < len(order):
                slot, ready = order[place[r]], free[r]
                chunks = [("B" if kind in "BI" else kind, way) for kind, way in slot]
                for kind, way in chunks:
                    before = r - 1 if (kind == "F") == (way == 0) else r + 1
                    if kind != "W" and 0 <= before < ranks:
                        ready = max(ready, done.get((kind, way, counts[r][kind, way], before), float("inf")))
                if ready == float("inf"):
                    break
                kind = slot[0][0]
                lasts = times.FB if len(slot) == 2 else {**times._asdict(), "I": times.B - times.W}[kind]
                free[r], busy[r], place[r], progressed = ready + lasts, busy[r] + lasts, place[r] + 1, True
                for (exact, _), (kind, way) in zip(slot, chunks, strict=True):
                    done[kind, way, counts[r][kind, way], r] = free[r]
                    counts[r][kind, way] += 1
                    pending[r] += (exact == "I") - (exact == "W")
                    assert pending[r] >= 0, "a weight gradient is asked for before its input gradient"
                    assert counts[r]["B", way] <= counts[r]["F", way], "a backward chunk before its forward one"
                    held[r] += kind == "F"
                    peak[r] = max(peak[r], held[r])
                held[r] -= sum(kind == "B" for kind, _ in chunks)
        assert progressed, "the schedule deadlocks"
    assert not any(pending), "a weight gradient is left"
    makespan = max(free)
    return makespan, [makespan - b for b in busy], peak


def bubble_formula(ranks: int, t: Times) -> float:
    return (ranks // 2 - 1) * (t.FB + t.B - 3 * t.W)


@pytest.mark.parametrize(
    ("ranks", "micro", "times", "makespan", "bubble"),
    [
        (8, 20, Times(1, 2, 1, 3), 66, 6),
        (8, 32, Times(1, 2, 1, 3), 102, 6),
        (8, 16, Times(1, 2, 1, 3), 54, 6),
        (4, 10, Times(1, 2, 1, 3), 32, 2),
        (16, 64, Times(1, 2, 1, 3), 206, 14),
        (2, 8, Times(1, 2, 1, 3), 24, 0),
        (8, 20, Times(1, 1.5, 0.5, 2.5), 57.5, 7.5),
    ],
)
def test_dualpipes_formula_is_its_bubble_where_the_input_gradient_takes_as_long_as_the_forward_pass(
    ranks: int, micro: int, times: Times, makespan: float, bubble: float
) -> None:
    found, idle, peak = simulate([dualpipe_order(ranks, micro, r) for r in range(ranks)], times)
    assert found == pytest.approx(makespan)
    assert idle == pytest.approx([bubble] * ranks)
    assert bubble == pytest.approx(bubble_formula(ranks, times))
    assert peak == [ranks + 1] * ranks


@pytest.mark.parametrize(
    ("times", "makespan", "bubble", "formula"),
    [(Times(1, 2, 0.5, 3), 69.5, 9.5, 10.5), (Times(1.5, 2, 1, 3.5), 79, 9.0, 7.5)],
    ids=["input gradient longer", "input gradient shorter"],
)
def test_elsewhere_dualpipes_formula_is_off_both_ways(
    times: Times, makespan: float, bubble: float, formula: float
) -> None:
    found, idle, peak = simulate([dualpipe_order(8, 20, r) for r in range(8)], times)
    assert found == pytest.approx(makespan)
    assert idle == pytest.approx([bubble] * 8)
    assert peak == [9] * 8
    assert bubble_formula(8, times) == pytest.approx(formula)
    assert max(idle) != pytest.approx(bubble_formula(8, times))


def test_one_forward_one_backward_for_comparison() -> None:
    found, idle, peak = simulate([one_f_one_b_order(8, 20, r) for r in range(8)], Times(1, 2, 1, 3))
    assert found == 81
    assert idle == [21.0] * 8
    assert peak == [8, 7, 6, 5, 4, 3, 2, 1]


# -- trap 13: rounding of LogFMT in linear space is not always the less biased ----------------------------


def logfmt(x: np.ndarray, bits: int, linear: bool) -> np.ndarray:
    """Encode and decode rows of ``x``: a sign and ``bits - 1`` bits of logarithm between the row's extremes."""
    size = np.abs(x)
    log = np.log(np.where(size > 0, size, np.nan))
    high = np.nanmax(log, axis=-1, keepdims=True)
    low = np.maximum(np.nanmin(log, axis=-1, keepdims=True), high - 32 * np.log(2))
    step = (high - low) / (2 ** (bits - 1) - 2)
    place = np.maximum((log - low) / step, 0)
    below = np.floor(place)
    if linear:  # the threshold is the arithmetic mean of the two neighbours
        up = size > (np.exp(low + step * below) + np.exp(low + step * (below + 1))) / 2
    else:
        up = place - below > 0.5
    return np.sign(x) * np.where(size > 0, np.exp(low + step * (below + up)), 0)


def relative_bias(x: np.ndarray, bits: int, linear: bool) -> float:
    return float((np.abs(logfmt(x, bits, linear)) - np.abs(x)).mean() / np.abs(x).mean())


def test_the_reference_logfmt_decodes_the_worked_example() -> None:
    x = np.array([[1, 2, 4, 8, 3, 2.9, -1, 0]])
    assert logfmt(x, 4, linear=True)[0] == pytest.approx([1, 2, 4, 8, 8**0.5, 8**0.5, -1, 0])
    assert logfmt(x, 3, linear=True)[0] == pytest.approx([1, 8**0.5, 8**0.5, 8, 8**0.5, 8**0.5, -1, 0])


@pytest.mark.parametrize(("bits", "log_bias"), [(4, 9.57e-2), (6, 4.15e-3), (8, 2.44e-4)])
def test_on_flat_data_linear_rounding_has_no_bias_and_rounding_of_the_logarithm_has(bits: int, log_bias: float) -> None:
    flat = np.random.default_rng(0).uniform(size=(40_000, 128))
    assert abs(relative_bias(flat, bits, linear=True)) < 0.02 * log_bias
    assert relative_bias(flat, bits, linear=False) == pytest.approx(log_bias, rel=0.03)


def test_on_normal_data_linear_rounding_is_the_more_biased_of_the_two() -> None:
    """Relative bias of the mean size, 8 bits: the density falls, so more numbers lie below a threshold than above."""
    normal = np.random.default_rng(0).normal(size=(40_000, 128))
    linear, logarithmic = (relative_bias(normal, 8, way) for way in (True, False))
    assert linear == pytest.approx(-2.0e-4, rel=0.15)
    assert logarithmic == pytest.approx(1.2e-4, rel=0.15)
    assert abs(linear) > abs(logarithmic)

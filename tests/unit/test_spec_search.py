"""Specs of searches: their spaces are those written by hand, and what has no solution is said with a fix that works."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from math import isnan, nan, prod
from pathlib import Path

import pytest
import torch
from operators_by_hand import CASES

from cofire.errors import SearchError, SpecError
from cofire.search import Allowance, Assembler, Space, Symbols, enumerate_operators
from cofire.search.from_spec import baseline_of, check_solvable, space_of, total_multiply_adds
from cofire.search.lowering import lower
from cofire.search.operator_io import from_spec
from cofire.search.rewards import MEASURED, REWARDS, make_reward
from cofire.spec import LimitsSpec, OperatorSpec, SearchSpec, diff, dump, load, load_as, parse, preset_names, save

SEARCHES = ["conv1d", "conv2d", "gpt2_qkv", "matmul", "vision"]


def search(*overrides: str, preset: str = "conv1d") -> SearchSpec:
    return load_as(SearchSpec, preset, overrides)


def check(*overrides: str, preset: str) -> None:
    spec = search(*overrides, preset=preset)
    check_solvable(space_of(spec), spec.depth)
    make_reward(spec)


def message(*overrides: str, preset: str = "conv1d") -> str:
    """Return what is wrong with a spec, from whichever check finds it first."""
    with pytest.raises((SpecError, SearchError)) as caught:
        check(*overrides, preset=preset)
    text = str(caught.value)
    assert "\n" not in text
    return text


def counts(spec: SearchSpec, depths: range) -> list[int]:
    return [len(enumerate_operators(space_of(spec), depth, spec.guidance)) for depth in depths]


# -- presets -----------------------------------------------------------------------------------------


def vision() -> Space:
    numbers = {"N": 1, "Ci": 128, "Co": 128, "H": 28, "W": 28, "k": 3, "s": 2, "g": 32}
    symbols = Symbols.of(["N", "Ci", "Co", "H", "W"], ["k", "s", "g"], [numbers])
    n, ci, co, h, w = (symbols.size(name) for name in symbols.primary)
    return Space(
        (n, ci, h, w),
        (n, co, h, w),
        Allowance.of(symbols, {"Ci": 2, "Co": 4, "k": 2, "s": 2, "g": 3}),
        fixed=((0, 0),),
        unordered_input=frozenset((1,)),
        unordered_output=frozenset((1,)),
        max_tensors=3,
        max_reductions=5,
        max_chain=6,
        max_splits=3,
        max_merges=2,
        max_shifts=2,
        max_strides=0,
        max_ends=2,
    )


def convolution_1d() -> Space:
    symbols = Symbols.of(["N", "Ci", "Co", "H"], ["k"], [{"N": 4, "Ci": 64, "Co": 64, "H": 64, "k": 3}])
    n, ci, co, h = (symbols.size(name) for name in ("N", "Ci", "Co", "H"))
    return Space((n, ci, h), (n, co, h), Allowance.of(symbols, {"Ci": 2, "Co": 1, "k": 2}), fixed=((0, 0),))


@pytest.mark.parametrize(("name", "space"), [("vision", vision()), ("conv1d", convolution_1d())])
def test_the_space_of_a_preset_is_the_one_written_by_hand(name, space):
    assert space_of(search(preset=name)) == space


def test_presets_have_the_known_counts():
    assert counts(search("guidance=compat", preset="matmul"), range(2, 8)) == [0, 1, 1, 1, 1, 1]
    assert counts(search(preset="matmul"), range(1, 5)) == [0, 1, 1, 1]
    assert counts(search("guidance=compat"), range(3, 8)) == [1, 2, 7, 9, 11]
    assert counts(search(), range(7, 8)) == [19]
    assert counts(search("guidance=compat", preset="conv2d"), range(6, 7)) == [28]
    assert counts(search(preset="conv2d"), range(6, 7)) == [48]


def test_limits_of_a_spec_are_those_of_a_space():
    shapes = {"input", "output", "allowance", "fixed", "unordered_input", "unordered_output"}
    limits = {field.name: field.default for field in fields(Space) if field.name not in shapes}
    assert MISSING not in limits.values()
    assert LimitsSpec().model_dump() == limits


@pytest.mark.parametrize("name", SEARCHES)
def test_a_preset_has_a_solution_and_survives_a_file(name, tmp_path: Path):
    spec = search(preset=name)
    save(spec, tmp_path / "s.toml")
    assert load(tmp_path / "s.toml") == spec == parse(SearchSpec, spec.model_dump(mode="json"))
    assert diff(spec, search("limits.max_chain=9", preset=name)) == [("limits.max_chain", spec.limits.max_chain, 9)]
    check_solvable(space_of(spec), spec.depth)
    baseline = baseline_of(spec, space_of(spec))
    assert baseline is not None
    # A baseline saves nothing; where there is an upper bound below it, it is outside the window.
    assert make_reward(spec)(baseline) == pytest.approx({"gpt2_qkv": 1.0, "vision": nan}.get(name, 0.0), nan_ok=True)
    assert name in dump(spec)


def test_presets_of_searches_are_these():
    assert preset_names("search") == SEARCHES


def operator_at(name: str, **numbers: int) -> OperatorSpec:
    return load_as(OperatorSpec, name).model_copy(update={"mappings": (numbers,)})


@pytest.mark.parametrize(
    ("name", "case", "numbers", "shape"),
    [
        ("operator_1", "operator 1", {"N": 2, "Ci": 4, "Co": 8, "H": 4, "W": 5, "k": 3, "s": 2, "g": 2}, (2, 4, 4, 5)),
        ("operator_2", "operator 2", {"N": 2, "Ci": 4, "Co": 8, "H": 4, "W": 5, "k": 3, "s": 2, "g": 2}, (2, 4, 4, 5)),
        ("gpt2_projection", "gpt-2", {"N": 2, "L": 3, "H": 8, "O": 30, "q": 2, "t": 5}, (2, 3, 8)),
        ("dense_conv1d", "conv1d k=3", {"N": 2, "Ci": 4, "Co": 5, "H": 7, "k": 3}, (2, 4, 7)),
        ("dense_conv2d", "conv2d k=5", {"N": 2, "Ci": 4, "Co": 5, "H": 7, "W": 8, "k": 5}, (2, 4, 7, 8)),
        ("dense_projection", "linear", {"N": 2, "L": 3, "H": 4, "t": 3}, (2, 3, 4)),
    ],
)
def test_an_operator_preset_is_the_function_that_torch_computes(name, case, numbers, shape):
    layer = lower(from_spec(operator_at(name, **numbers))).double()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), CASES[case]().function(x, *layer.weights))


def test_baselines_have_the_multiply_adds_of_a_dense_layer():
    wanted = {
        "matmul": 64**3,
        "conv1d": 4 * 64 * 64 * 64 * 3,
        "conv2d": 4 * 64 * 64 * 64**2 * 9,
        "vision": 128 * 128 * 28**2 * 9,
        "gpt2_qkv": 2048 * 768 * 3 * 768,
    }
    for name, number in wanted.items():
        spec = search(preset=name)
        baseline = baseline_of(spec, space_of(spec))
        assert baseline is not None
        assert total_multiply_adds(baseline) == number


# -- mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("primary=['N','Ci','Co','H','H']", "symbol 'H' is declared twice"),
        ("mappings=[]", "mappings = [] must hold at least one"),
        ("mappings=[{N=4,Ci=64,Co=64,H=64}]", "mappings.0 has no number for 'k'; add k = 1"),
        ("allowance.Cii=1", "allowance: 'Cii' is no symbol; nearest: Ci"),
        ("allowance.Ci=-1", "allowance.Ci = -1 must be greater than or equal to 0"),
        ("fixed=[[0,3]]", "fixed.0: position 3 is outside the output; positions are 0 to 2"),
        ("fixed=[[0,0],[0,2]]", "names a position of the input twice"),
        ("unordered_input=[3]", "unordered_input: position 3 is outside the input"),
        ("guidance=compact", "guidance = 'compact' is not one of exact, compat, none; nearest: compat"),
        ("limits.max_spilts=1", "unknown key 'limits.max_spilts'; nearest: limits.max_splits"),
        ("limits.low_rank=[9,3]", "low_rank = [9, 3] begins above its end; turn it round: [3, 9]"),
        ("limits.max_tensors=1", "max_tensors = 1 leaves no weight, but needs_weight = true"),
        ("window={min_ratio=2.0}", "min_ratio = 2.0 has no baseline; name one in window.operator"),
        ("input=[]", "input = [] has no dim; write its sizes"),
    ],
)
def test_a_mistake_in_a_table_is_one_line_with_a_fix(override, text):
    assert text in message(override)


def test_a_window_begins_below_its_end():
    text = message("window.min_ratio=2.0", "window.max_ratio=1.0")
    assert "min_ratio = 2.0 is above max_ratio = 1.0: nothing fits" in text


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["input=['N','Ci*x','H']"], "input.1: size 'Ci*x' names 'x', which is not among N, Ci, Co, H, k"),
        (["input=['N','Ci/H','H']"], "input.1 = Ci/H is no size: coefficients alone divide"),
        (["fixed=[[0,1]]"], "fixed pair (0, 1) joins N and Co; make them equal"),
        (["fixed=[[0,0],[2,2],[1,1]]"], "fixed pair (1, 1) joins Ci and Co"),
        (["allowance.Ci=0"], "the input has 1 Ci more than the output"),
        (
            ["sampling.reward=capacty"],
            "sampling.reward = 'capacty' is not one of multiply_adds, capacity, proxy_accuracy; nearest: cap",
        ),
        (["window.operator=none"], "is measured against a baseline; name one in window.operator"),
        (["window.operator=dense_conv2d"], "window.operator = 'dense_conv2d' has the symbol W, the search has N, Ci"),
        (["output=['N','Co','H','k']"], "has the output [N, Co, H], the search [N, Co, H, k]"),
        (["window.min_ratio=0.5", "window.max_multiply_adds=9"], "nothing fits; leave out the ratios or the absolute"),
    ],
)
def test_a_contradiction_is_said_before_the_search(overrides, text):
    assert text in message(*overrides)


@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [("Ci/k", 64, 63), ("Ci/k^2", 64, 63), ("Ci/k", 2, 3), ("Ci/k", 1, 3)],
)
def test_a_size_that_does_not_divide_names_a_number_that_does(text, wrong, right):
    mapping = "mappings=[{{N=4,Ci={},Co=64,H=64,k=3}}]"
    shape = f"input=['N','{text}','H']"
    found = message(shape, mapping.format(wrong))
    assert f"input.1 = {text} is {wrong}/{9 if '^' in text else 3} in mappings.0" in found
    assert f"take Ci = {right}, for example, instead of {wrong}" in found
    assert space_of(search(shape, mapping.format(right))).input[1].is_legal


def grouped(**numbers: int) -> list[str]:
    sizes = {"N": 4, "Ci": 64, "Co": 64, "H": 64, "k": 3, "g": 4} | numbers
    mapping = ", ".join(f"{name} = {number}" for name, number in sizes.items())
    return [
        "coefficient=['k','g']",
        f"mappings=[{{{mapping}}}]",
        "allowance={Ci=2,Co=1,k=2,g=2}",
        "limits.max_strides=0",
    ]


def test_a_coefficient_that_nothing_can_use_is_refused():
    text = message(*grouped(g=10))
    assert (
        "g = 10 divides none of N, Ci, Co, H in every mapping and is no window, which is odd and at most 30 here"
        in text
    )
    assert "leave g out of the allowance" in text
    for numbers in ({"g": 8}, {"g": 7}, {"g": 6}, {"g": 10, "H": 60}, {"g": 48, "N": 48}):
        space_of(search(*grouped(**numbers)))
    space_of(search(*grouped(g=10), "limits.max_tensors=3", "limits.low_rank=[3,10]"))
    space_of(search(*grouped(g=10), "allowance={Ci=2,Co=1,k=2}"))
    assert "g = 31 divides none" in message(*grouped(g=31))
    assert "at most 30 here" in message(*grouped(g=33))


@pytest.mark.parametrize("numbers", [{"g": 10}, {"g": 31}, {"g": 22, "H": 20}, {"g": 14, "k": 5}])
def test_a_coefficient_that_is_refused_is_in_no_operator(numbers):
    assert "leave g out of the allowance" in message(*grouped(**numbers))
    without = space_of(search(*grouped(**numbers), "allowance={Ci=2,Co=1,k=2}"))
    allowance = Allowance.of(without.allowance.symbols, {"Ci": 2, "Co": 1, "k": 2, "g": 2})
    found = enumerate_operators(replace(without, allowance=allowance), 5)
    assert len(found) >= 4
    for operator in found:
        ends = (*operator.input, *(dim for weight in operator.weights for dim in weight))
        assert not any("g" in str(dim.size) for end in ends for dim in end.walk())


@pytest.mark.parametrize(
    ("preset", "overrides", "fix"),
    [
        ("matmul", ["depth=1"], "depth=2"),
        ("matmul", ["allowance={K=1,N=1}"], "allowance.K=2"),
        ("conv1d", ["limits.max_reductions=0"], "limits.max_reductions=1"),
        ("conv1d", ["limits.max_outer=8", "depth=5"], "limits.max_outer=64"),
        ("conv1d", ["allowance={Ci=2,k=2}", "depth=5"], "allowance.Co=1"),
    ],
)
def test_a_spec_without_solution_names_a_change_that_gives_one(preset, overrides, fix):
    empty = search(*overrides, preset=preset)
    assert enumerate_operators(space_of(empty), empty.depth, "none") == []
    found = re.search(r"one exists with (\S+) = (\S+)$", message(*overrides, preset=preset))
    assert found is not None
    assert "=".join(found.groups()) == fix
    mended = search(*overrides, fix, preset=preset)
    assert enumerate_operators(space_of(mended), mended.depth)


@pytest.mark.parametrize("depth", range(1, 5))
def test_the_check_for_a_solution_agrees_with_enumeration(depth):
    for spec in (search(), search(preset="matmul"), search("limits.max_splits=0", "limits.max_merges=0")):
        space = space_of(spec)
        if enumerate_operators(space, depth):
            check_solvable(space, depth)
        else:
            with pytest.raises(SearchError, match="no operator within"):
                check_solvable(space, depth)


# -- rewards -----------------------------------------------------------------------------------------


def test_few_multiply_adds_are_worth_what_they_save_within_the_window():
    spec = search("window.min_ratio=0.34", "window.max_ratio=0.9")
    reward = make_reward(spec)
    whole = 4 * 64 * 64 * 64 * 3
    seen = set()
    for operator in enumerate_operators(space_of(spec), 6):
        ratio = total_multiply_adds(operator) / whole
        found = reward(operator)
        seen.add(isnan(found))
        assert isnan(found) if not 0.34 <= ratio <= 0.9 else found == pytest.approx(1 - ratio)
        assert pickle.loads(pickle.dumps(reward))(operator) == pytest.approx(found, nan_ok=True)
    assert seen == {True, False}


def test_absolute_bounds_stand_in_for_a_baseline():
    spec = search("window.operator=none", "window.max_multiply_adds=2000000")
    for operator in enumerate_operators(space_of(spec), 5):
        number = total_multiply_adds(operator)
        found = make_reward(spec)(operator)
        assert isnan(found) if number > 2_000_000 else found == pytest.approx(1 - number / 2_000_000)


def test_capacity_counts_a_matrix_whole():
    spec = search("sampling.reward=capacity")
    reward = make_reward(spec)
    plain = [operator for operator in enumerate_operators(space_of(spec), 6) if "+ r" not in str(operator)]
    assert len(plain) >= 2
    for operator in plain:
        assert reward(operator) == pytest.approx(prod(s.value() for s in operator.weight_shapes[0]) / (64 * 64 * 3))


def test_training_needs_the_shape_of_pictures():
    assert set(REWARDS) > MEASURED
    with pytest.raises(SearchError, match=r"reward = 'proxy_accuracy' puts operators where .*is, \[N, C, H, W\]"):
        make_reward(search("sampling.reward=proxy_accuracy"))


def test_capacity_does_not_count_taps_twice():
    """Of two windows of 3 over one dim, 7 of 9 taps differ: 5 offsets, and 3 of offset 0 by the zeros beside."""
    spec = search("sampling.reward=capacity")
    build = Assembler(space_of(spec).allowance.symbols)
    n, o, h = build.output("N", "Co", "H")
    c, i, j = build.contract(build.reduce("Ci", "k", "k"), [o])
    operator = build.finish(n, c, build.unfold(build.unfold(h, i), j))
    assert make_reward(spec)(operator) == pytest.approx(3 * 7 / 9)


# -- layers ------------------------------------------------------------------------------------------


def test_searching_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from cofire.spec import load\n"
        "from cofire.search.discovery import discover\n"
        "print(discover(load('matmul')).best[0].operator)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sum(r0) x[i0, r0] * W0[" in done.stdout

"""Canvas: sizes, shapes, primitives, graphs and the two solvers."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from itertools import count
from itertools import product as pairs
from math import gcd, lcm

import pytest
from canvas_in_torch import Runner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cofire.errors import SearchError, SpecError
from cofire.search.canvas import (
    Channel,
    DimName,
    Extent,
    Graph,
    Kernel,
    Node,
    Shape,
    Spatial,
    Variable,
)
from cofire.search.canvas.kernel_io import from_dict, to_dict
from cofire.search.canvas.primitives import (
    Activation,
    Bmm,
    Broadcast,
    Convolution,
    Fc,
    Fold,
    Group,
    Input,
    Mix,
    Output,
    Scale,
    Shift,
    Softmax,
    Unfold,
)
from cofire.search.canvas.solver import Substitution, Target, close, matches
from cofire.search.canvas.solver import candidates as sizes_tried
from cofire.search.canvas.variables import (
    ONE,
    C,
    G,
    H,
    W,
    common_divisor,
    common_multiple,
    dynamic_variable,
    number,
    solve_for_one,
)

X0, X1 = dynamic_variable(0), dynamic_variable(1)
SMALL = Extent(16, 6, 5)
RELU = Activation("relu")
CHANNELS, HEIGHT, WIDTH = DimName(0, "C"), DimName(1, "H"), DimName(1, "W")

static_variables = st.builds(
    Variable, st.tuples(*[st.integers(-2, 2)] * 4), numerator=st.integers(1, 6), denominator=st.integers(1, 6)
)
any_variables = st.builds(
    Variable, st.lists(st.integers(-2, 2), max_size=8).map(tuple), st.integers(1, 6), st.integers(1, 6)
)
extents = st.builds(Extent, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


# Sizes


@given(any_variables, any_variables, extents, st.integers(1, 5), st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_products_and_quotients_have_the_values_of_fractions(a, b, extent, groups, unknowns):
    def value(variable):
        for index, found in enumerate(unknowns):
            variable = variable.substitute(index, number(found))
        return variable.value(extent, groups)

    assert value(a * b) == value(a) * value(b)
    assert value(a / b) == value(a) / value(b)
    assert value(a**3) == value(a) ** 3
    assert value(a**-2) == value(a) ** -2
    assert (a / b) * b == a


@given(any_variables)
def test_text_of_a_size_reads_back(variable):
    assert Variable.parse(str(variable)) == variable


@given(static_variables, extents, st.integers(1, 5))
def test_value_is_the_product_of_powers(variable, extent, groups):
    exact = Fraction(variable.numerator, variable.denominator)
    for name, base in zip("GCHW", (groups, *extent), strict=True):
        exact *= Fraction(base) ** variable.power(name)
    assert variable.value(extent, groups) == exact


whole_monomials = st.builds(Variable, st.tuples(*[st.integers(0, 2)] * 4), st.integers(1, 6))


@given(st.lists(whole_monomials, min_size=1, max_size=4))
def test_common_divisor_and_multiple_are_those_of_numbers(variables):
    primes = Extent(11, 13, 17)  # none of them divides a factor, so that numbers divide as monomials do
    numbers = [variable.value(primes, 19).numerator for variable in variables]
    assert common_divisor(variables).value(primes, 19) == gcd(*numbers)
    assert common_multiple(variables).value(primes, 19) == lcm(*numbers)


@settings(max_examples=200, deadline=None)
@given(st.builds(Variable, st.tuples(*[st.integers(-1, 1)] * 5), st.integers(1, 3), st.integers(1, 3)))
def test_a_size_may_be_whole_exactly_if_brute_force_finds_it_whole(variable):
    """C is a multiple of 6 * G here, as sizes are only ever divided by G and by numbers where C is there to be."""
    places = [(Extent(6 * g * m, h, w), g) for h, w, g, m in pairs((1, 7), (1, 11), (1, 5), (1, 13))]

    def whole(size):
        return all(size.value(*place).denominator == 1 for place in places)

    if variable.is_static:
        assert variable.may_be_whole == whole(variable)
    elif variable.power("x0") == 1:
        assert variable.may_be_whole
        assert whole(variable.substitute(0, C * G * H * W * number(6)))
    else:
        assert variable.may_be_whole == (whole(variable * X0) and not (variable * X0).is_one)


def test_a_size_has_at_most_one_dynamic_variable_above_and_one_below():
    assert (X0 / X1).may_be_whole
    for size in (X0 * X1, C / (X0 * X1), X0**2, C / X0**2, ONE / X0, H / (W * X0)):
        assert not size.may_be_whole


@given(any_variables, st.integers(0, 3), st.sampled_from([1, -1]))
def test_shape_matching_makes_the_quotient_one(rest, index, power):
    unknown = dynamic_variable(index)
    ratio = rest.substitute(index, ONE) * unknown**power
    solution = solve_for_one(ratio, index)
    assert index not in solution.dynamic
    assert ratio.substitute(index, solution).is_one


@given(static_variables, st.sampled_from([1, -1]), extents, st.integers(1, 4))
def test_shape_matching_finds_the_only_number_that_brute_force_finds(rest, power, extent, groups):
    ratio = rest * X0**power
    found = [x for x in range(1, 200) if ratio.substitute(0, number(x)).value(extent, groups) == 1]
    solution = solve_for_one(ratio, 0).value(extent, groups)
    assert found == ([solution.numerator] if solution.denominator == 1 and solution < 200 else [])


def test_shape_matching_refuses_what_is_not_linear():
    with pytest.raises(SearchError, match="not linear in x0"):
        solve_for_one(C * X0**2, 0)


@pytest.mark.parametrize("text", ["K", "C**2", "", "x16", "C^-1", "C+1", "0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SearchError):
        Variable.parse(text)


def test_an_open_size_has_no_number():
    with pytest.raises(SearchError, match="x1 is open"):
        (C * X1).value(SMALL)


# Closing: the choices for one variable against brute force over whole numbers


small_monomials = st.builds(
    Variable, st.tuples(st.just(0), st.integers(0, 2), st.just(0), st.integers(0, 1)), st.integers(1, 6)
)
PRIMES = Extent(7, 1, 11)  # C and W; no factor above has them


@given(st.lists(small_monomials, min_size=1, max_size=3))
def test_the_first_size_tried_is_the_greatest_number_that_divides_all(numerators):
    assume(not common_divisor(numerators).is_one)
    numbers = [variable.value(PRIMES).numerator for variable in numerators]
    first = sizes_tried(tuple(n / X0 for n in numerators), 0)[0]
    assert first.value(PRIMES) == max(x for x in range(1, min(numbers) + 1) if all(n % x == 0 for n in numbers))


@given(st.lists(small_monomials, min_size=1, max_size=3))
def test_one_of_the_sizes_tried_is_the_least_number_that_all_divide(denominators):
    numbers = [variable.value(PRIMES).numerator for variable in denominators]
    tried = [size.value(PRIMES) for size in sizes_tried(tuple(X0 / d for d in denominators), 0)]
    assert next(x for x in count(1) if all(x % n == 0 for n in numbers)) in tried


def test_closing_finds_every_choice_that_brute_force_over_the_same_menu_finds():
    """Two groupings and a bottleneck: x0 and x1 are groups, x2 channels that x0 and x1 must divide."""
    x2 = dynamic_variable(2)
    graph = Graph.start()
    for primitive in (Group(X0), Fc(x2), Group(X1), Fc(C)):
        graph = graph.apply(primitive, len(graph.nodes) - 1)
    target = Target((Extent(32, 4, 4), Extent(96, 2, 2)), 2)
    found = {str(kernel.graph) for kernel in close(graph, target)}
    expected = set()
    for a, b, c in pairs((1, 2, 4, 8), repeat=3):
        channels = C / number(c)
        groups, inner = channels / number(a), channels / number(b)
        if all(extent.c % (c * a) == extent.c % (c * b) == 0 for extent in target.extents):
            chain = Graph.start()
            for primitive in (Group(groups), Fc(channels), Group(inner), Fc(C)):
                chain = chain.apply(primitive, len(chain.nodes) - 1)
            expected.add(str(chain.apply(Output(), 4)))
    assert found == expected
    assert len(found) > 5


def test_closing_solves_the_last_variable_from_the_number_of_elements():
    graph = Graph.start().apply(Fc(X0), 0).apply(Unfold("H", 3), 1).apply(Group(X1), 2).apply(Fc(X1), 3)
    (first, *_) = close(graph, Target((SMALL,)))
    assert first.graph.nodes[4].primitive == Fc(C)
    assert first.graph.nodes[3].primitive == Group(C)
    assert first.graph.nodes[1].primitive == Fc(C)


def test_closing_solves_for_the_last_variable_first():
    graph = chain(Mix((CHANNELS,), (X0,)), Mix((HEIGHT,), (X1,)))
    (first, *_) = close(graph, Target((SMALL,)))
    assert [node.primitive for node in first.graph.nodes[1:3]] == [Mix((CHANNELS,), (C * H,)), Mix((HEIGHT,), (ONE,))]


def test_sizes_tried_leave_out_what_hangs_on_another_variable():
    assert sizes_tried((C / X0, X1 / X0), 0)[0] == C


def test_a_closed_kernel_has_groups_only_if_it_uses_them():
    target = Target((SMALL,), 4)
    assert {kernel.groups for kernel in close(chain(Fc(C)), target)} == {1}
    assert {kernel.groups for kernel in close(chain(Group(G), Fc(C)), target)} == {4}


def test_what_can_not_be_closed_yields_nothing():
    pooled = Graph.start().apply(Fold("avg", (HEIGHT, WIDTH)), 0)
    assert list(close(pooled, Target((SMALL,)))) == []
    odd = Graph.start().apply(Fc(C / number(2)), 0).apply(Fc(C), 1)
    assert list(close(odd, Target((Extent(15, 4, 4),)))) == []
    assert len(list(close(odd, Target((Extent(14, 4, 4),))))) == 1


def test_closing_refuses_two_open_tensors():
    with pytest.raises(SearchError, match="2 nodes are open"):
        list(close(Graph.start().apply(Fc(C), 0).apply(Fc(C), 0), Target((SMALL,))))


def test_a_substitution_reaches_every_node_of_the_graph():
    graph = Graph.start().apply(Fc(X0), 0).apply(RELU, 1).apply(Convolution(3, 1, X1), 2)
    add = Broadcast("add")
    assert list(matches(graph, add, (2, 3))) == [None, Substitution(0, X1), Substitution(1, X0)]
    joined = graph.substitute(0, X1).apply(add, 2, 3)
    assert joined.dynamic == (1,)
    assert [str(shape) for shape in joined.shapes[1:]] == ["[C=x1 | H=H W=W]"] * 4


def test_a_substitution_is_refused_where_a_node_elsewhere_needs_what_is_not_whole():
    graph = Graph.start().apply(Fc(X0), 0).apply(Group(H), 1)
    with pytest.raises(SearchError, match="C/H can never be whole"):
        graph.substitute(0, C)


# Kernels by hand


def chain(*primitives) -> Graph:
    graph = Graph.start()
    for primitive in primitives:
        graph = graph.apply(primitive, len(graph.nodes) - 1)
    return graph


def finish(graph: Graph, groups: int = 1) -> Kernel:
    return Kernel(graph.apply(Output(), len(graph.nodes) - 1), groups)


def depthwise_separable() -> Kernel:
    return finish(chain(Convolution(3), RELU, Fc(C)))


def inverted_bottleneck() -> Kernel:
    wide = C * number(6)
    graph = chain(Fc(wide), RELU, Convolution(3), RELU, Fc(C))
    return finish(graph.apply(Broadcast("add"), 0, 5))


def large_kernel_attention() -> Kernel:
    return finish(chain(Convolution(5), Convolution(7, 3), Fc(C)).apply(Broadcast("mul"), 0, 3))


def involution() -> Kernel:
    graph = chain(Fc(C / number(4)), RELU, Fc(number(9) * G))
    graph = graph.apply(Group(G), 0).apply(Unfold("HW", 3), 4).apply(Broadcast("mul"), 3, 5)
    return finish(graph.apply(Fold("avg", (DimName(0, "KH"), DimName(0, "KW"))), 6), groups=4)


def self_attention() -> Kernel:
    graph = Graph.start().apply(Fc(C), 0).apply(Fc(C), 0).apply(Fc(C), 0)
    graph = graph.apply(Bmm(transpose_left=True, softmax=True), 1, 2)
    return finish(graph.apply(Bmm(transpose_right=True), 3, 4))


def grouped_convolution() -> Kernel:
    return finish(chain(Group(G), Convolution(3, 2, C)), groups=4)


BY_HAND = (depthwise_separable, inverted_bottleneck, large_kernel_attention, involution, self_attention)


@pytest.mark.parametrize(
    ("make", "parameters", "multiply_adds_per_pixel"),
    [
        (depthwise_separable, 16 * 9 + 16 * 16, 16 * 9 + 16 * 16),
        (inverted_bottleneck, 2 * 16 * 96 + 96 * 9, 2 * 16 * 96 + 96 * 9),
        (large_kernel_attention, 16 * (25 + 49 + 16), 16 * (25 + 49 + 16)),
        (involution, 16 * 4 + 4 * 36, 16 * 4 + 4 * 36),
        (self_attention, 3 * 16 * 16, 3 * 16 * 16 + 2 * 30 * 16),
        (grouped_convolution, 16 * 4 * 9, 16 * 4 * 9),
    ],
)
def test_kernels_by_hand_have_the_counts_of_their_papers(make, parameters, multiply_adds_per_pixel):
    kernel = make()
    assert kernel.parameters(SMALL) == parameters
    assert kernel.multiply_adds(SMALL) == multiply_adds_per_pixel * SMALL.h * SMALL.w


def test_attention_is_a_matrix_of_positions_by_positions():
    shapes = self_attention().graph.shapes
    assert shapes[4] == Shape(Spatial(H, W), Spatial(H, W))
    assert shapes[5] == Shape(Channel(c=C), Spatial(H, W))


def test_an_involution_lays_its_kernel_over_windows_of_groups():
    graph = involution().graph
    assert graph.shapes[5] == Shape(Channel(G, C / G, number(3), number(3)), Spatial(H, W))
    stretch = Broadcast("mul").stretch(graph.input_shapes(6))
    assert stretch == (ONE, C / G, number(9) * G, H * W)
    assert str(graph.shapes[7]) == "[G=G C=C/G | H=H W=W]"


@pytest.mark.parametrize("make", [*BY_HAND, grouped_convolution])
def test_kernels_by_hand_count_what_pytorch_counts(make):
    kernel = make()
    runner = Runner(kernel, SMALL)
    assert runner.parameters == kernel.parameters(SMALL)
    assert runner.multiply_adds == kernel.multiply_adds(SMALL)


# Graphs


def test_a_digest_ignores_the_order_of_nodes():
    there = Graph.start().apply(Fc(C), 0).apply(Scale((CHANNELS,)), 0).apply(Broadcast("sub"), 1, 2)
    back = Graph.start().apply(Scale((CHANNELS,)), 0).apply(Fc(C), 0).apply(Broadcast("sub"), 2, 1)
    assert there != back
    assert there.digest == back.digest


def test_a_digest_knows_arguments_input_order_and_which_tensors_are_one():
    two = Graph.start().apply(Fc(C), 0).apply(Fc(C), 0)
    graphs = [
        two.apply(Broadcast("sub"), 0, 1).apply(Broadcast("add"), 3, 2),
        two.apply(Broadcast("sub"), 1, 0).apply(Broadcast("add"), 3, 2),
        two.apply(Bmm(transpose_right=True), 1, 1).apply(Broadcast("add"), 2, 0),
        two.apply(Bmm(transpose_right=True), 1, 2),
        two.apply(Bmm(transpose_left=True), 1, 2),
        Graph.start().apply(Fc(C), 0).apply(Bmm(transpose_right=True), 1, 1),
        chain(Shift((HEIGHT,), 1)),
        chain(Shift((HEIGHT,), 2)),
        chain(Shift((WIDTH,), 1)),
        chain(Convolution(3, 1)),
        chain(Convolution(3, 2)),
        chain(Convolution(3, 1, C)),
    ]
    crossed = two.apply(Bmm(transpose_right=True), 1, 2).apply(Bmm(transpose_right=True), 2, 1)
    straight = two.apply(Bmm(transpose_right=True), 1, 1).apply(Bmm(transpose_right=True), 2, 2)
    graphs += [crossed.apply(Broadcast("add"), 3, 4), straight.apply(Broadcast("add"), 3, 4)]
    assert len({graph.digest for graph in graphs}) == len(graphs)


@pytest.mark.parametrize("make", BY_HAND)
def test_a_kernel_goes_through_json_and_back(make):
    kernel = make()
    again = from_dict(json.loads(json.dumps(to_dict(kernel))))
    assert again == kernel
    assert again.digest == kernel.digest
    assert again.graph.shapes == kernel.graph.shapes


def test_text_and_graphviz_name_every_node():
    kernel = large_kernel_attention()
    assert "t4 = broadcast(kind=mul) t0 t3: [C=C | H=H W=W]" in str(kernel).splitlines()
    lines = kernel.graph.graphviz().splitlines()
    assert lines[0] == "digraph kernel {"
    assert sum("label=" in line and "->" not in line for line in lines) == 6
    assert "  t3 -> t4 [label=1];" in lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": True}, "groups = True must be a whole number"),
        ({"groups": "4"}, "groups = '4' must be a whole number"),
        ({"depth": 3}, "'depth' is no field"),
        ({"primitives": "fc"}, "must be a list of tables"),
        ({"primitives": [{"primitive": "dense", "inputs": []}]}, "'dense' is none of input, output"),
        ({"primitives": [{"primitive": "fc", "inputs": [0]}]}, "channels is missing"),
        ({"primitives": [{"primitive": "fc", "inputs": [0], "channels": "K"}]}, "'K' is no number"),
        ({"primitives": [{"primitive": "fc", "inputs": 0, "channels": "C"}]}, "must be a list of positions"),
        ({"primitives": [{"primitive": "softmax", "inputs": [0], "dim": "2.C"}]}, "'2.C' is no dim"),
        ({"primitives": [{"primitive": "bmm", "inputs": [0, 0], "softmax": 1}]}, "must be true or false"),
        ({"primitives": [{"primitive": "scale", "inputs": [0], "dims": "0.C"}]}, "must be a list"),
    ],
)
def test_a_table_that_is_no_kernel_says_where(change, message):
    with pytest.raises(SpecError, match=message):
        from_dict({"groups": 1, "primitives": [], **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Graph(()), "must begin with an input"),
        (lambda: Graph.start().apply(Fc(C), 1), "reads node 1, which is not before it"),
        (lambda: Graph.start().apply(Bmm(), 0), "1 inputs are given; it has 2"),
        (lambda: Graph((Node(Input()), Node(Input()))), "another input"),
        (lambda: chain(Output(), Fc(C)), "nothing comes after it"),
        (lambda: Kernel(chain(Fc(C))), "apply an output"),
        (lambda: Kernel(Graph.start().apply(Fc(C), 0).apply(Output(), 0)), "nothing reads node 1"),
        (lambda: Kernel(chain(Fc(X0), Fc(C), Output())), "x0 of a kernel is open"),
        (lambda: chain(Fc(X0), Output()), "a kernel ends with C[*]H[*]W"),
        (lambda: chain(Fc(C, meta=1)), "is space"),
        (lambda: chain(Group(G), Group(G)), "has groups already"),
        (lambda: chain(Unfold("H", 3), Unfold("HW", 5)), "KH of .* holds a window already"),
        (lambda: chain(Fold("avg", (HEIGHT,)), Convolution(3)), "no height or no width"),
        (lambda: chain(Fold("avg", (HEIGHT,)), Softmax(HEIGHT)), "has size 1"),
        (lambda: chain(Fold("max", (CHANNELS, HEIGHT))), "must be KH and KW, or H and W"),
        (lambda: chain(Mix((HEIGHT, CHANNELS), (H, C))), "once each and in this order"),
        (lambda: chain(Mix((CHANNELS,), (C, C))), "1 dims have 2 new sizes"),
        (lambda: chain(Scale((DimName(1, "KH"),))), "must be among 0.G, .*, 1.W"),
        (lambda: chain(Scale((WIDTH, CHANNELS))), "once each and in this order"),
        (lambda: chain(Scale(())), "no dim is named"),
        (lambda: Graph.start().shapes[0].size(DimName(2, "C")), "has no dim 2.C"),
        (lambda: Graph.start().apply(Bmm(), 0, 0), "H[*]W columns do not meet C rows"),
        (lambda: chain(Fc(H)).apply(Broadcast("add"), 0, 1), "but H/C"),
        (lambda: Convolution(4), "must be 3, 5 or 7"),
        (lambda: Unfold("HW", 3, 4), "must be 1, 2 or 3"),
        (lambda: Shift((HEIGHT,), 0), "must be 1, 2 or 3"),
        (lambda: replace(RELU, kind="swish"), "must be one of gelu"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(make, message):
    with pytest.raises(SearchError, match=message):
        make()


def test_a_kernel_is_refused_at_a_place_that_does_not_divide():
    kernel = finish(chain(Fc(C / number(4)), Fc(C)))
    assert kernel.parameters(Extent(8, 2, 2)) == 2 * 8 * 2
    with pytest.raises(SearchError, match="C/4 of the kernel is 3/2"):
        kernel.parameters(Extent(6, 2, 2))


def test_output_puts_channels_first():
    graph = Graph.start().apply(Fc(C), 0).apply(Bmm(transpose_left=True), 0, 0)
    assert graph.shapes[2] == Shape(Spatial(H, W), Spatial(H, W))
    turned = graph.apply(Bmm(transpose_right=True), 2, 1)
    assert turned.shapes[3] == Shape(Spatial(H, W), Channel(c=C))
    assert turned.apply(Output(), 3).shapes[4] == Shape(Channel(c=C), Spatial(H, W))

"""Canvas: what may be done to an unfinished kernel, the rules that refuse it, and sampled kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import product as pairs
from random import Random

import pytest
from canvas_in_torch import Runner

from cofire.errors import SearchError
from cofire.search.canvas import (
    DimName,
    Extent,
    Graph,
    Kernel,
    Limits,
    Sampler,
)
from cofire.search.canvas.actions import (
    KINDS,
    RULES_AFTER,
    RULES_BEFORE,
    Action,
    Plan,
    State,
    actions,
    candidates,
    kinds,
    refusal,
)
from cofire.search.canvas.kernel_io import from_dict, to_dict
from cofire.search.canvas.primitives import (
    PRIMITIVES,
    Activation,
    Bmm,
    Broadcast,
    Elementwise,
    Fc,
    Fold,
    Group,
    Mix,
    Scale,
    Shift,
    Softmax,
    Unfold,
)
from cofire.search.canvas.solver import Substitution, Target
from cofire.search.canvas.variables import (
    ONE,
    C,
    G,
    dynamic_variable,
    number,
)

X0 = dynamic_variable(0)
PLACES = ((16, 8, 8), (32, 4, 4), (48, 6, 2))
SMALL = Extent(16, 6, 5)
CHANNELS, HEIGHT = DimName(0, "C"), DimName(1, "H")


def chain(*primitives) -> Graph:
    graph = Graph.start()
    for primitive in primitives:
        graph = graph.apply(primitive, len(graph.nodes) - 1)
    return graph


@cache
def samples(seed: int = 0, count: int = 40) -> tuple[Kernel, ...]:
    sampler = Sampler(PLACES, Limits(primitives=(5, 16)), seed)
    return tuple(sampler.sample() for _ in range(count))


# Rules


def plan(num_primitives: int = 6, width: int = 3, groups: int = 4, **changes) -> Plan:
    limits = Limits(**changes)
    return Plan(Target(tuple(Extent(*place) for place in PLACES), groups), limits, num_primitives, width)


def state(*primitives, **changes) -> State:
    return State(plan(**changes), chain(*primitives))


RELU, ABS = Activation("relu"), Elementwise("abs")
REFUSED = [
    ("count", state(RELU, Fc(C), num_primitives=2), Action(RELU, (2,)), None),
    ("width", state(Fc(C), RELU, width=1), Action(Fc(C), (0,)), Action(Fc(C), (2,))),
    ("width", state(Fc(C), RELU, num_primitives=3), Action(Fc(C), (0,)), Action(Broadcast("add"), (0, 2))),
    ("weighted", state(Fc(C), RELU, Fc(C), weighted=(1, 2)), Action(Fc(C), (3,)), Action(RELU, (3,))),
    ("weighted", state(Fc(C), RELU, Fc(C), Fc(C)), Action(Fc(C), (4,)), Action(RELU, (4,))),
    ("weighted", state(RELU, num_primitives=2), Action(Shift((HEIGHT,)), (1,)), Action(Fc(C), (1,))),
    ("self", state(Fc(C)), Action(Broadcast("max"), (1, 1)), Action(Broadcast("max"), (0, 1))),
    ("unfold", state(Unfold("H", 3)), Action(RELU, (1,)), Action(Softmax(HEIGHT), (1,))),
    ("void", state(RELU), Action(RELU, (1,)), Action(Elementwise("sin"), (1,))),
    ("void", state(ABS), Action(ABS, (1,)), Action(Elementwise("neg"), (1,))),
    ("void", state(Elementwise("sqrt")), Action(Elementwise("sqr"), (1,)), Action(ABS, (0,))),
    ("duplicate", state(RELU), Action(RELU, (0,)), Action(ABS, (0,))),
    (
        "duplicate",
        State(plan(), Graph.start().apply(Fc(C), 0).apply(Broadcast("add"), 0, 1)),
        Action(Broadcast("add"), (1, 0)),
        Action(Broadcast("sub"), (1, 0)),
    ),
    (
        "duplicate",
        State(plan(), Graph.start().apply(Fc(C), 0).apply(Broadcast("sub"), 0, 1)),
        Action(Broadcast("sub"), (0, 1)),
        Action(Broadcast("sub"), (1, 0)),
    ),
    ("one group", state(groups=1), Action(Group(G), (0,)), Action(Group(C), (0,))),
    ("dims", state(Group(G), dims=4), Action(Unfold("H", 3), (1,)), Action(Unfold("H", 3), (0,))),
    ("spatial weight", state(), Action(Scale((HEIGHT,)), (0,)), Action(Scale((CHANNELS,)), (0,))),
    ("whole", state(), Action(Fc(C / number(5)), (0,)), Action(Fc(C / number(16)), (0,))),
    ("shape", state(Group(G)), Action(Group(G), (1,)), Action(Group(C), (0,))),
    ("closing", state(Fc(C), num_primitives=2), Action(Fold("avg", (HEIGHT,)), (1,)), Action(RELU, (1,))),
]


@pytest.mark.parametrize(("rule", "before", "refused", "allowed"), REFUSED)
def test_each_rule_refuses_what_it_says_and_not_its_neighbour(rule, before, refused, allowed):
    assert refusal(before, refused) == rule
    assert refused not in actions(before)
    if allowed is not None:
        assert refusal(before, allowed) is None


def test_every_rule_is_among_the_cases_above():
    assert {rule for rule, *_ in REFUSED} | {"bmm"} == {"count", "shape", *RULES_BEFORE, *RULES_AFTER}


def test_a_kernel_that_must_have_a_bmm_ends_with_one_at_the_latest():
    before = State(replace(plan(num_primitives=3, spatial_weights=True), needs_bmm=True), chain(RELU, Fc(X0)))
    assert refusal(before, Action(ABS, (2,))) == "bmm"
    assert {action.primitive.name for action in actions(before)} == {"bmm"}


def test_actions_are_the_candidates_that_no_rule_refuses():
    rng = Random(3)
    for seed in range(4):
        now = State.start(plan(num_primitives=5 + seed, width=2 + seed % 2))
        while now.left:
            legal = actions(now)
            every = [action for kind in KINDS for action in candidates(now, kind)]
            assert [action for action in every if refusal(now, action) is None] == list(legal)
            assert {action.primitive.name for action in legal} <= set(kinds(now))
            if not legal:
                break
            now = now.apply(rng.choice(legal))
            assert len(now.graph.open) <= min(now.plan.max_width, now.left + 1)
            assert all(len(shape.wide_dims) <= 7 for shape in now.graph.shapes)
            assert now.plan.target.admits_graph(now.graph)


def test_a_join_of_unequal_sizes_comes_with_the_substitution_that_makes_them_equal():
    before = State(plan(num_primitives=4), Graph.start().apply(Fc(X0), 0))
    joins = [a for a in actions(before) if a.primitive == Broadcast("add") and a.inputs == (1, 0)]
    assert [action.substitution for action in joins] == [None, Substitution(0, C)]
    multiplied = [a for a in actions(before) if a.primitive == Bmm(transpose_left=True) and a.inputs == (1, 0)]
    assert [action.substitution for action in multiplied] == [Substitution(0, C)]
    stretched = [a for a in actions(before) if a.primitive == Broadcast("add") and a.inputs == (0, 1)]
    assert [action.substitution for action in stretched] == [None, Substitution(0, C)]
    assert before.apply(joins[1]).graph.nodes[1].primitive == Fc(C)


def test_a_mix_that_is_an_fc_is_no_candidate():
    mixed = [a.primitive.arguments()["dims"] for a in candidates(state(), "mix")]
    assert ["0.C"] not in mixed
    assert ["0.C", "1.H"] in mixed
    grouped = [a.primitive for a in candidates(state(Group(G)), "mix") if a.inputs == (1,)]
    assert Mix((CHANNELS,), (C / G,)) in grouped
    unfolded = [a.primitive for a in candidates(state(Unfold("H", 3)), "mix") if a.inputs == (1,)]
    window = (CHANNELS, DimName(0, "KH"))
    assert Mix(window, (C, number(3))) in unfolded
    assert Mix(window, (X0, ONE)) not in unfolded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"primitives": (5, 4)}, "primitives = 5 to 4 is no range"),
        ({"weighted": (0, 4)}, "weighted = 0 to 4 is no range"),
        ({"weighted": (4, 4), "primitives": (2, 5)}, "4 weights are more than 0.6 of 5 primitives"),
        ({"kinds": ("fc", "dense")}, "kinds name 'dense'"),
        ({"kinds": ("fold", "bmm")}, "kinds leave no primitive with a weight"),
        ({"bmm_share": 2.0}, "must be from 0 to 1"),
    ],
)
def test_limits_that_leave_nothing_are_refused(changes, message):
    with pytest.raises(SearchError, match=message):
        Limits(**changes)


# Sampler


def test_samples_keep_to_the_limits():
    limits = Limits(primitives=(5, 16))
    for kernel in samples():
        graph = kernel.graph
        assert 5 <= graph.num_primitives <= 16
        assert 1 <= graph.num_weighted <= min(8, limits.weighted_ratio * graph.num_primitives)
        assert 16 % kernel.groups == 0
        for position, shape in enumerate(graph.shapes):
            assert len(shape.wide_dims) <= 7
            assert not any(size.power("H") or size.power("W") for size in graph.weight(position))
            width = Graph(graph.nodes[: position + 1]).open
            assert len(width) <= 8
    assert len({kernel.digest for kernel in samples()}) == len(samples())


def test_samples_are_the_same_in_every_process():
    script = (
        "import sys; from cofire.search.canvas import Limits, Sampler\n"
        "sampler = Sampler(((16, 8, 8), (32, 4, 4), (48, 6, 2)), Limits(primitives=(5, 16)), 0)\n"
        "print(*(sampler.sample().digest for _ in range(10)), 'torch' in sys.modules)"
    )
    expected = [str(kernel.digest) for kernel in samples()[:10]]
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.split() == [*expected, "False"]


def test_other_seeds_give_other_samples():
    assert samples(1, 5)[0] != samples()[0]


def test_a_share_of_kernels_must_have_a_bmm():
    sampler = Sampler(PLACES, Limits(primitives=(5, 8), bmm_share=1.0), 2)
    for _ in range(5):
        assert any(node.primitive.name == "bmm" for node in sampler.sample().graph.nodes)


def test_weights_over_space_come_only_where_they_are_allowed():
    sampler = Sampler([SMALL], Limits(primitives=(3, 5), spatial_weights=True, kinds=("mix", "scale", "softmax")), 0)
    graphs = [sampler.sample().graph for _ in range(10)]
    sizes = [size for graph in graphs for k in range(len(graph.nodes)) for size in graph.weight(k)]
    assert any(size.power("H") for size in sizes)


def test_a_sampler_that_finds_nothing_says_which_rule_refused_most():
    limits = Limits(primitives=(2, 2), weighted=(1, 1), kinds=("scale", "fold"), bmm_share=0.0, spatial_weights=True)
    assert Sampler(PLACES, replace(limits, kinds=("scale", "shift"))).sample().graph.num_primitives == 2
    impossible = replace(limits, kinds=("scale", "unfold"))
    with pytest.raises(SearchError, match=r"no kernel in 20 tries; rule 'closing' refused most, \d+ of \d+"):
        Sampler(PLACES, impossible).sample(max_tries=20)


def test_the_rules_of_earlier_kernels_are_not_told_again():
    limits = Limits(primitives=(2, 2), weighted=(1, 1), kinds=("scale", "unfold"), bmm_share=0.0)
    sampler = Sampler(PLACES, limits)
    for _ in range(3):
        before = sampler.refused.total()
        with pytest.raises(SearchError) as caught:
            sampler.sample(max_tries=5)
        assert f" of {sampler.refused.total() - before}:" in str(caught.value)


def test_a_graph_that_only_a_weight_over_space_would_close_is_refused_by_the_solver():
    sampler = Sampler([SMALL], Limits(primitives=(2, 2), weighted=(1, 1), kinds=("fc", "fold"), bmm_share=0.0), 0)
    first = [sampler.sample().graph.nodes[1].primitive for _ in range(20)]
    assert {primitive.dims for primitive in first if isinstance(primitive, Fold)} == {(CHANNELS,)}
    assert sampler.refused["solver"] > 0


@pytest.mark.parametrize(
    ("places", "message"),
    [([], "no place to fill"), ([(16, 0, 4)], "16, 0, 4 of a place must be at least 1")],
)
def test_places_that_are_none_are_refused(places, message):
    with pytest.raises(SearchError, match=message):
        Sampler(places)
    with pytest.raises(SearchError, match="groups = 3 does not divide the 16 channels"):
        Target((SMALL,), 3)


def test_every_sample_closes_at_every_place_and_counts_what_pytorch_counts():
    for kernel, place in pairs(samples(), PLACES):
        extent = Extent(*place)
        runner = Runner(kernel, extent)
        assert runner.output.shape == (1, *extent)
        assert runner.parameters == kernel.parameters(extent)
        assert runner.multiply_adds == kernel.multiply_adds(extent)


def test_samples_go_through_json_and_back():
    for kernel in samples():
        again = from_dict(json.loads(json.dumps(to_dict(kernel))))
        assert again == kernel
        assert again.digest == kernel.digest
        assert again.graph.shapes == kernel.graph.shapes


def test_every_primitive_has_arguments_that_read_back():
    seen = {node.primitive.name for kernel in samples() for node in kernel.graph.nodes}
    assert seen == set(PRIMITIVES)

"""Places, mappings and exchanges against shapes, counts and outputs that torch itself gives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import operators_by_hand
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.errors import SearchError
from cofire.search.placeholder import (
    Fitting,
    Placeholder,
    Replacement,
    find_places,
    fit_operator,
    fit_spec,
    measure,
    operator_factory,
    replace,
    with_mappings,
)
from cofire.spec.search import SearchSpec

EXAMPLE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions of several kinds; one is called twice, one never, one twice with different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.never = nn.Conv2d(8, 8, 3, padding=1)
        self.varying = nn.Conv2d(8, 8, 1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4)
        self.narrow = nn.Conv2d(16, 16, 3)
        self.hole = Placeholder()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.twice(self.twice(x).relu())
        x = x + self.varying(x) + F.interpolate(self.varying(x[:, :, ::2, ::2]), scale_factor=2)
        x = self.narrow(self.grouped(self.down(x)).relu())
        return self.head(self.hole(x).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


def spec(**fields: object) -> SearchSpec:
    """A search for convolutions from [N, Ci, H, H] to [N, Co, H, H]."""
    table: dict[str, object] = {
        "primary": ("N", "Ci", "Co", "H"),
        "coefficient": ("k", "g"),
        "mappings": ({"N": 1, "Ci": 64, "Co": 64, "H": 32, "k": 3, "g": 4},),
        "input": ("N", "Ci", "H", "H"),
        "output": ("N", "Co", "H", "H"),
    }
    return SearchSpec.model_validate(table | fields)


def reasons(fitting: Fitting) -> dict[str, str]:
    return {place.name: reason for place, reason in fitting.skipped}


def test_places_have_the_shapes_that_hooks_of_our_own_see():
    model = net()
    seen: dict[str, list[tuple[torch.Size, torch.Size]]] = {}
    handles = [
        layer.register_forward_hook(
            lambda _, args, output, name=name: seen.setdefault(name, []).append((args[0].shape, output.shape))
        )
        for name, layer in model.named_modules()
    ]
    model(EXAMPLE)
    for handle in handles:
        handle.remove()
    places = {place.name: place for place in find_places(model, EXAMPLE)}
    assert list(places) == ["stem", "twice", "down", "grouped", "narrow", "hole", "head"]
    for name, place in places.items():
        assert (place.input_shape, place.output_shape) == tuple(map(tuple, seen[name][0]))
        assert place.calls == len(seen[name])
    kinds = [place.kind for place in places.values()]
    assert kinds == ["convolution"] * 5 + ["placeholder", "linear"]
    grouped, down = places["grouped"], places["down"]
    assert (grouped.kernel, grouped.stride, grouped.dilation, grouped.groups) == ((3, 3), (1, 1), (2, 2), 4)
    assert (down.kernel, down.stride, down.groups) == ((3, 3), (2, 2), 1)


def test_finding_places_leaves_a_model_as_it_was():
    model = net()
    model.grouped.eval()
    before = copy.deepcopy(model.state_dict())
    find_places(model, EXAMPLE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not model.grouped.training
    assert model.stem.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_of_several_inputs_takes_a_tuple():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(input=x) * y

    (place,) = find_places(Two(), (torch.zeros(2, 4), torch.ones(2, 3)))
    assert (place.input_shape, place.output_shape) == ((2, 4), (2, 3))


def test_mappings_follow_from_shapes_and_misfits_have_a_reason():
    places = find_places(net(), EXAMPLE)
    fitting = fit_spec(spec(), places, {"k": 3, "g": 4}, whole=["Ci/g"])
    fits = {place.name: fitting.mappings[mapping] for place, mapping in fitting.fits}
    assert fits == {
        "twice": {"N": 2, "Ci": 8, "Co": 8, "H": 12, "k": 3, "g": 4},
        "grouped": {"N": 2, "Ci": 16, "Co": 16, "H": 6, "k": 3, "g": 4},
        "hole": {"N": 2, "Ci": 16, "Co": 16, "H": 4, "k": 3, "g": 4},
    }
    assert reasons(fitting) == {
        "stem": "Ci/g is 3/4, which is not whole; padded to Ci = 4 it would be",
        "down": "H is 12, but its output has 6 there (stride 2)",
        "narrow": "H is 6, but its output has 4 there",
        "head": "its input has 2 dims, the operator's 4",
    }


def test_equal_places_share_a_mapping():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)), nn.Conv2d(4, 8, 3, padding=1))
    fitting = fit_spec(spec(), find_places(model, torch.zeros(1, 4, 8, 8)))
    assert [mapping for _, mapping in fitting.fits] == [0, 0, 0, 1]
    assert [(row["Ci"], row["Co"], row["k"]) for row in fitting.mappings] == [(4, 4, 3), (4, 8, 3)]


def test_a_search_with_a_stride_in_its_shapes_fits_strided_layers_alone():
    table = {"coefficient": ("s",), "mappings": ({"N": 1, "Ci": 8, "Co": 8, "H": 4, "s": 2},)}
    strided = spec(input=("N", "Ci", "s*H", "s*H"), **table)
    fitting = fit_spec(strided, find_places(net(), EXAMPLE))
    assert [place.name for place in fitting.places] == ["down"]
    assert fitting.mappings == ({"N": 2, "Ci": 8, "Co": 16, "H": 6, "s": 2},)
    odd = fit_spec(strided, find_places(nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.zeros(1, 3, 7, 7)))
    assert list(reasons(odd).values()) == ["H*s of the input is 7, so that H would be 7/2"]


def test_symbols_that_no_shape_tells_must_be_chosen():
    places = find_places(net(), EXAMPLE)
    with pytest.raises(SearchError, match=r"no number is chosen for the coefficient g"):
        fit_spec(spec(), places, {"k": 3})
    with pytest.raises(SearchError, match=r"a number is chosen for R, which is not among"):
        fit_spec(spec(), places, {"k": 3, "g": 4, "R": 2})
    hidden = spec(
        primary=("N", "Ci", "Co", "H", "M"), mappings=({"N": 1, "Ci": 8, "Co": 8, "H": 4, "M": 24, "k": 3, "g": 4},)
    )
    with pytest.raises(SearchError, match=r"do not tell M; choose a number"):
        fit_spec(hidden, places, {"k": 3, "g": 4})
    assert {row["M"] for row in fit_spec(hidden, places).mappings} == {24}


def test_an_operator_fits_where_all_of_its_sizes_are_whole():
    operator = operators_by_hand.grouped_convolution().operator
    model = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 9, 1))
    fitting = fit_operator(operator, find_places(model, torch.zeros(1, 6, 5, 7)))
    assert [place.name for place in fitting.places] == ["0", "1"]
    assert reasons(fitting) == {"2": "D/g is 9/2, which is not whole; padded to D = 10 it would be"}
    with pytest.raises(SearchError, match=r"2 cannot be filled: D/g is 9/2"):
        fitting.mapping_at(fitting.skipped[0][0])
    assert with_mappings(operator, fitting.mappings).symbols.mappings == ((1, 6, 4, 5, 7, 3, 2), (1, 4, 6, 5, 7, 3, 2))


def test_canvas_gets_the_extents_of_places_that_keep_their_shape():
    places = {place.name: place for place in find_places(net(), EXAMPLE)}
    extents = {name: places[name].extent for name in ("twice", "grouped", "hole")}
    assert extents == {"twice": (8, 12, 12), "grouped": (16, 6, 6), "hole": (16, 4, 4)}
    for name in ("stem", "down", "narrow", "head"):
        with pytest.raises(SearchError, match=f"{name} makes .* keep the shape"):
            _ = places[name].extent


def replaced_convolutions(in_place: bool = False) -> tuple[Net, Replacement]:
    """The stem, which has a bias, and the convolution that is called twice, as operators."""
    model = net()
    places = [place for place in find_places(model, EXAMPLE) if place.name in ("stem", "twice")]
    factory = operator_factory(operators_by_hand.convolution_2d(3).operator, places)
    return model, replace(model, factory, places, EXAMPLE, in_place=in_place)


def weight_of(done: Replacement, name: str) -> Any:
    """The only weight of an operator's module."""
    (weight,) = done.model.get_submodule(name).parameters()
    return weight


def test_a_convolution_replaced_by_itself_leaves_outputs_gradients_and_costs():
    model, done = replaced_convolutions()
    stem, twice = (weight_of(done, name) for name in ("stem.inner", "twice"))
    with torch.no_grad():
        stem.copy_(model.stem.weight.permute(1, 2, 3, 0))
        twice.copy_(model.twice.weight.permute(1, 2, 3, 0))
    old, new = model(EXAMPLE), done.model(EXAMPLE)
    assert torch.allclose(old, new, atol=1e-5)
    old.square().sum().backward()
    new.square().sum().backward()
    pairs = [
        (stem.grad.permute(3, 0, 1, 2), model.stem.weight.grad),
        (twice.grad.permute(3, 0, 1, 2), model.twice.weight.grad),
        (done.model.get_parameter("stem.bias").grad, model.get_parameter("stem.bias").grad),
    ]
    assert all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) for ours, theirs in pairs)
    assert done.before == done.after


def test_costs_before_and_after_are_those_of_closed_forms():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    example = torch.zeros(1, 8, 10, 6)
    places = find_places(model, example)
    factory = operator_factory(operators_by_hand.depthwise_separable_convolution().operator, places)
    done = replace(model, factory, places, example)
    assert done.before.parameters == 2 * 8 * 8 * 9 + 8
    assert done.before.multiply_adds == 2 * 8 * 8 * 9 * 60
    assert done.after.parameters == 2 * (8 * 8 + 8 * 9) + 8
    assert done.after.multiply_adds == 2 * (8 * 8 + 8 * 9) * 60
    assert measure(model, example) == done.before


def test_linear_layers_are_replaced_with_their_bias():
    first, second = nn.Linear(5, 7), nn.Linear(7, 4, bias=False)
    model = nn.Sequential(first, nn.GELU(), second).double()
    example = torch.randn(2, 3, 5, dtype=torch.float64)
    places = find_places(model, example)
    done = replace(model, operator_factory(operators_by_hand.linear().operator, places), places, example)
    with torch.no_grad():
        weight_of(done, "0.inner").copy_(first.weight.T)
        weight_of(done, "2").copy_(second.weight.T)
    assert torch.allclose(done.model(example), model(example), atol=1e-12)
    assert done.model(example).dtype == torch.float64


def test_a_copy_leaves_the_model_and_in_place_can_be_restored():
    model, done = replaced_convolutions()
    assert done.model is not model
    assert type(model.stem) is nn.Conv2d
    model, done = replaced_convolutions(in_place=True)
    assert done.model is model
    assert type(model.stem) is not nn.Conv2d
    fresh = net()
    done.restore()
    done.restore()
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert torch.equal(model.eval()(EXAMPLE), fresh.eval()(EXAMPLE))


def test_a_layer_of_two_names_is_replaced_under_both():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    inner = nn.Sequential(layer)
    model = nn.Sequential(layer, nn.ReLU(), inner, layer)
    example = torch.zeros(1, 4, 6, 6)
    (place,) = find_places(model, example)
    assert place.calls == 3
    done = replace(model, lambda _: nn.Conv2d(4, 4, 1, bias=False), [place], example, in_place=True)
    assert model[0] is inner[0] is model[3]
    assert type(model[0]) is not nn.Conv2d
    done.restore()
    assert model[0] is inner[0] is model[3] is layer


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda _: nn.Conv2d(4, 1, 1), r"the module made for 0 makes \[1, 1, 6, 6\] of .* the layer \[1, 4, 6, 6\]"),
        (lambda _: nn.Conv2d(3, 3, 1), r"the module made for 0 fails on \[1, 4, 6, 6\]: Given groups=1"),
    ],
)
def test_a_module_that_does_not_fit_leaves_the_model_as_it_was(
    factory: Callable[[object], nn.Module], message: str
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    layers, example = list(model), torch.zeros(1, 4, 6, 6)
    with pytest.raises(SearchError, match=message):
        replace(model, factory, find_places(model, example), example, in_place=True)
    assert list(model) == layers


def test_a_module_that_fails_within_the_model_is_taken_out_again():
    class Once(nn.Module):
        """Works when it is tried, and not again."""

        def __init__(self) -> None:
            super().__init__()
            self.runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            if self.runs > 1:
                raise RuntimeError("no more")
            return x

    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False))
    layer, example = model[0], torch.zeros(1, 4, 6, 6)
    with pytest.raises(RuntimeError, match="no more"):
        replace(model, lambda _: Once(), find_places(model, example), example, in_place=True)
    assert model[0] is layer


def test_places_of_another_model_are_refused():
    example = torch.zeros(1, 4, 6, 6)
    (place,) = find_places(nn.Sequential(nn.Conv2d(4, 4, 1)), example)
    identity = operator_factory(operators_by_hand.convolution_2d(1).operator, [place])
    with pytest.raises(SearchError, match="'0' is a ReLU, not a convolution"):
        replace(nn.Sequential(nn.ReLU()), identity, [place], example)
    with pytest.raises(SearchError, match="no layer '0'"):
        replace(nn.Conv2d(4, 4, 1), identity, [place], example)
    with pytest.raises(SearchError, match="no place to fill"):
        replace(nn.ReLU(), identity, [], example)
    alone = nn.Conv2d(4, 4, 1)
    with pytest.raises(SearchError, match=r"put it into an nn\.Sequential"):
        replace(alone, identity, find_places(alone, example), example)
    with pytest.raises(SearchError, match="0 cannot be filled: its input has 4 dims, the operator's 3"):
        operator_factory(operators_by_hand.convolution_1d(3).operator, [place])


def test_a_placeholder_is_the_identity_until_it_is_filled():
    hole = Placeholder()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), hole).eval()
    x = torch.randn(2, 4, 6, 6)
    before = model(x)
    assert torch.equal(before, model[0](x))
    places = [place for place in find_places(model, x) if place.kind == "placeholder"]
    done = replace(model, lambda place: nn.Conv2d(place.extent[0], place.extent[0], 1), places, x, in_place=True)
    assert hole.filling is not None
    assert torch.equal(model(x), hole.filling(model[0](x)))
    assert not hole.filling.training
    assert [place.name for place in find_places(model, x)] == ["0", "1"]
    done.restore()
    assert torch.equal(model(x), before)
    hole.filling = nn.Conv2d(4, 5, 1)
    with pytest.raises(SearchError, match=r"makes \[2, 5, 6, 6\] of \[2, 4, 6, 6\]"):
        model(x)


def test_a_factory_sent_to_another_process_makes_the_same_module():
    places = find_places(nn.Conv2d(4, 6, 3, padding=1), torch.zeros(1, 4, 6, 6))
    factory = operator_factory(operators_by_hand.operator_1().operator, places, {"g": 2, "k": 3, "R": 3})
    sent = pickle.loads(pickle.dumps(factory))
    made: list[Any] = []
    for one in (factory, sent):
        torch.manual_seed(0)
        made.append(one(places[0]))
    x = torch.randn(3, 4, 6, 6)
    assert torch.equal(made[0](x), made[1](x))
    # k, k and R; C/g = 2, D = 6.
    assert [sorted(weight.shape) for weight in made[0].weights] == [[2, 3, 3, 3, 6], [2, 3, 3]]

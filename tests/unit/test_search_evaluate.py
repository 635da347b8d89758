"""Pictures, filters and the proxy reward, against numbers counted by hand and orders that are known."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from math import inf, isnan
from multiprocessing import get_context

import numpy as np
import operators_by_hand
import pytest
import torch
from torch import Tensor, nn

from cofire.errors import SearchError
from cofire.search import Operator
from cofire.search.evaluate import (
    SPLITS,
    Arrays,
    Evaluation,
    Filters,
    Floats,
    Labels,
    Pictures,
    ProxyTask,
    Split,
    broken_gradients,
    independent_part,
    latencies,
    output_variance,
    proxy_accuracy,
    reward_of,
)
from cofire.search.lowering import lower
from cofire.search.placeholder import Place, operator_factory
from cofire.spec.search import SearchSpec

SMALL = ProxyTask(
    data=Pictures(train=1000, validation=500, noise=0.2),
    width=16,
    stages=(1, 1, 1),
    epochs=4,
    batch_size=25,
    milestones=(),
)
TINY = replace(SMALL, data=Pictures(side=8, train=100, validation=50, test=70), width=4, stages=(1, 1), epochs=2)


def shift_only() -> Operator:
    build = operators_by_hand.begin("B C H W", B=2, C=3, H=5, W=6)
    b, c, h, w = build.output("B", "C", "H", "W")
    return build.finish(b, c, build.shift(h, 1), w)


def two_windows_over_one_dim() -> Operator:
    """x[c, h+a-1+b-1] * w[c, a, b, d]: of nine pairs of taps five differ away from the border."""
    build = operators_by_hand.begin("B C D H", "k", B=2, C=3, D=4, H=9, k=3)
    b, d, h = build.output("B", "D", "H")
    c, i, j = build.reduce("C", "k", "k")
    c, i, j = build.contract([c, i, j], [d])
    return build.finish(b, c, build.unfold(build.unfold(h, i), j))


def convolution() -> Operator:
    return operators_by_hand.convolution_2d(3).operator


# --- pictures ---


def test_splits_hold_as_many_pictures_of_each_class_and_none_twice():
    data = Pictures(train=200, validation=100, test=50)
    pictures = []
    for split, count in zip(SPLITS, (200, 100, 50), strict=True):
        x, y = data.draw(split)
        assert x.shape == (count, *data.shape)
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
        assert np.bincount(y).tolist() == [count // 10] * 10
        pictures += [picture.tobytes() for picture in x]
    assert len(set(pictures)) == 350
    assert not np.array_equal(replace(data, seed=1).draw("train")[0], data.draw("train")[0])


def test_stripes_are_constant_along_their_direction_and_no_other():
    x, y = Pictures(train=400, noise=0.0).draw("train")
    grey = x[:, 0]

    def constant(pictures: Floats, down: int, right: int) -> bool:
        height, width = pictures.shape[1:]
        moved = pictures[:, down:, right:]
        return np.array_equal(pictures[:, : height - down, : width - right], moved)

    horizontal, vertical, falling, rising = (grey[y == label] for label in range(4))
    assert constant(horizontal, 0, 1)
    assert constant(vertical, 1, 0)
    assert constant(falling, 1, 1)
    assert constant(rising[:, :, ::-1], 1, 1)
    assert not constant(horizontal, 1, 0)
    assert not constant(vertical, 0, 1)
    assert not constant(falling[:, :, ::-1], 1, 1)
    assert not constant(rising, 1, 1)


def test_outlines_lie_where_geometry_says():
    """The darkest and the lightest value are the two colours; the scarcer one draws."""
    x, y = Pictures(train=400, side=32, noise=0.0).draw("train")
    counts = {label: [] for label in range(5, 10)}
    for picture, label in zip(x[:, 0], y, strict=True):
        values, number = np.unique(picture, return_counts=True)
        assert len(values) == 2
        if label >= 5:
            counts[int(label)].append(number.min() / picture.size)
    disc, ring, square, plus, saltire = (np.mean(counts[label]) for label in range(5, 10))
    size = 0.3  # on average, in parts of the side
    assert disc == pytest.approx(np.pi * size**2, rel=0.2)
    assert ring == pytest.approx(2 * np.pi * size * 2 / 32, rel=0.2)
    assert square == pytest.approx(8 * size * 2 / 32, rel=0.2)
    assert plus == pytest.approx(4 * size * 2 / 32, rel=0.25)
    assert saltire == pytest.approx(4 * size * 2 / 32, rel=0.25)


def test_colours_do_not_tell_the_class():
    data = Pictures(train=2000, validation=1000)

    def colours(split: Split) -> tuple[Floats, Labels]:
        x, y = data.draw(split)
        means = x.mean((2, 3))
        return np.concatenate([means, means**2, np.ones_like(means)], axis=1), y

    x, y = colours("train")
    weights, *_ = np.linalg.lstsq(x, np.eye(10)[y], rcond=None)
    x, y = colours("validation")
    assert ((x @ weights).argmax(1) == y).mean() < 0.17


def test_arrays_are_cut_into_three_sets_that_hold_every_picture_once():
    x = np.arange(50, dtype=np.float32).reshape(50, 1, 1, 1)
    data = Arrays(x, np.arange(50) % 7, parts=(0.5, 0.3), seed=3)
    drawn = [data.draw(split) for split in SPLITS]
    assert [len(y) for _, y in drawn] == [25, 15, 10]
    assert sorted(float(n) for pictures, _ in drawn for n in pictures.ravel()) == list(range(50))
    assert all((pictures.ravel() % 7 == labels).all() for pictures, labels in drawn)
    assert (data.shape, data.classes) == ((1, 1, 1), 7)
    assert np.array_equal(drawn[0][0], data.draw("train")[0])


@pytest.mark.parametrize(
    ("shape", "labels", "parts", "message"),
    [
        ((10, 8, 8), 10, (0.5, 0.3), r"pictures of shape \[10, 8, 8\]"),
        ((10, 1, 8, 8), 9, (0.5, 0.3), r"classes of shape \[9\]"),
        ((10, 1, 8, 8), 10, (0.6, 0.4), r"parts \(0.6, 0.4\) of 10 pictures leave a set empty"),
    ],
)
def test_arrays_of_no_data_set_are_refused(
    shape: tuple[int, ...], labels: int, parts: tuple[float, float], message: str
) -> None:
    with pytest.raises(SearchError, match=message):
        Arrays(np.zeros(shape, np.float32), np.zeros(labels, np.int64), parts)


# --- filters ---


def test_variance_is_that_of_a_sum_of_independent_numbers():
    layer = nn.Conv2d(12, 5, 1, bias=False)
    nn.init.ones_(layer.weight)
    assert output_variance(layer, (20, 12, 16, 16)) == pytest.approx(12, rel=0.1)
    assert output_variance(nn.Identity(), (20, 12, 16, 16)) == pytest.approx(1, rel=0.05)


class Broken(nn.Module):
    """Of four weights one has a good gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.unused, self.zero, self.infinite = (nn.Parameter(torch.ones(())) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.good + 0 * self.zero + (self.infinite - 1).sqrt()


def test_gradients_that_are_absent_zero_or_infinite_are_named():
    assert broken_gradients(Broken(), (2, 3)) == ("unused", "zero", "infinite")
    assert broken_gradients(nn.Identity(), (2, 3)) == ()
    for case in operators_by_hand.CASES.values():
        operator = case().operator
        assert broken_gradients(lower(operator), tuple(size.value() for size in operator.input_shape)) == ()


def test_independent_part_counts_what_two_factors_share_once():
    operator = operators_by_hand.depthwise_separable_convolution().operator
    # Per channel a number can go from one factor to the other; at probe sizes C = D = 5 or 7, and k = 3.
    parts = {1 - c / (9 * c + c * d) for c in (5, 7) for d in (5, 7)}
    assert any(independent_part(operator) == pytest.approx(part) for part in parts)
    assert independent_part(convolution()) == 1
    assert independent_part(shift_only()) == 1
    assert independent_part(operators_by_hand.operator_1().operator) is None
    part = independent_part(two_windows_over_one_dim())
    assert part is not None
    assert 5 / 9 <= part < 1


def test_filters_say_what_they_refuse():
    shape = (2, 3, 9)
    operator = two_windows_over_one_dim()
    module = lower(operator)
    assert Filters().refuse(module, shape, operator) is None
    refused = Filters(min_independent=0.9).refuse(module, shape, operator)
    assert refused is not None
    assert refused.endswith("of the parameters are independent, less than 90%")
    assert Filters(min_independent=0.9).refuse(module, shape) is None
    variance = output_variance(nn.Identity(), shape)
    assert Filters(min_variance=5).refuse(nn.Identity(), shape) == f"output variance {variance:.3g} is outside 5 to 100"
    assert Filters(max_variance=inf).refuse(Broken(), shape) == "the gradient to unused is zero or not finite"
    dead = lower(operator)
    with torch.no_grad():
        dead.weights[0].fill_(torch.nan)
    assert Filters().refuse(dead, shape) == "output variance nan is outside 0.01 to 100"


def test_a_module_many_times_as_deep_is_too_slow():
    one = nn.Conv2d(8, 8, 3, padding=1)
    many = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(30)))
    shape = (4, 8, 16, 16)
    for backward in (True, False):
        taken = latencies({"one": one, "many": many}, shape, backward=backward)
        assert taken["many"] > 5 * taken["one"] > 0
    limited = Filters(min_variance=0, max_slowdown=5)
    refused = limited.refuse(many, shape, replaced=one)
    assert refused is not None
    assert "times as long as what it replaces, more than 5" in refused
    assert limited.refuse(one, shape, replaced=many) is None


# --- proxy training ---


def test_rewards_are_a_fourth_power_between_two_accuracies():
    assert [reward_of(accuracy, 0.4, 0.8) for accuracy in (0.0, 0.4, 0.8, 1.0)] == [0, 0, 1, 1]
    assert reward_of(0.6, 0.4, 0.8) == pytest.approx(1 / 16)


@cache
def small(name: str, seed: int) -> Evaluation:
    operators = {
        "convolution": convolution,
        "pointwise": lambda: operators_by_hand.convolution_2d(1).operator,
        "shift": shift_only,
    }
    return replace(SMALL, seed=seed).evaluate(operators[name]())


def test_a_convolution_is_worth_more_than_a_pointwise_layer_and_both_more_than_a_shift():
    rewards = {name: [small(name, seed).reward for seed in range(2)] for name in ("convolution", "pointwise", "shift")}
    last = {name: np.mean([small(name, seed).accuracies[-1] for seed in range(2)]) for name in rewards}
    assert min(rewards["convolution"]) > 100 * max(rewards["pointwise"])
    assert np.mean(rewards["pointwise"]) > 5 * np.mean(rewards["shift"])
    assert last["convolution"] > 0.8
    assert last["pointwise"] > last["shift"] + 0.02
    assert last["shift"] < 0.18


def test_costs_are_those_of_the_network_per_picture():
    cost = small("convolution", 0).cost
    assert cost is not None
    width, pixels = SMALL.width, (256, 64, 16)
    assert cost.parameters == 3 * width + 4 * 2 * width + 3 * 9 * width**2 + 10 * width + 10
    assert cost.multiply_adds == 256 * 3 * width + sum(pixels) * 9 * width**2 + 10 * width


def test_an_operator_learns_as_the_layer_of_torch_that_it_is():
    factory = operator_factory(convolution(), SMALL.places)

    def in_torch(place: Place) -> nn.Module:
        (weight,) = factory(place).parameters()
        with torch.random.fork_rng():
            layer = nn.Conv2d(SMALL.width, SMALL.width, 3, padding=1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(weight.permute(3, 0, 1, 2))
        return layer

    task = replace(SMALL, epochs=2)
    ours, theirs = task.train(factory), task.train(in_torch)
    assert ours.cost == theirs.cost
    assert ours.accuracies == pytest.approx(theirs.accuracies, abs=0.05)
    assert ours.accuracies[-1] > 0.3


def test_a_seed_gives_the_same_evaluation_in_every_process():
    operator = operators_by_hand.depthwise_separable_convolution().operator
    torch.manual_seed(5)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first = TINY.evaluate(operator)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.randn(3)
    torch.set_num_threads(2)
    try:
        assert TINY.evaluate(operator) == first
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        assert executor.submit(TINY.evaluate, operator).result() == first
        assert executor.submit(TINY, operator).result() == first.reward
    assert replace(TINY, seed=1).evaluate(operator).accuracies != first.accuracies


@dataclass
class Watched:
    """Pictures that remember which of them were drawn."""

    pictures: Pictures
    drawn: list[Split]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.pictures.shape

    @property
    def classes(self) -> int:
        return self.pictures.classes

    def draw(self, split: Split) -> tuple[Floats, Labels]:
        self.drawn.append(split)
        return self.pictures.draw(split)


def test_no_reward_reads_the_test_set():
    assert isinstance(TINY.data, Pictures)
    watched = Watched(TINY.data, [])
    task = replace(TINY, data=watched)
    assert task(convolution()) >= 0
    assert watched.drawn == ["train", "validation", "validation"]
    accuracy = task.test_accuracy(operator_factory(convolution(), task.places))
    assert watched.drawn[-1] == "test"
    assert (accuracy * 70) == pytest.approx(round(accuracy * 70), abs=1e-4)


def test_training_ends_at_a_milestone_that_is_missed():
    found = replace(TINY, epochs=3, milestones=((1, 0.0), (2, 0.99))).evaluate(convolution())
    whole = replace(TINY, epochs=3).evaluate(convolution())
    assert (found.pruned, whole.pruned) == (True, False)
    assert found.accuracies == whole.accuracies[:2]
    assert len(whole.accuracies) == 3


@pytest.mark.parametrize(
    ("task", "operator", "reason"),
    [
        (TINY, operators_by_hand.convolution_1d(3).operator, "its input has 4 dims, the operator's 3"),
        (replace(TINY, width=5), operators_by_hand.operator_1().operator, "C/g is 5/2, which is not whole"),
        (replace(TINY, filters=Filters(max_variance=0.1)), convolution(), "output variance"),
        (replace(TINY, learning_rate=1e30), convolution(), "training diverged"),
    ],
)
def test_what_cannot_be_trained_has_a_reason_and_no_reward(task: ProxyTask, operator: Operator, reason: str) -> None:
    found = task.evaluate(operator)
    assert isnan(found.reward)
    assert isnan(task(operator))
    assert found.refused is not None
    assert reason in found.refused


def test_a_task_that_would_always_fail_is_refused():
    with pytest.raises(SearchError, match="in no order"):
        ProxyTask(lower=0.9, upper=0.5)
    with pytest.raises(SearchError, match="10 x 10 pixels are not halved 2 times"):
        ProxyTask(data=Pictures(side=10), stages=(1, 1, 1))
    with pytest.raises(SearchError, match=r"stages = \(1, 0\) has a resolution without places"):
        ProxyTask(stages=(1, 0))
    with pytest.raises(SearchError, match="cannot be filled: its input has 4 dims, the operator's 3"):
        ProxyTask(filters=Filters(max_slowdown=2), baseline=operators_by_hand.convolution_1d(3).operator)
    with pytest.raises(SearchError, match="nothing to measure against"):
        ProxyTask(filters=Filters(max_slowdown=2))
    with pytest.raises(SearchError, match="batch_size = 101, but 100 pictures"):
        replace(TINY, batch_size=101).train(operator_factory(convolution(), replace(TINY, batch_size=101).places))


def test_a_limit_of_time_is_measured_against_the_baseline():
    pointwise = operators_by_hand.convolution_2d(1).operator
    window = operators_by_hand.convolution_2d(7).operator
    task = replace(TINY, width=16, filters=Filters(max_slowdown=1e-3), baseline=pointwise)
    assert "times as long as what it replaces" in (task.evaluate(window).refused or "")
    assert replace(task, filters=Filters(max_slowdown=1e3)).evaluate(window).refused is None


def search(**fields: object) -> SearchSpec:
    table: dict[str, object] = {
        "primary": ("N", "C", "H"),
        "coefficient": ("k",),
        "mappings": ({"N": 1, "C": 64, "H": 56, "k": 3},),
        "input": ("N", "C", "H", "H"),
        "output": ("N", "C", "H", "H"),
    }
    return SearchSpec.model_validate(table | fields)


def test_a_search_gets_the_reward_if_its_shapes_are_those_of_the_proxy():
    task = proxy_accuracy(search(), None)
    assert pickle.loads(pickle.dumps(task)) == task == ProxyTask()
    with pytest.raises(SearchError, match=r"'proxy_accuracy' puts operators where .*its input has 4 dims, .* 3"):
        proxy_accuracy(search(input=("N", "C", "H"), output=("N", "C", "H")), None)
    with pytest.raises(SearchError, match=r"C\*k is 96, but its output has 32 there"):
        proxy_accuracy(search(output=("N", "k*C", "H", "H")), None)

"""What an operator is worth in a network that learns: cheap filters first, then a proxy training of seconds.

A :class:`ProxyTask` puts an operator into every place of a small network of convolutions, trains it on small pictures,
and turns its accuracy on held-out pictures into a reward (Syno, reward; Canvas, proxy data set). Unlike the
originals, whose reward was the best accuracy on the very test pictures that they reported, it has three disjoint sets:
weights learn from the first, rewards read the second, and :meth:`ProxyTask.test_accuracy` alone reads the third.

The accuracy is the last epoch's and not the best one's, and the reward is clipped to 1. On one thread of one machine a
seed gives the same reward in every process; latency is measured, and so no filter of rewards unless it is asked for.

The pictures are *synthetic*: :class:`Pictures` draws stripes, boards and outlines in random colours. :class:`Arrays`
takes any others. A reward ranks operators for such pictures at such sizes, and no more. Left out: accelerators, whose
sums are not the same in every run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import inf, isfinite, nan, prod
from statistics import median
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cofire.errors import SearchError
from cofire.search import placeholder
from cofire.search.fingerprint import probe_sizes, redundant_weights
from cofire.search.graph import Operator
from cofire.search.placeholder import (
    ModelCost,
    Place,
    Placeholder,
    find_places,
    fit_spec,
    operator_factory,
    with_mappings,
)
from cofire.spec.search import SearchSpec

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Split = Literal["train", "validation", "test"]
Factory = Callable[[Place], nn.Module]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


# --- pictures ---


class Data(Protocol):
    """Labelled pictures in three disjoint sets."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes."""
        ...

    def draw(self, split: Split) -> tuple[Floats, Labels]:
        """Return pictures [n, C, H, W] and their classes [n], the same in every call and process."""
        ...


# From rows and columns counted from a random centre and a random size, in pixels, to what is in the foreground.
_DRAWINGS: dict[str, Callable[[Floats, Floats, Floats], NDArray[np.bool_]]] = {
    "horizontal stripes": lambda u, v, size: np.sin(2 * np.pi * u / size) + 0 * v > 0,
    "vertical stripes": lambda u, v, size: np.sin(2 * np.pi * v / size) + 0 * u > 0,
    "falling stripes": lambda u, v, size: np.sin(2 * np.pi * (u - v) / (1.4 * size)) > 0,
    "rising stripes": lambda u, v, size: np.sin(2 * np.pi * (u + v) / (1.4 * size)) > 0,
    "board": lambda u, v, size: np.sin(2 * np.pi * u / size) * np.sin(2 * np.pi * v / size) > 0,
    "disc": lambda u, v, size: np.hypot(u, v) < size,
    "ring": lambda u, v, size: np.abs(np.hypot(u, v) - size) < 1,
    "square": lambda u, v, size: np.abs(np.maximum(np.abs(u), np.abs(v)) - size) < 1,
    "plus": lambda u, v, size: (np.minimum(np.abs(u), np.abs(v)) < 1) & (np.maximum(np.abs(u), np.abs(v)) < size),
    "saltire": lambda u, v, size: (np.abs(np.abs(u) - np.abs(v)) < 1) & (np.abs(u) < size),
}


@dataclass(frozen=True)
class Pictures:
    """Synthetic pictures of 10 classes, as many of each: stripes, boards and outlines, anywhere and of random colours.

    Colours say nothing about the class, nor does a pixel alone.

    Attributes:
        side: Height and width in pixels.
        train: Number of pictures to learn from.
        validation: Number of pictures that rewards read.
        test: Number of pictures that no reward reads.
        noise: Standard deviation of what is added to each channel of a pixel; colours differ by 1 to 3 in each.
        seed: Where all random choices come from.
    """

    side: int = 16
    train: int = 2000
    validation: int = 1000
    test: int = 1000
    noise: float = 0.5
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Three colours, height and width."""
        return 3, self.side, self.side

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(_DRAWINGS)

    def draw(self, split: Split) -> tuple[Floats, Labels]:
        """Return pictures [n, 3, side, side] and their classes [n], the same in every call and process."""
        return _drawn(self, split)


@lru_cache(maxsize=6)
def _drawn(pictures: Pictures, split: Split) -> tuple[Floats, Labels]:
    count: int = getattr(pictures, split)
    rng = np.random.default_rng([pictures.seed, SPLITS.index(split)])
    labels = rng.permutation(np.arange(count) % pictures.classes)
    side = pictures.side
    centre = rng.uniform(0.3 * side, 0.7 * side, (2, count, 1))
    u, v = ((np.arange(side) - at).astype(np.float32) for at in centre)
    size = rng.uniform(0.2 * side, 0.4 * side, (count, 1, 1)).astype(np.float32)
    mask = np.zeros((count, side, side), dtype=bool)
    for label, drawing in enumerate(_DRAWINGS.values()):
        chosen = labels == label
        mask[chosen] = drawing(u[chosen][:, :, None], v[chosen][:, None, :], size[chosen])
    # The second colour lies a quarter to three quarters round from the first in each channel, so that either may be
    # the lighter one.
    back = rng.uniform(0, 1, (count, 3, 1, 1))
    front = (back + rng.uniform(0.25, 0.75, back.shape)) % 1
    colours = 4 * np.where(mask[:, None], front, back) - 2
    x = colours + pictures.noise * rng.standard_normal(colours.shape)
    return x.astype(np.float32), labels.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Pictures that are there already, shuffled by a seed and cut into three sets.

    Attributes:
        x: Pictures, [n, C, H, W].
        y: Their classes, [n], from 0.
        parts: Parts of the training and of the validation set; the rest is the test set.
        seed: Of the shuffle.
    """

    x: Floats
    y: Labels
    parts: tuple[float, float] = (0.6, 0.2)
    seed: int = 0

    def __post_init__(self) -> None:
        """Check shapes and parts.

        Raises:
            SearchError: They are not of one data set, or a set would be empty.
        """
        if self.x.ndim != 4 or self.y.shape != self.x.shape[:1]:
            raise SearchError(
                f"pictures of shape {list(self.x.shape)} with classes of shape {list(self.y.shape)}; pass [n, C, H, W] "
                "and [n]"
            )
        if min(map(len, self._indices)) == 0:
            raise SearchError(
                f"parts {self.parts} of {len(self.y)} pictures leave a set empty; pass two above 0 whose sum is below 1"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        _, c, h, w = self.x.shape
        return c, h, w

    @property
    def classes(self) -> int:
        """Number of classes: the highest and all below it."""
        return int(self.y.max()) + 1

    @property
    def _indices(self) -> list[Labels]:
        count = len(self.y)
        first = round(count * self.parts[0])
        order = np.random.default_rng(self.seed).permutation(count)
        return np.split(order, [first, first + round(count * self.parts[1])])

    def draw(self, split: Split) -> tuple[Floats, Labels]:
        """Return pictures [n, C, H, W] and their classes [n], the same in every call and process."""
        chosen = self._indices[SPLITS.index(split)]
        return self.x[chosen].astype(np.float32), self.y[chosen].astype(np.int64)


# --- filters ---


def output_variance(module: nn.Module, shape: tuple[int, ...], seed: int = 0) -> float:
    """Return the variance of a module's output on standard normal numbers.

    Args:
        module: Any module.
        shape: Shape of its input, the batch first.
        seed: Of the input.
    """
    with torch.no_grad():
        return module(_normal(shape, seed)).var().item()


def broken_gradients(module: nn.Module, shape: tuple[int, ...], seed: int = 0) -> tuple[str, ...]:
    """Return the names of parameters whose gradient is zero throughout, not finite or not there.

    Args:
        module: Any module.
        shape: Shape of its input, the batch first; numbers in it are standard normal.
        seed: Of the input and of the sum of outputs that is differentiated.
    """
    named = dict(module.named_parameters())
    y = module(_normal(shape, seed))
    if not named or not y.requires_grad:
        return tuple(named)
    total = (y * _normal(tuple(y.shape), seed + 1)).sum()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    good = (g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients)
    return tuple(name for name, is_good in zip(named, good, strict=True) if not is_good)


def independent_part(operator: Operator, max_parameters: int = 256) -> float | None:
    """Return the rank of the Jacobian to the weights per parameter, at the sizes of ``fingerprint.probe_sizes``.

    Args:
        operator: The operator.
        max_parameters: Of an operator with more at these sizes it is not computed: it takes 0.1 s at 100 parameters,
            2 s at 400 and 13 s at 1,800.

    Returns:
        The part, 1 where there are no weights; none: not computed.
    """
    try:
        sizes = probe_sizes([operator])
        small = with_mappings(operator, [sizes])
        if sum(prod(size.value() for size in weight) for weight in small.weight_shapes) > max_parameters:
            return None
        found = redundant_weights(operator, sizes)
    except SearchError:
        return None
    return found.rank / found.parameters if found.parameters else 1.0


def latencies(
    modules: Mapping[str, nn.Module], shape: tuple[int, ...], *, backward: bool = True, rounds: int = 9
) -> dict[str, float]:
    """Return how long modules take, in seconds: medians of rounds in which each runs once, after one that warms up.

    Args:
        modules: What is measured, by name.
        shape: Shape of the input of all, the batch first.
        backward: Whether gradients to the input and to all parameters are computed too.
        rounds: How often each is measured.
    """
    x = _normal(shape, 0).requires_grad_(backward)
    taken: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(rounds + 1):
        for name, module in modules.items():
            begin = time.perf_counter()
            with torch.set_grad_enabled(backward):
                y = module(x)
                if backward:
                    torch.autograd.grad(y.sum(), [x, *module.parameters()], allow_unused=True)
            taken[name].append(time.perf_counter() - begin)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Filters:
    """What refuses an operator before it is trained.

    Attributes:
        min_variance: Least variance of the output on standard normal numbers, before any training.
        max_variance: Most of it.
        min_independent: Least part of the parameters that is independent, where it is computed; a half refuses
            operators that hold most of their weights twice.
        max_parameters: Most parameters at probe sizes with which that is computed.
        max_slowdown: Most time that forward and backward take together, in units of the module that is replaced. Any
            limit makes a reward depend on the clock.
    """

    min_variance: float = 0.01
    max_variance: float = 100.0
    min_independent: float = 0.5
    max_parameters: int = 256
    max_slowdown: float = inf

    def refuse(
        self,
        module: nn.Module,
        shape: tuple[int, ...],
        operator: Operator | None = None,
        replaced: nn.Module | None = None,
    ) -> str | None:
        """Return why a module is not worth training, or none; what is cheap to know is looked at first.

        Args:
            module: The module.
            shape: Shape of its input, the batch first.
            operator: What it was lowered from; none: nothing is known of its weights' independence.
            replaced: What its time is measured against; none: it is not measured.
        """
        variance = output_variance(module, shape)
        if not self.min_variance <= variance <= self.max_variance:
            return f"output variance {variance:.3g} is outside {self.min_variance:g} to {self.max_variance:g}"
        if broken := broken_gradients(module, shape):
            return f"the gradient to {broken[0]} is zero or not finite"
        part = None if operator is None else independent_part(operator, self.max_parameters)
        if part is not None and part < self.min_independent:
            return f"{part:.0%} of the parameters are independent, less than {self.min_independent:.0%}"
        if replaced is not None and self.max_slowdown < inf:
            taken = latencies({"new": module, "replaced": replaced}, shape)
            slowdown = taken["new"] / taken["replaced"]
            if slowdown > self.max_slowdown:
                return f"it takes {slowdown:.2f} times as long as what it replaces, more than {self.max_slowdown:g}"
        return None


# --- proxy training ---


class ProxyNetwork(nn.Module):
    """A small network of placeholders: pixels to channels, stages of placeholders with pooling between, classes.

    Every placeholder is followed by a batch norm and a ReLU; all else works on one pixel at a time, so that what an
    operator does not see across pixels only the pooling brings together.
    """

    def __init__(self, channels: int, width: int, stages: tuple[int, ...], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for number, depth in enumerate(stages):
            if number:
                layers.append(nn.AvgPool2d(2))
            for _ in range(depth):
                layers += [Placeholder(), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of pictures [n, channels, H, W]."""
        return self.head(self.body(x).mean((2, 3)))


@dataclass(frozen=True)
class Evaluation:
    """What came of one operator.

    Attributes:
        reward: From 0 to 1; not a number where it was refused.
        accuracies: On the validation set, after each epoch that was run.
        refused: Why it was not trained, or why its training failed; none: it was trained.
        pruned: Whether training ended at a milestone.
        cost: Of the network with it: multiply-adds per picture.
        seconds: What it took.
    """

    reward: float
    accuracies: tuple[float, ...] = ()
    refused: str | None = None
    pruned: bool = False
    cost: ModelCost | None = None
    seconds: float = field(default=0.0, compare=False)


def reward_of(accuracy: float, lower: float, upper: float) -> float:
    """Return ``((max(accuracy, lower) - lower) / (upper - lower)) ** 4``, at most 1 (Syno, reward; clipped here)."""
    return min(1.0, (max(accuracy, lower) - lower) / (upper - lower)) ** 4


@dataclass(frozen=True)
class ProxyTask:
    """A reward: how well a small network learns with an operator in all of its places.

    Settings alone, so that it can be sent to other processes. An operator is lowered at the sizes of the network's
    places, with the coefficients of its first mapping.

    Attributes:
        data: Pictures to learn.
        width: Channels at every place.
        stages: Places at each resolution, the full one first.
        epochs: Passes over the training set.
        batch_size: Pictures per step.
        learning_rate: Of stochastic gradient descent with momentum 0.9, lowered to 0 along a cosine.
        weight_decay: Of all weights.
        lower: Accuracy that is worth nothing; the default is that of a guess among 10 classes.
        upper: Accuracy that is worth 1.
        milestones: Epochs, counted from 1, and the least accuracy on the validation set with which training goes on.
        seed: Of the weights and of the order of pictures.
        filters: What refuses an operator before it is trained.
        baseline: What times are measured against, if a filter limits them.
    """

    data: Data = Pictures()
    width: int = 32
    stages: tuple[int, ...] = (1, 2)
    epochs: int = 6
    batch_size: int = 50
    learning_rate: float = 0.2
    weight_decay: float = 1e-3
    lower: float = 0.1
    upper: float = 1.0
    milestones: tuple[tuple[int, float], ...] = ((2, 0.12), (4, 0.18))
    seed: int = 0
    filters: Filters = Filters()
    baseline: Operator | None = None

    def __post_init__(self) -> None:
        """Check what would fail in every training.

        Raises:
            SearchError: Accuracies are in no order, a resolution has no place, pictures cannot be pooled, or time is
                limited without a baseline that fits.
        """
        if not 0 <= self.lower < self.upper:
            raise SearchError(f"lower = {self.lower} and upper = {self.upper} are in no order; raise upper")
        if min(self.stages, default=0) < 1:
            raise SearchError(f"stages = {self.stages} has a resolution without places; give each at least 1")
        blocks = 2 ** (len(self.stages) - 1)
        _, h, w = self.data.shape
        if h % blocks or w % blocks:
            raise SearchError(
                f"pictures of {h} x {w} pixels are not halved {len(self.stages) - 1} times; take other stages"
            )
        if self.filters.max_slowdown < inf:
            if self.baseline is None:
                raise SearchError("filters.max_slowdown has nothing to measure against; pass a baseline")
            operator_factory(self.baseline, self.places)

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that an operator fills, with a whole batch."""
        with _reproducible(self.seed):
            found = find_places(self._network(), self._example)
        return tuple(place for place in found if place.kind == "placeholder")

    def __call__(self, operator: Operator) -> float:
        """Return the reward of an operator; not a number where it is refused."""
        return self.evaluate(operator).reward

    def evaluate(self, operator: Operator) -> Evaluation:
        """Filter an operator and train with it.

        Args:
            operator: From [N, C, H, W] to the same, in any symbols.
        """
        begin = time.perf_counter()
        try:
            found = self.evaluate_factory(operator_factory(operator, self.places), operator)
        except SearchError as error:
            found = Evaluation(nan, refused=str(error))
        return replace(found, seconds=time.perf_counter() - begin)

    def evaluate_factory(self, factory: Factory, operator: Operator | None = None) -> Evaluation:
        """Filter and train with any modules, such as a kernel of Canvas gives.

        Args:
            factory: Makes a module for a place.
            operator: What it lowers, for the filter of independent weights.

        Raises:
            SearchError: A module does not keep its place's shape.
        """
        begin = time.perf_counter()
        places = self.places
        with _reproducible(self.seed):
            module = factory(places[0])
            replaced = None
            if self.baseline is not None and self.filters.max_slowdown < inf:
                replaced = operator_factory(self.baseline, places)(places[0])
            refused = self.filters.refuse(module, places[0].input_shape, operator, replaced)
        found = Evaluation(nan, refused=refused) if refused else self.train(factory)
        return replace(found, seconds=time.perf_counter() - begin)

    def train(self, factory: Factory) -> Evaluation:
        """Train without filters.

        Args:
            factory: Makes a module for a place: an operator's, a kernel's, or any other.

        Raises:
            SearchError: A module does not keep its place's shape.
        """
        begin = time.perf_counter()
        with _reproducible(self.seed):
            network, cost = self._filled(factory)
            accuracies = list(self._epochs(network))
        seconds = time.perf_counter() - begin
        if not isfinite(accuracies[-1]):
            return Evaluation(nan, tuple(accuracies[:-1]), "training diverged", cost=cost, seconds=seconds)
        reward = reward_of(accuracies[-1], self.lower, self.upper)
        pruned = len(accuracies) < self.epochs
        return Evaluation(reward, tuple(accuracies), pruned=pruned, cost=cost, seconds=seconds)

    def test_accuracy(self, factory: Factory) -> float:
        """Train to the end and return the accuracy on the test set, which is for reports and for no choice.

        Args:
            factory: As for :meth:`train`.

        Raises:
            SearchError: A module does not keep its place's shape.
        """
        task = replace(self, milestones=())
        with _reproducible(self.seed):
            network, _ = task._filled(factory)
            trained = list(task._epochs(network))
            return _accuracy(network, *self.data.draw("test")) if isfinite(trained[-1]) else nan

    @property
    def _example(self) -> Tensor:
        return torch.zeros(self.batch_size, *self.data.shape)

    def _network(self) -> ProxyNetwork:
        return ProxyNetwork(self.data.shape[0], self.width, self.stages, self.data.classes)

    def _filled(self, factory: Factory) -> tuple[nn.Module, ModelCost]:
        network = self._network()
        done = placeholder.replace(network, factory, self.places, self._example, in_place=True)
        return network, replace(done.after, multiply_adds=done.after.multiply_adds // self.batch_size)

    def _epochs(self, network: nn.Module) -> Generator[float, None, None]:
        """Train, and yield the validation accuracy after each epoch; not a number: the loss is none, and all ends."""
        x, y = map(torch.from_numpy, self.data.draw("train"))
        least = dict(self.milestones)
        steps = len(x) // self.batch_size
        if not steps:
            raise SearchError(
                f"batch_size = {self.batch_size}, but {len(x)} pictures to learn from; take at most these"
            )
        optimizer = torch.optim.SGD(
            network.parameters(), self.learning_rate, momentum=0.9, weight_decay=self.weight_decay, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * steps)
        for epoch in range(1, self.epochs + 1):
            network.train()
            order = torch.randperm(len(x))
            loss = torch.zeros(())
            for step in range(steps):
                chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
                loss = F.cross_entropy(network(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            accuracy = _accuracy(network, *self.data.draw("validation")) if loss.isfinite() else nan
            yield accuracy
            if not accuracy >= least.get(epoch, 0.0):
                return


def _accuracy(network: nn.Module, x: Floats, y: Labels, batch_size: int = 250) -> float:
    network.eval()
    with torch.no_grad():
        parts = torch.from_numpy(x).split(batch_size)
        found = torch.cat([network(part).argmax(1) for part in parts])
    return (found == torch.from_numpy(y)).float().mean().item()


@contextmanager
def _reproducible(seed: int) -> Generator[None, None, None]:
    """Draw from a seed, and on one thread, for the order of sums follows the number of threads; then as before."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def proxy_accuracy(spec: SearchSpec, baseline: Operator | None) -> ProxyTask:
    """Return the reward ``proxy_accuracy`` of a search, after checking that its operators fit the proxy's places.

    Args:
        spec: The search.
        baseline: What its window is measured against, if it has one.

    Raises:
        SearchError: The shapes of the search are not those of the proxy's places, whatever its symbols' numbers.
    """
    task = ProxyTask(baseline=baseline)
    for place, reason in fit_spec(spec, task.places).skipped:
        raise SearchError(
            f"reward = 'proxy_accuracy' puts operators where {list(place.input_shape)} is, [N, C, H, W]: {reason}; "
            "search from [N, C, H, W] to the same, or take another reward"
        )
    return task

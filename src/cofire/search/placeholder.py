"""Where operators go in a model: the layers that they may replace, the sizes there, and the exchange itself.

A search begins with :func:`find_places`, which runs a model once and notes the shapes at its convolutions, its linear
layers and its placeholders. :func:`fit_spec` turns them into the mappings of a search in Syno's space, one per distinct
set of sizes; ``Place.extent`` is the channels, height and width that Canvas asks for. It ends with :func:`replace`,
which puts what was found into the model, and says how many parameters and multiply-adds that saves::

    places = [place for place in find_places(model, example) if place.kernel == (3, 3)]
    fitting = fit_spec(spec, places, {"k": 3, "s": 2, "g": 32})  # then search with mappings=fitting.mappings
    done = replace(model, operator_factory(operator, places), places, example)

Left out: places whose sizes would have to be padded first (the reason says by how much), transposed convolutions, and
layers whose weight is read without a call of the layer, as in PyTorch's multi-head attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cofire.errors import SearchError
from cofire.search.graph import Operator
from cofire.search.lowering import lower
from cofire.search.operator_io import from_spec, to_spec
from cofire.search.padding import pad, sizes_of
from cofire.search.sizes import Size, Symbols
from cofire.spec.search import SearchSpec

Kind = Literal["convolution", "linear", "placeholder"]
Shape = tuple[int, ...]
Example = Tensor | tuple[Any, ...]


class Placeholder(nn.Module):
    """A layer that a search is to find: the identity until it is filled, and of the same shape before and after.

    Attributes:
        filling: What it computes; none: the identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.filling: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, or what the filling makes of it.

        Args:
            x: A tensor of any shape.

        Raises:
            SearchError: The filling changes the shape.
        """
        if self.filling is None:
            return x
        y = self.filling(x)
        if y.shape != x.shape:
            raise SearchError(
                f"a placeholder's filling makes {list(y.shape)} of {list(x.shape)}; fill it with one of the same shape"
            )
        return y


_KINDS: dict[type[nn.Module], Kind] = {
    nn.Conv1d: "convolution",
    nn.Conv2d: "convolution",
    nn.Conv3d: "convolution",
    nn.Linear: "linear",
    Placeholder: "placeholder",
}


@dataclass(frozen=True)
class Place:
    """A layer that an operator may replace.

    Attributes:
        name: Of the module within its model.
        kind: What it is.
        input_shape: Shape of its input in the example, the batch first; channels follow it at a convolution and come
            last at a linear layer.
        output_shape: Shape of its output.
        kernel: The window of a convolution, per dim.
        stride: Its stride, per dim.
        dilation: Its dilation, per dim.
        groups: Its groups; 1 at other layers.
        calls: How often one run of the model calls it.
    """

    name: str
    kind: Kind
    input_shape: Shape
    output_shape: Shape
    kernel: Shape = ()
    stride: Shape = ()
    dilation: Shape = ()
    groups: int = 1
    calls: int = 1

    @property
    def extent(self) -> tuple[int, int, int]:
        """Channels, height and width, as Canvas has them.

        Raises:
            SearchError: The layer does not keep the shape of [N, C, H, W].
        """
        if len(self.input_shape) != 4 or self.input_shape != self.output_shape:
            raise SearchError(
                f"{self.name} makes {list(self.output_shape)} of {list(self.input_shape)}; Canvas fills places that "
                "keep the shape of [N, C, H, W]"
            )
        _, c, h, w = self.input_shape
        return c, h, w


def find_places(model: nn.Module, example: Example) -> tuple[Place, ...]:
    """Return the convolutions, linear layers and placeholders that a model calls, in the order of first calls.

    A layer that is called with several shapes is none of them, nor is what a placeholder is filled with, nor a subclass
    of PyTorch's layers, which may compute anything. The model is left as it was: it runs in evaluation mode and without
    gradients.

    Args:
        model: Any module.
        example: Its input, or a tuple of its inputs. With a batch of one, costs are per example.
    """
    found: dict[str, Place] = {}
    varying: set[str] = set()
    inside: set[nn.Module] = set()
    handles = []

    def noted(name: str) -> Callable[..., None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            place = _place(name, layer, tuple(x.shape), tuple(output.shape), 1)
            known = found.get(name)
            if known is None:
                found[name] = place
            elif (known.input_shape, known.output_shape) == (place.input_shape, place.output_shape):
                found[name] = _place(name, layer, place.input_shape, place.output_shape, known.calls + 1)
            else:
                varying.add(name)

        return note

    for name, module in model.named_modules():
        if module not in inside and type(module) in _KINDS:
            handles.append(module.register_forward_hook(noted(name), with_kwargs=True))
            inside.update(module.modules())
    try:
        _run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(place for name, place in found.items() if name not in varying)


def _place(name: str, layer: nn.Module, input_shape: Shape, output_shape: Shape, calls: int) -> Place:
    kind = _KINDS[type(layer)]
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Place(name, kind, input_shape, output_shape, calls=calls)
    return Place(
        name,
        kind,
        input_shape,
        output_shape,
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        dilation=tuple(layer.dilation),
        groups=layer.groups,
        calls=calls,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Run a model without dropout, running statistics and gradients, and set each module back to the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _run(model: nn.Module, example: Example) -> Any:
    with _evaluating(model):
        return model(*example) if isinstance(example, tuple) else model(example)


# --- sizes ---


@dataclass(frozen=True)
class Fitting:
    """The numbers of an operator's symbols at places.

    Attributes:
        mappings: A number for every symbol, once per distinct set of sizes.
        fits: Places that an operator can fill, each with the position of its mapping.
        skipped: Places that it cannot, each with the reason.
    """

    mappings: tuple[dict[str, int], ...]
    fits: tuple[tuple[Place, int], ...]
    skipped: tuple[tuple[Place, str], ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that an operator can fill."""
        return tuple(place for place, _ in self.fits)

    def mapping_at(self, place: Place) -> int:
        """Return the position of a place's mapping.

        Raises:
            SearchError: The place was skipped, or is another model's.
        """
        for known, mapping in self.fits:
            if known == place:
                return mapping
        reason = next((why for known, why in self.skipped if known == place), "it is not among the places fitted")
        raise SearchError(f"{place.name} cannot be filled: {reason}")


def fit_spec(
    spec: SearchSpec, places: Iterable[Place], chosen: Mapping[str, int] | None = None, whole: Iterable[str] = ()
) -> Fitting:
    """Return the mappings under which a search's operators fill places.

    Primary symbols follow from the shapes of input and output, one after the other: of a size such as ``s*H`` all but
    one must be known.

    Args:
        spec: Symbols and shapes.
        places: Where operators are to go, such as ``find_places`` returns.
        chosen: Numbers of all coefficients, and of primaries that stand in no shape; default: those of the spec's first
            mapping.
        whole: More sizes that must be whole at a place, such as ``"Ci/g"``.

    Raises:
        SearchError: A symbol's number is neither chosen nor in a shape, or a size is no monomial in the symbols.
    """
    symbols = Symbols.of(spec.primary, spec.coefficient, spec.mappings)
    shapes = [tuple(symbols.size(text) for text in shape) for shape in (spec.input, spec.output)]
    return _fit(symbols, shapes, [symbols.size(text) for text in whole], places, chosen)


def fit_operator(operator: Operator, places: Iterable[Place], chosen: Mapping[str, int] | None = None) -> Fitting:
    """Return the mappings under which an operator fills places.

    Args:
        operator: The operator; all of its sizes must be whole at a place.
        places: Where it is to go.
        chosen: Numbers of coefficients and of primaries that stand in no shape; default: those of its first mapping.

    Raises:
        SearchError: A symbol's number is neither chosen nor in a shape.
    """
    shapes = [operator.input_shape, operator.output_shape]
    return _fit(operator.symbols, shapes, sizes_of(operator), places, chosen)


def _fit(
    symbols: Symbols,
    shapes: Sequence[tuple[Size, ...]],
    whole: Iterable[Size],
    places: Iterable[Place],
    chosen: Mapping[str, int] | None,
) -> Fitting:
    if chosen is None:
        shaped = [any(size.exponents[k] for shape in shapes for size in shape) for k in range(len(symbols.primary))]
        numbers = zip(symbols.names, symbols.mappings[0], strict=True)
        chosen = {name: number for k, (name, number) in enumerate(numbers) if k >= len(shaped) or not shaped[k]}
    for name in symbols.coefficient:
        if name not in chosen:
            raise SearchError(f"no number is chosen for the coefficient {name}; no shape of a layer tells it")
    for name in chosen:
        if name not in symbols.names:
            raise SearchError(f"a number is chosen for {name}, which is not among {', '.join(symbols.names)}")
    whole = tuple(whole)
    mappings: list[dict[str, int]] = []
    fits, skipped = [], []
    for place in places:
        found = _solve(symbols, shapes, whole, place, chosen)
        if isinstance(found, str):
            skipped.append((place, found))
            continue
        if found not in mappings:
            mappings.append(found)
        fits.append((place, mappings.index(found)))
    return Fitting(tuple(mappings), tuple(fits), tuple(skipped))


def _solve(
    symbols: Symbols,
    shapes: Sequence[tuple[Size, ...]],
    whole: Sequence[Size],
    place: Place,
    chosen: Mapping[str, int],
) -> dict[str, int] | str:
    """Return a number for every symbol at a place, or the reason why there are none."""
    pairs: list[tuple[Size, int, str]] = []
    held = (place.input_shape, place.output_shape)
    for sizes, numbers, tensor in zip(shapes, held, ("input", "output"), strict=True):
        if len(sizes) != len(numbers):
            return f"its {tensor} has {len(numbers)} dims, the operator's {len(sizes)}"
        pairs += [(size, number, tensor) for size, number in zip(sizes, numbers, strict=True)]
    values = dict(chosen)
    while (next_pair := next((pair for pair in pairs if _unknown(pair[0], values) is not None), None)) is not None:
        size, number, tensor = next_pair
        name = _unknown(size, values)
        assert name is not None
        quotient = Fraction(number) / _value(size, {**values, name: 1})
        if quotient.denominator != 1:
            return f"{size} of the {tensor} is {number}, so that {name} would be {quotient}"
        values[name] = quotient.numerator
    for name in symbols.names:
        if name not in values:
            raise SearchError(f"the shapes of layers do not tell {name}; choose a number for it")
    for size, number, tensor in pairs:
        if (value := _value(size, values)) != number:
            strided = f" (stride {max(place.stride)})" if max(place.stride, default=1) > 1 else ""
            return f"{size} is {value}, but its {tensor} has {number} there{strided}"
    for size in whole:
        if (value := _value(size, values)).denominator != 1:
            return f"{size} is {value}, which is not whole{_padded(symbols, values, whole)}"
    return {name: values[name] for name in symbols.names}


def _padded(symbols: Symbols, values: Mapping[str, int], sizes: Iterable[Size]) -> str:
    """Return the least larger numbers that would make sizes whole, as the end of a sentence."""
    try:
        padded = pad(symbols, {name: values[name] for name in symbols.names}, sizes)
    except SearchError:
        return ""
    changes = [f"{name} = {padded[name]}" for name in symbols.names if padded[name] != values[name]]
    return f"; padded to {', '.join(changes)} it would be"


def _unknown(size: Size, values: Mapping[str, int]) -> str | None:
    """Return the only symbol of a size without a number, if the size is linear in it."""
    powers = zip(size.symbols.names, size.exponents, strict=True)
    unknown = [(name, power) for name, power in powers if power and name not in values]
    return unknown[0][0] if len(unknown) == 1 and unknown[0][1] == 1 else None


def _value(size: Size, values: Mapping[str, int]) -> Fraction:
    powers = zip(size.symbols.names, size.exponents, strict=True)
    return prod((Fraction(values[name]) ** power for name, power in powers if power), start=Fraction(1))


def with_mappings(operator: Operator, mappings: Iterable[Mapping[str, int]]) -> Operator:
    """Return an operator with other numbers for its symbols.

    Args:
        operator: Any operator.
        mappings: A number for every symbol, at least once.

    Raises:
        SearchError: A size is not whole under a mapping.
    """
    return from_spec(to_spec(operator).model_copy(update={"mappings": tuple(dict(row) for row in mappings)}))


# --- the exchange ---


@dataclass(frozen=True)
class OperatorFactory:
    """Makes an operator's module for a place.

    Attributes:
        operator: With the mappings of ``fitting``.
        fitting: Which mapping is a place's.
    """

    operator: Operator
    fitting: Fitting

    def __call__(self, place: Place) -> nn.Module:
        """Return a new module with new weights.

        Raises:
            SearchError: The operator does not fit the place.
        """
        return lower(self.operator, self.fitting.mapping_at(place))


def operator_factory(
    operator: Operator, places: Iterable[Place], chosen: Mapping[str, int] | None = None
) -> OperatorFactory:
    """Return what makes an operator's modules for places; a place that it does not fit is an error.

    Args:
        operator: The operator; its own mappings may be those of other places.
        places: Where it is to go.
        chosen: As for :func:`fit_operator`.

    Raises:
        SearchError: A place does not fit, or there is none.
    """
    fitting = fit_operator(operator, places, chosen)
    for place, reason in fitting.skipped:
        raise SearchError(f"{place.name} cannot be filled: {reason}; leave it out, or choose other coefficients")
    if not fitting.mappings:
        raise SearchError("no place to fill; pass at least one")
    return OperatorFactory(with_mappings(operator, fitting.mappings), fitting)


@dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Attributes:
        parameters: Elements of all parameters, shared ones once.
        multiply_adds: Of the products and convolutions that PyTorch runs for the example; sums, activations and
            products by element are not among them.
    """

    parameters: int
    multiply_adds: int


def measure(model: nn.Module, example: Example) -> ModelCost:
    """Return what a model costs, by counting while it runs.

    Args:
        model: Any module.
        example: Its input, or a tuple of its inputs.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        _run(model, example)
    return ModelCost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


@dataclass
class Replacement:
    """A model in which layers have been replaced.

    Attributes:
        model: The model.
        places: What was replaced.
        before: What it cost before.
        after: What it costs now.
    """

    model: nn.Module
    places: tuple[Place, ...]
    before: ModelCost
    after: ModelCost
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Put the former layers back into the model, with the weights that they had; again does nothing."""
        while self._undo:
            self._undo.pop()()


class _Biased(nn.Module):
    """A module whose output has a bias added along a dim counted from the last, which the layer it replaces had."""

    def __init__(self, inner: nn.Module, bias: Tensor, dim: int) -> None:
        super().__init__()
        self.inner, self.dim = inner, dim
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + self.bias.view(-1, *([1] * (-1 - self.dim)))


def replace(
    model: nn.Module,
    factory: Callable[[Place], nn.Module],
    places: Iterable[Place],
    example: Example,
    *,
    in_place: bool = False,
) -> Replacement:
    """Put new modules where layers are, and measure the model before and after.

    A new module takes its layer's device, number format, mode and bias; placeholders are filled. If anything fails, the
    model is as it was.

    Args:
        model: The model that the places were found in.
        factory: Makes a module for a place, such as :func:`operator_factory` returns, or for a kernel of Canvas
            ``lambda place: lower(kernel, place.extent)``.
        places: What is replaced.
        example: The model's input, or a tuple of its inputs; the number of examples in it is that of the costs.
        in_place: Change the model itself, not a copy.

    Raises:
        SearchError: There is no place, the model has no such layer, or a new module makes another shape.
    """
    places = tuple(places)
    if not places:
        raise SearchError("no place to fill; pass at least one")
    before = measure(model, example)
    if not in_place:
        model = copy.deepcopy(model)
    likeness = next(model.parameters(), None)
    made = [(layer := _layer(model, place), _made(factory, place, layer, likeness)) for place in places]
    done = Replacement(model, places, before, before)
    try:
        for layer, new in made:
            _install(done, layer, new)
        done.after = measure(model, example)
    except BaseException:
        done.restore()
        raise
    return done


def _layer(model: nn.Module, place: Place) -> nn.Module:
    try:
        layer = model.get_submodule(place.name)
    except AttributeError:
        raise SearchError(f"the model has no layer {place.name!r}; find the places of this model first") from None
    if _KINDS.get(type(layer)) != place.kind:
        raise SearchError(f"{place.name!r} is a {type(layer).__name__}, not a {place.kind}; find the places anew")
    if layer is model and place.kind != "placeholder":
        raise SearchError("the model is the very layer to be replaced; put it into an nn.Sequential")
    return layer


def _made(
    factory: Callable[[Place], nn.Module], place: Place, layer: nn.Module, likeness: nn.Parameter | None
) -> nn.Module:
    """Return a checked module that can stand where a layer stands; of a layer without parameters, like another's."""
    new = factory(place)
    likeness = next(layer.parameters(), likeness)
    options: dict[str, Any] = {} if likeness is None else {"device": likeness.device, "dtype": likeness.dtype}
    if options:
        new.to(**options)
    try:
        shape = tuple(_run(new, torch.zeros(place.input_shape, **options)).shape)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SearchError(f"the module made for {place.name} fails on {list(place.input_shape)}: {reason}") from error
    if shape != place.output_shape:
        raise SearchError(
            f"the module made for {place.name} makes {list(shape)} of {list(place.input_shape)}, the layer "
            f"{list(place.output_shape)}; make one of the same shapes"
        )
    bias = getattr(layer, "bias", None)
    if bias is not None:
        new = _Biased(new, bias, dim=-1 - len(place.kernel))
    return new.train(layer.training)


def _install(done: Replacement, layer: nn.Module, new: nn.Module) -> None:
    """Put a module in a layer's place, under every name that the layer has, and note how to undo it."""
    if isinstance(layer, Placeholder):
        former = layer.filling
        layer.filling = new
        done._undo.append(lambda: setattr(layer, "filling", former))
        return
    for parent in list(done.model.modules()):
        for name, child in list(parent._modules.items()):
            if child is layer:
                setattr(parent, name, new)
                done._undo.append(lambda parent=parent, name=name: setattr(parent, name, layer))

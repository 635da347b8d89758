"""Calls of PyTorch that both compute and write themselves, so that a lowered kernel and its source cannot differ.

An expression is the name of a tensor or a call. It is no ``cofire.search.lowering.steps.Step``: a step gives the tensor
that it reads a new value, while a kernel of Canvas is a graph whose tensors are read more than once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_INFIX: dict[str, Callable[..., Tensor]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "@": operator.matmul,
}
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "F.conv1d": F.conv1d,
    "F.conv2d": F.conv2d,
    "F.gelu": F.gelu,
    "F.linear": F.linear,
    "F.pad": F.pad,
    "F.relu": F.relu,
    "torch.einsum": torch.einsum,
    "torch.maximum": torch.maximum,
    "torch.minimum": torch.minimum,
    "torch.sigmoid": torch.sigmoid,
    "torch.tanh": torch.tanh,
}
_METHODS: dict[str, Callable[..., Tensor]] = {
    "abs": Tensor.abs,
    "amax": Tensor.amax,
    "exp": Tensor.exp,
    "flatten": Tensor.flatten,
    "mean": Tensor.mean,
    "neg": Tensor.neg,
    "permute": Tensor.permute,
    "reshape": Tensor.reshape,
    "roll": Tensor.roll,
    "sin": Tensor.sin,
    "softmax": Tensor.softmax,
    "sqrt": Tensor.sqrt,
    "square": Tensor.square,
    "transpose": Tensor.transpose,
    "unfold": Tensor.unfold,
    "unsqueeze": Tensor.unsqueeze,
}
_EVERY = "every"


def _every(tensor: Tensor, stride: int) -> Tensor:
    return tensor[..., ::stride]


_CALLABLES = {**_INFIX, **_FUNCTIONS, **_METHODS, _EVERY: _every}


@dataclass(frozen=True)
class Name:
    """A tensor by its name: ``x``, ``y0``, or ``self.w0`` for a weight."""

    text: str

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor."""
        return tensors[self.text]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Call:
    """A function of tensors, numbers and tuples of numbers.

    Attributes:
        function: A sign between two arguments, a name such as ``F.pad``, the name of a method of the first argument, or
            ``every`` for every n-th element of the last dim.
        arguments: In order.
        options: Arguments by name.
    """

    function: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute it.

        Args:
            tensors: Every tensor by name.
        """
        arguments = [part.value(tensors) if isinstance(part, Name | Call) else part for part in self.arguments]
        return _CALLABLES[self.function](*arguments, **dict(self.options))

    def __str__(self) -> str:
        first, *rest = self.arguments
        if self.function in _INFIX:
            return f"{_enclosed(first)} {self.function} {_enclosed(rest[0])}"
        if self.function == _EVERY:
            return f"{_enclosed(first)}[..., ::{rest[0]}]"
        is_method = self.function in _METHODS
        shown = [_shown(part) for part in (rest if is_method else self.arguments)]
        listed = ", ".join([*shown, *(f"{key}={value}" for key, value in self.options)])
        return f"{_enclosed(first)}.{self.function}({listed})" if is_method else f"{self.function}({listed})"


Expression = Name | Call


def reads(part: Any, name: str) -> bool:
    """Whether an argument of a call is or holds a tensor of that name."""
    if isinstance(part, Call):
        return any(reads(inner, name) for inner in part.arguments)
    return part == Name(name)


def _shown(part: Any) -> str:
    return f'"{part}"' if isinstance(part, str) else str(part)


def _enclosed(part: Any) -> str:
    return f"({part})" if isinstance(part, Call) and part.function in _INFIX else str(part)

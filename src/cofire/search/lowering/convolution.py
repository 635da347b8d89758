"""Finds the convolutions in an operator: windows whose offset only one weight shares and that is summed over.

A dim labelled [i + j - floor(k/2)], a weight with a dim labelled j and a sum over j are a convolution along i. The
other dims take their part by who holds them: the input alone (batch), input and weight (groups, or input channels where
they are summed), the weight alone (output channels). A strided offset s*j is a dilation of s, with floor(s*k/2) zeros
before and the rest behind (facts: trap of the dilated window), which torch's symmetric padding alone cannot say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cofire.search.lowering.bound import Bound
from cofire.search.primitives import Dim, Iterator, Reduction, Stride, Unfold

# Torch convolves over at most three dims.
MAX_WINDOWS = 3


@dataclass(frozen=True)
class Convolution:
    """The parts that the dims of an input and a weight have in a convolution.

    Attributes:
        windows: The windows taken in.
        batch: Dims of the input alone.
        groups: Dims of both that stay.
        inner: Dims of both that are summed.
        outer: Dims of the weight alone.
        spatial: The windows, and maybe a dim of the input that would else be moved into the batch, in their order.
    """

    windows: tuple[Unfold, ...]
    batch: tuple[Dim, ...]
    groups: tuple[Dim, ...]
    inner: tuple[Dim, ...]
    outer: tuple[Dim, ...]
    spatial: tuple[Dim, ...]

    @property
    def places(self) -> tuple[Dim, ...]:
        """Labels of the spatial dims of the result."""
        return tuple(dim.source if isinstance(dim, Unfold) and dim in self.windows else dim for dim in self.spatial)

    @property
    def weight(self) -> tuple[Dim, ...]:
        """The weight's dims in the order of torch: groups, out, in, kernel."""
        kernel = (offset(dim) for dim in self.spatial if isinstance(dim, Unfold) and dim in self.windows)
        return (*self.groups, *self.outer, *self.inner, *kernel)

    def window(self, bound: Bound, dim: Dim) -> tuple[int, int, tuple[int, int]]:
        """Return taps, dilation and the zeros before and after of a spatial dim."""
        if not isinstance(dim, Unfold) or dim not in self.windows:
            return 1, 1, (0, 0)
        taps = bound.size(offset(dim))
        dilation = bound.size(dim.window) // taps
        before = bound.size(dim.window) // 2
        return taps, dilation, (before, dilation * (taps - 1) - before)


def offset(window: Unfold) -> Dim:
    """Return the coordinate j of a window's taps, without its stride."""
    return window.window.source if isinstance(window.window, Stride) else window.window


def closure(labels: Iterable[Dim]) -> set[Dim]:
    """Return the dims and all that they depend on."""
    return {dim for label in labels for dim in label.walk()}


def find_convolution(
    bound: Bound, labels: Sequence[Dim], factor: Sequence[Dim], later: Sequence[Dim]
) -> Convolution | None:
    """Return the convolution of an input and a weight, or none.

    Args:
        bound: The operator and its mapping.
        labels: Coordinates of the input's dims.
        factor: Coordinates of the weight's dims.
        later: Coordinates at which factors still to come are read.
    """
    windows = [dim for dim in labels if isinstance(dim, Unfold) and _is_window(dim, labels, factor, later)]
    if not 1 <= len(windows) <= MAX_WINDOWS or len(set(factor)) < len(factor):
        return None
    offsets = [offset(window) for window in windows]
    compound = [dim for dim in (*labels, *factor) if not isinstance(dim, Iterator) and dim not in windows]
    needed = closure((*later, *compound, *(window.source for window in windows)))
    shared = [dim for dim in labels if dim in factor]
    inner = [dim for dim in shared if isinstance(dim, Reduction) and dim not in needed]
    outer = [dim for dim in factor if dim not in shared and dim not in offsets]
    if any(isinstance(dim, Reduction) and dim not in needed for dim in outer):
        return None
    batch = [dim for dim in labels if dim not in shared and dim not in windows]
    beside = batch[-1:] if len(windows) == 1 and len(batch) > 1 else []
    batch = [dim for dim in batch if dim not in beside]
    # Only one size can be inferred when the batch is unflattened.
    if len(batch) > 1 and sum(bound.is_free(dim) for dim in batch) > 1:
        return None
    return Convolution(
        windows=tuple(windows),
        batch=tuple(batch),
        groups=tuple(dim for dim in shared if dim not in inner),
        inner=tuple(inner),
        outer=tuple(outer),
        spatial=tuple(dim for dim in labels if dim in windows or dim in beside),
    )


def _is_window(window: Unfold, labels: Sequence[Dim], factor: Sequence[Dim], later: Sequence[Dim]) -> bool:
    """Say whether nothing but the window and the weight depends on the window's offset."""
    taps = offset(window)
    if not isinstance(taps, Reduction) or taps not in factor or taps in closure([window.source]):
        return False
    others = closure(dim for dim in (*labels, *factor, *later) if dim not in (window, taps))
    is_alone = taps not in others and taps not in labels and taps not in later and window not in later
    return is_alone and window.source not in labels and not closure([window]) & closure(factor) - {taps}

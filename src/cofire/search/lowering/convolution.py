"""Finds the convolutions in an operator: windows whose offset only one weight shares and that is summed over.

A dim labelled [i + j - floor(k/2)], a weight with a dim labelled j and a sum over j are a convolution along i; so is a
dim labelled i*k + j, whose windows do not overlap (a patch embedding). The other dims take their part by who holds
them: the input alone (batch, or places that the kernel does not span), input and weight (groups, or input channels
where they are summed), the weight alone (output channels). A strided offset s*j is a dilation of s, with floor(s*k/2)
zeros before and the rest behind (Syno's rule), which torch's symmetric padding alone cannot say; a strided source s*i
is the convolution's own stride.

Without any window it is a convolution of one tap, worth while if places follow the channels as the data lie: a matrix
product would have to turn them, or go through them in small batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from cofire.search.lowering.bound import Bound
from cofire.search.primitives import Dim, Iterator, Reduction, Split, Stride, Unfold

# Torch convolves over at most three dims; places that the kernel does not span are taken in up to two.
MAX_WINDOWS = 3
MAX_PLACES = 2
# A weight is repeated over a dim that it does not hold, to convolve in groups, up to so many times.
MAX_REPEATS = 256
# With fewer places than lanes of a vector a convolution of one tap gains nothing.
MIN_PLACES = 16


@dataclass(frozen=True)
class Convolution:
    """The parts that the dims of an input and a weight have in a convolution.

    Attributes:
        windows: The windows taken in.
        batch: Dims of the input alone, ahead of the channels.
        repeated: A dim of the input alone that stands beside the channels: groups that share their weight.
        groups: Dims of both that stay.
        inner: Dims of both that are summed.
        outer: Dims of the weight alone.
        spatial: The windows, and dims of the input alone behind the channels, in their order.
    """

    windows: tuple[Dim, ...]
    batch: tuple[Dim, ...]
    repeated: tuple[Dim, ...]
    groups: tuple[Dim, ...]
    inner: tuple[Dim, ...]
    outer: tuple[Dim, ...]
    spatial: tuple[Dim, ...]

    @property
    def places(self) -> tuple[Dim, ...]:
        """Labels of the spatial dims of the result."""
        return tuple(_place(dim) if dim in self.windows else dim for dim in self.spatial)

    @property
    def is_flat(self) -> bool:
        """Whether the spatial dims are more than torch takes, and are made one."""
        return not self.windows and len(self.spatial) > MAX_PLACES

    @property
    def weight(self) -> tuple[Dim, ...]:
        """The weight's dims in the order of torch: groups, out, in, kernel."""
        kernel = (offset(dim) for dim in self.spatial if dim in self.windows)
        return (*self.groups, *self.outer, *self.inner, *kernel)

    def window(self, bound: Bound, dim: Dim) -> Kernel:
        """Return how a spatial dim is convolved."""
        if dim not in self.windows:
            return Kernel(1, 1, 1, (0, 0))
        taps = bound.size(offset(dim))
        if isinstance(dim, Unfold):
            size = bound.size(dim.window)
            dilation, before = size // taps, size // 2
            return Kernel(taps, bound.size(dim) // bound.size(_place(dim)), dilation, _pads(before, dilation, taps))
        return Kernel(taps, taps, 1, (0, 0))


@dataclass(frozen=True)
class Kernel:
    """A convolution along one dim.

    Attributes:
        taps: Elements of the kernel.
        stride: Distance of the places.
        dilation: Distance of the taps.
        pads: Zeros before and after.
    """

    taps: int
    stride: int
    dilation: int
    pads: tuple[int, int]


def offset(window: Dim) -> Dim:
    """Return the coordinate j of a window's taps, without its stride."""
    if isinstance(window, Split):
        return window.minor
    assert isinstance(window, Unfold)
    return window.window.source if isinstance(window.window, Stride) else window.window


def closure(labels: Iterable[Dim]) -> set[Dim]:
    """Return the dims and all that they depend on."""
    return {dim for label in labels for dim in label.walk()}


def find_convolution(
    bound: Bound, labels: Sequence[Dim], factor: Sequence[Dim], later: Sequence[Dim], kinds: tuple[type[Dim], ...]
) -> Convolution | None:
    """Return the convolution of an input and a weight, or none.

    Args:
        bound: The operator and its mapping.
        labels: Coordinates of the input's dims.
        factor: Coordinates of the weight's dims.
        later: Coordinates at which factors still to come are read.
        kinds: What may be a window: Unfold, Split, both or neither.
    """
    windows = [dim for dim in labels if isinstance(dim, kinds) and _is_window(dim, labels, factor, later)]
    if len(windows) > MAX_WINDOWS or len(set(factor)) < len(factor):
        return None
    offsets = [offset(window) for window in windows]
    compound = [dim for dim in (*labels, *factor) if not isinstance(dim, Iterator) and dim not in windows]
    needed = closure((*later, *compound, *(_place(window) for window in windows)))
    shared = [dim for dim in labels if dim in factor]
    inner = [dim for dim in shared if isinstance(dim, Reduction) and dim not in needed]
    groups = [dim for dim in shared if dim not in inner]
    outer = [dim for dim in factor if dim not in shared and dim not in offsets]
    if any(isinstance(dim, Reduction) and dim not in needed for dim in outer):
        return None
    if not inner and any(isinstance(window, Split) for window in windows):
        # One channel in blocks side by side is a matrix product, and a slow convolution.
        return None
    start = min((labels.index(dim) for dim in shared or windows), default=0)
    before, behind = (
        [dim for dim in part if dim not in (*shared, *windows)] for part in (labels[:start], labels[start:])
    )
    if not windows and (list(labels) != [*before, *groups, *inner, *behind] or not _is_worth_it(bound, inner, behind)):
        return None
    room = max(MAX_PLACES - len(windows), 0) if windows else len(behind)
    beside = behind[max(len(behind) - room, 0) :]
    batch = [*before, *(dim for dim in behind if dim not in beside)]
    repeated = [dim for dim in before[1:][-1:] if batch == before and _is_repeatable(bound, dim, inner)]
    return Convolution(
        windows=tuple(windows),
        batch=tuple(dim for dim in batch if dim not in repeated),
        repeated=tuple(repeated),
        groups=tuple(groups),
        inner=tuple(inner),
        outer=tuple(outer),
        spatial=tuple(dim for dim in labels if dim in windows or dim in beside),
    )


def _is_window(window: Dim, labels: Sequence[Dim], factor: Sequence[Dim], later: Sequence[Dim]) -> bool:
    """Say whether nothing but the window and the weight depends on the window's offset."""
    taps, source = offset(window), window.below[0]
    if not isinstance(taps, Reduction) or taps not in factor or taps in closure([source]):
        return False
    others = closure(dim for dim in (*labels, *factor, *later) if dim not in (window, taps))
    is_alone = taps not in others and taps not in labels and taps not in later and window not in later
    # A later factor may be read at the place, but not at a strided one that the convolution has passed over.
    is_alone = is_alone and source not in labels and _place(window) not in labels
    is_alone = is_alone and (source == _place(window) or source not in closure(later))
    return is_alone and not closure([window]) & closure(factor) - {taps}


def _place(window: Dim) -> Dim:
    """Return the coordinate of a window's place: i, also where the window slides along s*i."""
    source = window.below[0]
    return source.below[0] if isinstance(window, Unfold) and isinstance(source, Stride) else source


def _pads(before: int, dilation: int, taps: int) -> tuple[int, int]:
    return before, dilation * (taps - 1) - before


def _is_worth_it(bound: Bound, inner: Sequence[Dim], behind: Sequence[Dim]) -> bool:
    """Say whether a convolution of one tap is to be preferred to a matrix product."""
    return bool(inner) and prod(bound.shape(behind)) >= MIN_PLACES


def _is_repeatable(bound: Bound, dim: Dim, inner: Sequence[Dim]) -> bool:
    """Say whether groups with the same weight are to be preferred to a larger batch of few channels."""
    return not bound.is_free(dim) and bound.size(dim) <= MAX_REPEATS and prod(bound.shape(inner)) < MIN_PLACES

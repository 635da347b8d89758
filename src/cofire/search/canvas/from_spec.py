"""From specs to kernels: the space that a search names, what its kernels are worth, and a kernel's file.

The window's bounds are filters of the space: what they refuse is no evaluation, and is counted by the filter's name.
Rewards are modelled: they say what a kernel costs, not how well it learns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from cofire.errors import SearchError
from cofire.search.canvas.actions import UNWEIGHTED, WEIGHTED, Limits
from cofire.search.canvas.graph import Kernel
from cofire.search.canvas.kernel_io import from_dict, to_dict
from cofire.search.canvas.receptive import min_receptive_size
from cofire.search.canvas.search import Filter, KernelSpace, within
from cofire.search.canvas.variables import Extent
from cofire.spec.kernels import KernelSpec, KernelsSpec, KernelWindowSpec

BOUNDS = {  # what to widen, by the filter that refuses
    "groups": "limits.max_groups",
    "multiply_adds": "window.min_ratio or window.max_ratio",
    "parameters": "window.min_parameters or window.max_parameters",
    "receptive": "window.min_receptive_size",
}


def space_of(spec: KernelsSpec) -> KernelSpace:
    """Return the space that a spec says; its filters have the names in ``BOUNDS``.

    Args:
        spec: Places, limits and window.

    Raises:
        SearchError: The limits leave no kernel.
    """
    extents = extents_of(spec)
    limits = Limits(**spec.limits.model_dump(exclude={"max_groups"}))
    _check_unweighted(limits)
    return KernelSpace(extents, limits, _filters(extents, spec.window, spec.limits.max_groups))


def _check_unweighted(limits: Limits) -> None:
    """Refuse limits whose fewest primitives cannot all have a weight and have no others to take."""
    least, most = limits.primitives[0], min(limits.weighted[1], int(limits.weighted_ratio * limits.primitives[0]))
    if most < least and set(limits.kinds) <= set(WEIGHTED):
        raise SearchError(
            f"kinds = {', '.join(limits.kinds)} all have a weight, but only {most} of {least} primitives may have one; "
            f"add {UNWEIGHTED[-1]}, or raise weighted or weighted_ratio"
        )


def extents_of(spec: KernelsSpec | KernelSpec) -> tuple[Extent, ...]:
    """Return the places that a spec names."""
    return tuple(Extent(*place) for place in spec.places)


def _filters(extents: tuple[Extent, ...], window: KernelWindowSpec, max_groups: int) -> dict[str, Filter]:
    """Return the filters of a window, the cheap ones first; those that can refuse nothing are left out."""
    found: dict[str, Filter] = {"groups": lambda kernel: kernel.groups <= max_groups}
    low, high = window.min_ratio, window.max_ratio
    if low is not None or high is not None:
        dense = {extent: dense_multiply_adds(extent, window.dense_kernel) for extent in extents}
        bounds = {
            extent: (0.0 if low is None else low * whole, inf if high is None else high * whole)
            for extent, whole in dense.items()
        }
        found["multiply_adds"] = within(Kernel.multiply_adds, bounds)
    if window.min_parameters is not None or window.max_parameters is not None:
        least, most = window.min_parameters or 0, window.max_parameters or inf
        found["parameters"] = lambda kernel: least <= total_parameters(kernel, extents) <= most
    if window.min_receptive_size > 1:
        found["receptive"] = min_receptive_size(window.min_receptive_size, *window.receptive_map)
    return found


def dense_multiply_adds(extent: Extent, kernel: int) -> int:
    """Return the multiply-adds of a convolution of all channels to as many, for one example.

    Args:
        extent: The place.
        kernel: Height and width of the window.
    """
    return (kernel * extent.c) ** 2 * extent.h * extent.w


def total_multiply_adds(kernel: Kernel, extents: tuple[Extent, ...]) -> int:
    """Return a kernel's multiply-adds for one example, summed over places."""
    return sum(kernel.multiply_adds(extent) for extent in extents)


def total_parameters(kernel: Kernel, extents: tuple[Extent, ...]) -> int:
    """Return the elements of a kernel's weights, summed over places."""
    return sum(kernel.parameters(extent) for extent in extents)


@dataclass(frozen=True)
class FewMultiplyAdds:
    """The reward ``multiply_adds``: one minus a kernel's over those of dense convolutions, all places together.

    Attributes:
        extents: The places.
        whole: Multiply-adds that are worth nothing.
    """

    extents: tuple[Extent, ...]
    whole: int

    def __call__(self, kernel: Kernel) -> float:
        """Return the part of the multiply-adds that is saved; negative above the dense ones."""
        return 1.0 - total_multiply_adds(kernel, self.extents) / self.whole


@dataclass(frozen=True)
class Equal:
    """The reward ``none``: every kernel is worth the same, and the first ones are kept."""

    def __call__(self, kernel: Kernel) -> float:
        """Return 0."""
        return 0.0


def reward_of(spec: KernelsSpec) -> FewMultiplyAdds | Equal:
    """Return the reward that a spec names; it can be sent to other processes."""
    if spec.sampling.reward == "none":
        return Equal()
    extents = extents_of(spec)
    return FewMultiplyAdds(extents, sum(dense_multiply_adds(extent, spec.window.dense_kernel) for extent in extents))


def kernel_of(spec: KernelSpec) -> Kernel:
    """Return the kernel that a spec says.

    Raises:
        SpecError: A primitive has a field it should not have, lacks one, or has one of the wrong type.
        SearchError: The primitives are well formed, but are no kernel, or one that cannot fill the spec's places.
    """
    kernel = from_dict({"groups": spec.groups, "primitives": list(spec.primitives)})
    for extent in extents_of(spec):
        kernel.check(extent)
    return kernel


def to_spec(
    kernel: Kernel, name: str = "kernel", description: str = "", places: tuple[tuple[int, int, int], ...] = ()
) -> KernelSpec:
    """Return a kernel as a spec.

    Args:
        kernel: The kernel.
        name: The spec's name.
        description: What is said of it.
        places: Channels, height and width of the places that it was found for.
    """
    return KernelSpec(name=name, description=description, places=places, **to_dict(kernel))

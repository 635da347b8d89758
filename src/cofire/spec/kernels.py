"""What a search for kernels is, and what a kernel is: Canvas's coarse primitives in files.

A kernel maps [N, C, H, W] to the same shape and fills every place of a network that is named by its C, H and W::

    kind = "kernels"
    name = "small_kernels"
    places = [[16, 8, 8], [32, 4, 4]]

    [window]
    max_ratio = 1.0
    min_receptive_size = 9

A kernel's primitives are tables whose fields are the primitive's own, with sizes as text::

    kind = "kernel"
    places = [[16, 8, 8]]
    primitives = [
        { primitive = "input", inputs = [] },
        { primitive = "fc", inputs = [0], channels = "C" },
        { primitive = "output", inputs = [1] },
    ]

Here the tables are checked for themselves. Whether primitives apply and a kernel exists, ``cofire.search`` says. Left
out: training as a reward.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from cofire.spec.spec_type import NonNegative, Positive, Spec

KernelPrimitiveName = Literal[
    "fc",
    "convolution",
    "mix",
    "scale",
    "fold",
    "unfold",
    "group",
    "shift",
    "softmax",
    "activation",
    "elementwise",
    "broadcast",
    "bmm",
]


def _read_place(value: Any) -> Any:
    whole = isinstance(value, list | tuple) and all(type(number) is int and number >= 1 for number in value)
    if not whole or len(value) != 3:
        raise ValueError("must be three whole numbers from 1 up, channels, height and width: [64, 56, 56]")
    return tuple(value)


Place = Annotated[tuple[int, int, int], BeforeValidator(_read_place)]
Share = Annotated[float, Field(ge=0, le=1)]
_MapSide = Annotated[Positive, Field(le=64)]  # beyond, masks of a pair of maps no longer fit in memory


class KernelLimitsSpec(Spec):
    """What kernels may be; the defaults are Canvas's. Pairs are the least and the greatest number."""

    primitives: tuple[Positive, Positive] = Field(default=(5, 25), description="input and output not counted")
    width: tuple[Positive, Positive] = Field(
        default=(2, 8), description="tensors open at once; a search has the greatest as its limit"
    )
    weighted: tuple[Positive, Positive] = Field(default=(1, 8), description="primitives with a weight")
    weighted_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.6, description="greatest share of primitives with a weight"
    )
    dims: Positive = Field(default=7, description="dims of a tensor that are wider than 1, beside the batch")
    spatial_weights: bool = Field(
        default=False, description="whether a weight may depend on H or W, which ties a kernel to a size of images"
    )
    bmm_share: Share = Field(default=0.1, description="share of kernels that must have a Bmm")
    max_groups: Positive = Field(default=1024, description="greatest number of groups, a power of 2 in every kernel")
    kinds: tuple[KernelPrimitiveName, ...] = Field(
        default=get_args(KernelPrimitiveName), description="primitives that may be used"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("primitives", "width", "weighted"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}] begins above its end; turn it round: [{high}, {low}]")
        if not self.kinds:
            raise ValueError("kinds = [] leaves no primitive; leave it out for all of them")
        return self


class KernelWindowSpec(Spec):
    """What a kernel may cost, and how much of the image it must see.

    Ratios are of the multiply-adds of a dense convolution of C channels to as many, at each place. Parameters are
    summed over all places.
    """

    dense_kernel: Positive = Field(default=3, description="height and width of the dense convolution's window")
    min_ratio: Annotated[float, Field(ge=0)] | None = None
    max_ratio: Annotated[float, Field(gt=0)] | None = None
    min_parameters: NonNegative | None = None
    max_parameters: Positive | None = None
    min_receptive_size: Positive = Field(default=1, description="places of the map that the middle one depends on")
    receptive_map: tuple[_MapSide, _MapSide] = Field(
        default=(21, 21), description="height and width of the map, a torus, that they are counted on"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("ratio", "parameters"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{name} = {low} is above max_{name} = {high}: nothing fits; exchange them")
        height, width = self.receptive_map
        if self.min_receptive_size > height * width:
            raise ValueError(
                f"min_receptive_size = {self.min_receptive_size} is above the {height * width} places of "
                f"receptive_map = [{height}, {width}]; take a larger map"
            )
        return self


class KernelSamplingSpec(Spec):
    """How kernels are sampled.

    The same spec gives the same kernels in the same order; ``workers`` counts, as that many are evaluated at a time
    before anything is learnt from them.
    """

    algorithm: Literal["mcts", "random"] = "mcts"
    reward: Literal["multiply_adds", "none"] = Field(
        default="multiply_adds", description="modelled: the part of a dense convolution's that is saved; or all equal"
    )
    seed: NonNegative = 0
    budget: Positive = Field(default=100, description="kernels evaluated; those that the window refuses do not count")
    workers: Positive = Field(default=1, description="processes that compute rewards")
    keep: Positive = Field(default=10, description="best kernels kept")
    save_every: Positive = Field(default=10, description="evaluations between two saved states")


class KernelsSpec(Spec):
    """A search for kernels that fill all of some places. A place is its channels, height and width."""

    kind: Literal["kernels"] = "kernels"
    name: str = "kernels"
    description: str = ""
    places: tuple[Place, ...]
    limits: KernelLimitsSpec = KernelLimitsSpec()
    sampling: KernelSamplingSpec = KernelSamplingSpec()
    window: KernelWindowSpec = KernelWindowSpec()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.places:
            raise ValueError("places = [] has no place to fill; name one, for example [[64, 56, 56]]")
        for position, place in enumerate(self.places):
            if place in self.places[:position]:
                raise ValueError(f"places.{position} = {list(place)} is there already; name each place once")
        return self


class KernelSpec(Spec):
    """A kernel. Primitives stand in an order in which they can be computed; inputs are positions, from 0."""

    kind: Literal["kernel"] = "kernel"
    name: str = "kernel"
    description: str = ""
    places: tuple[Place, ...] = Field(default=(), description="places that it was found for")
    groups: Positive = Field(default=1, description="the number that G stands for")
    primitives: tuple[dict[str, Any], ...]

"""What an operator search is: symbols, shapes, limits, and how the space is searched.

A linear operator is sought from ``input`` to ``output`` in Syno's space of primitives. A 1-D convolution::

    kind = "search"
    name = "conv1d"
    primary = ["N", "Ci", "Co", "H"]
    coefficient = ["k"]
    mappings = [{ N = 4, Ci = 64, Co = 64, H = 64, k = 3 }]
    input = ["N", "Ci", "H"]
    output = ["N", "Co", "H"]
    fixed = [[0, 0]]
    depth = 5
    allowance = { Ci = 2, Co = 1, k = 2 }

Here the tables are checked for themselves. Whether sizes divide and an operator exists, ``cofire.search`` says before
it searches.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cofire.spec.messages import nearest
from cofire.spec.operator import OperatorSpec, check_symbols
from cofire.spec.spec_type import NonNegative, Positive, Spec

PositiveNumber = Annotated[float, Field(gt=0)]


class LimitsSpec(Spec):
    """What operators of the space may have; the defaults are those of Syno's core.

    ``none`` lifts a limit that may be lifted. Products and sizes are the largest over all mappings.
    """

    max_tensors: Positive = Field(default=2, description="the input and the weights")
    max_reductions: NonNegative = 2
    max_chain: Positive = Field(default=5, description="primitives from a dim of a tensor down to the output")
    max_splits: NonNegative | None = None
    max_merges: NonNegative | None = None
    max_shifts: NonNegative | None = None
    max_strides: NonNegative | None = Field(default=None, description="0 in every published search")
    max_unfolds: NonNegative | None = None
    min_unfold_ratio: PositiveNumber = Field(default=2.0, description="a window k over N needs N/k at least this")
    max_window: Positive = Field(default=30, description="largest window, and largest strided dim")
    odd_windows: bool = True
    max_reshape_over_shift: PositiveNumber = Field(
        default=5.0, description="a shift by d does not touch a reshape whose block is above this times d"
    )
    max_repeat: Positive = Field(default=1, description="product of dims repeated without a weight")
    max_outer: Positive = Field(default=512, description="product of dims that only weights have")
    low_rank: tuple[Positive, Positive] = Field(
        default=(3, 8), description="least and largest dim that two weights share and the input does not have"
    )
    min_weight: Positive = Field(default=1, description="least number of elements of a weight")
    max_pooling: Positive = Field(default=8, description="product of reductions that meet no weight")
    max_reduction_ratio: Positive = Field(default=32, description="product of all reductions over the input's size")
    max_symbols: Positive = Field(default=3, description="distinct symbols in a size")
    max_degree: Positive = Field(default=16, description="sum of the absolute exponents of a size")
    max_exponents: Positive = Field(default=5, description="exponents tried per symbol when a dim is divided")
    max_ends: Positive | None = Field(
        default=None, description="operators kept of one interface, of most equal weights; none: all; Syno: 2"
    )
    needs_matmul: bool = Field(
        default=True, description="a weight has a dim of its own and a shared one; false admits depthwise convolution"
    )
    needs_weight: bool = Field(default=True, description="false admits pooling")

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.low_rank
        if low > high:
            raise ValueError(f"low_rank = [{low}, {high}] begins above its end; turn it round: [{high}, {low}]")
        if self.needs_weight and self.max_tensors < 2:
            raise ValueError(
                f"max_tensors = {self.max_tensors} leaves no weight, but needs_weight = true; allow 2 tensors, or set "
                "needs_weight = false"
            )
        return self


class SamplingSpec(Spec):
    """How operators are sampled.

    The same spec gives the same operators in the same order; ``workers`` counts, as that many are evaluated at a time
    before anything is learnt from them.
    """

    algorithm: Literal["mcts", "random", "beam"] = "mcts"
    reward: str = Field(
        default="multiply_adds", description="multiply_adds or capacity (modelled), or proxy_accuracy (measured)"
    )
    seed: NonNegative = 0
    budget: Positive = Field(default=100, description="operators evaluated, those outside the window too")
    workers: Positive = Field(default=1, description="processes that compute rewards")
    keep: Positive = Field(default=10, description="best operators kept")
    save_every: Positive = Field(default=10, description="evaluations between two saved states")


class WindowSpec(Spec):
    """What an operator may cost. Multiply-adds are those of the cheapest order of stages, summed over all mappings.

    Ratios are of those of ``operator``, the baseline, which has the shapes and symbols of the search.
    """

    operator: OperatorSpec | None = Field(default=None, description="the baseline: a preset, a file or a table")
    min_ratio: Annotated[float, Field(ge=0)] | None = None
    max_ratio: PositiveNumber | None = None
    min_multiply_adds: NonNegative | None = None
    max_multiply_adds: Positive | None = None
    max_parameters: Positive | None = Field(default=None, description="of all weights, summed over all mappings")
    max_tensor_bytes: Positive | None = Field(
        default=None, description="input, output, weights and the largest intermediate in FP32, in any mapping"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("ratio", "multiply_adds"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{name} = {low} is above max_{name} = {high}: nothing fits; exchange them")
        if self.operator is None:
            for name in ("min_ratio", "max_ratio"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} = {getattr(self, name)} has no baseline; name one in window.operator")
        return self


class SearchSpec(Spec):
    """A search for linear operators from ``input`` to ``output``.

    Sizes are monomials in the symbols, such as ``Ci/g`` or ``k^2*H``. ``mappings`` give every symbol a number, once per
    place that an operator is to fill. Positions of dims count from 0.
    """

    kind: Literal["search"] = "search"
    name: str = "search"
    description: str = ""
    primary: tuple[str, ...] = Field(description="large symbols: channels, height")
    coefficient: tuple[str, ...] = Field(default=(), description="small symbols: window, stride, groups")
    mappings: tuple[dict[str, Positive], ...]
    input: tuple[str, ...]
    output: tuple[str, ...]
    fixed: tuple[tuple[NonNegative, NonNegative], ...] = Field(
        default=(), description="pairs of an input's and an output's position that are one dim, such as the batch"
    )
    unordered_input: tuple[NonNegative, ...] = Field(
        default=(), description="positions whose elements have no order, such as channels"
    )
    unordered_output: tuple[NonNegative, ...] = ()
    depth: Positive = Field(default=6, description="most steps of an operator")
    guidance: Literal["exact", "compat", "none"] = Field(
        default="exact", description="how steps are pruned: exact loses nothing, compat prunes as Syno does"
    )
    allowance: dict[str, NonNegative] = Field(
        default={}, description="how often each symbol may be brought in; a symbol that is not named never"
    )
    limits: LimitsSpec = LimitsSpec()
    sampling: SamplingSpec = SamplingSpec()
    window: WindowSpec = WindowSpec()

    @model_validator(mode="after")
    def _check(self) -> Self:
        symbols = (*self.primary, *self.coefficient)
        check_symbols(self.primary, self.coefficient, self.mappings)
        for shape in ("input", "output"):
            if not getattr(self, shape):
                raise ValueError(f'{shape} = [] has no dim; write its sizes, for example ["N", "C"]')
        for name in self.allowance:
            if name not in symbols:
                raise ValueError(f"allowance: {name!r} is no symbol{nearest(name, symbols)}")
        for position, (i, o) in enumerate(self.fixed):
            self._check_position(f"fixed.{position}", i, "input")
            self._check_position(f"fixed.{position}", o, "output")
        for side in (0, 1):
            held = [pair[side] for pair in self.fixed]
            if len(set(held)) < len(held):
                raise ValueError(
                    f"fixed = {[list(pair) for pair in self.fixed]} names a position of the "
                    f"{('input', 'output')[side]} twice; fix each once"
                )
        for shape, positions in (("input", self.unordered_input), ("output", self.unordered_output)):
            for place in positions:
                self._check_position(f"unordered_{shape}", place, shape)
        return self

    def _check_position(self, where: str, place: int, shape: str) -> None:
        count = len(getattr(self, shape))
        if place >= count:
            raise ValueError(f"{where}: position {place} is outside the {shape}; positions are 0 to {count - 1}")

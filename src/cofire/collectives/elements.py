"""Types of elements and operations, as the native core numbers them.

The numbers are those of ``csrc/kernels/kernels.h``. Imports no PyTorch: a PyTorch type is known by its name.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import Any

from cofire.errors import CollectiveError


class Element(IntEnum):
    """The type of an element."""

    F32 = 0
    F64 = 1
    F16 = 2
    BF16 = 3
    E4M3 = 4
    E5M2 = 5
    I32 = 6
    I64 = 7

    @property
    def size_bytes(self) -> int:
        """Bytes of one."""
        return _SIZES[self]

    @property
    def is_integer(self) -> bool:
        """Whether it is a whole number."""
        return self in (Element.I32, Element.I64)


class Op(IntEnum):
    """What is done with the elements of all ranks."""

    SUM = 0
    AVERAGE = 1
    PRODUCT = 2
    MIN = 3
    MAX = 4
    BIT_AND = 5
    BIT_OR = 6
    BIT_XOR = 7

    @property
    def is_bitwise(self) -> bool:
        """Whether it works on bits, so for integers only."""
        return self >= Op.BIT_AND


class Isa(IntEnum):
    """An instruction set that the kernels are compiled for."""

    SCALAR = 0
    AVX2 = 1
    AVX512 = 2


_SIZES = {
    Element.F32: 4,
    Element.F64: 8,
    Element.F16: 2,
    Element.BF16: 2,
    Element.E4M3: 1,
    Element.E5M2: 1,
    Element.I32: 4,
    Element.I64: 8,
}

_BY_NAME = {
    "float32": Element.F32,
    "float64": Element.F64,
    "float16": Element.F16,
    "bfloat16": Element.BF16,
    "float8_e4m3fn": Element.E4M3,
    "float8_e5m2": Element.E5M2,
    "int32": Element.I32,
    "int64": Element.I64,
}


@cache
def find_element(dtype: Any) -> Element | None:
    """Return the element type of a PyTorch or numpy dtype; none if the core has no kernel for it."""
    return _BY_NAME.get(str(dtype).removeprefix("torch."))


def element_of(dtype: Any) -> Element:
    """Return the element type of a PyTorch or numpy dtype.

    Raises:
        CollectiveError: The core has no kernel for it.
    """
    element = find_element(dtype)
    if element is None:
        raise CollectiveError(f"{dtype} has no reduction kernel; take one of {', '.join(_BY_NAME)}")
    return element

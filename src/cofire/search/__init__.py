"""Operator synthesis: Syno's space of linear tensor operators, built by hand or enumerated."""

from cofire.search.assembler import Assembler
from cofire.search.enumeration import Synthesis, enumerate_operators
from cofire.search.graph import Operator
from cofire.search.sizes import Allowance, Size, Symbols
from cofire.search.space import Space

__all__ = ["Allowance", "Assembler", "Operator", "Size", "Space", "Symbols", "Synthesis", "enumerate_operators"]

"""Search: operators from [N, Ci, H] to [N, Co, H], counted, and sampled for few multiply-adds. Needs no accelerator.

python examples/03_search.py [DEPTH BUDGET]
"""

import sys

from cofire.search import enumerate_operators
from cofire.search.cost import cost
from cofire.search.discovery import discover
from cofire.search.fingerprint import distinct
from cofire.search.from_spec import space_of
from cofire.search.lowering import write_source
from cofire.spec import SearchSpec, load_as


def main(depth: int, budget: int) -> None:
    spec = load_as(SearchSpec, "conv1d", [f"depth={depth}", f"sampling.budget={budget}"])
    for guidance in ("exact", "compat"):
        operators = enumerate_operators(space_of(spec), depth, guidance)
        print(f"{guidance:7} {len(operators)} operators, {len(distinct(operators))} functions")

    found = discover(spec)
    print(f"\n{found.evaluated} sampled, the best by multiply-adds saved (modelled):")
    for one in found.best:
        print(f"{one.reward:6.3f}  {cost(one.operator).parameters:>6,} parameters  {one.operator}")

    # The plainest one with a window, as a module to paste into a program without Cofire.
    windowed = [one.operator for one in found.best if "floor" in str(one.operator)]
    print()
    print(write_source(min(windowed, key=lambda operator: len(str(operator)))))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ["7", "100"]))

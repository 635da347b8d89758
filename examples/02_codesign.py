"""Co-design: a mixture of experts and the network of its cluster, varied together. Needs no torch and no accelerator.

python examples/02_codesign.py [MODEL CLUSTER]
"""

import sys

from cofire.plan.design_space import SweepSpec, parse_axis, parse_objective
from cofire.plan.sweep import run_sweep
from cofire.plan.sweep_report import by_price, describe_change, trade
from cofire.spec.units import format_count

# Half as many experts of twice the width, and twice as many of half: the sum of their parameters stays the same.
VARY = (
    "model.moe.num_routed_experts/model.moe.expert_intermediate_size=32/2816,64/1408,128/704",
    "model.moe.num_experts_per_token=3,6,12",
    "cluster.network.bandwidth_bytes_per_s=12.5e9,25e9,50e9",
)


def main(model: str, cluster: str) -> None:
    spec = SweepSpec(
        model=model,
        cluster=cluster,
        axes=tuple(map(parse_axis, VARY)),
        # Sixteen devices, each with all layers: a sweep without this looks for the best layout of each design.
        budget=16,
        fixed={"pp": 1, "tp": 1, "ep": 16, "zero_stage": 1},
        objectives=tuple(map(parse_objective, ("activated", "usd", "tpot"))),
    )
    result = run_sweep(spec)
    print(f"{len(result.designs)} designs, {len(result.front)} that no other beats")
    for place in by_price(result):
        design = result.designs[place]
        figures = design.figures
        assert figures is not None  # a refused design is on no front
        print(
            f"{format_count(figures.activated_parameters):>6} activated  ${figures.usd_per_trillion_tokens:7,.0f}  "
            f"{figures.tpot_s * 1e3:5.2f} ms  {describe_change(design)}"
        )
        print(f"       {trade(result, design)}")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["deepseek-v2-lite", "h800-2048"]))

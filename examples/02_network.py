"""Network: which topology is cheapest at a size, and what a dead plane and hashed routes cost. Needs no accelerator.

python examples/02_network.py [ENDPOINTS]
"""

import sys

from cofire.network.scenario import Traffic, simulate_traffic
from cofire.network.survey import compare_topologies, survey_routing
from cofire.spec import ClusterSpec, load_as
from cofire.spec.hardware import NetworkSpec


def main(num_endpoints: int) -> None:
    kind = NetworkSpec(switch_ports=64, num_planes=8, nics_per_node=8, bandwidth_bytes_per_s=50e9)
    print(f"{'topology':16} {'switches':>8} {'links':>7} {'diameter':>8} {'load':>5} {'$ per port':>10}")
    for row in compare_topologies(kind, num_endpoints).rows:
        if row.facts is None or row.cost is None:
            print(f"{row.name:16} {row.refused}")
            continue
        facts = row.facts
        print(
            f"{row.name:16} {facts.switches:>8,} {facts.links:>7,} {facts.diameter_links:>8} "
            f"{facts.all_to_all_load:>5.2f} {row.cost.per_endpoint:>10,.0f}"
        )

    cluster = load_as(ClusterSpec, "h800-2048")
    print(f"\nall-to-all of 1 GB per port over 32 nodes of {cluster.name} (simulated)")
    for name, failed in (("eight planes", ()), ("one of them dead", (3,))):
        run = simulate_traffic(cluster, Traffic(pattern="all_to_all", failed_planes=failed), num_nodes=32).run
        if run.makespan_s is not None and run.algorithm_bytes_per_s is not None:
            rate = run.algorithm_bytes_per_s / 1e9
            print(f"{name:16} {1e3 * run.makespan_s.value:6.2f} ms {rate:6.2f} GB/s, figures {run.label}")

    print("\na shift by half of all nodes: flows on the busiest link between switches")
    for routing in survey_routing(cluster).rows:
        print(f"{routing.routing:16} {routing.largest:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16_384)

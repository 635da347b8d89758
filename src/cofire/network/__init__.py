"""Wires: topologies as graphs, routes through them, what they cost, and flows that share them. No torch.

Names are loaded when first used (PEP 562): the planner asks for closed forms thousands of times and for graphs seldom.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Counts": "cofire.network.shapes",
    "Dragonfly": "cofire.network.shapes",
    "FatTree": "cofire.network.shapes",
    "FlowResult": "cofire.network.flowsim",
    "Flows": "cofire.network.flowsim",
    "FullyConnected": "cofire.network.shapes",
    "Group": "cofire.network.collective_time",
    "HostReduceBounds": "cofire.network.host",
    "Network": "cofire.network.topology",
    "NetworkCost": "cofire.network.cost",
    "NetworkFacts": "cofire.network.analytical",
    "Pattern": "cofire.network.patterns",
    "PriceList": "cofire.network.cost",
    "Routes": "cofire.network.routing",
    "SlimFly": "cofire.network.shapes",
    "Torus": "cofire.network.shapes",
    "TwoZone": "cofire.network.shapes",
    "Wire": "cofire.network.collective_time",
    "all_to_all": "cofire.network.patterns",
    "analyse": "cofire.network.analytical",
    "analyse_cluster": "cofire.network.analytical",
    "build": "cofire.network.builders",
    "build_network": "cofire.network.builders",
    "cluster_host_reduce_bounds": "cofire.network.host",
    "cluster_network_cost": "cofire.network.cost",
    "cluster_shape": "cofire.network.shapes",
    "collective_time_s": "cofire.network.collective_time",
    "device_routes": "cofire.network.routing",
    "double_tree": "cofire.network.double_tree",
    "expert_pattern": "cofire.network.patterns",
    "link_loads": "cofire.network.routing",
    "network_cost": "cofire.network.cost",
    "price_list": "cofire.network.cost",
    "route": "cofire.network.routing",
    "simulate_flows": "cofire.network.flowsim",
    "zoned_double_tree": "cofire.network.double_tree",
}

__all__ = [*sorted(_HOMES, key=lambda name: (not name[0].isupper(), name))]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cofire.network' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

"""What a network costs: switches and links of its shape times a price list.

arXiv 2505.09343, table 3, and arXiv 2408.14158, table III. The papers print no prices of parts, so the lists in
``prices.toml`` are fits to what they print for whole networks; a file of one's own replaces them. Left out: NICs,
spares, installation and discounts by volume.
"""

from __future__ import annotations

import os
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cofire.errors import PlanError
from cofire.network.shapes import Counts, cluster_shape
from cofire.spec.figure import Figure, Label
from cofire.spec.hardware import ClusterSpec
from cofire.spec.io import parse
from cofire.spec.messages import nearest
from cofire.spec.spec_type import Spec

Price = Annotated[float, Field(ge=0)]


class PriceList(Spec):
    """Prices of parts, in ``unit``; ``nodes`` are servers without network, by name."""

    source: str
    label: Label = "assumed"
    unit: str = "USD"
    switch: Price
    optical_link: Price
    electrical_link: Price
    endpoint_link: Price = 0.0
    switch_watts: Figure
    nodes: dict[str, Price] = Field(default_factory=dict)


class NetworkCost(Spec):
    """A network's price and power; ``label`` says how well the prices are known."""

    endpoints: int
    switches: int
    optical_links: int
    electrical_links: int
    unit: str
    switches_price: float
    links_price: float
    total: float
    per_endpoint: float
    watts: Figure
    label: Label
    source: str


def price_lists(path: str | os.PathLike[str] | None = None) -> dict[str, PriceList]:
    """Return price lists by name.

    Args:
        path: A TOML file with a table per list; none: the lists that come with Cofire.

    Raises:
        PlanError: The file cannot be read or holds no list.
        SpecError: A list breaks a rule.
    """
    try:
        if path is None:
            text = resources.files("cofire.network").joinpath("prices.toml").read_text("utf-8")
        else:
            text = Path(path).read_text("utf-8")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{path}: no price file can be read here ({error}); a file holds a table per list") from None
    wrong = [name for name, table in tables.items() if not isinstance(table, dict)]
    if wrong or not tables:
        raise PlanError(f"{path}: {wrong[0] if wrong else 'nothing'} is no price list; put prices into a [table]")
    return {name: parse(PriceList, table, f"{path or 'prices.toml'}: {name}") for name, table in tables.items()}


def price_list(name: str = "isca25", path: str | os.PathLike[str] | None = None) -> PriceList:
    """Return one price list; a file with a single list needs no name.

    Raises:
        PlanError: There is no list of this name.
        SpecError: A list breaks a rule.
    """
    lists = price_lists(path)
    if path is not None and len(lists) == 1:
        return next(iter(lists.values()))
    if name not in lists:
        raise PlanError(f"price list {name!r} is not one of {', '.join(lists)}{nearest(name, lists)}")
    return lists[name]


def network_cost(counts: Counts, prices: PriceList | None = None) -> NetworkCost:
    """Return the price of a network.

    Args:
        counts: Of its shape.
        prices: Price list; none: the fit to arXiv 2505.09343.
    """
    prices = prices or price_list()
    switches = counts.switches * prices.switch
    links = counts.optical_links * prices.optical_link + counts.electrical_links * prices.electrical_link
    links += counts.endpoints * prices.endpoint_link
    watts = prices.switch_watts
    return NetworkCost(
        endpoints=counts.endpoints,
        switches=counts.switches,
        optical_links=counts.optical_links,
        electrical_links=counts.electrical_links,
        unit=prices.unit,
        switches_price=switches,
        links_price=links,
        total=switches + links,
        per_endpoint=(switches + links) / counts.endpoints,
        watts=Figure(
            value=watts.value * counts.switches,
            low=watts.low * counts.switches,
            high=watts.high * counts.switches,
            label=watts.label,
            source=watts.source,
        ),
        label=prices.label,
        source=prices.source,
    )


def cluster_network_cost(
    cluster: ClusterSpec, num_nodes: int | None = None, prices: PriceList | None = None
) -> NetworkCost:
    """Return the price of a cluster's network.

    Args:
        cluster: With a network.
        num_nodes: Nodes; none: as many as the network is bought for.
        prices: Price list; none: the fit to arXiv 2505.09343.

    Raises:
        PlanError: The cluster has no network, or its switches are too small.
    """
    return network_cost(cluster_shape(cluster, num_nodes).counts(), prices)

"""Prices: lists that come with Cofire, lists of one's own, and what a cluster's network costs."""

from __future__ import annotations

import pytest

from cofire.errors import CofireError, PlanError, SpecError
from cofire.network.cost import cluster_network_cost, network_cost, price_list, price_lists
from cofire.network.shapes import Counts, Dragonfly, FatTree
from cofire.spec import ClusterSpec, load_as

OWN = """
[mine]
source = "an offer of yesterday"
label = "measured"
unit = "EUR"
switch = 1000
optical_link = 10
electrical_link = 1
endpoint_link = 2
switch_watts = 500
"""


def test_every_part_is_counted_once_at_its_price(tmp_path):
    (tmp_path / "own.toml").write_text(OWN, "utf-8")
    cost = network_cost(Counts(7, 3, 20, 5), price_list(path=tmp_path / "own.toml"))
    assert cost.switches_price == 3 * 1000
    assert cost.links_price == 20 * 10 + 5 * 1 + 7 * 2
    assert cost.total == 3219
    assert cost.per_endpoint == pytest.approx(3219 / 7)
    assert (cost.unit, cost.label) == ("EUR", "measured")
    assert (cost.watts.low, cost.watts.value, cost.watts.high) == pytest.approx((1350, 1500, 1650))


def test_links_inside_a_dragonfly_group_are_electrical():
    cost = network_cost(Dragonfly(2, 4, 2, 9).counts())
    assert (cost.optical_links, cost.electrical_links) == (9 * 8 // 2, 9 * 6)


def test_fitted_lists_say_that_they_are_fits():
    for prices in price_lists().values():
        assert prices.label == "calibrated"
        assert prices.source.startswith("fitted")
        assert prices.switch_watts.label == "assumed"


def test_cost_of_a_cluster_is_that_of_what_its_network_is_bought_for():
    cluster = load_as(ClusterSpec, "h800-2048")
    whole = cluster_network_cost(cluster)
    tree = FatTree(2048, num_planes=8, ports_per_node=8)
    assert (whole.switches, whole.total) == (96, network_cost(tree.counts()).total)
    half = cluster_network_cost(cluster, 128)
    assert half.endpoints == 1024
    assert half.total == pytest.approx(whole.total / 2)


def test_oversubscription_makes_a_network_cheaper():
    totals = [network_cost(FatTree(1440, oversubscription=o).counts()).total for o in (1, 2, 3, 7)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("switch = 3", PlanError, "switch is no price list"),
        ("", PlanError, "nothing is no price list"),
        ("[a", PlanError, "no price file can be read here"),
        (OWN.replace("switch = 1000", "switch = -1"), SpecError, "switch = -1"),
        (OWN.replace("optical_link", "optical_links"), SpecError, "nearest: optical_link"),
    ],
)
def test_a_wrong_price_file_says_what_is_wrong(tmp_path, text, kind, message):
    (tmp_path / "own.toml").write_text(text, "utf-8")
    with pytest.raises(kind, match=message) as caught:
        price_list("mine", tmp_path / "own.toml")
    assert isinstance(caught.value, CofireError)
    assert "\n" not in str(caught.value)


def test_an_unknown_list_names_the_nearest():
    with pytest.raises(PlanError, match=r"isca52.* nearest: isca25"):
        price_list("isca52")
    with pytest.raises(PlanError, match="no price file"):
        price_list("mine", "nowhere.toml")

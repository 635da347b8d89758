"""Bounds of the host: passes counted step by step, and which resource binds."""

from __future__ import annotations

import pytest

from cofire.errors import PlanError
from cofire.network.host import (
    cluster_host_reduce_bounds,
    host_reduce_bounds,
    memory_passes,
    pcie_passes,
    peer_ring_bound,
    ring_factor,
)
from cofire.spec import ClusterSpec, load_as
from cofire.spec.figure import Figure
from cofire.spec.hardware import HostSpec

ROOMY = HostSpec(memory_bandwidth_bytes_per_s=1e15, pcie_bandwidth_bytes_per_s=1e15, bridge_bandwidth_bytes_per_s=1e15)


def counted_passes(num_devices: int, num_nodes: int, gdrcopy: bool, paired: bool) -> int:
    """Walk one chunk through the host and count each time that it is read or written."""
    in_memory = num_devices // 2 if paired else num_devices
    passes = 0
    for _ in range(in_memory):
        passes += 1  # a copy arrives
    for _ in range(in_memory):
        passes += 1  # the sum reads it
    passes += 1  # and is written
    if num_nodes > 1:
        for step in ("send up", "receive up", "add", "receive down", "send down"):
            passes += bool(step)
    for _ in range(2 if gdrcopy else in_memory):
        passes += 1  # a copy leaves, or a socket reads it for all its devices
    return passes


@pytest.mark.parametrize("num_devices", [4, 8, 16])
@pytest.mark.parametrize("num_nodes", [1, 2, 9])
@pytest.mark.parametrize("gdrcopy", [True, False])
@pytest.mark.parametrize("paired", [True, False])
def test_passes_equal_those_of_a_chunk_walked_through(num_devices, num_nodes, gdrcopy, paired):
    passes = memory_passes(num_devices, num_nodes, gdrcopy, paired)
    assert passes.total == counted_passes(num_devices, num_nodes, gdrcopy, paired)


@pytest.mark.parametrize(
    ("change", "nic", "binds"),
    [
        ({"memory_bandwidth_bytes_per_s": 1e9}, 1e15, "host memory"),
        ({"pcie_bandwidth_bytes_per_s": 1e9}, 1e15, "PCIe slot"),
        ({}, 1e9, "NIC"),
        ({"root_ports": ((0, 1),), "shared_port_bandwidth_bytes_per_s": 1e9}, 1e15, "shared root port"),
    ],
)
def test_the_scarcest_resource_binds(change, nic, binds):
    result = host_reduce_bounds(ROOMY.model_copy(update=change), nic)
    assert result.binds == binds
    assert result.ceiling_bytes_per_s.value == min(result.bounds_bytes_per_s.values())


def test_a_root_port_of_unknown_bandwidth_is_that_of_one_slot():
    host = ROOMY.model_copy(update={"pcie_bandwidth_bytes_per_s": 40e9, "root_ports": ((5, 6),)})
    full = Figure(value=1, low=1, high=1)
    assert host_reduce_bounds(host, 1e15, duplex=full).bounds_bytes_per_s["shared root port"] == 20e9


def test_two_nodes_send_each_byte_once_and_more_send_it_twice():
    two, three = (host_reduce_bounds(ROOMY, 10e9, num_nodes=n).bounds_bytes_per_s["NIC"] for n in (2, 3))
    assert (two, three) == (10e9, 5e9)
    assert "NIC" not in host_reduce_bounds(ROOMY, 0.0, num_nodes=1).bounds_bytes_per_s


def test_the_interval_of_the_ceiling_never_passes_another_bound():
    host = ROOMY.model_copy(
        update={
            "root_ports": ((0, 1),),
            "shared_port_bandwidth_bytes_per_s": 40e9,
            "pcie_bandwidth_bytes_per_s": 10.5e9,
        }
    )
    ceiling = host_reduce_bounds(host, 1e15).ceiling_bytes_per_s
    assert (ceiling.low, ceiling.value, ceiling.high) == pytest.approx((8.6e9, 10e9, 10.5e9))


def test_through_the_host_a_byte_passes_the_slot_half_as_often_as_in_a_ring():
    assert ring_factor(8) == 1.75
    assert pcie_passes(8) == {"host": 2.0, "ring": 3.5}
    assert peer_ring_bound(2).value == 9 * 2**30


def test_a_cluster_brings_its_host_and_nics():
    cluster = load_as(ClusterSpec, "h800-2048")
    result = cluster_host_reduce_bounds(cluster)
    assert result.bounds_bytes_per_s["NIC"] == 8 * 50e9 / 2
    assert result.bounds_bytes_per_s["host memory"] == 600e9 / 24
    assert result.binds == "host memory"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: memory_passes(7, paired=True), "7 devices do not pair; take 8"),
        (
            lambda: host_reduce_bounds(
                ROOMY.model_copy(update={"bridge_bandwidth_bytes_per_s": None}), 1e9, paired=True
            ),
            "bridge_bandwidth",
        ),
        (lambda: peer_ring_bound(1), "take 2 or more"),
        (lambda: cluster_host_reduce_bounds(load_as(ClusterSpec, "h800-2048", ["host=none"])), "has no host"),
        (
            lambda: cluster_host_reduce_bounds(load_as(ClusterSpec, "h800-2048", ["network=none"])),
            "has no network for 256 nodes",
        ),
    ],
)
def test_a_host_that_cannot_reduce_so_says_why(call, message):
    with pytest.raises(PlanError, match=message):
        call()

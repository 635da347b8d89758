"""The model that chooses chunks and threads: its limits, its order, and its choice against trying everything."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cofire.collectives import tuning
from cofire.collectives.tuning import Calibration, CopyRate, all_reduce_s, choose, memory_bound_s, slot_passes
from cofire.errors import CollectiveError
from cofire.network.host import cluster_host_reduce_bounds
from cofire.spec import ClusterSpec, load_as
from cofire.spec.figure import Figure


def figure(value: float) -> Figure:
    return Figure(value=value, low=value, high=value)


def machine(memory: float = 10e9, cache: float = 50e9, flag_s: float = 1e-6, wake_s: float = 10e-6) -> Calibration:
    rows = [
        CopyRate(copiers=n, memory_bytes_per_s=figure(memory * n**0.5), cache_bytes_per_s=figure(cache * n))
        for n in (1, 2, 4, 8)
    ]
    times = {"hand_over_s": figure(flag_s), "wake_up_s": figure(wake_s)}
    return Calibration.model_validate({"copies": rows, "cache_bytes": float(32 << 20), **times})


MACHINES = st.builds(
    machine,
    memory=st.floats(2e9, 50e9),
    cache=st.floats(50e9, 500e9),
    flag_s=st.floats(1e-8, 1e-5),
    wake_s=st.floats(1e-5, 1e-4),
)
SIZES = st.integers(0, 1 << 28)


@given(MACHINES, st.integers(1, 16), st.integers(1, 16), SIZES, st.sampled_from([4 << 10, 64 << 10, 1 << 20]))
def test_no_all_reduce_is_faster_than_reading_and_writing_the_data_once(known, ranks, cores, size, chunk):
    bound = memory_bound_s(ranks, size, known, min(ranks, cores))
    assert all_reduce_s(ranks, cores, size, chunk, 1, known) >= bound


@given(MACHINES, st.integers(1, 8), SIZES, SIZES)
def test_more_bytes_never_take_less_time(known, ranks, one, other):
    small, large = sorted((one, other))
    assert memory_bound_s(ranks, small, known) <= memory_bound_s(ranks, large, known)
    # Within one way of adding: where ranks stop adding everything themselves the model may step down.
    if ranks <= 2:
        times = [all_reduce_s(ranks, 8, size, 64 << 10, 1, known) for size in (small, large)]
        assert times[0] <= times[1] * (1 + 1e-9)


@given(MACHINES, st.integers(2, 8), st.integers(1 << 16, 1 << 28))
def test_ranks_without_a_core_each_are_never_faster(known, ranks, size):
    times = [all_reduce_s(ranks, cores, size, 64 << 10, 1, known) for cores in (1, ranks)]
    assert times[0] >= times[1]


def test_passes_through_the_slots_add_up_rank_by_rank():
    for ranks in range(3, 9):
        # Counted element by element on a chunk of `ranks` parts: what ranks copy in, read, write and copy out.
        copied = sum(1 for rank, part in itertools.product(range(ranks), repeat=2) if rank != part)
        read = sum(1 for rank, peer in itertools.product(range(ranks), repeat=2) if rank != peer)
        written, taken = ranks, ranks * ranks
        assert slot_passes(ranks, 1 << 20) * ranks * ranks == pytest.approx(copied + read + written + taken)
    assert slot_passes(2, 1 << 20) == 3
    assert slot_passes(1, 1 << 20) == 0


def test_large_data_moves_at_the_memorys_speed_and_small_data_at_the_caches():
    known = machine(memory=10e9, cache=100e9)
    assert memory_bound_s(1, 1e6, known) == pytest.approx(2e6 / 100e9)
    assert memory_bound_s(1, 1e12, known) == pytest.approx(2e12 / 10e9, rel=1e-4)


@given(MACHINES, st.integers(1, 8), st.integers(1, 16), st.integers(1, 1 << 28), st.sampled_from([1, 2, 5]))
def test_choice_is_near_the_best_of_a_finer_grid(known, ranks, cores, size, nodes):
    best = choose(ranks, cores, size, known, num_nodes=nodes)
    most = 1 if nodes > 1 else max(1, min(8, cores // ranks))
    # Every half and three-quarter step between the powers of two, and every number of threads.
    chunks = [(4 << 10) * 2 ** (step / 4) for step in range(41)]
    tried = min(
        all_reduce_s(ranks, cores, size, chunk, threads, known, nodes)
        for chunk, threads in itertools.product(chunks, range(1, most + 1))
    )
    assert best.time_s <= 1.25 * tried
    powers = [4096 << step for step in range(11)]
    same = [
        all_reduce_s(ranks, cores, size, chunk, threads, known, nodes)
        for chunk, threads in itertools.product(powers, [n for n in (1, 2, 4, 8) if n <= most])
    ]
    assert best.time_s == min(same)


def test_costly_wake_ups_make_chunks_larger_and_a_small_cache_makes_them_smaller():
    cheap, dear = machine(wake_s=1e-6), machine(wake_s=200e-6)
    assert choose(4, 2, 64 << 20, cheap).chunk_bytes < choose(4, 2, 64 << 20, dear).chunk_bytes
    small = machine(memory=2e9).model_copy(update={"cache_bytes": float(1 << 20)})
    assert choose(2, 2, 64 << 20, small).chunk_bytes < choose(2, 2, 64 << 20, machine(memory=2e9)).chunk_bytes


def test_what_the_user_sets_is_kept():
    found = choose(2, 16, 64 << 20, machine(), chunk_bytes=12_345, num_threads=3)
    assert found[:2] == (12_345, 3)
    assert found.time_s == all_reduce_s(2, 16, 64 << 20, 12_345, 3, machine())


def test_chunks_never_outgrow_a_core_for_each_thread():
    for ranks, cores in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 64)):
        threads = choose(ranks, cores, 1 << 28, machine()).num_threads
        assert threads == 1 or threads * ranks <= cores


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_no_ranks_cores_or_nodes_is_one_line(numbers):
    ranks, cores, nodes = numbers
    with pytest.raises(CollectiveError, match="take 1 or more") as error:
        choose(ranks, cores, 1, machine(), num_nodes=nodes)
    assert "\n" not in str(error.value)


def test_a_cluster_adds_the_bounds_of_its_hosts():
    cluster = load_as(ClusterSpec, "fire-flyer-2")
    found = tuning.ceilings_bytes_per_s(2, 1 << 30, machine(), cluster, 8)
    expected = cluster_host_reduce_bounds(cluster, 8).bounds_bytes_per_s
    assert {name: found[name] for name in expected} == expected
    assert set(found) - set(expected) == {"memory"}
    # 320 GB/s over 24 passes, and 200 Gb/s shared by two directions of two trees (section IV).
    assert found["host memory"] == pytest.approx(13.3e9, rel=0.01)
    assert found["NIC"] == pytest.approx(12.5e9)


def test_calibration_measures_this_machine_and_is_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("COFIRE_CACHE", str(tmp_path / "cache"))
    assert tuning.load_calibration() == tuning.assumed_calibration()
    measured = tuning.calibrate()
    assert [row.copiers for row in measured.copies] == [n for n in (1, 2, 4, 8) if n <= tuning.available_cores()]
    for row in measured.copies:
        assert row.memory_bytes_per_s.label == row.cache_bytes_per_s.label == "measured"
        assert 1e8 < row.memory_bytes_per_s.value < 1e13
    assert 0 < measured.wake_up_s.value < 0.1
    tuning.save_calibration(measured)
    assert tuning.load_calibration() == measured
    tuning.calibration_file().write_text("copies = 3")
    assert tuning.load_calibration() == tuning.assumed_calibration()

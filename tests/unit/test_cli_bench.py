"""``cofire bench reduce`` as a user types it, with real ranks at tiny sizes; times themselves are not judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cofire.cli.main import main
from cofire.collectives import measure
from cofire.collectives.measure import ReduceSample, bus_factor, calls_per_sample, num_buffers, sample
from cofire.network.host import cluster_host_reduce_bounds
from cofire.spec import ClusterSpec, load_as


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["bench", "reduce", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_two_ranks_of_gloo_give_rows_whose_bandwidths_follow_from_their_times(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    picture = tmp_path / "reduce.png"
    words = ["--backend", "gloo", "--sizes", "4KiB,2MiB", "--repeats", "2", "--plot", str(picture)]
    found = run_json(capsys, *words, "--cluster", "fire-flyer-2")
    assert [(row["backend"], row["size_bytes"]) for row in found["rows"]] == [("gloo", 4096), ("gloo", 2 << 20)]
    for row in found["rows"]:
        assert row["algorithm_bytes_per_s"] == pytest.approx(row["size_bytes"] / row["time_s"]["value"])
        assert row["bus_bytes_per_s"] == pytest.approx(row["algorithm_bytes_per_s"] * 2 * (2 - 1) / 2)
        assert row["ratio"] == pytest.approx(row["algorithm_bytes_per_s"] / row["ceiling_bytes_per_s"])
        assert row["time_s"]["low"] <= row["time_s"]["value"] <= row["time_s"]["high"]
        assert row["cpu_s"] > 0
    assert [row["binds"] for row in found["rows"]][-1] == "memory"
    expected = cluster_host_reduce_bounds(load_as(ClusterSpec, "fire-flyer-2"))
    assert found["cluster"]["bounds_bytes_per_s"] == expected.bounds_bytes_per_s
    assert found["cluster"]["binds"] == "shared root port"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one rank, as torchrun describes it."""
    rendezvous = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(rendezvous.port)}
    for name, value in (world | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    yield
    assert not dist.is_initialized()


@pytest.mark.usefixtures("torchrun")
def test_torchruns_group_is_used_whatever_the_ranks_asked_for(capsys: pytest.CaptureFixture[str]):
    found = run_json(capsys, "--ranks", "5", "--backend", "gloo", "--sizes", "4KiB", "--repeats", "1")
    assert found["question"]["num_ranks"] == 1
    assert found["rows"][0]["bus_bytes_per_s"] == 0


@pytest.mark.usefixtures("torchrun")
def test_the_table_names_what_was_measured_and_the_modelled_hosts(capsys: pytest.CaptureFixture[str]):
    words = ["--backend", "gloo", "--sizes", "4KiB", "--dtype", "fp64", "--op", "max", "--cluster", "fire-flyer-2"]
    code, out, _ = run(capsys, *words, "--repeats", "1")
    assert code == 0
    for word in ("All-reduce (max) of fp64 by 1 ranks, measured", "4 KiB", "gloo", "Ceiling: every rank", "(binds)"):
        assert word in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sizes", "4KiB,many"], "--sizes 'many' is not a number"),
        (["--sizes", "6", "--backend", "gloo"], "6 bytes are no whole number of fp32; take 4"),
        (["--dtype", "fp12", "--backend", "gloo"], "dtype 'fp12' is not one of fp32"),
        (["--op", "median", "--backend", "gloo"], "op 'median' is not one of sum"),
        (["--backend", "carrier-pigeon"], "backend 'carrier-pigeon' is not one of"),
        (["--cluster", "no-such-cluster", "--backend", "gloo"], "no-such-cluster"),
        (["--sizes", "0", "--backend", "gloo"], "sizes_bytes"),
    ],
)
def test_wrong_input_exits_2_with_one_line(capsys: pytest.CaptureFixture[str], words: list[str], says: str):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("cofire: ")]
    assert len(lines) == 1
    assert says in lines[0]


@pytest.mark.usefixtures("torchrun")
def test_a_type_that_the_backend_does_not_add_is_one_line(capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, "--sizes", "4KiB", "--backend", "gloo", "--dtype", "e4m3", "--repeats", "1")
    assert (code, out) == (2, "")
    assert "a rank failed" in err


def test_samples_take_the_slowest_rank_and_add_up_all_ranks_processors():
    calls: list[tuple[str, int]] = []
    sides = {name: (lambda number, name=name: calls.append((name, number))) for name in ("one", "two")}
    given = iter([[[0.1, 0.5], [0.3, 0.2]], [[1.0, 1.0], [2.0, 4.0]]] * 2)
    found = sample(sides, 4 << 20, 2, 2, lambda: None, lambda _: next(given))
    assert all(isinstance(row, ReduceSample) for row in found)
    assert [row.time_s.value for row in found] == [0.4, 0.4]  # of the slowest: 0.3 and 0.5
    assert [row.cpu_s for row in found] == [4.0, 4.0]  # of the sums: 3 and 5
    warm = num_buffers(4 << 20, 2)
    timed = [name for name, _ in calls[2 * warm :]]
    assert timed == ["one", "two", "one", "two"]
    assert {number for _, number in calls} == set(range(warm))


def test_large_data_comes_from_memory_and_little_is_called_often():
    for size in (4 << 10, 1 << 20, 16 << 20, 186 << 20):
        for ranks in (1, 2, 4, 16):
            assert 1 <= calls_per_sample(size) <= 200
            in_turn = num_buffers(size, ranks)
            assert 2 <= in_turn <= 8
            if size > measure.HOT_BYTES_MAX and in_turn < 8:
                assert in_turn * size * ranks >= 96 << 20
    assert bus_factor(4) == pytest.approx(1.5)

"""``cofire plan experts`` as a user types it; loads and placements in files, good and bad."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cofire.cli.experts import dealt_out
from cofire.cli.main import main
from cofire.errors import PlanError
from cofire.plan.expert_placement import Placement, evaluate_placement, place_experts, update_placement
from cofire.plan.placement_file import read_load, read_placement, write_placement

RNG = np.random.default_rng(7)
LOAD = RNG.lognormal(0, 1, (3, 32))
LATER = LOAD * RNG.uniform(0.6, 1.4, LOAD.shape)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", "experts", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.fixture
def load_file(tmp_path: Path) -> str:
    path = tmp_path / "load.npy"
    np.save(path, LOAD)
    return str(path)


def flat(text: str) -> str:
    """Take usage errors out of their box."""
    return " ".join(text.replace("\u2502", " ").split())


def equal(one: Placement, other: Placement) -> bool:
    names = ("physical_to_logical", "logical_to_physical", "replica_count")
    counts = ("num_devices", "num_nodes", "num_groups", "distinct")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names) and all(
        getattr(one, name) == getattr(other, name) for name in counts
    )


# -- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ([], {}),
        (["--greedy"], {"refine": False}),
        (["--distinct"], {"distinct": True}),
        (["--nodes", "2", "--groups", "4"], {"num_nodes": 2, "num_groups": 4}),
        (
            ["--nodes", "2", "--groups", "4", "--policy", "global"],
            {"num_nodes": 2, "num_groups": 4, "policy": "global"},
        ),
    ],
)
def test_json_is_the_placement_that_the_library_gives(
    capsys: pytest.CaptureFixture[str], load_file: str, words: list[str], fields: dict[str, Any]
) -> None:
    shown = run_json(capsys, load_file, "--replicas", "40", "--devices", "8", *words)
    expected = place_experts(LOAD, 40, 8, **fields)
    assert shown["placement"]["physical_to_logical"] == expected.physical_to_logical.tolist()
    assert shown["placement"]["replica_count"] == expected.replica_count.tolist()
    assert shown["imbalance_max"] == pytest.approx(expected.imbalance.max())
    assert shown["imbalance_mean"] == pytest.approx(expected.imbalance.mean())
    assert shown["moves"] == 0


def test_imbalance_shown_is_that_of_loads_summed_by_hand(capsys: pytest.CaptureFixture[str], load_file: str) -> None:
    shown = run_json(capsys, load_file, "--replicas", "40", "--devices", "8")
    for layer, slots in enumerate(shown["placement"]["physical_to_logical"]):
        count = Counter(slots)
        assert set(count) == set(range(32))
        device = [sum(LOAD[layer, e] / count[e] for e in slots[5 * d : 5 * d + 5]) for d in range(8)]
        assert shown["placement"]["imbalance"][layer] == pytest.approx(max(device) / (sum(device) / 8))
        alone = [LOAD[layer, 4 * d : 4 * d + 4].sum() for d in range(8)]
        assert shown["before"]["imbalance"][layer] == pytest.approx(max(alone) / (sum(alone) / 8))


def test_json_and_npy_of_the_same_load_give_the_same_plan(
    capsys: pytest.CaptureFixture[str], load_file: str, tmp_path: Path
) -> None:
    expected = run_json(capsys, load_file, "--replicas", "40", "--devices", "8")
    for name, value in (("rows.json", LOAD.tolist()), ("table.json", {"load": LOAD.tolist(), "step": 3})):
        (tmp_path / name).write_text(json.dumps(value))
        assert run_json(capsys, str(tmp_path / name), "--replicas", "40", "--devices", "8") == expected


def test_a_placement_in_use_is_adapted_in_few_moves(
    capsys: pytest.CaptureFixture[str], load_file: str, tmp_path: Path
) -> None:
    plan, later, after = (str(tmp_path / name) for name in ("plan.json", "later.json", "after.json"))
    assert run(capsys, load_file, "--replicas", "40", "--devices", "8", "--out", plan)[0] == 0
    Path(later).write_text(json.dumps(LATER.tolist()))
    first = place_experts(LOAD, 40, 8)
    for words, fields in (
        ([], {}),
        (["--max-moves", "2"], {"max_moves": 2}),
        (["--min-gain", "0.3"], {"min_gain": 0.3}),
    ):
        shown = run_json(capsys, later, "--previous", plan, *words, "--out", after)
        expected = update_placement(first, LATER, **fields)
        assert shown["moves"] == expected.moves
        assert shown["placement"]["physical_to_logical"] == expected.physical_to_logical.tolist()
        assert shown["before"]["imbalance"] == pytest.approx(evaluate_placement(first, LATER).imbalance.tolist())
        assert equal(read_placement(after, 32), expected)
    code, out, _ = run(capsys, later, "--previous", plan)
    assert code == 0
    assert f"Moves: {update_placement(first, LATER).moves} of 120 replicas" in out


def test_the_note_shows_imbalance_before_and_after(capsys: pytest.CaptureFixture[str], load_file: str) -> None:
    code, out, _ = run(capsys, load_file, "--replicas", "40", "--devices", "8")
    assert code == 0
    before, after = dealt_out(LOAD, 8), place_experts(LOAD, 40, 8).imbalance
    assert "3 layers of 32 experts: 40 replicas on 8 devices, 5 each" in out
    for value in (before.mean(), before.max(), after.mean(), after.max()):
        assert f"{value:.4f}" in out


# -- what is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[[1, 2], [3]]", "layer 1 has 1 experts, but layer 0 has 2"),
        ("[[1, -2]]", "load[0, 1] = -2 must be finite and not negative; use 0 for no load"),
        ("[[1, NaN]]", "load[0, 1] = nan must be finite"),
        ("[[1, Infinity]]", "load[0, 1] = inf must be finite"),
        ("[[1, true]]", "load[0, 1] = true is not a number"),
        ('[[1, "2"]]', 'load[0, 1] = "2" is not a number'),
        ("[[1, null]]", "load[0, 1] = null is not a number"),
        ("[[[1, 2]]]", "load[0, 0] = [1, 2] is not a number"),
        ("[[]]", "the load has shape [1, 0]"),
        ("[]", "the load has shape"),
        ("[[1, 2], 3]", "a load is a list of layers"),
        ("7", "a load is a list of layers"),
        ('{"loads": [[1]]}', 'has no key "load"'),
        ("[[1, 2]", "not valid JSON"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ("[[1" + "0" * 400 + "]]", "a number is too large"),
    ],
)
def test_a_load_that_is_none_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, text: str
) -> None:
    path = tmp_path / "load.json"
    path.write_text(content)
    code, out, err = run(capsys, str(path), "--replicas", "2", "--devices", "2")
    assert (code, out) == (2, "")
    assert text in err
    assert err.startswith("cofire: ")
    assert err.count("\n") == 1


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_an_array_of_objects_is_never_unpickled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    objects = np.empty((1, 2), dtype=object)
    objects[:] = Trap(sprung)
    np.save(tmp_path / "array.npy", objects, allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("array.npy", "pickle.npy"):
        code, _, err = run(capsys, str(tmp_path / name), "--replicas", "2", "--devices", "2")
        assert code == 2
        assert "not an array of numbers in numpy's .npy format" in err
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.ones((2, 3, 4)), "the load has shape [2, 3, 4]"),
        (np.ones((2, 0)), "the load has shape [2, 0]"),
        (np.array([["1", "2"]]), "holds <U1, but a load is integers or floating-point"),
        (np.ones((1, 2), dtype=complex), "holds complex128"),
        (np.ones((1, 2), dtype=bool), "holds bool"),
        (np.array([[1.0, np.nan]]), "load[0, 1] = nan must be finite"),
    ],
)
def test_an_array_that_is_no_load_says_what_it_is(tmp_path: Path, array: np.ndarray, text: str) -> None:
    np.save(tmp_path / "load.npy", array)
    with pytest.raises(PlanError, match=re.escape(text)):
        read_load(tmp_path / "load.npy")


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "load.npy"
    np.save(path, LOAD)
    data = path.read_bytes()
    header = data.replace(b"(3, 32)", b"(3, 9" + b"9" * 12 + b")")
    for damaged in (b"", data[:40], data[:-8], b"no array", header, data.replace(b"NUMPY", b"NOMPY")):
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(PlanError, match=r"load\.npy"):
                read_load(path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--replicas", "40"], "--devices: is needed for a first plan"),
        (["--devices", "8"], "--replicas: is needed for a first plan"),
        (["--replicas", "40", "--devices", "8", "--min-gain", "0.1"], "--min-gain: needs --previous"),
        (["--replicas", "40", "--devices", "8", "--out", "plan.txt"], "must end in .json"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(
    capsys: pytest.CaptureFixture[str], load_file: str, words: list[str], text: str
) -> None:
    code, _, err = run(capsys, load_file, *words)
    assert code == 2
    assert text in flat(err)


def test_options_of_a_first_plan_are_refused_with_a_previous_one(
    capsys: pytest.CaptureFixture[str], load_file: str, tmp_path: Path
) -> None:
    plan = str(tmp_path / "plan.json")
    write_placement(plan, place_experts(LOAD, 40, 8))
    for words in (["--greedy"], ["--distinct"], ["--nodes", "2"], ["--policy", "global"]):
        code, _, err = run(capsys, load_file, "--previous", plan, *words)
        assert code == 2
        assert f"{words[0]}: is taken from the placement" in flat(err)
    code, _, err = run(capsys, load_file, "--previous", plan, "--replicas", "48")
    assert code == 2
    assert "--replicas 48 differs from the 40 of" in err
    assert run(capsys, load_file, "--previous", plan, "--replicas", "40", "--devices", "8")[0] == 0


def test_counts_that_do_not_divide_name_the_nearest(capsys: pytest.CaptureFixture[str], load_file: str) -> None:
    code, out, err = run(capsys, load_file, "--replicas", "41", "--devices", "8")
    assert (code, out) == (2, "")
    assert "num_replicas = 41 must be a multiple of num_devices = 8" in err
    assert "nearest: 40" in err
    code, _, err = run(capsys, "nowhere.npy", "--replicas", "8", "--devices", "8")
    assert (code, err) == (2, "cofire: cannot read 'nowhere.npy': No such file or directory\n")
    code, _, err = run(capsys, load_file, "--replicas", "40", "--devices", "8", "--out", "/nowhere/plan.json")
    assert (code, err) == (2, "cofire: cannot write '/nowhere/plan.json': No such file or directory\n")


# -- placements in files -----------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 8, 4), (12, 16, 4), (6, 12, 3), (5, 8, 8)]))
def test_a_placement_comes_back_from_its_file(seed: int, shape: tuple[int, int, int]) -> None:
    import tempfile

    num_experts, replicas, devices = shape
    load = np.random.default_rng(seed).exponential(size=(2, num_experts))
    placement = place_experts(load, replicas, devices)
    with tempfile.TemporaryDirectory() as folder:
        write_placement(Path(folder) / "plan.json", placement)
        back = read_placement(Path(folder) / "plan.json", num_experts)
    assert equal(back, placement)
    assert np.allclose(evaluate_placement(back, load).device_load, placement.device_load)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "model"}, 'is no placement of kind "placement"'),
        ({"num_devices": 0}, "num_devices = 0 must be an integer of at least 1"),
        ({"num_devices": True}, "num_devices = true must be an integer"),
        ({"num_nodes": None}, "num_nodes = null must be an integer"),
        ({"num_devices": 7}, "num_devices = 7 must divide the 40 slots of a layer"),
        ({"distinct": 1}, "distinct = 1 must be true or false"),
        ({"physical_to_logical": []}, "physical_to_logical must be a list of layers"),
        ({"physical_to_logical": [[0, 1], [0]]}, "physical_to_logical must be a list of layers"),
        ({"physical_to_logical": [[0, 32] * 4]}, r"physical_to_logical\[0, 1\] = 32 must be an expert from 0 to 31"),
        ({"physical_to_logical": [[0, 1.5] * 4]}, r"physical_to_logical\[0, 1\] = 1.5 must be an expert"),
        ({"physical_to_logical": [[*range(31), 0]]}, "layer 0 has no slot for expert 31 of 32"),
    ],
)
def test_a_placement_that_breaks_a_rule_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    path = tmp_path / "plan.json"
    write_placement(path, place_experts(LOAD, 40, 8))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PlanError, match=text) as caught:
        read_placement(path, 32)
    assert "\n" not in str(caught.value)


def test_a_placement_of_another_model_is_refused(
    capsys: pytest.CaptureFixture[str], load_file: str, tmp_path: Path
) -> None:
    plan = str(tmp_path / "plan.json")
    write_placement(plan, place_experts(LOAD[:2], 40, 8))
    code, out, err = run(capsys, load_file, "--previous", plan)
    assert (code, out) == (2, "")
    assert "load has shape [3, 32], but the placement has [2, 32]" in err


def test_experts_dealt_out_alone_are_as_uneven_as_their_sums() -> None:
    load = np.array([[4.0, 1, 1, 2], [0, 0, 0, 0]])
    assert dealt_out(load, 2).tolist() == [5 / 4, 1]
    assert dealt_out(load, 8).tolist() == [4, 1]  # half of the devices have none
    assert dealt_out(load, 3).tolist() == [5 / (8 / 3), 1]

"""Co-design: the front against brute force, designs against the planner's own answers, files that were cut off."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import PlanError, SpecError
from cofire.plan.design_space import (
    MEASURES,
    Axis,
    SweepSpec,
    candidate,
    chosen_indices,
    default_axes,
    parse_axis,
    parse_objective,
)
from cofire.plan.layouts import SearchSpec, rank_layouts
from cofire.plan.page import render_page
from cofire.plan.parameters import count_parameters
from cofire.plan.pareto import knee, num_beaten, pareto_front, scaled, spread
from cofire.plan.serving import plan_serving
from cofire.plan.step import StepModel
from cofire.plan.sweep import SweepResult, best_step, decode, judge, most_throughput, prepare, run_sweep, timing_key
from cofire.plan.sweep_effects import axis_effects
from cofire.plan.sweep_report import reasons, remarks, sweep_page, trade
from cofire.spec import ClusterSpec, ModelSpec, ParallelSpec, WorkloadSpec, load_as

# Small integers, so that ties and equal designs are common.
COSTS = (
    st.integers(1, 4)
    .flatmap(
        lambda measures: st.lists(
            st.lists(st.integers(-3, 3), min_size=measures, max_size=measures), min_size=1, max_size=40
        )
    )
    .map(lambda rows: np.array(rows, np.float64))
)

VARY = (
    "model.moe.num_routed_experts=8,16,24",
    "model.moe.num_experts_per_token=2,4,6",
    "cluster.network.bandwidth_bytes_per_s=25e9,50e9",
)


def tiny(*vary: str, **changes: Any) -> SweepSpec:
    """A sweep that takes a second: tiny on two nodes, its layout given."""
    axes = tuple(parse_axis(text) for text in vary or VARY)
    table = {"budget": 16, "fixed": {"pp": 1, "tp": 1, "ep": 8}, **changes}
    return prepare(SweepSpec(model="tiny", cluster="h800-2048", axes=axes, **table))


@pytest.fixture(scope="module")
def result() -> SweepResult:
    return run_sweep(tiny())


def beats(one: list[float], other: list[float]) -> bool:
    no_worse = all(a <= b for a, b in zip(one, other, strict=True))
    return no_worse and any(a < b for a, b in zip(one, other, strict=True))


@given(COSTS)
def test_the_front_is_what_nothing_beats_when_all_pairs_are_compared(costs: np.ndarray) -> None:
    rows = costs.tolist()
    front = [i for i, row in enumerate(rows) if not any(beats(other, row) for other in rows)]
    assert pareto_front(costs) == front
    counts = [sum(beats(rows[i], other) for other in rows) for i in front]
    assert num_beaten(costs, front) == counts


@given(COSTS, st.integers(1, 6))
def test_the_knee_is_closest_to_the_ideal_and_the_spread_holds_it(costs: np.ndarray, limit: int) -> None:
    front = pareto_front(costs)
    places = scaled(costs[front])
    distances = [sum(x * x for x in row) for row in places.tolist()]
    assert distances[front.index(knee(costs, front))] == pytest.approx(min(distances))
    shown = spread(costs, front, limit)
    assert len(shown) == min(limit, len(front)) == len(set(shown))
    assert set(shown) <= set(front)
    assert knee(costs, front) in shown


@given(COSTS.map(lambda costs: costs + 4.0), st.floats(0.01, 100))
def test_the_knee_does_not_depend_on_units(costs: np.ndarray, factor: float) -> None:
    front = pareto_front(costs)
    assert scaled(costs * factor) == pytest.approx(scaled(costs), abs=1e-9)
    assert knee(np.round(scaled(costs * factor), 9), front) == knee(np.round(scaled(costs), 9), front)


def test_a_long_front_is_shown_with_the_best_of_each_measure() -> None:
    x = np.linspace(1, 100, 200)
    costs = np.stack([x, 1 / x, np.abs(x - 50)], axis=1)
    front = pareto_front(costs)
    shown = spread(costs, front, 8)
    assert len(front) == 200
    assert {int(costs[:, measure].argmin()) for measure in range(3)} <= set(shown)


def test_a_cost_that_is_no_number_is_refused() -> None:
    with pytest.raises(PlanError, match="design 1 has nan as measure 0"):
        pareto_front(np.array([[1.0], [np.nan]]))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("model.num_layers=4,8", [("4",), ("8",)]),
        ("model.num_layers=1:8:x2", [("1",), ("2",), ("4",), ("8",)]),
        ("model.num_layers=2:9:3,9", [("2",), ("5",), ("8",), ("9",)]),
        ("cluster=h800-2048,h100-8,h100-8", [("h800-2048",), ("h100-8",)]),
        ("model.moe.num_routed_experts/model.moe.expert_intermediate_size=8/64,16/32", [("8", "64"), ("16", "32")]),
    ],
)
def test_values_ranges_and_linked_paths_are_read(text: str, values: list[tuple[str, ...]]) -> None:
    assert list(parse_axis(text).values) == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model.moe.num_routed_expert=1,2", "nearest: model.moe.num_routed_experts"),
        ("cluster.network.planes=1,8", "nearest: cluster.network.num_planes"),
        (
            "modle.num_layers=1",
            "must be model, cluster, or begin with model., cluster. or workload.; nearest: model.num_layers",
        ),
        ("model.num_layers", "not of the form path=value,value"),
        ("model.num_layers=", "not of the form path=value,value"),
        ("model.num_layers=8:2:1", "must grow"),
        ("model.num_layers=1:9999:1", "more than 1000 values"),
        ("model.num_layers/model.hidden_size=1/2,3", "'3' must have 2 values"),
    ],
)
def test_a_bad_axis_is_one_line_with_the_nearest_fix(text: str, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_axis(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_objectives_have_a_way_that_can_be_turned_round() -> None:
    assert [parse_objective(name).better for name in ("usd", "total", "total:min")] == ["lower", "higher", "lower"]
    with pytest.raises(PlanError, match="nearest: tpot"):
        parse_objective("tpto")
    with pytest.raises(PlanError, match="must be min or max"):
        parse_objective("usd:least")


def test_the_grid_is_the_product_of_the_axes_and_each_design_is_what_set_gives() -> None:
    spec = tiny()
    wanted = list(itertools.product((8, 16, 24), (2, 4, 6), (25e9, 50e9)))
    assert spec.grid_size == len(wanted)
    for index, (experts, chosen, speed) in enumerate(wanted):
        changes = [f"moe.num_routed_experts={experts}", f"moe.num_experts_per_token={chosen}"]
        found = candidate(spec, index)
        if chosen > experts // 2:  # tiny's tokens reach 2 of 4 groups
            assert found.specs is None
            assert f"must be at most the {experts // 2} experts in 2 of 4 groups" in found.reason
            continue
        assert found.specs is not None
        assert found.specs.model == load_as(ModelSpec, "tiny", changes)
        nodes = ["num_nodes=2", "network.num_endpoints=none", f"network.bandwidth_bytes_per_s={speed}"]
        assert found.specs.cluster == load_as(ClusterSpec, "h800-2048", nodes)


def test_designs_that_break_a_rule_are_counted_with_the_reason(result: SweepResult) -> None:
    # 6 of 8 experts cannot be reached: 1 of 9 models, at 2 speeds.
    assert result.refused == {"spec": 2}
    assert reasons(result)[0][:2] == ("spec", 2)
    assert "num_experts_per_token = 6 must be at most the 4" in reasons(result)[0][2]
    assert sum(design.figures is None for design in result.designs) == 2


def test_a_sweep_whose_designs_are_all_refused_is_one_line() -> None:
    with pytest.raises(PlanError, match=r"^all 2 designs are refused, 2 by spec: tiny: moe\.num_experts_per_token"):
        run_sweep(tiny("model.moe.num_experts_per_token=900,1000"))


def test_figures_are_those_of_the_planner_asked_directly(result: SweepResult) -> None:
    for design in result.designs:
        specs, figures = candidate(result.spec, design.index).specs, design.figures
        if specs is None or figures is None:
            continue
        count = count_parameters(specs.model)
        assert figures.total_parameters == count.total
        assert figures.activated_parameters == count.activated_with_both_embeddings
        workload = specs.workload.model_copy(update={"global_batch_size": 8 * 16})
        step = StepModel(specs.model, specs.cluster, workload).estimate(figures.layout)
        assert figures.step_s == pytest.approx(step.step_s, rel=1e-12)
        serving = result.spec.serving.model_copy(
            update={"num_devices": figures.decode_devices, "tp": figures.decode_tp, "context_length": 512}
        )
        served = plan_serving(specs.model, specs.cluster, serving)
        assert served.tpot_s is not None
        assert figures.tpot_s == served.tpot_s.value


def test_the_front_of_a_sweep_is_beaten_by_none_of_its_designs(result: SweepResult) -> None:
    able = [design for design in result.designs if design.figures is not None]

    def costs(design: Any) -> list[float]:
        figures = design.figures
        return [
            -figures.total_parameters,
            -figures.activated_parameters,
            figures.usd_per_trillion_tokens,
            figures.tpot_s,
        ]

    front = [d.index for d in able if not any(beats(costs(other), costs(d)) for other in able)]
    assert [result.designs[place].index for place in result.front] == front
    assert result.knee in result.front


def test_a_faster_network_costs_its_share_of_the_rent(result: SweepResult) -> None:
    slow, fast = (result.designs[index].figures for index in (0, 1))
    assert slow is not None
    assert fast is not None
    assert fast.rent_usd_per_device_hour == pytest.approx(2.0)  # 50 GB/s is what is rented
    assert slow.network_usd_per_device is not None
    assert fast.network_usd_per_device == pytest.approx(2 * slow.network_usd_per_device)
    rent = 2.0 - slow.network_usd_per_device / (4 * 365 * 24)
    assert slow.rent_usd_per_device_hour == pytest.approx(rent)
    price = slow.device_hours_per_trillion_tokens * rent
    assert slow.usd_per_trillion_tokens == pytest.approx(price)


def test_intervals_hold_the_price_and_are_as_weak_as_the_rent(result: SweepResult) -> None:
    assert [one.index for one in result.intervals] == [result.designs[place].index for place in result.shown]
    for one in result.intervals:
        figures = result.designs[one.index].figures
        assert figures is not None
        assert one.value == pytest.approx(figures.usd_per_trillion_tokens)
        # The rent alone spans 1.5 to 3 of 2 dollars.
        assert one.low < 0.8 * one.value < 1.4 * one.value < one.high
        assert one.label == "assumed"


def test_eight_planes_reach_the_paper_s_endpoints_where_one_plane_is_refused() -> None:
    """ISCA'25, table 3: 16,384 endpoints at 4,390 dollars each; a two-layer tree of 64 ports ends at 2,048."""
    fixed = {"pp": 16, "tp": 1, "ep": 64, "schedule": "dualpipe", "recompute": "selective", "precision": "fp8"}
    spec = SweepSpec(
        model="deepseek-v3",
        cluster="h800-2048",
        axes=(parse_axis("cluster.network.num_planes=1,8"),),
        fixed=fixed,
        budget=16384,
    )
    found = run_sweep(spec)
    one, eight = found.designs
    assert found.refused == {"network": 1}
    assert one.refusal == "network"
    assert eight.figures is not None
    assert eight.figures.network_usd_per_device == pytest.approx(4390, rel=0.005)


def test_designs_that_share_a_search_have_equal_steps() -> None:
    """Guards the grouping: whoever lets the step depend on the network's shape must change ``timing_key``."""
    axes = (
        parse_axis("cluster.network.topology/cluster.network.num_planes=multi_plane/8,multi_plane/1,fat_tree3/1"),
        parse_axis("cluster.network.switch_ports=64,128"),
        parse_axis("cluster.device_hour_usd=2,3"),
        parse_axis("cluster.network.bandwidth_bytes_per_s=50e9,25e9"),
    )
    spec = SweepSpec(
        model="deepseek-v3", cluster="h800-2048", axes=axes, workload=WorkloadSpec(global_batch_size=16384)
    )
    layout = ParallelSpec(pp=16, dp=128, ep=64, schedule="dualpipe", recompute="selective", precision="fp8")
    steps: dict[str, set[float]] = {}
    for index in range(spec.grid_size):
        specs = candidate(spec, index).specs
        assert specs is not None
        step = StepModel(specs.model, specs.cluster, specs.workload).estimate(layout)
        steps.setdefault(timing_key(specs), set()).add(step.step_s)
    assert [len(times) for times in steps.values()] == [1, 1]
    assert len(set.union(*steps.values())) == 2


@pytest.mark.parametrize(("model", "cluster"), [("tiny", "h100-8"), ("deepseek-v2-lite", "h100-8")])
def test_the_search_in_three_passes_is_within_one_percent_of_the_whole_search(model: str, cluster: str) -> None:
    specs = load_as(ModelSpec, model), load_as(ClusterSpec, cluster)
    workload = WorkloadSpec(sequence_length=512)
    whole = rank_layouts(*specs, workload, SearchSpec(), limit=1).best[0]
    assert best_step(*specs, workload).tokens_per_s > 0.99 * whole.tokens_per_s


def test_decoding_takes_the_smallest_instance_that_holds_it() -> None:
    model, cluster = load_as(ModelSpec, "deepseek-v3"), load_as(ClusterSpec, "h800-2048")
    asked = prepare(SweepSpec(model="deepseek-v3", cluster="h800-2048")).serving.model_copy(update={"num_devices": 4})
    served = decode(model, cluster, asked).serving
    assert served.num_devices in (8, 16, 32)
    for tp in (1, 2, 4):
        smaller = asked.model_copy(update={"num_devices": served.num_devices // 2, "tp": tp})
        with pytest.raises(PlanError):
            plan_serving(model, cluster, smaller)


def test_processes_and_one_process_give_the_same_result(result: SweepResult) -> None:
    assert run_sweep(tiny(), workers=2) == result


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepResult, bytes, Path]:
    spec = tiny("model.moe.num_routed_experts=8,16", "cluster.network.num_planes=1,8")
    path = tmp_path_factory.mktemp("sweep") / "sweep.jsonl"
    return run_sweep(spec, path=str(path)), path.read_bytes(), path


@settings(max_examples=10, deadline=None)
@given(st.floats(0, 1))
def test_a_file_cut_anywhere_goes_on_to_the_same_result(
    whole_file: tuple[SweepResult, bytes, Path], share: float
) -> None:
    whole, text, path = whole_file
    path.write_bytes(text[: int(share * len(text))])
    assert run_sweep(whole.spec, path=str(path)) == whole
    assert path.read_bytes() == text


def test_a_finished_file_is_not_estimated_again_and_a_larger_sample_goes_on(
    tmp_path: Path, result: SweepResult
) -> None:
    path, seen = tmp_path / "sweep.jsonl", []
    run_sweep(tiny(max_points=4), path=str(path), progress=lambda done, number: seen.append((done, number)))
    first = path.read_bytes()
    assert seen[0] == (0, 4)
    seen.clear()
    run_sweep(tiny(max_points=4), path=str(path), progress=lambda done, number: seen.append((done, number)))
    assert seen == [(4, 4)]
    larger = run_sweep(tiny(), path=str(path))
    assert path.read_bytes().startswith(first)
    assert larger == result


def test_a_file_of_another_sweep_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    run_sweep(tiny(max_points=2), path=str(path))
    before = path.read_bytes()
    with pytest.raises(PlanError, match="holds something else than this sweep"):
        run_sweep(tiny(tpot_limit_s=0.01), path=str(path))
    assert path.read_bytes() == before
    notes = tmp_path / "notes.jsonl"
    notes.write_text("my notes")
    with pytest.raises(PlanError, match="holds something else"):
        run_sweep(tiny(), path=str(notes))
    assert notes.read_text() == "my notes"


def test_a_record_that_was_edited_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    run_sweep(tiny(max_points=2), path=str(path))
    path.write_text(path.read_text().replace('"tpot_s"', '"tpto_s"'))
    with pytest.raises(SpecError, match=r"sweep\.jsonl: unknown key 'figures\.tpto_s'"):
        run_sweep(tiny(max_points=2), path=str(path))


def test_an_edited_model_file_begins_another_sweep(tmp_path: Path) -> None:
    model, path = tmp_path / "mine.toml", tmp_path / "sweep.jsonl"
    for layers, fits in ((3, True), (2, False)):
        model.write_text(f'base = "tiny"\nnum_layers = {layers}\n')
        spec = tiny(max_points=2).model_copy(update={"model": str(model)})
        if fits:
            run_sweep(spec, path=str(path))
            continue
        with pytest.raises(PlanError, match="holds something else"):
            run_sweep(spec, path=str(path))


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_killed_sweep_goes_on_to_the_same_result(tmp_path: Path, result: SweepResult) -> None:
    path, script = tmp_path / "sweep.jsonl", tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom cofire.plan.sweep import SweepSpec, run_sweep\n"
        "run_sweep(SweepSpec.model_validate_json(sys.argv[1]), path=sys.argv[2])\n"
    )
    child = subprocess.Popen([sys.executable, str(script), tiny().model_dump_json(), str(path)])
    while child.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert path.read_bytes().count(b"\n") >= 3
    assert run_sweep(tiny(), path=str(path)) == result
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert sorted(record["index"] for record in records) == list(range(18))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_workers_end_when_the_sweep_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\nfrom cofire.plan.sweep import SweepSpec, run_sweep\n"
        "wait = lambda done, number: print('ready', flush=True) or time.sleep(60)\n"
        "run_sweep(SweepSpec.model_validate_json(sys.argv[1]), workers=2, progress=wait)\n"
    )
    child = subprocess.Popen([sys.executable, str(script), tiny().model_dump_json()], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    workers = [int(word) for word in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    assert len(workers) == 2
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    for _ in range(1500):
        if not any(Path(f"/proc/{worker}").exists() and _runs(worker) for worker in workers):
            return
        time.sleep(0.01)
    pytest.fail(f"workers {workers} outlive the sweep")


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_file_in_use_is_refused(tmp_path: Path) -> None:
    from cofire.plan.sweep import fingerprint
    from cofire.plan.sweep_file import SweepFile

    path = tmp_path / "sweep.jsonl"
    with SweepFile(path, fingerprint(tiny())), pytest.raises(PlanError, match="written by another sweep"):
        run_sweep(tiny(), path=str(path))


def test_a_sample_is_fixed_by_its_seed() -> None:
    spec = tiny(max_points=5)
    assert chosen_indices(spec) == chosen_indices(spec)
    assert len(set(chosen_indices(spec))) == 5
    assert chosen_indices(spec) != chosen_indices(spec.model_copy(update={"seed": 1}))


def test_default_axes_hold_the_model_as_it_is_and_keep_the_rules() -> None:
    for model, cluster in (
        ("deepseek-v3", "h800-2048"),
        ("llama3.1-405b", "h100-8"),
        ("deepseekmoe-16b", "gb200-nvl72"),
    ):
        specs = load_as(ModelSpec, model), load_as(ClusterSpec, cluster)
        spec = SweepSpec(model=model, cluster=cluster, axes=default_axes(*specs))
        found = [candidate(spec, index).specs for index in range(spec.grid_size)]
        assert any(one is not None and (one.model, one.cluster) == specs for one in found)
        assert sum(one is not None for one in found) > 0.9 * len(found)


def test_mistakes_of_a_whole_sweep_are_one_line() -> None:
    twice = Axis(paths=("model.num_layers",), values=(("1",),))
    with pytest.raises(PlanError, match=r"model\.num_layers is varied twice"):
        prepare(SweepSpec(model="tiny", cluster="h100-8", axes=(twice, twice)))
    axes = tuple(parse_axis(f"model.{name}=1:30:1") for name in ("num_layers", "vocab_size", "hidden_size"))
    with pytest.raises(PlanError, match=r"the grid has 27,000 designs.*--max-points"):
        prepare(SweepSpec(model="tiny", cluster="h100-8", axes=axes))
    with pytest.raises(PlanError, match="nearest: h100-8"):
        prepare(SweepSpec(model="tiny", cluster="h100-9"))
    with pytest.raises(PlanError, match="budget = 4 devices are less than one node"):
        prepare(SweepSpec(model="tiny", cluster="h100-8", budget=4))
    with pytest.raises(SpecError, match="schedule"):
        prepare(SweepSpec(model="tiny", cluster="h100-8", fixed={"schedule": "1f2b"}))


def test_a_cluster_without_rent_says_so_and_can_be_swept_by_other_measures() -> None:
    free = {"changes": ("cluster.device_hour_usd=none",)}
    with pytest.raises(PlanError, match=r"has no rent; set cluster\.device_hour_usd=2"):
        run_sweep(tiny(**free))
    found = run_sweep(tiny(objectives=(parse_objective("total"), parse_objective("tpot")), **free))
    assert found.intervals == ()
    assert "sortable" in render_page(sweep_page(found))


def test_each_member_of_the_front_says_what_it_trades(result: SweepResult) -> None:
    said = {place: trade(result, result.designs[place]) for place in result.front}
    assert said[result.knee].startswith("the knee")
    costs = {place: result.designs[place].value("usd") for place in result.front}
    assert "least $ per 1e12 tokens" in said[min(costs, key=lambda place: costs[place] or 0.0)]
    assert all("against the knee" in text or "as the knee" in text for p, text in said.items() if p != result.knee)


def test_an_axis_moves_what_pairs_of_designs_that_differ_in_it_alone_say(result: SweepResult) -> None:
    able = {design.changed: design for design in result.designs if design.figures is not None}
    knee = dict(result.designs[result.knee].changed)
    effects = axis_effects(result)
    for one in effects:
        ratios = []
        for changed, design in able.items():
            fields = dict(changed)
            if fields[one.axis] == one.value[0]:
                other = able.get(tuple((fields | {one.axis: knee[one.axis]}).items()))
                if other is not None:
                    ratios.append((design.value("usd") or 0.0) / (other.value("usd") or 1.0))
        assert one.num_pairs == len(ratios)
        assert one.ratios["usd"] == pytest.approx(float(np.prod(ratios)) ** (1 / len(ratios)))
    # Every other value of each axis has an effect; the speed of ports has none on sizes.
    assert len(effects) == 2 + 2 + 1
    assert effects[-1].axis == "cluster.network.bandwidth_bytes_per_s"
    assert effects[-1].ratios["total"] == effects[-1].ratios["activated"] == 1.0


def test_the_default_batch_of_decoding_is_halved_until_the_design_as_given_holds_it() -> None:
    spec = prepare(SweepSpec(model="llama3.1-405b", cluster="h100-2048"))
    size = spec.serving.sequences_per_device
    model, cluster = load_as(ModelSpec, "llama3.1-405b"), load_as(ClusterSpec, "h100-2048")
    assert size < 32
    assert decode(model, cluster, spec.serving).serving.sequences_per_device == size
    with pytest.raises(PlanError, match="do not fit"):
        decode(model, cluster, spec.serving.model_copy(update={"sequences_per_device": 2 * size}))


def test_decoding_takes_the_fastest_tensor_parallel_degree_that_fits() -> None:
    """Eight do not fit: each device then holds the caches of eight times the sequences."""
    model, cluster = load_as(ModelSpec, "deepseek-v3"), load_as(ClusterSpec, "h800-2048")
    asked = SweepSpec(model="deepseek-v3", cluster="h800-2048").serving
    steps = [plan_serving(model, cluster, asked.model_copy(update={"tp": tp})).step_s.value for tp in (1, 2, 4)]
    assert decode(model, cluster, asked).step_s.value == min(steps)


def test_throughput_is_the_best_of_any_batch_and_degree_under_the_limit() -> None:
    model, cluster = load_as(ModelSpec, "deepseek-v3"), load_as(ClusterSpec, "h800-2048")
    asked = SweepSpec(model="deepseek-v3", cluster="h800-2048").serving
    best = most_throughput(model, cluster, asked, 1, 0.05)
    assert best is not None
    seen = []
    for tp, size in itertools.product((1, 2, 4, 8), range(1, 260)):
        try:
            plan = plan_serving(
                model, cluster, asked.model_copy(update={"tp": tp, "sequences_per_device": float(size)})
            )
        except PlanError:
            continue
        if plan.tpot_s is not None and plan.tpot_s.value <= 0.05:
            seen.append(plan.tokens_per_s_per_device.value)
    assert best.tokens_per_s_per_device.value >= max(seen)


def test_the_page_shows_every_design_the_axes_the_refusals_and_the_remarks(result: SweepResult) -> None:
    page = sweep_page(result)
    text = render_page(page)
    plot = page.sections[0].items[0]
    assert len(plot.points) == 16  # type: ignore[union-attr]
    assert {metric.name for metric in plot.metrics} >= {MEASURES[name].title for name in ("usd", "total", "tpot", "kv")}  # type: ignore[union-attr]
    for words in ("What was varied", "What was refused", "Parameters are not quality", "model.moe.num_routed_experts"):
        assert words in text
    assert all(remark in page.remarks for remark in remarks(result))


def test_the_judgement_of_known_designs_needs_no_estimate(result: SweepResult) -> None:
    asked = result.spec.model_copy(update={"objectives": (parse_objective("kv"), parse_objective("activated:min"))})
    judged = judge(asked, list(result.designs))
    fewest = min(design.value("activated") or 0.0 for design in judged.designs if design.figures is not None)
    # All caches are equal, so that the front is whatever activates least.
    assert {judged.designs[place].value("activated") for place in judged.front} == {fewest}

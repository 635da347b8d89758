"""Calibration and the prediction of a step, against PyTorch's own count, the planner's formula and an even device."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from cofire.cli.calibrate import calibrate
from cofire.errors import PlanError
from cofire.model import build
from cofire.model import linear as linear_module
from cofire.plan.flops import training_flops_per_token
from cofire.plan.machine import (
    MachineRates,
    RateTable,
    faster_recipe,
    figure_of,
    load_machine,
    machine_file,
    measure_with_numpy,
    predict_training_step,
    save_machine,
)
from cofire.plan.parameters import count_parameters
from cofire.plan.step_machine import PASSES, MatrixProduct, MemoryPass, padded_rows, training_operations
from cofire.precision import product as product_module
from cofire.spec import ClusterSpec, DeviceSpec, Figure, KernelRate, ModelSpec, RunSpec, load_as
from cofire.train import calibration


def _figure(value: float) -> Figure:
    return Figure(value=value, low=0.9 * value, high=1.1 * value, label="measured", source="a test")


def _device(**changes: object) -> DeviceSpec:
    """A device on which each product runs at 1 GFLOP/s, in BF16 at half of it, and each pass at 1 GB/s."""
    forms = ("forward", "input_gradient", "weight_gradient")
    products = [
        {"format": name, "form": form, "batch": batch, "m": 64, "n": 64, "k": 64, "flops_per_s": _figure(rate)}
        for name, rate, batches in (("fp32", 1e9, (1,)), ("bf16", 0.5e9, (1, 8)))
        for form in forms
        for batch in batches
    ]
    kernels = [KernelRate(kernel=kernel, size_bytes=4, bytes_per_s=_figure(1e9)) for kernel in PASSES]
    table = {
        "name": "even",
        "memory_bytes": 1e10,
        "memory_bandwidth_bytes_per_s": 1e9,
        "peak_flops_per_s": {"fp32": 1e9, "bf16": 0.5e9},
        "kernel_latency_s": {"value": 1e-6, "label": "measured"},
        "reserved_bytes": 1e8,
        "retained_share": {"value": 0.5, "low": 0.4, "high": 0.7, "label": "measured"},
        "matrix_rates": products,
        "kernel_rates": kernels,
    }
    return DeviceSpec.model_validate({**table, **changes})


def _cluster(**changes: object) -> ClusterSpec:
    return ClusterSpec(name="this-machine", devices_per_node=1, device=_device(**changes))


def _run(model: str, **changes: object) -> RunSpec:
    length = 256
    run = RunSpec(model=load_as(ModelSpec, model), batch_size=2, micro_batch_size=2)
    data = run.data.model_copy(update={"sequence_length": length})
    return RunSpec.model_validate({**run.model_copy(update={"data": data}).model_dump(), **changes})


# -- the table --------------------------------------------------------------------------------------


def test_a_table_gives_back_its_own_points() -> None:
    points = {(float(m), float(n)): 1e9 * (m + 3 * n) for m in (64, 256, 1024) for n in (32, 64)}
    table = RateTable(points)
    for at, rate in points.items():
        assert table.rate(*at) == pytest.approx(rate, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1.0, 1e6), min_size=4, max_size=4).map(sorted), st.floats(1, 1e5), st.floats(1, 1e5))
def test_between_rising_points_a_rate_rises(rates: list[float], x: float, y: float) -> None:
    table = RateTable({(size,): rate for size, rate in zip((10.0, 100.0, 1000.0, 10000.0), rates, strict=True)})
    low, high = sorted((x, y))
    assert table.rate(low) <= table.rate(high) * (1 + 1e-9)
    assert rates[0] * (1 - 1e-9) <= table.rate(x) <= rates[-1] * (1 + 1e-9)


def test_half_way_between_logarithms_a_rate_is_the_geometric_mean_of_the_corners() -> None:
    corners = {(a, b, c): 10.0 ** (i + 1) for i, (a, b, c) in enumerate(itertools.product((4.0, 16.0), repeat=3))}
    mean = math.exp(sum(math.log(rate) for rate in corners.values()) / 8)
    assert RateTable(corners).rate(8, 8, 8) == pytest.approx(mean)


def test_a_missing_corner_takes_the_nearest_measured_point() -> None:
    table = RateTable({(1.0, 1.0): 2.0, (1.0, 10.0): 4.0, (10.0, 1.0): 8.0, (1000.0, 10.0): 64.0})
    assert table.rate(10, 10) == pytest.approx(4.0)  # as near as (10, 1), and first in order
    assert table.rate(1000, 1) == pytest.approx(64.0)


def test_a_figure_holds_the_quartiles_of_its_samples() -> None:
    figure = figure_of([4.0, 1.0, 3.0, 2.0, 5.0], "five samples")
    assert (figure.low, figure.value, figure.high, figure.label) == (2.0, 3.0, 4.0, "measured")


# -- the operations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 100, 511, 512, 513, 4097])
def test_windows_have_the_rows_that_the_model_gives_them(rows: int) -> None:
    assert padded_rows(rows) == product_module.padded_rows(rows)


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["tiny", "small", "qwen2.5-72b"])
def test_useful_products_are_the_operations_of_the_planners_formula(model: str, recipe: str) -> None:
    """Apart from what the formula counts otherwise: norms and biases, MTP's lost positions, blocks of attention."""
    run = _run(model)
    spec, tokens, length = run.model, run.tokens_per_step, run.data.sequence_length
    products = [o for o in training_operations(run, recipe) if isinstance(o, MatrixProduct)]  # type: ignore[arg-type]
    core = sum(o.flops for o in products if o.part == "attention core")
    matrices = sum(o.flops * o.useful for o in products if o.part != "attention core")

    count, rule = count_parameters(spec), training_flops_per_token(spec, length)
    per_layer = 3 * length * spec.attention.num_heads * (spec.attention.qk_head_dim + spec.attention.v_head_dim)
    attention = spec.attention
    latents = (attention.q_lora_rank or 0) + attention.kv_lora_rank if attention.kind == "mla" else 0  # norms
    main = rule.matrices - 6 * (count.norms + count.router_bias + spec.num_layers * latents)
    bias = spec.moe.num_routed_experts if spec.moe else 0
    depth = count.mtp.depth
    mtp = rule.mtp - depth * per_layer - 6 * (count.mtp.norms + depth * (bias + latents))
    lost = mtp * run.batch_size if depth else 0
    if spec.attention.kind == "gqa":
        main -= 6 * _bias_numbers(spec)
    assert matrices == pytest.approx(main * tokens + mtp * tokens - lost, rel=1e-12)

    block = {"fp32": 256, "bf16": 128}[recipe]
    widths = 4 * spec.attention.qk_head_dim + 3 * spec.attention.v_head_dim

    def pairs(positions: int) -> int:
        ends = [min(start + block, positions) for start in range(0, positions, block)]
        return sum(end * (end - start) for start, end in zip(range(0, positions, block), ends, strict=True))

    total = spec.num_layers * pairs(length) + depth * pairs(length - 1)
    assert core == pytest.approx(2.0 * run.batch_size * spec.attention.num_heads * widths * total, rel=1e-12)


def _bias_numbers(spec: ModelSpec) -> int:
    attention = spec.attention
    if attention.kind != "gqa" or not attention.qkv_bias:
        return 0
    return spec.num_layers * (attention.num_heads + 2 * attention.num_key_value_heads) * attention.head_dim


def test_products_are_those_that_pytorch_counts_in_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run("tiny")
    for module in (linear_module, product_module):  # the counter does not know oneDNN's operator
        monkeypatch.setattr(module, "takes_onednn", lambda *_: False)
    decoder = build(run.model, seed=0).train()
    tokens = torch.randint(0, run.model.vocab_size, (2, run.data.sequence_length + 1))
    with FlopCounterMode(display=False) as counter:
        output = decoder.loss(tokens)
        output.loss.backward()
    loads = tuple(tuple(row) for row in output.expert_counts.tolist())
    products = [o for o in training_operations(run, "fp32", loads) if isinstance(o, MatrixProduct)]
    moe = run.model.moe
    assert moe is not None
    # Gates times rows, forward and for both gradients: a pass over memory to us.
    positions = run.model.num_moe_layers * 2 * 256 + 2 * 255
    gates = 3 * 2 * positions * moe.num_experts_per_token * run.model.hidden_size
    assert sum(o.flops for o in products) == counter.get_total_flops() - gates


def test_a_second_micro_batch_doubles_all_but_the_optimizer() -> None:
    one, two = (training_operations(_run("tiny", batch_size=n), "fp32") for n in (2, 4))
    counts = [sum(o.count for o in operations if o.part != "optimizer") for operations in (one, two)]
    assert counts[1] == 2 * counts[0]
    updates = [[o for o in ops if isinstance(o, MemoryPass) and o.kernel == "adamw"] for ops in (one, two)]
    assert updates[0] == updates[1]


def test_recomputation_is_refused_in_one_line() -> None:
    with pytest.raises(PlanError, match=r"recompute = 'full'.*set recompute=none"):
        training_operations(_run("tiny", recompute="full"), "fp32")


# -- the prediction ---------------------------------------------------------------------------------


def test_on_an_even_device_a_step_is_operations_over_rates() -> None:
    run = _run("tiny")
    operations = training_operations(run, "fp32")
    expected = 0.0
    for o in operations:
        expected += o.count * 3e-6
        expected += o.flops / 1e9 if isinstance(o, MatrixProduct) else o.count * o.size_bytes / 1e9
    found = predict_training_step(run, _cluster())
    assert found.recipe == "fp32"
    assert found.step_s.value == pytest.approx(expected)
    assert sum(part.total_s for part in found.parts) == pytest.approx(expected)
    assert found.step_s.low < found.step_s.value < found.step_s.high
    assert found.step_s.label == "measured"


def test_faster_products_make_a_shorter_step() -> None:
    device = _device()
    faster = [r.model_copy(update={"flops_per_s": _figure(3e9)}) for r in device.matrix_rates]
    slow, fast = (
        predict_training_step(_run("tiny"), _cluster(matrix_rates=rates)) for rates in (device.matrix_rates, faster)
    )
    gained = slow.step_s.value - fast.step_s.value
    assert gained == pytest.approx(slow.flops / 1e9 * 2 / 3)


def test_memory_is_the_sum_of_its_parts_and_ends_move_with_the_allocators_share() -> None:
    found = predict_training_step(_run("tiny"), _cluster())
    assert found.peak_memory_bytes.value == pytest.approx(sum(found.memory.values()))
    passing = found.memory["activations"] + found.memory["gradients"]
    assert found.peak_memory_bytes.high - found.peak_memory_bytes.value == pytest.approx(0.2 * passing)


def test_automatic_precision_takes_the_faster_format() -> None:
    assert faster_recipe(_device()) == "fp32"
    assert faster_recipe(_device(peak_flops_per_s={"fp32": 1e9, "bf16": 2e9})) == "bf16"


def test_a_call_below_the_smallest_measured_size_takes_no_less_than_that_size() -> None:
    kernels = [KernelRate(kernel="copy", size_bytes=size, bytes_per_s=_figure(size * 1e6)) for size in (1024, 4096)]
    rates = MachineRates(_device(kernel_rates=kernels))
    assert rates.seconds(MemoryPass("p", "copy", 1)) == pytest.approx(1e-6)
    assert rates.seconds(MemoryPass("p", "copy", 512, count=3)) == pytest.approx(3e-6)


# -- what is kept -----------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COFIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_kept_machine_is_read_back_equal(own_cache: Path) -> None:
    cluster = _cluster()
    assert save_machine(cluster) == own_cache / "this-machine.toml"
    assert load_machine() == cluster


def test_without_calibration_the_command_that_makes_it_is_named(own_cache: Path) -> None:
    with pytest.raises(PlanError, match=r"not calibrated.*cofire plan calibrate"):
        load_machine()


@pytest.mark.parametrize("text", ["kind = ", 'kind = "model"', 'kind = "cluster"\nname = "x"\n'])
def test_a_damaged_file_is_one_line_that_names_it(own_cache: Path, text: str) -> None:
    own_cache.mkdir()
    machine_file().write_text(text)
    with pytest.raises(PlanError) as caught:
        load_machine()
    assert "\n" not in str(caught.value)
    assert "this-machine.toml" in str(caught.value)
    assert "calibrate --again" in str(caught.value)


def test_numpy_alone_measures_what_it_can_and_a_prediction_says_what_is_missing() -> None:
    cluster = measure_with_numpy()
    rates = [r.flops_per_s for r in cluster.device.matrix_rates]
    assert {r.label for r in rates} == {"measured"}
    assert all(0 < r.low <= r.high for r in rates)
    with pytest.raises(PlanError, match=r"no measured rate.*with PyTorch installed"):
        predict_training_step(_run("tiny"), cluster)


def test_a_calibration_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = calibration.Journal(path)
    assert first.values("a", lambda: [1.0, 2.0]) == [1.0, 2.0]
    with path.open("a") as file:
        file.write('{"key": "b", "samp')  # killed while it wrote
    second = calibration.Journal(path)
    assert second.values("a", lambda: [9.0]) == [1.0, 2.0]
    assert second.values("b", lambda: [3.0]) == [3.0]
    assert calibration.Journal(path).values("b", lambda: [9.0]) == [3.0]
    assert calibration.Journal(path, again=True).values("a", lambda: [9.0]) == [9.0]


def test_samples_of_another_machine_state_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    calibration.Journal(path).values("a", lambda: [1.0])
    monkeypatch.setattr(calibration.socket, "gethostname", lambda: "elsewhere")
    assert calibration.Journal(path).values("a", lambda: [9.0]) == [9.0]


@pytest.mark.parametrize("form", ["forward", "input_gradient", "weight_gradient"])
@pytest.mark.parametrize(("name", "batch"), [("fp32", 1), ("bf16", 1), ("bf16", 3)])
def test_a_measured_product_has_the_shape_that_its_key_says(form: str, name: str, batch: int) -> None:
    (call, *_) = calibration.product_calls(name, form, batch, 6, 10, 4)  # type: ignore[arg-type]
    y = call()
    assert isinstance(y, torch.Tensor)
    assert y.shape == ((6, 10) if batch == 1 else (batch, 6, 10))
    assert y.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


@pytest.mark.parametrize("kernel", PASSES)
def test_every_kernel_of_a_step_can_be_timed(kernel: str) -> None:
    times = calibration.seconds(calibration.kernel_calls(kernel, 1 << 14)[:2])
    assert len(times) == 5
    assert min(times) > 0


def test_calls_take_turns_and_the_first_round_is_not_timed() -> None:
    made: list[str] = []
    times = calibration.seconds([lambda: made.append("a"), lambda: made.append("b")])
    assert made[:2] == ["a", "b"]
    timed = made[3:]  # two of the first round, one that sizes the samples
    assert timed == ["a" if i % 2 == 0 else "b" for i in range(len(timed))]
    assert len(timed) % len(times) == 0


def test_calibration_of_a_few_operations_becomes_a_cluster_that_is_read_back(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [t for t in calibration._product_tasks() if " 64 64 64" in t[0]]
    monkeypatch.setattr(calibration, "_product_tasks", lambda: tasks)
    monkeypatch.setattr(calibration, "_KERNEL_NUMBERS", (1 << 14,))
    shares = {"0": 0.3, "1": 0.1, "2": 0.2}
    memory = {seed: {"reserved_bytes": 2e8, "retained_share": share} for seed, share in shares.items()}
    monkeypatch.setattr(calibration, "_child", lambda _name, seed: memory[seed])
    monkeypatch.setattr(calibration, "_all_reduce", lambda: {"16": [2e-4] * 3, str(1 << 22): [0.016777216] * 3})
    seen: list[float] = []
    cluster = calibration.calibrate(lambda _what, part: seen.append(part))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert not list(own_cache.glob("*.partial.jsonl"))
    assert cluster.scale_up is not None
    assert cluster.scale_up.bandwidth_bytes_per_s == pytest.approx(1e9)
    assert cluster.scale_up.latency_s.value == pytest.approx(1e-4)
    assert cluster.device.retained_share.value == 0.2
    save_machine(cluster)
    assert load_machine() == cluster
    for recipe in ("fp32", "bf16"):
        run = _run("tiny", precision={"recipe": recipe})
        assert predict_training_step(run, cluster).step_s.value > 0


@pytest.mark.slow
def test_two_processes_reduce_over_loopback() -> None:
    times = calibration._all_reduce()
    assert {len(samples) for samples in times.values()} == {5}
    assert all(t > 0 for samples in times.values() for t in samples)


def test_a_rehearsed_step_leaves_no_gradient_and_the_weights_as_they_were() -> None:
    x = torch.randn(64, 8)
    weights = [(torch.randn(4, 12, 8, requires_grad=True), torch.randn(4, 8, 6, requires_grad=True)) for _ in range(2)]
    before = [w.detach().clone() for pair in weights for w in pair]
    calibration.rehearse_step(x, weights)
    assert all(w.grad is None for pair in weights for w in pair)
    assert all(torch.equal(a, b) for a, b in zip(before, (w for pair in weights for w in pair), strict=True))


def test_what_is_kept_after_the_last_round_is_a_share_of_the_tensors_that_come_and_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([1e9, 1.4e9])
    monkeypatch.setattr(calibration, "_resident_bytes", lambda: next(sizes))
    for name, value in (("_REHEARSALS", 4), ("_LAYERS", 2), ("_EXPERTS", 2), ("_ROWS", 64), ("_HIDDEN", 8)):
        monkeypatch.setattr(calibration, name, value)
    calibration.print_memory()
    found = json.loads(capsys.readouterr().out)
    matrices = 4 * 2 * 2 * (2 * 128 * 8 + 8 * 128)  # layers, experts, gate and up beside down
    passing = 4 * 2 * 64 * (8 + 3 * 128) + matrices
    assert found["reserved_bytes"] == 1e9 - matrices - 4 * 64 * 8
    assert found["retained_share"] == pytest.approx(4e8 / passing - 1)


# -- the command ------------------------------------------------------------------------------------


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(calibrate)
    return app


def test_a_known_machine_is_shown_and_not_measured_again(
    own_cache: Path, app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_machine(_cluster())
    monkeypatch.setattr(calibration, "calibrate", lambda *_: pytest.fail("measured again"))
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0, result.output
    assert "already measured" in result.stdout
    assert "best product, fp32" in result.stdout
    printed = json.loads(CliRunner().invoke(app, ["--json"]).stdout)
    assert ClusterSpec.model_validate(printed) == _cluster()


def test_without_pytorch_the_command_measures_with_numpy_and_says_so(
    own_cache: Path, app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = CliRunner().invoke(app, ["--again"])
    assert result.exit_code == 0, result.output
    assert "PyTorch is not installed" in result.stderr
    assert load_machine().description == "without PyTorch"


def test_a_damaged_file_stops_the_command_until_it_is_told_to_measure_again(own_cache: Path, app: typer.Typer) -> None:
    own_cache.mkdir()
    machine_file().write_text("kind = ")
    assert isinstance(CliRunner().invoke(app, []).exception, PlanError)

"""Health of quantised tensors: counted by hand, and written to the log of a run in FP8."""

from __future__ import annotations

import json
import math

import pytest
import torch

from cofire.precision.health import Watch, summary, tensor_health
from cofire.precision.quantize import TILE, round_values
from cofire.spec import RunSpec, load_as
from cofire.train import fit, metrics


def test_lost_and_broken_values_are_counted_as_a_loop_counts_them():
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    x[0, :50] *= 1e-7
    x[1, 200] = math.inf
    x[2] = 0.0
    y = round_values(x, TILE)
    found = tensor_health("layer", "input", x, y)
    pairs = list(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
    finite = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    alive = [(a, b) for a, b in finite if a != 0]
    assert found.broken == pytest.approx(1 - len(finite) / len(pairs))
    assert found.broken == pytest.approx(128 / x.numel())
    assert found.underflow == pytest.approx(sum(b == 0 for _, b in alive) / len(alive))
    assert found.underflow > 0
    noise = sum((a - b) ** 2 for a, b in finite)
    assert found.snr_db == pytest.approx(10 * math.log10(sum(a * a for a, _ in finite) / noise), abs=1e-6)
    tiles = [row[first : first + 128] for row in x.nan_to_num(0, 0, 0).tolist() for first in (0, 128, 256)]
    exponents = [math.frexp(max(map(abs, tile)))[1] for tile in tiles if any(tile)]
    assert found.amax == {e: exponents.count(e) for e in sorted(set(exponents))}


def test_a_tensor_that_loses_nothing_has_no_ratio_and_zeros_are_no_loss():
    found = tensor_health("l", "weight", torch.ones(2, 128), torch.ones(2, 128))
    assert (found.underflow, found.broken, found.snr_db) == (0.0, 0.0, None)
    zeros = tensor_health("l", "weight", torch.zeros(2, 128), torch.zeros(2, 128))
    assert (zeros.underflow, zeros.snr_db, zeros.amax) == (0.0, None, {})


def test_a_watch_looks_only_while_it_is_active():
    watch = Watch()
    watch.see("a", "input", torch.ones(1, 4), torch.ones(1, 4))
    assert watch.take() == []
    watch.active = True
    watch.see("a", "input", torch.ones(1, 4), torch.zeros(1, 4))
    watch.see("a", "input", torch.ones(1, 4), torch.ones(1, 4))
    assert [row.underflow for row in watch.take()] == [0.0]
    assert watch.take() == []


def test_a_run_in_fp8_logs_the_health_of_every_quantised_tensor(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for i in range(40):
        lines = (f"line {j} of file {i}: {i * j % 97}\n" for j in range(60))
        (tmp_path / "text" / f"{i}.txt").write_text("".join(lines))
    overrides = {
        "data.paths": f'["{tmp_path}/text"]',
        "data.cache": str(tmp_path / "cache"),
        "data.sequence_length": "32",
        "model.vocab_size": "300",
        "data.validation_fraction": "0.1",
        "steps": "4",
        "batch_size": "4",
        "micro_batch_size": "2",
        "validate_every_steps": "2",
        "validation_sequences": "2",
        "precision.recipe": "fp8",
    }
    run = load_as(RunSpec, "tiny", [f"{path}={value}" for path, value in overrides.items()])
    fit(run, tmp_path / "run")
    # What multiplies faster is measured; a resumed run must not ask again.
    monkeypatch.setattr(metrics, "choose_recipe", lambda device: pytest.fail("asked again"))
    fit(run.model_copy(update={"steps": 6}), tmp_path / "run", resume=True)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [event for event in events if event["event"] == "precision"]
    assert [event["step"] for event in seen] == [2, 4, 6]
    for event in seen:
        kinds = {(row["layer"], row["tensor"]) for row in event["tensors"]}
        layers = {layer for layer, _ in kinds}
        assert kinds == {(layer, tensor) for layer in layers for tensor in ("input", "weight", "gradient")}
        assert "layers.0.attention.output" in layers
        assert 20 < event["input_snr_min_db"] < 45
        assert event["weight_broken_max"] == 0.0
    assert all(not (event["event"] == "step" and "tensors" in event) for event in events)


def test_a_summary_names_the_worst_of_each_kind():
    rows = [
        tensor_health("a", "input", torch.ones(1, 4), torch.full((1, 4), 0.9)),
        tensor_health("b", "input", torch.ones(1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.0]])),
    ]
    found = summary(rows)
    assert found["input_snr_min_db"] == pytest.approx(20 * math.log10(2), abs=1e-4)
    assert found["input_underflow_max"] == 0.25
    assert [row["layer"] for row in found["tensors"]] == ["a", "b"]

"""The trainer on a very small model and corpus: what it writes, resumes, refuses and never computes twice."""

import json
import os
import pickle
import signal
import threading
import time

import pytest
import torch

from cofire.errors import ServeError, TrainError
from cofire.model import build
from cofire.model.weights import SafeReader, damage, load_decoder, newest_checkpoint
from cofire.spec import RunSpec, load_as
from cofire.train import fit
from cofire.train.checkpoint import CheckpointStore
from cofire.train.trainer import Trainer
from cofire.train.view import SilentView


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text("".join(f"line {j} of file {i}: {i * j % 97}\n" for j in range(60)))
    return folder


def _run(corpus, *overrides: str) -> RunSpec:
    return load_as(
        RunSpec,
        "tiny",
        [
            f'data.paths=["{corpus}/text"]',
            f"data.cache={corpus}/cache",
            "data.sequence_length=32",
            "model.vocab_size=300",
            "data.validation_fraction=0.1",
            "steps=6",
            "batch_size=4",
            "micro_batch_size=2",
            "schedule.warmup_steps=2",
            "validate_every_steps=3",
            "validation_sequences=4",
            "checkpoint.every_steps=2",
            "precision.recipe=fp32",
            *overrides,
        ],
    )


def _state(folder):
    decoder = load_decoder(folder)
    return decoder.state_dict()


def _events(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


class StopAt:
    """Asks to stop once it was looked at a number of times."""

    def __init__(self, looks):
        self.looks = looks

    def requested(self):
        self.looks -= 1
        return "test" if self.looks < 0 else None


def test_a_run_leaves_model_metrics_and_report(tmp_path, corpus):
    result = fit(_run(corpus), tmp_path / "run")
    assert result.reason == "finished"
    assert result.step == 6
    assert result.tokens == 6 * 4 * 32
    for name in ("run.toml", "plan.json", "metrics.jsonl", "tokenizer.json", "report.html", "model/config.json"):
        assert (tmp_path / "run" / name).is_file(), name
    assert [event["step"] for event in _events(tmp_path / "run", "step")] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in _events(tmp_path / "run", "validation")] == [3, 6]
    saved = _state(tmp_path / "run")
    for name, value in load_decoder(tmp_path / "run" / "model").state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("extra", [(), ("precision.moments=bf16", "ema_decay=0.9", "precision.recipe=bf16")])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, corpus, extra):
    run = _run(corpus, *extra)
    fit(run, tmp_path / "whole")
    stopped = fit(run, tmp_path / "parts", signals=[StopAt(3)])
    assert stopped.reason == "stopped by test"
    assert stopped.step == 3
    fit(run, tmp_path / "parts", resume=True)
    whole, parts = _state(tmp_path / "whole"), _state(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for name in ("step", "validation"):
        for a, b in zip(_events(tmp_path / "whole", name), _events(tmp_path / "parts", name), strict=True):
            for key in ("step", "main_loss", "loss", "ema_loss"):
                assert a.get(key) == b.get(key)


def test_the_averaged_weights_are_validated_and_training_goes_on_with_its_own(tmp_path, corpus):
    """Compared with a run without an average, and with the average formed by hand from every step's weights."""
    run = _run(corpus, "ema_decay=0.5", "checkpoint.every_steps=1", "checkpoint.keep=10", "validate_every_steps=6")
    fit(run, tmp_path / "averaged")
    fit(_run(corpus), tmp_path / "plain")
    own, plain = _state(tmp_path / "averaged"), _state(tmp_path / "plain")
    assert all(torch.equal(own[name], plain[name]) for name in own)
    decoder = build(run.model, seed=run.seed)
    average = {name: value.detach().clone() for name, value in decoder.named_parameters()}
    for step in range(1, 7):
        state = load_decoder(tmp_path / "averaged" / "checkpoints" / f"step-{step:08d}").state_dict()
        average = {name: 0.5 * value + 0.5 * state[name] for name, value in average.items()}
    decoder.load_state_dict({**own, **average})  # selection biases are buffers: those of the last step
    trainer = Trainer(run, tmp_path / "averaged", True, SilentView())
    losses = [decoder.eval().loss(tokens) for tokens in trainer.validation]
    trainer.close()
    sizes = [tokens.shape[0] for tokens in trainer.validation]
    by_hand = sum(n * loss.main_loss.item() for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    (event,) = _events(tmp_path / "averaged", "validation")
    assert event["ema_loss"] == pytest.approx(by_hand, rel=1e-5)
    assert event["ema_loss"] != event["loss"]


def test_micro_batches_add_up_to_the_whole_batch_and_biases_move_once_per_step(tmp_path, corpus):
    """With epsilon far above the gradients an AdamW step is proportional to the gradient, so steps compare."""
    settings = ("steps=1", "optimizer.epsilon=1.0", "optimizer.learning_rate=1.0", "optimizer.weight_decay=0.0")
    settings += ("schedule.warmup_steps=0", "optimizer.clip_norm=1e9", "schedule.kind=constant")
    decoders = []
    for size in (1, 4):
        fit(_run(corpus, f"micro_batch_size={size}", *settings), tmp_path / f"run{size}")
        decoders.append(load_decoder(tmp_path / f"run{size}"))
    start = build(decoders[0].spec, seed=0)
    for a, b, before in zip(decoders[0].parameters(), decoders[1].parameters(), start.parameters(), strict=True):
        assert not torch.equal(a, before)
        torch.testing.assert_close(a - before, b - before, rtol=1e-3, atol=2e-6)
    rate = float(torch.tensor(decoders[0].spec.moe.balance.bias_update_rate))
    for one, other in zip(decoders[0].moe_routers(), decoders[1].moe_routers(), strict=True):
        assert torch.equal(one.bias, other.bias)
        assert set(one.bias.abs().tolist()) <= {0.0, rate}


def test_full_recomputation_changes_neither_losses_nor_loads(tmp_path, corpus):
    for recompute in ("none", "full"):
        fit(_run(corpus, f"recompute={recompute}"), tmp_path / recompute)
    for a, b in zip(_events(tmp_path / "none", "step"), _events(tmp_path / "full", "step"), strict=True):
        assert a["main_loss"] == b["main_loss"]
        assert a["max_violation"] == b["max_violation"]


def test_the_router_bias_gets_no_gradient_and_is_in_the_checkpoint(tmp_path, corpus):
    fit(_run(corpus), tmp_path / "run")
    decoder = load_decoder(tmp_path / "run")
    assert all(not router.bias.requires_grad for router in decoder.moe_routers())
    assert any(router.bias.abs().max() > 0 for router in decoder.moe_routers())


def test_sigterm_saves_and_a_resumed_run_finishes(tmp_path, corpus):
    run = _run(corpus, "steps=400", "checkpoint.every_steps=300", "validate_every_steps=400")
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    result = fit(run, tmp_path / "run")
    timer.join()
    assert result.reason == "stopped by SIGTERM"
    assert 0 < result.step < 400
    assert newest_checkpoint(tmp_path / "run").name == f"step-{result.step:08d}"


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, corpus):
    fit(_run(corpus), tmp_path / "run")
    newest = newest_checkpoint(tmp_path / "run")
    shard = next((newest / "state").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-7])
    assert "differs" in damage(newest)
    assert newest_checkpoint(tmp_path / "run") != newest
    with pytest.raises(ServeError, match="is damaged"):
        load_decoder(newest)


def test_a_checkpoint_whose_index_names_a_foreign_type_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch /tmp/never",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match="no place"):
        SafeReader(str(tmp_path)).read_metadata()


def test_a_folder_that_holds_a_run_needs_resume_and_the_same_settings(tmp_path, corpus):
    fit(_run(corpus, "steps=2"), tmp_path / "run")
    with pytest.raises(TrainError, match="--resume"):
        fit(_run(corpus, "steps=2"), tmp_path / "run")
    with pytest.raises(TrainError, match=r"optimizer\.learning_rate = 0\.001, not 0\.5"):
        fit(_run(corpus, "optimizer.learning_rate=0.5"), tmp_path / "run", resume=True)
    assert fit(_run(corpus, "steps=4"), tmp_path / "run", resume=True).step == 4


def test_a_folder_with_foreign_files_is_left_alone(tmp_path, corpus):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(TrainError, match="is not empty"):
        fit(_run(corpus), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_checkpoint_of_another_model_is_refused_by_the_field_that_differs(tmp_path, corpus):
    fit(_run(corpus, "steps=2"), tmp_path / "run")
    other = _run(corpus, "model.moe.num_experts_per_token=1").model
    store = CheckpointStore(tmp_path / "run", other, keep=1)
    with pytest.raises(TrainError, match=r"num_experts_per_token = 2 there, 1 here"):
        store.restore(store.newest(), {})


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(tmp_path, corpus, monkeypatch):
    run = _run(corpus)
    fit(_run(corpus, "steps=2"), tmp_path / "run")
    store = CheckpointStore(tmp_path / "run", run.model, keep=2)
    before = store.newest()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cofire.train.checkpoint.dcp.save", full)
    store.save(9, {"model": {"w": torch.zeros(2)}}, {}, asynchronous=True)
    with pytest.raises(TrainError, match="No space left on device"):
        store.wait()
    assert store.newest() == before
    assert [p.name for p in before.parent.iterdir() if p.name.startswith(".")] == []


def test_too_little_memory_is_said_before_anything_is_allocated(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("cofire.train.metrics.available_memory_bytes", lambda device: 1e6)
    monkeypatch.setattr("cofire.train.trainer.build", lambda *a, **k: pytest.fail("allocated"))
    with pytest.raises(TrainError, match="needs about"):
        fit(_run(corpus), tmp_path / "run")


def test_a_missing_corpus_and_several_processes_are_refused(tmp_path, corpus, monkeypatch):
    with pytest.raises(TrainError, match="nowhere"):
        fit(_run(corpus, 'data.paths=["/nowhere/at/all.txt"]'), tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="one process"):
        fit(_run(corpus), tmp_path / "other")


def test_asynchronous_checkpoints_hold_the_state_of_their_step(tmp_path, corpus):
    """Training goes on while a checkpoint is written; what it holds must not."""
    run = _run(corpus)
    store = CheckpointStore(tmp_path, run.model, keep=2)
    live = torch.zeros(1000, 1000)
    store.save(1, {"model": {"w": live}}, {"step": 1}, asynchronous=True)
    for _ in range(50):
        live += 1
        time.sleep(0.001)
    store.wait()
    into = {"model": {"w": torch.full((1000, 1000), -1.0)}}
    assert store.restore(store.newest(), into) == {"step": 1}
    assert torch.equal(into["model"]["w"], torch.zeros(1000, 1000))


def test_the_trainer_itself_costs_little(tmp_path, corpus):
    """The loop's own work (logging, view) is measured and printed; no bound, as machines differ."""
    trainer = Trainer(_run(corpus), _claimed(tmp_path), False, SilentView())
    start = time.perf_counter()
    loads = torch.ones(3, 8, dtype=torch.int64)
    trainer.recent = [1.0]
    for _ in range(20):
        trainer._log_step((1.0, [1.0], 0.0), loads, 1e-3, 1.0)
    print(f"logging one step: {(time.perf_counter() - start) / 20 * 1e3:.2f} ms")
    trainer.close()


def _claimed(folder):
    (folder / "run").mkdir()
    return folder / "run"

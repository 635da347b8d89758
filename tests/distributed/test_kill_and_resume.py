"""kill -9 at random moments, resume, and compare with a run that nobody touched.

``COFIRE_KILL_RUNS`` sets how many runs are killed (3 by default).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from cofire.model.weights import load_decoder

_STEPS = 40
_RUNS = int(os.environ.get("COFIRE_KILL_RUNS", "3"))


def _command(folder, corpus):
    settings = [
        f"data.cache={corpus}/cache",
        "data.sequence_length=32",
        "model.vocab_size=300",
        "data.validation_fraction=0.1",
        f"steps={_STEPS}",
        "batch_size=4",
        "micro_batch_size=2",
        "schedule.warmup_steps=4",
        "validate_every_steps=10",
        "validation_sequences=4",
        "checkpoint.every_steps=3",
        "precision.recipe=fp32",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "cofire", "train", "tiny", "--json", "--resume", "--out", str(folder), "--data",
            str(corpus / "text"), *words]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text("".join(f"{i} {j} {i * j % 89}\n" for j in range(80)))
    return folder


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def untouched(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untouched") / "run"
    done = subprocess.run(_command(folder, corpus), env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reason"] == "finished"
    return load_decoder(folder).state_dict(), _losses(folder)


def _losses(folder):
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(event["step"], event["main_loss"]) for event in events if event["event"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(_RUNS))
def test_a_killed_run_resumes_bit_for_bit(seed, corpus, untouched, tmp_path):
    chance = random.Random(seed)
    folder, kills = tmp_path / "run", 0
    for attempt in range(12):
        process = subprocess.Popen(
            _command(folder, corpus), env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if kills < 3:
            # Most of a process's life is start-up: wait for steps, then strike at a random moment.
            _wait_for_progress(process, folder)
            time.sleep(chance.random() * 0.8)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        _, error = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, f"attempt {attempt}: {error.decode()}"
    assert process.returncode == 0, f"seed {seed} never finished"
    assert kills >= 1, f"seed {seed} was never struck"
    state, losses = untouched
    resumed = load_decoder(folder).state_dict()
    assert all(torch.equal(state[name], resumed[name]) for name in state), f"seed {seed}"
    assert _losses(folder) == losses
    leftovers = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    assert leftovers == []


def _wait_for_progress(process, folder):
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.stat().st_mtime_ns > before and _losses_so_far(metrics):
            return
        time.sleep(0.01)


def _losses_so_far(metrics):
    return b'"event": "step"' in metrics.read_bytes()

"""The report reads a run folder, in any state that a run can leave behind, and writes one page and PNG files.

``write_run`` makes a run folder as the trainer does, with curves that look like a real run's: loss that falls
from ln(vocabulary), expert load drawn from a multinomial whose evenness grows. It needs no torch.
"""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cofire.errors import TrainError
from cofire.plan import estimate
from cofire.spec import MoESpec, RunSpec, dump, load_as
from cofire.spec.units import format_duration, format_quantity
from cofire.train.charts import Chart, HeatMap, figures
from cofire.train.load_floor import sampling_floor
from cofire.train.report import render_page, write_report
from cofire.train.run_record import read_run
from cofire.train.summary import headline, plan_rows, summarise

ENTROPY = 6.1
BYTES_PER_TOKEN = 3.3
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def run_spec(*overrides: str, steps: int = 120) -> RunSpec:
    return load_as(RunSpec, "demo", [f"steps={steps}", *overrides])


def start_event(run: RunSpec) -> dict:
    return {
        "event": "start",
        "time_s": 0.0,
        "run_name": run.name,
        "parameters_total": 13_400_000,
        "parameters_activated": 5_100_000,
        "matrix_peak_flops_per_s": 1.9e11,
        "dtype": "bfloat16",
        "unigram_entropy_nats": ENTROPY,
        "bytes_per_token": BYTES_PER_TOKEN,
        "train_tokens": 9_000_000,
        "validation_tokens": 180_000,
        "step": 0,
    }


def loss_at(step: int, steps: int) -> float:
    return 2.2 + (math.log(4096) - 2.2) * math.exp(-5.0 * step / steps)


def step_event(run: RunSpec, step: int, rng: np.random.Generator) -> dict:
    loss = loss_at(step, run.steps) + rng.normal(0, 0.06)
    event = {
        "event": "step",
        "step": step,
        "time_s": 1.1 * step,
        "loss": loss * 1.3,
        "main_loss": loss,
        "balance_loss": 1e-4,
        "mtp_losses": [loss + 0.6],
        "learning_rate": 1e-3 * min(1.0, step / 40),
        "grad_norm": 0.4 + 3 * math.exp(-step / 10) + rng.exponential(0.1),
        "tokens": step * run.tokens_per_step,
        "tokens_per_s": 3900 + rng.normal(0, 120),
        "mfu": 0.31 + rng.normal(0, 0.01),
    }
    moe = run.model.moe
    if moe is None:
        return event | {"mtp_losses": []}
    spread = 1.2 * math.exp(-3.0 * step / run.steps) + 0.03
    loads = []
    for layer in range(run.model.num_moe_layers + 1):
        preference = np.random.default_rng(layer).normal(0, spread, moe.num_routed_experts)
        shares = np.exp(preference) / np.exp(preference).sum()
        loads.append(rng.multinomial(run.tokens_per_step * moe.num_experts_per_token, shares) / 1.0)
    event["max_violation"] = [float(load.max() / load.mean() - 1) for load in loads]
    if step % 10 == 0:
        event["expert_load"] = [(load / load.sum()).round(5).tolist() for load in loads]
    return event


def validation_event(run: RunSpec, step: int) -> dict:
    loss = loss_at(step, run.steps) + 0.02
    event = {"event": "validation", "step": step, "loss": loss, "bits_per_byte": loss / math.log(2) / BYTES_PER_TOKEN}
    if run.model.moe is not None:
        event["max_violation_global"] = [
            *[1.5 * math.exp(-3 * step / run.steps) + 0.05] * run.model.num_moe_layers,
            40.0,  # the MTP module's own: not part of the run's one number
        ]
    return event | {"ema_loss": loss + 0.01}


def precision_event(step: int) -> dict:
    tensors = [
        {"layer": layer, "tensor": tensor, "underflow": 0.001 * k, "broken": 0.0, "snr_db": 30.0 + k, "amax": amax}
        for tensor in ("input", "weight", "gradient")
        for k, (layer, amax) in enumerate([("a", {-3: 98, 2: 2}), ("b", {-4: 60, -3: 40}), ("c", {-3: 100})])
    ]
    return {"event": "precision", "step": step, "time_s": 1.0 * step, "tensors": tensors}


def write_events(folder: Path, events: list[dict], tail: str = "") -> None:
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(text + tail, "utf-8")


def run_events(run: RunSpec, last: int | None = None, validated: bool = True, ended: bool = True) -> list[dict]:
    rng = np.random.default_rng(7)
    events = [start_event(run)]
    for step in range(1, (run.steps if last is None else last) + 1):
        events.append(step_event(run, step, rng))
        if validated and step % 20 == 0:
            events += [validation_event(run, step), {"event": "checkpoint", "step": step, "seconds": 0.2}]
    return [*events, {"event": "end", "step": events[-1]["step"], "reason": "finished"}] if ended else events


def write_run(folder: Path, run: RunSpec, events: list[dict] | None = None, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(dump(run), "utf-8")
    write_events(folder, run_events(run) if events is None else events, tail)
    return folder


class Page(HTMLParser):
    """The elements of a page and the text a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> Page:
    record = read_run(folder)
    return Page(render_page(record, figures(record)))


def figures_of(folder: Path) -> dict[str, Chart | HeatMap]:
    return {figure.key: figure for figure in figures(read_run(folder))}


def chart_of(folder: Path, key: str) -> Chart:
    chart = figures_of(folder)[key]
    assert isinstance(chart, Chart)
    return chart


def test_finished_run_gets_a_page_with_every_figure_and_a_png_of_each(tmp_path):
    folder = write_run(tmp_path / "run", run_spec())
    page = Page(write_report(folder).read_text("utf-8"))
    keys = list(figures_of(tmp_path / "run"))
    assert keys == [
        "loss",
        "bits_per_byte",
        "max_violation",
        "max_violation_global",
        "expert_load",
        "mtp_loss",
        "tokens_per_s",
        "mfu",
        "learning_rate",
        "grad_norm",
    ]
    drawn = [attributes["id"] for tag, attributes in page.elements if tag == "figure"]
    assert sorted(drawn) == sorted(f"figure-{key}" for key in keys)
    for key in keys:
        assert (tmp_path / "run" / "plots" / f"{key}.png").read_bytes().startswith(b"\x89PNG")
    assert "trained for 120 steps" in page.text
    assert not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_browser_draws_every_figure_and_shows_values_under_the_mouse(tmp_path):
    folder = write_run(tmp_path / "run", run_spec())
    text = write_report(folder).read_text("utf-8")
    hover = """<script>
      window.addEventListener("error", (event) => document.body.append("FA" + "ULT " + event.message));
      const drawn = document.querySelector("#figure-loss svg"), box = drawn.getBoundingClientRect();
      drawn.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 13, clientY: box.top + 50 }));
    </script></body>"""
    copy = tmp_path / "hover.html"
    copy.write_text(text.replace("</body>", hover), "utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(BROWSER), *flags, "--virtual-time-budget=3000", "--dump-dom", copy.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "FAULT" not in seen
    parts = re.split(r'<figure id="figure-', seen)[1:]
    for part in parts:
        assert "<path " in part or "<canvas " in part
        assert "NaN" not in part
    tip = re.search(r'class="tip"[^>]*>(.*?)</figure>', parts[0], re.DOTALL)
    assert tip
    assert "step 120" in tip[1]
    assert f"<b>{loss_at(120, 120) + 0.02:.3f}</b>" in tip[1]


def test_page_needs_no_network(tmp_path):
    record = read_run(write_run(tmp_path / "run", run_spec()))
    text = render_page(record, figures(record))
    for _, attributes in Page(text).elements:
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
    assert "@import" not in text
    assert "url(" not in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert len(text) < 400_000


def test_figures_in_the_page_are_the_curves_of_the_run(tmp_path):
    record = read_run(write_run(tmp_path / "run", run_spec()))
    text = render_page(record, figures(record))
    embedded = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert embedded
    loss = json.loads(embedded[1])[0]
    validation = next(curve for curve in loss["curves"] if curve["label"] == "validation")
    assert validation["steps"] == [20, 40, 60, 80, 100, 120]
    assert validation["values"][-1] == pytest.approx(loss_at(120, 120) + 0.02, rel=1e-4)
    assert loss["levels"] == [{"label": "unigram entropy", "value": ENTROPY}]


def test_headline_says_what_was_trained_and_how_well(tmp_path):
    summary = summarise(read_run(write_run(tmp_path / "run", run_spec())))
    text = headline(summary)
    loss = loss_at(120, 120) + 0.02
    assert text.startswith("small (13.4M parameters, 5.1M activated per token): trained for 120 steps, 491.5K tokens; ")
    assert f"validation loss {loss:.3f} nats per token" in text
    assert f"{loss / math.log(2) / BYTES_PER_TOKEN:.3f} bits per byte" in text
    assert f"{1 - loss / ENTROPY:.0%} below the unigram entropy of 6.10" in text
    assert f"MaxVio {1.5 * math.exp(-3) + 0.05:.2f}" in text
    assert re.search(r", 3,[89]\d\d tokens/s\.$", text)


def test_run_without_end_says_so(tmp_path):
    run = run_spec()
    page = page_of(write_run(tmp_path / "run", run, run_events(run, last=35, ended=False)))
    assert "no end recorded (running or killed) at step 35 of 120" in page.text


def test_suspended_run_says_where_it_stopped(tmp_path):
    run = run_spec()
    events = [*run_events(run, last=35, ended=False), {"event": "end", "step": 35, "reason": "suspended"}]
    page = page_of(write_run(tmp_path / "run", run, events))
    assert "stopped at step 35 of 120" in page.text
    assert "ended: suspended" in page.text


def test_resumed_run_counts_each_step_once(tmp_path):
    run, rng = run_spec(steps=40), np.random.default_rng(3)
    again = [step_event(run, step, rng) for step in range(21, 41)]
    events = [
        *run_events(run, last=27, ended=False),
        {"event": "resume", "step": 20},
        *again,
        validation_event(run, 40),
        {"event": "end", "step": 40, "reason": "finished"},
    ]
    folder = write_run(tmp_path / "run", run, events)
    record = read_run(folder)
    assert [event["step"] for event in record.steps] == list(range(1, 41))
    assert record.steps[24]["main_loss"] == again[4]["main_loss"]
    page = page_of(folder)
    assert "trained for 40 steps, resumed once" in page.text
    assert "resumed from step 20" in page.text


def test_end_before_a_resume_is_not_the_end(tmp_path):
    run = run_spec(steps=40)
    events = [
        *run_events(run, last=20, ended=False),
        {"event": "end", "step": 20, "reason": "suspended"},
        {"event": "resume", "step": 20},
        step_event(run, 21, np.random.default_rng(3)),
    ]
    assert read_run(write_run(tmp_path / "run", run, events)).end is None


def test_dense_model_has_no_expert_figures(tmp_path):
    run = run_spec("model.moe=none", "model.mtp=none")
    folder = write_run(tmp_path / "run", run)
    assert not {"max_violation", "max_violation_global", "expert_load", "mtp_loss"} & figures_of(folder).keys()
    page = page_of(folder)
    assert "MaxVio" not in headline(summarise(read_run(folder)))
    assert "trained for 120 steps" in page.text


def test_run_that_never_validated_reports_its_training_loss(tmp_path):
    run = run_spec()
    folder = write_run(tmp_path / "run", run, run_events(run, validated=False))
    assert "not validated yet" in page_of(folder).text
    assert "Training loss" in page_of(folder).text


def test_run_that_only_started_is_reported(tmp_path):
    run = run_spec()
    page = page_of(write_run(tmp_path / "run", run, [start_event(run)]))
    assert "no loss recorded yet" in page.text
    assert not [tag for tag, _ in page.elements if tag == "figure"]


def test_single_step_run_is_drawn(tmp_path):
    run = run_spec(steps=1)
    rng = np.random.default_rng(0)
    event = step_event(run, 1, rng) | {"expert_load": [[1 / 32] * 32] * 6}
    folder = write_run(tmp_path / "run", run, [start_event(run), event])
    write_report(folder)
    assert len(list((folder / "plots").iterdir())) == len(figures_of(folder)) == 8


def test_half_written_last_line_is_left_out_and_noted(tmp_path):
    run = run_spec()
    folder = write_run(tmp_path / "run", run, run_events(run, last=30, ended=False), tail='{"event": "step", "st')
    assert read_run(folder).last_step == 30
    assert "the last one, is cut off" in page_of(folder).text


def test_broken_line_in_the_middle_is_one_error(tmp_path):
    run = run_spec()
    folder = write_run(tmp_path / "run", run, run_events(run, last=5, ended=False))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], '{"event": ', *lines[2:]]))
    with pytest.raises(TrainError, match=r"metrics\.jsonl, line 3: not a JSON object") as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"event": "setp", "step": 2}, "line 3: event = 'setp' is not one of start, step"),
        ({"event": "step", "step": "two"}, "line 3: step = 'two' is not a whole number"),
        ({"event": "step", "step": 2, "loss": "low"}, "line 3: loss = 'low' is not a number"),
        ({"event": "step", "step": 2, "max_violation": 3}, "line 3: max_violation = '3' is not a list of numbers"),
        ({"event": "step", "step": 2, "expert_load": [1]}, "is not a list of lists of numbers"),
    ],
)
def test_wrong_value_names_its_line(tmp_path, changed, message):
    run = run_spec()
    events = run_events(run, last=4, ended=False)
    folder = write_run(tmp_path / "run", run, [*events[:2], changed, *events[2:]])
    with pytest.raises(TrainError, match=re.escape(message)):
        write_report(folder)


def test_values_that_are_not_finite_are_gaps(tmp_path):
    run = run_spec()
    events = run_events(run)
    events[50] |= {"main_loss": math.nan, "loss": math.inf, "grad_norm": None, "mfu": None}
    folder = write_run(tmp_path / "run", run, events)
    page_of(folder)
    raw = chart_of(folder, "loss").curves[0]
    assert [step for step, value in zip(raw.steps, raw.values, strict=True) if value is None]


def test_folder_that_is_no_run_is_one_error(tmp_path):
    with pytest.raises(TrainError, match=r"is not a run folder: it has no run\.toml"):
        write_report(tmp_path)
    (tmp_path / "run.toml").write_text(dump(run_spec()))
    with pytest.raises(TrainError, match=r"it has no metrics\.jsonl"):
        write_report(tmp_path)


def test_text_of_the_run_is_shown_and_never_run(tmp_path):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    run = run_spec(f"name='{attack}'", f"description='{attack}'")
    folder = write_run(tmp_path / "run", run)
    samples = [{"step": 120, "prompt": attack, "text": attack + "</script>\u2028 & \ud7ff"}, {"text": attack}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    text = write_report(folder).read_text("ascii")
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "img" not in [tag for tag, _ in page.elements]
    assert attack in page.text
    assert html.escape(attack) in text


def test_samples_are_shown_with_their_prompt(tmp_path):
    folder = write_run(tmp_path / "run", run_spec())
    (folder / "samples.jsonl").write_text(json.dumps({"step": 120, "prompt": "def main(", "text": "args):"}))
    page = page_of(folder)
    assert "def main(args):" in page.text
    assert "after step 120" in page.text


def test_plan_stands_beside_the_measurement(tmp_path):
    run = run_spec()
    plan = estimate(run)
    folder = write_run(tmp_path / "run", run)
    (folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    record = read_run(folder)
    rows = {row[0]: row[1:3] for row in plan_rows(record, summarise(record))}
    assert rows["Parameters"] == (f"{plan.parameters.total_with_mtp:,}", "13,400,000")
    assert rows["Activated parameters"] == (f"{plan.parameters.activated_head_only:,}", "5,100,000")
    assert rows["Peak memory"] == (format_quantity(plan.training_memory.total, "B", 3), "")
    assert rows["Time per step"][0] == format_duration(4096 * plan.training_flops.total / 1.9e11)
    assert "Plan against measurement" in page_of(folder).text


def test_plan_that_knows_less_leaves_rows_out(tmp_path):
    folder = write_run(tmp_path / "run", run_spec())
    (folder / "plan.json").write_text(json.dumps({"parameters": {"total": "many"}}))
    record = read_run(folder)
    rows = {row[0]: row[1:3] for row in plan_rows(record, summarise(record))}
    assert rows["Parameters"] == ("", "13,400,000")
    assert "Training FLOP per token" not in rows


def test_broken_plan_is_one_error(tmp_path):
    folder = write_run(tmp_path / "run", run_spec())
    (folder / "plan.json").write_text("[1")
    with pytest.raises(TrainError, match=r"plan\.json: not a JSON document"):
        write_report(folder)


def test_same_run_gives_the_same_bytes(tmp_path):
    folder = write_run(tmp_path / "run", run_spec())
    write_report(folder)
    first = {path.name: path.read_bytes() for path in folder.rglob("*.[hp][tn]*")}
    write_report(folder)
    assert first == {path.name: path.read_bytes() for path in folder.rglob("*.[hp][tn]*")}


def test_many_layers_are_drawn_as_mean_and_extremes(tmp_path):
    run = run_spec("model.num_layers=20", steps=30)
    curves = chart_of(write_run(tmp_path / "run", run), "max_violation").curves
    assert [curve.label for curve in curves] == ["highest layer", "lowest layer", "mean"]


def test_long_run_is_thinned(tmp_path):
    run = run_spec("model=tiny", steps=2500)
    chart = chart_of(write_run(tmp_path / "run", run), "loss")
    assert all(len(curve.steps) <= 1000 for curve in chart.curves)
    assert chart.curves[0].steps[-1] == pytest.approx(2500, abs=2)


def test_expert_load_is_relative_to_an_even_share(tmp_path):
    heat = figures_of(write_run(tmp_path / "run", run_spec()))["expert_load"]
    assert isinstance(heat, HeatMap)
    assert heat.layers == ("layer 1", "layer 2", "layer 3", "layer 4", "layer 5", "MTP 1")
    assert heat.steps == tuple(range(10, 121, 10))
    for column in (column for layer in heat.loads for column in layer):
        assert sum(column) == pytest.approx(32, rel=0.01)


def test_run_in_fp8_shows_noise_underflow_and_tiles_of_its_operands(tmp_path):
    run = run_spec("precision.recipe=fp8")
    events = run_events(run, ended=False) + [precision_event(step) for step in (50, 100)]
    folder = write_run(tmp_path / "run", run, events)
    by_label = {curve.label: curve.values for curve in chart_of(folder, "precision_snr").curves}
    assert by_label["input, lowest"] == (30.0, 30.0)
    assert by_label["gradient, median"] == (31.0, 31.0)
    by_label = {curve.label: curve.values for curve in chart_of(folder, "precision_underflow").curves}
    assert by_label["weight, highest"] == pytest.approx((0.2, 0.2))
    # Of 300 tiles 60 are in 2 ** -4, 238 in 2 ** -3 and 2 in 2 ** 2.
    by_label = {curve.label: curve.values for curve in chart_of(folder, "precision_amax").curves}
    assert [by_label[f"input, {word}"][0] for word in ("1 %", "median", "99 %")] == [-4.0, -3.0, -3.0]
    assert "Signal over noise in FP8" in page_of(folder).text
    write_report(folder)
    assert (folder / "plots" / "precision_amax.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "tensors", [None, 3, [{"layer": "a"}], [precision_event(1)["tensors"][0] | {"amax": {"x": 1}}]]
)
def test_health_of_another_shape_names_its_line(tmp_path, tensors):
    folder = write_run(
        tmp_path / "run", run_spec(), [start_event(run_spec()), precision_event(1) | {"tensors": tensors}]
    )
    with pytest.raises(TrainError, match="line 2: tensors is not a list of objects with layer, tensor, underflow"):
        read_run(folder)


def test_sampling_floor_is_the_known_one():
    # Loss-Free Balancing's setting: 2,048 tokens, top-6 of 64; independent draws give about 0.17.
    moe = MoESpec(num_routed_experts=64, num_experts_per_token=6, expert_intermediate_size=8)
    assert sampling_floor(moe, 2048) == pytest.approx(0.17, abs=0.01)


def test_sampling_floor_scales_with_the_number_of_tokens():
    moe = run_spec().model.moe
    assert moe is not None
    assert sampling_floor(moe, 32_768) == pytest.approx(sampling_floor(moe, 8192) / 2, rel=1e-6)
    # Simulated on both sides of the limit, not only scaled.
    assert sampling_floor(moe, 2048) == pytest.approx(2 * sampling_floor(moe, 8192), rel=0.1)


def test_sampling_floor_of_all_experts_is_zero():
    moe = MoESpec(num_routed_experts=4, num_experts_per_token=4, expert_intermediate_size=8)
    assert sampling_floor(moe, 100) == 0.0

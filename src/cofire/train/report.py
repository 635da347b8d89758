"""The report of a training run: one HTML file that needs no network, and the same figures as PNG files.

``write_report`` reads a run folder, finished or not, and writes ``report.html`` and ``plots/*.png`` into it. The
page opens with the result in a sentence, then figures with a line of explanation each, the plan beside the
measurement, sample text and the spec.

The figures in the page are drawn by ``report_page/page.js``, about 240 lines: the whole page is some 100 kB,
follows the reader's light or dark scheme and shows values under the mouse. Plotly's script alone is 4.8 MB in each
report and does not follow the scheme. Left out: comparing runs.

Every text that comes from the run or its corpus is escaped, so text like ``<script>`` is shown and never run.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from cofire.errors import TrainError
from cofire.spec.units import format_count, format_duration
from cofire.train.atomic import replace_file
from cofire.train.charts import Figure, HeatMap, figures
from cofire.train.plots import write_plots
from cofire.train.run_record import Event, RunRecord, number, read_run
from cofire.train.summary import Summary, headline, plan_rows, summarise

_SECTIONS = ("Loss", "Experts", "Multi-token prediction", "Speed", "Optimiser", "Precision")
_SAMPLES_MAX = 6
_SAMPLE_CHARACTERS_MAX = 4000


def write_report(run_folder: Path | str) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into a run folder.

    Args:
        run_folder: The folder of a run, finished or not; only its files are read.

    Returns:
        The path of the HTML file.

    Raises:
        TrainError: It is no run folder, one of its files is broken, or the report cannot be written.
    """
    record = read_run(run_folder)
    drawn = figures(record)
    target = record.folder / "report.html"
    try:
        write_plots(drawn, record.folder / "plots")
        with replace_file(target) as file:
            file.write(render_page(record, drawn).encode("ascii", "xmlcharrefreplace"))
    except OSError as error:
        raise TrainError(f"cannot write the report to {record.folder}: {error.strerror}") from None
    return target


def render_page(record: RunRecord, drawn: list[Figure]) -> str:
    """Return the page of a run as HTML text.

    Args:
        record: The run.
        drawn: Its figures, from :func:`cofire.train.charts.figures`.
    """
    summary, style, script = summarise(record), _asset("page.css"), _asset("page.js")
    sections = [
        *(_figure_section(name, [figure for figure in drawn if figure.section == name]) for name in _SECTIONS),
        _plan_section(record, summary),
        _sample_section(record),
        _machine_section(record, summary),
        _spec_section(record),
        _note_section(record),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(summary.name)}: training report</title>
<style>
{style}</style>
</head>
<body>
<main>
<p class="eyebrow">Training report of {_text(summary.name)}{_description(record)}</p>
<h1>{_text(headline(summary))}</h1>
<div class="tiles">{"".join(_tile(*tile) for tile in _tiles(summary))}</div>
<noscript><p>The figures need JavaScript; the folder plots/ has them as PNG files.</p></noscript>
{"".join(sections)}
</main>
<script type="application/json" id="figures">{_json(drawn)}</script>
<script>
{script}</script>
</body>
</html>
"""


def _description(record: RunRecord) -> str:
    return f" - {_text(record.run.description)}" if record.run.description else ""


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """Return (label, value, remark) of the numbers at the top."""
    validated, training = summary.validation_loss, summary.training_loss
    tiles = []
    if validated is not None:
        tiles.append(("Validation loss", f"{validated:.3f}", "nats per token"))
    elif training is not None:
        tiles.append(("Training loss", f"{training:.3f}", "nats per token"))
    if summary.unigram_entropy is not None:
        tiles.append(("Unigram entropy", f"{summary.unigram_entropy:.2f}", "the loss of knowing frequencies only"))
    if summary.bits_per_byte is not None:
        tiles.append(("Bits per byte", f"{summary.bits_per_byte:.3f}", "of validation text"))
    if summary.max_violation is not None:
        floor = f"even routing: {summary.max_violation_floor:.2f}; " if summary.max_violation_floor is not None else ""
        tiles.append(("MaxVio", f"{summary.max_violation:.2f}", f"{floor}{summary.max_violation_scope}"))
    if summary.ema_loss is not None:
        tiles.append(("Loss of averaged weights", f"{summary.ema_loss:.3f}", "nats per token, validation"))
    if summary.tokens_per_s is not None:
        mfu = "" if summary.mfu is None else f"{summary.mfu:.0%} of the matrix peak"
        tiles.append(("Tokens per second", f"{summary.tokens_per_s:,.0f}", mfu))
    if summary.time_s is not None:
        tiles.append(("Time", format_duration(summary.time_s), f"{format_count(summary.tokens)} tokens"))
    return tiles


def _tile(label: str, value: str, remark: str) -> str:
    return f'<div class="tile"><span>{_text(label)}</span><b>{_text(value)}</b><span>{_text(remark)}</span></div>'


def _figure_section(name: str, drawn: list[Figure]) -> str:
    if not drawn:
        return ""
    return f'<h2>{_text(name)}</h2>\n<div class="figures">{"".join(map(_figure, drawn))}</div>\n'


def _figure(figure: Figure) -> str:
    wide = ' class="wide"' if isinstance(figure, HeatMap) else ""
    return (
        f'<figure id="figure-{figure.key}"{wide}><h3>{_text(figure.title)}</h3><div class="drawing"></div>'
        f"<figcaption>{_text(figure.caption)}</figcaption></figure>\n"
    )


def _plan_section(record: RunRecord, summary: Summary) -> str:
    rows = plan_rows(record, summary)
    if not rows:
        return ""
    return "<h2>Plan against measurement</h2>\n" + _table(("", "Plan", "Measured", ""), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table of text cells whose second and third columns are numbers."""
    classes = ("", ' class="number"', ' class="number"', ' class="remark"')
    top = "".join(f"<th{classes[i]}>{_text(cell)}</th>" for i, cell in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{classes[i]}>{_text(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="card scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>\n'


def _sample_section(record: RunRecord) -> str:
    if not record.samples:
        return ""
    cards = "".join(_sample(event) for event in record.samples[-_SAMPLES_MAX:][::-1])
    return f"<h2>Sample text</h2>\n{cards}"


def _sample(event: Event) -> str:
    prompt = str(event.get("prompt") or "")
    text = str(event.get("text") or "")
    step = number(event, "step")
    when = "" if step is None else f"<p>after step {step:,.0f}</p>"
    marked = f'<span class="prompt">{_text(prompt)}</span>' if prompt else ""
    return f'<div class="card">{when}<pre>{marked}{_text(text[:_SAMPLE_CHARACTERS_MAX])}</pre></div>\n'


def _machine_section(record: RunRecord, summary: Summary) -> str:
    """Say what the run was measured on, as far as its start record tells."""
    start = record.start
    machine = start.get("machine")
    rows = [(str(key), str(value)) for key, value in machine.items()] if isinstance(machine, dict) else []
    if isinstance(machine, str):
        rows.append(("machine", machine))
    rows += [(key, str(start[key])) for key in ("device", "dtype", "products") if isinstance(start.get(key), str)]
    peak = number(start, "matrix_peak_flops_per_s")
    if peak is not None:
        rows.append(("measured matrix peak", f"{peak / 1e9:,.1f} GFLOP/s"))
    if summary.time_s is not None:
        rows.append(("time, summed over resumes", format_duration(summary.time_s)))
    for key, label in (("train_tokens", "training tokens"), ("validation_tokens", "validation tokens")):
        value = number(start, key)
        if value is not None:
            rows.append((f"corpus: {label}", f"{value:,.0f}"))
    body = "".join(f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in rows)
    return f'<h2>Machine and data</h2>\n<div class="card scroll"><table><tbody>{body}</tbody></table></div>\n'


def _spec_section(record: RunRecord) -> str:
    return (
        "<h2>Spec</h2>\n"
        f'<details class="card"><summary>run.toml: all that this run was told</summary><pre>{_text(record.run_text)}'
        "</pre></details>\n"
    )


def _note_section(record: RunRecord) -> str:
    notes = list(record.notes)
    if record.resumed_steps:
        steps = ", ".join(f"{step:,}" for step in record.resumed_steps)
        notes.append(f"resumed from step {steps}; steps that were done twice are counted once")
    if record.end is not None and record.end.get("reason"):
        notes.append(f"ended: {record.end['reason']}")
    if not notes:
        return ""
    return f'<h2>Notes</h2>\n<ul class="notes">{"".join(f"<li>{_text(note)}</li>" for note in notes)}</ul>\n'


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _json(drawn: list[Figure]) -> str:
    """Return figures as JSON that is safe inside a script element: no character there can end it."""
    table = [_rounded(dataclasses.asdict(figure)) for figure in drawn]
    text = json.dumps(table, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(value: Any) -> Any:
    """Round numbers to five digits or whole ones: finer than a screen, and a page of half the size."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return round(value) if abs(value) >= 1e5 else float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value


def _asset(name: str) -> str:
    return (resources.files("cofire.train") / "report_page" / name).read_text("utf-8")

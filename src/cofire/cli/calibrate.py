"""``cofire plan calibrate``: measure this machine and keep it as the cluster ``this-machine``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cofire.cli.options import JsonOption
from cofire.cli.output import console, print_json, print_note

if TYPE_CHECKING:
    from cofire.spec import ClusterSpec


def calibrate(
    again: Annotated[bool, typer.Option("--again", help="Measure anew, even if this machine is known.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine's matrix products, passes over memory and all-reduce, and keep them.

    Takes about a minute; what is kept is used by --cluster this-machine. A calibration that was stopped goes on.
    """
    from cofire.plan.machine import load_machine, machine_file, save_machine
    from cofire.spec import dump

    known = machine_file().exists() and not again
    if known:
        cluster = load_machine()
    else:
        cluster = _measure(again)
        save_machine(cluster)
    if as_json:
        import json

        print_json(json.loads(dump(cluster, "json")))
        return
    _print(cluster)
    out = console()
    out.print(f"{'already measured' if known else 'kept'}: {machine_file()}", markup=False, soft_wrap=True)


def _measure(again: bool) -> ClusterSpec:
    """Measure with PyTorch, or with NumPy as far as that goes."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        from cofire.plan.machine import measure_with_numpy

        print_note("PyTorch is not installed: NumPy's FP32 products, additions and copies only; no step is predicted")
        return measure_with_numpy()
    from rich.progress import Progress

    from cofire.train.calibration import calibrate as measure

    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("calibrating", total=1.0)
        return measure(lambda what, part: bar.update(task, completed=part, description=what), again)


def _print(cluster: ClusterSpec) -> None:
    from rich.table import Table

    from cofire.spec.units import format_quantity

    device = cluster.device
    table = Table(title="this-machine (measured)", title_justify="left")
    for column in ("what", "value", "interval"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name in device.peak_flops_per_s:
        best = max(
            (r for r in device.matrix_rates if r.format == name), key=lambda rate: rate.flops_per_s.value
        ).flops_per_s
        interval = " to ".join(format_quantity(x, "FLOP/s") for x in (best.low, best.high))
        table.add_row(f"best product, {name}", format_quantity(best.value, "FLOP/s"), interval)
    for kernel in ("copy", "add"):
        rate = max((r for r in device.kernel_rates if r.kernel == kernel), key=lambda rate: rate.size_bytes).bytes_per_s
        interval = " to ".join(format_quantity(x, "B/s") for x in (rate.low, rate.high))
        table.add_row(f"{kernel}, large", format_quantity(rate.value, "B/s"), interval)
    latency = device.kernel_latency_s
    if latency.label == "measured":
        interval = " to ".join(format_quantity(x, "s") for x in (latency.low, latency.high))
        table.add_row("call of the framework", format_quantity(latency.value, "s"), interval)
    if cluster.scale_up is not None:
        table.add_row("all-reduce of two", format_quantity(cluster.scale_up.bandwidth_bytes_per_s, "B/s"), "")
    if device.reserved_bytes:
        table.add_row("process without tensors", format_quantity(device.reserved_bytes, "B"), "")
    console().print(table)

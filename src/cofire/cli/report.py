"""``cofire report``: a training run as one HTML page and PNG figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cofire.cli.options import JsonOption
from cofire.cli.output import console, print_json


def register(app: typer.Typer) -> None:
    """Add ``cofire report``."""
    app.command("report")(report)


def report(
    run: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders that cofire train --out wrote, finished or not.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Write a run's report: report.html and plots/*.png in its folder. Training does this by itself at its end."""
    import dataclasses

    from cofire.train.report import write_report
    from cofire.train.run_record import read_run
    from cofire.train.summary import headline, summarise

    written = []
    for folder in run:
        page = write_report(folder)
        summary = summarise(read_run(folder))
        written.append({"report": str(page), "headline": headline(summary), **dataclasses.asdict(summary)})
        if not as_json:
            console().print(headline(summary), markup=False)
            console().print(str(page), markup=False, soft_wrap=True)
    if as_json:
        print_json(written)

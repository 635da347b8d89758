"""``cofire train``: trains a model into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cofire.cli.options import JsonOption, SetOption, complete_run
from cofire.cli.output import console, print_json


def register(app: typer.Typer) -> None:
    """Add ``cofire train``."""
    app.command("train")(train)


def train(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A preset or a file: a run, or a model to train.", autocompletion=complete_run
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; none: runs/ and the run's name.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSONL or Parquet: a path, folder or glob of any fsspec file system. Repeat for more."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in the folder, if there is one.")
    ] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Train a model: plan, live progress, checkpoints, and a report at the end.

    SIGTERM or Ctrl-C ends the run after the current step with everything saved; --resume goes on bit for bit.
    """
    from cofire.spec import RunSpec, load_as

    run = load_as(RunSpec, source, overrides or ())
    if data:
        run = run.model_copy(update={"data": run.data.model_copy(update={"paths": tuple(data)})})
    folder = out or Path("runs") / run.name
    _train(run, folder, resume, as_json)


def _train(run, folder: Path, resume: bool, as_json: bool) -> None:
    from rich.table import Table

    from cofire.plan import estimate, note
    from cofire.train.corpus import Corpus
    from cofire.train.trainer import check_folder, comparison, fit, result_dict
    from cofire.train.view import make_view

    check_folder(folder, run, resume)
    Corpus(run.data.paths, run.data.text_field)  # a path that matches nothing is said before anything is printed
    plan = estimate(run)
    if not as_json:
        console(stderr=True).print(note(plan))
    result = fit(run, folder, resume=resume, view=make_view(quiet=as_json))
    if as_json:
        print_json(result_dict(result))
        return
    table = Table(title=f"{run.name}: {result.reason} after step {result.step}", title_justify="left")
    for column in ("", "plan", "measured"):
        table.add_column(column)
    for row in comparison(plan, result):
        table.add_row(*row)
    console().print(table)
    console().print(f"run folder: {folder}", markup=False, soft_wrap=True)

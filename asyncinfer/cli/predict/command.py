"""`asyncinfer predict`: rows of a file, of stdin or of the command line."""

import math
from typing import Final

import click

from asyncinfer.cli import options
from asyncinfer.cli.options import Server

_READ: Final = ("csv", "json", "ndjson", "npy", "parquet")
_WRITTEN: Final = ("table", "csv", "json", "ndjson", "parquet")


class _Predict(click.Command):
    """Numbers below zero are rows, not options."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.ignore_unknown_options = True
        return super().parse_args(context, args)


@options.command(
    "predict",
    "asyncinfer predict 5.1 3.5 1.4 0.2",
    "asyncinfer predict '[[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]' --to json",
    "asyncinfer predict flowers.csv --model iris",
    "asyncinfer predict flowers.csv --columns 1,2,3,4 --output classes.parquet",
    "cat rows.ndjson | asyncinfer predict - --to csv > classes.csv",
    "asyncinfer predict flowers.csv --resume flowers-1    # what is done is not run again",
    "asyncinfer predict flowers.csv --timeout 600    # seconds",
    cls=_Predict,
)
@click.argument("rows", nargs=-1, required=True, metavar="FILE | - | ROW")
@click.option("--model", "-m", metavar="NAME", help="Default: the default model.")
@click.option("--from", "read_as", type=click.Choice(_READ), help="Default: by the file's name.")
@click.option(
    "--to",
    "write_as",
    type=click.Choice(_WRITTEN),
    help="Default: by the name of --output, else a table on a terminal and NDJSON in a pipe.",
)
@click.option("--output", "-o", metavar="FILE", help="Write here; it appears once it is whole.")
@click.option(
    "--columns",
    metavar="A,B",
    help="Columns to send, by name or number from 1. Default: those named as the model's inputs "
    "where it has one for each, else all.",
)
@click.option("--header/--no-header", default=None, help="Whether a CSV has one. Default: look.")
@click.option(
    "--resume",
    metavar="GROUP",
    help="Go on with a group of jobs. Default: made from the file and the model's version.",
)
@click.option("--fresh", is_flag=True, help="Run all rows, those too that ran within a day.")
@click.option(
    "--batch", type=click.IntRange(1), metavar="ROWS", help="Rows of a job. Default: 256."
)
@click.option(
    "--in-flight",
    type=click.IntRange(1, 1000),
    default=8,
    show_default=True,
    metavar="JOBS",
    help="Jobs under way at once.",
)
@click.option("--priority", type=click.Choice(("high", "normal", "low")), help="Of the jobs.")
@options.timeout("How long to wait for all answers. Default: for ever.", above_zero=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --to json.")
@options.server
@click.pass_obj
def predict(
    typed: tuple[str, ...],
    *,
    rows: tuple[str, ...],
    model: str | None,
    read_as: str | None,
    write_as: str | None,
    output: str | None,
    columns: str | None,
    header: bool | None,
    resume: str | None,
    fresh: bool,
    batch: int | None,
    in_flight: int,
    priority: str | None,
    timeout: float | None,
    as_json: bool,
    server: Server,
) -> int:
    """Run rows of a file, of stdin or of the command line.

    FILE is CSV, JSON, NDJSON (.jsonl), NPY or Parquet, - stdin. Answers come in the order of the
    rows, each with the number of its row, from 1. A row that fails is told on stderr, has an
    `error` in the output, and makes the exit code 1. Ctrl-C cancels what is not done, and says how
    to go on. While the queue is full, a worker loads the model or the server restarts, it waits.
    When nothing comes for 2 s and there is a reason, such as no worker that has the model, stderr
    tells it. After --timeout it exits with 4: jobs that were sent go on, and the command that it
    shows takes them up again.
    """
    from asyncinfer.cli.predict import run

    _refuse_options(rows)
    asked = run.Asked(
        rows=rows,
        model=model,
        read_as=read_as,
        write_as="json" if as_json else write_as,
        output=output,
        columns=tuple(one.strip() for one in columns.split(",")) if columns else (),
        header=header,
        group=resume,
        fresh=fresh,
        batch=batch or "auto",
        in_flight=in_flight,
        priority=priority,
        timeout_seconds=math.inf if timeout is None else timeout,
        typed=typed or (),
    )
    return run.run(server, asked)


def _refuse_options(rows: tuple[str, ...]) -> None:
    for one in rows:
        if one.startswith("-") and one != "-" and not _is_number(one):
            raise click.NoSuchOption(one, ctx=click.get_current_context())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

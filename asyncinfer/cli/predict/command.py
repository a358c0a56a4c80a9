"""`asyncinfer predict`: predictions for rows of a file, of stdin or of the command line."""

import math
from typing import Any

import click

from asyncinfer.cli import options
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.predict.formats import INPUT_FORMATS, OUTPUT_FORMATS


class _Predict(click.Command):
    """Takes negative numbers as rows, not as options."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.ignore_unknown_options = True
        return super().parse_args(context, args)


def _separator(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """The character of --separator, which may be given as `tab` or `\\t`."""
    separator = "\t" if text in ("tab", "\\t") else text
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        raise click.BadParameter(f"{text!r} is neither a single character nor tab.")
    return separator


@options.command(
    "predict",
    "asyncinfer predict 5.1 3.5 1.4 0.2",
    "asyncinfer predict '[[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]' --to json",
    "asyncinfer predict flowers.csv --model iris",
    "asyncinfer predict flowers.csv --columns 1,2,3,4 --output classes.parquet",
    "cat rows.ndjson | asyncinfer predict - --to csv > classes.csv",
    "asyncinfer predict flowers.csv --resume flowers-1    # rows that are done are not run again",
    "asyncinfer predict flowers.csv --timeout 600    # seconds",
    cls=_Predict,
)
@click.argument("rows", nargs=-1, required=True, metavar="FILE | - | ROW")
@click.option("--model", "-m", metavar="NAME", help="The model. Default: the default model.")
@click.option(
    "--from",
    "read_as",
    type=click.Choice(INPUT_FORMATS),
    help="Format of the input. Default: by the file's name.",
)
@click.option(
    "--to",
    "write_as",
    type=click.Choice(OUTPUT_FORMATS),
    help="Format of the output. Default: by the name of --output, else a table on a terminal and "
    "NDJSON in a pipe.",
)
@click.option(
    "--output", "-o", metavar="FILE", help="Write to this file, which appears once it is complete."
)
@click.option(
    "--columns",
    metavar="A,B",
    help="Columns to send, by name or number from 1. Default: those named like the model's inputs "
    "if there is one for each, else all.",
)
@click.option(
    "--header/--no-header",
    default=None,
    help="Whether a CSV file has a header. Default: detected from its first line.",
)
@click.option(
    "--separator",
    callback=_separator,
    metavar="CHARACTER",
    help="Separator of the cells of a CSV file, such as ';' or tab. Default: a tab or semicolon if "
    "its first line has one outside of quotes, else a comma.",
)
@click.option(
    "--resume",
    "group",
    metavar="GROUP",
    help="Continue this group of jobs of an earlier run; there must be one. Default: a name made "
    "from the file and the model's version, which continues the same run.",
)
@click.option(
    "--fresh", is_flag=True, help="Run all rows, even those that ran within the last day."
)
@click.option("--batch", type=click.IntRange(1), metavar="ROWS", help="Rows per job. Default: 256.")
@click.option(
    "--in-flight",
    type=click.IntRange(1, 1000),
    default=8,
    show_default=True,
    metavar="JOBS",
    help="Number of concurrent jobs.",
)
@click.option(
    "--priority", type=click.Choice(("high", "normal", "low")), help="Priority of the jobs."
)
@options.timeout("How long to wait for all results. Default: no limit.", above_zero=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --to json.")
@options.server
@click.pass_obj
def predict(
    arguments: tuple[str, ...],
    /,
    *,
    rows: tuple[str, ...],
    write_as: str | None,
    columns: str | None,
    batch: int | None,
    timeout: float | None,
    as_json: bool,
    server: ServerOptions,
    **more: Any,
) -> int:
    """Predict rows of a file, of stdin or of the command line.

    FILE is CSV, JSON, NDJSON (.jsonl), NPY or Parquet; - is stdin. Results come in the order of the
    rows, each with its row number, from 1. A row that fails has an `error` in the output and a line
    on stderr, and makes the exit code 1. Ctrl-C cancels the remaining jobs, and says how to
    continue. While the queue is full, a worker loads the model or the server restarts, the command
    waits. If nothing comes for 2 s and the reason is known, such as that no worker has the model,
    it is printed on stderr. After --timeout the command exits with 4: jobs that were submitted go
    on, and it prints the command that continues them.
    """
    from asyncinfer.cli.predict import run

    _reject_options(rows)
    if as_json and write_as not in (None, "json"):
        raise click.UsageError("Give --json or --to, not both.")
    if more["group"] and more["fresh"]:
        raise click.UsageError("Give --resume or --fresh, not both.")
    predict_options = run.PredictOptions(
        rows=rows,
        write_as="json" if as_json else write_as,
        columns=tuple(column.strip() for column in columns.split(",")) if columns else (),
        batch=batch or "auto",
        timeout_seconds=math.inf if timeout is None else timeout,
        arguments=arguments or (),
        **more,
    )
    return run.run(server, predict_options)


def _reject_options(rows: tuple[str, ...]) -> None:
    """Raises NoSuchOption for a row that begins with - and is no number."""
    for row in rows:
        if row.startswith("-") and row != "-" and not _is_number(row):
            raise click.NoSuchOption(row, ctx=click.get_current_context())


def _is_number(text: str) -> bool:
    """Whether float() reads the text; so do `nan` and `inf`."""
    try:
        float(text)
    except ValueError:
        return False
    return True

"""`asyncinfer bench`: a short load on your own deployment, and what limits it."""

import click

from asyncinfer.cli import options
from asyncinfer.cli.options import Server


@options.command(
    "bench",
    "asyncinfer bench --seconds 2 --connections 4    # seconds of each of the two loads",
    "asyncinfer bench --seconds 2 --model digits --json",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.5, 600),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long each of the two loads lasts.",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    metavar="COUNT",
    help="Requests under way at once.",
)
@click.option("--model", metavar="NAME", help="Default: the default model.")
@options.server
@options.as_json
def bench(
    seconds: float, connections: int, model: str | None, server: Server, as_json: bool
) -> int:
    """Measure a model on your deployment, and what limits it.

    First each connection waits for a job, then makes the next (waits); then each only submits
    (submits). The input is the model's own example. The jobs are in a group of their own; what is
    left of them is cancelled and deleted at the end. Real traffic is slowed down meanwhile.
    Exits with 1 when any request was answered with an error other than a full queue.
    """
    from asyncinfer.cli.bench.load import measure
    from asyncinfer.cli.bench.report import show_bench
    from asyncinfer.cli.output import say_json

    found = measure(server, model, seconds, connections)
    if as_json:
        say_json(found)
    else:
        show_bench(found)
    return 1 if found.waits.errors or found.submits.errors else 0

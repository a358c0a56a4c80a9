"""`asyncinfer bench`: a short load on a deployment, and its bottleneck."""

import click

from asyncinfer.cli import options
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.output import say_json


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
    help="Number of concurrent requests.",
)
@click.option("--model", metavar="NAME", help="Default: the default model.")
@options.server
@options.as_json
def bench(
    seconds: float, connections: int, model: str | None, server: ServerOptions, as_json: bool
) -> int:
    """Measure throughput and latency of a model, and name the bottleneck.

    Runs two loads with the model's own example as input. In the first (waits) each connection
    submits a job, waits for its result and submits the next; in the second (submits) it only
    submits. Real traffic is slower meanwhile. All jobs are in a group of their own, which is
    cancelled and deleted at the end. Exits with 1 if any request failed for another reason than a
    full queue.
    """
    from asyncinfer.cli.bench.load import measure
    from asyncinfer.cli.bench.report import show_bench

    found = measure(server, model, seconds, connections)
    if as_json:
        say_json(found)
    else:
        show_bench(found)
    return 1 if found.waits.errors or found.submits.errors else 0

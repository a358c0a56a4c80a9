"""`asyncinfer top`: a live view of queues and workers."""

from typing import Final

import click

from asyncinfer.cli import options
from asyncinfer.cli.options import ServerOptions
from asyncinfer.settings import Settings

_SECONDS: Final = 1.0


@options.command(
    "top",
    "asyncinfer top",
    "asyncinfer top --interval 5    # seconds between refreshes",
    "asyncinfer top --once",
    "asyncinfer top --redis redis://127.0.0.1:6379 --once --json",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 3600),
    default=_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How often to refresh.",
)
@click.option(
    "--once",
    is_flag=True,
    help="Print one snapshot and exit; the default in a pipe without --json.",
)
@click.option(
    "--redis",
    "redis_url",
    metavar="URL",
    help="Read this Redis directly, all tenants, without an API.",
)
@click.option(
    "--queue-name",
    envvar="QUEUE_NAME",
    default=Settings().queue_name,
    show_default=True,
    help="With --redis: name of the default model's list. [QUEUE_NAME]",
)
@options.server
@options.as_json
def top(
    interval: float,
    once: bool,
    redis_url: str | None,
    queue_name: str,
    server: ServerOptions,
    as_json: bool,
) -> None:
    """Watch queues and workers, live.

    Press q or Ctrl-C to leave. Rates (IN/s, OUT/s, FAIL/s) are jobs per second over the last minute
    or less. WAIT and RUN p50 p95 are percentiles of the jobs that ended last. AGE is how long the
    oldest job has waited. Queues without a worker, a job, a dead letter or a webhook to deliver
    are left out. Webhooks that are to come, due or given up are counted in a line. With --json each
    snapshot is one line, with all queues.
    """
    from asyncinfer.cli.top.live import api_reader, redis_reader, watch

    reader = redis_reader(redis_url, queue_name) if redis_url else api_reader(server)
    with reader as read_snapshot:
        watch(read_snapshot, interval, once=once, as_json=as_json)

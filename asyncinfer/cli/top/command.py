"""`asyncinfer top`: queues and workers, live."""

from typing import Final

import click

from asyncinfer.cli import options
from asyncinfer.cli.options import Server
from asyncinfer.settings import Settings

_SECONDS: Final = 1.0


@options.command(
    "top",
    "asyncinfer top",
    "asyncinfer top --interval 5    # seconds between looks",
    "asyncinfer top --once",
    "asyncinfer top --redis redis://127.0.0.1:6379 --once --json",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 3600),
    default=_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
@click.option("--once", is_flag=True, help="Look once. So it does in a pipe, without --json.")
@click.option(
    "--redis",
    "redis_url",
    metavar="URL",
    help="Look at this Redis itself, all tenants, where no API answers.",
)
@click.option(
    "--queue-name",
    envvar="QUEUE_NAME",
    default=Settings().queue_name,
    show_default=True,
    help="With --redis: the default model's list. [QUEUE_NAME]",
)
@options.server
@options.as_json
def top(
    interval: float,
    once: bool,
    redis_url: str | None,
    queue_name: str,
    server: Server,
    as_json: bool,
) -> None:
    """Watch queues and workers, live.

    q or Ctrl-C leaves it. Rates are jobs a second over the last minute or less, WAIT and RUN the
    50th and 95th percentile of the jobs that ended last, AGE that of the job that waits longest.
    Queues that have no worker, no job and no dead letter are left out. With --json, one object a
    line, with all queues.
    """
    from asyncinfer.cli.top.live import http, redis, watch

    source = redis(redis_url, queue_name) if redis_url else http(server)
    with source as look:
        watch(look, interval, once=once, as_json=as_json)

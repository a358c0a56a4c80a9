"""The command `audit`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from asyncinfer.cli import options
from asyncinfer.cli.api_client import connect
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.output import say_json, say_on_stderr, show, utc
from asyncinfer.schemas.requests import AUDIT_ACTIONS

if TYPE_CHECKING:
    from asyncinfer.client import AuditEntry


@options.command(
    "audit",
    "asyncinfer audit --limit 20",
    "asyncinfer audit --action purge",
    "asyncinfer audit --tenant acme --json",
)
@click.option("--action", type=click.Choice(AUDIT_ACTIONS), help="Only this action.")
@click.option(
    "--tenant",
    metavar="NAME",
    help="Only what keys of this tenant did, or was done to its jobs alone.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=50,
    show_default=True,
    help="Maximum number of entries.",
)
@options.server
@options.as_json
def audit(server: ServerOptions, as_json: bool, **filters: Any) -> None:
    """List what operators did, the newest first.

    That is each pause and resume of a model and cancel of all that waits for it, each cancel, retry
    and purge of many jobs, and what was done across tenants. Needs the scope `operator`.
    """
    with connect(server) as client:
        log = client.audit(**filters)
    if as_json:
        say_json(log.entries)
    else:
        columns = ("TIME", "ACTION", "TENANT", "KEY", "FILTER", "JOBS", "OUTCOME")
        show(columns, map(_row, log.entries), numeric=("JOBS",))
        if not log.entries:
            say_on_stderr("No such entries.")
    if log.unreadable:
        say_on_stderr(
            f"Left out, since another program has written to Redis: {log.unreadable} unreadable."
        )


def _row(entry: "AuditEntry") -> Sequence[object]:
    """The cells of an entry; its time is UTC."""
    selected = " ".join(f"{name}={_as_in_a_query(value)}" for name, value in entry.filter.items())
    time = utc(entry.at)
    return time, entry.action, entry.tenant, entry.key, selected, entry.jobs, entry.outcome


def _as_in_a_query(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

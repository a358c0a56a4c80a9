"""The commands `cancel`, `retry` and `purge`."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click
from msgspec import Struct

from asyncinfer.cli import options
from asyncinfer.cli.exit_codes import EXIT_FAILED, say_error
from asyncinfer.cli.options import ServerOptions

if TYPE_CHECKING:
    from asyncinfer.client import ClearedJobs

_OUTCOME_TEXTS: Final = {"stopping": "running and told to stop"}


class Selection(Struct, frozen=True):
    """The jobs of `ids`, or all that match the `filters` if `ids` is None."""

    ids: tuple[str, ...] | None
    filters: dict[str, Any]


def _selection(
    verb: str, statuses: Sequence[str], status_help: str
) -> Callable[[Callable[..., int]], Any]:
    """A decorator that adds [ID], --model, --group and --status; the command receives `selection`.

    A flag `dead` of the command is a filter too. Both ids and filters, or neither, raise
    click.UsageError.
    """

    def add(function: Callable[..., int]) -> Any:
        @click.argument("job_ids", nargs=-1, metavar="[ID]...")
        @click.option("--model", metavar="NAME", help="All jobs of this model.")
        @click.option("--group", metavar="NAME", help="All jobs of this group.")
        @click.option("--status", type=click.Choice(statuses), help=status_help)
        @functools.wraps(function)
        def run(*args: Any, job_ids: tuple[str, ...], **values: Any) -> int:
            names = values.keys() & {"model", "group", "status", "dead"}
            given = {name: values.pop(name) for name in names}
            filters = {name: None if value is False else value for name, value in given.items()}
            if bool(job_ids) == any(value is not None for value in filters.values()):
                raise click.UsageError(
                    f"Say which jobs to {verb}: by ID, or by --status, --model or --group, "
                    "not both."
                )
            return function(*args, selection=Selection(job_ids or None, filters), **values)

        return run

    return add


@options.command(
    "cancel",
    "asyncinfer cancel 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer cancel --model digits --status pending",
    "asyncinfer cancel --group flowers-1",
    "asyncinfer cancel --tenant acme --model digits",
)
@_selection("cancel", ("pending", "processing"), "Only those in this state.")
@options.tenant
@options.server
@options.as_json
def cancel(selection: Selection, tenant: str | None, server: ServerOptions, as_json: bool) -> int:
    """Cancel jobs, by id or by filter.

    Running jobs are told to stop. Nothing is deleted: `retry` runs cancelled jobs again.
    """
    from asyncinfer.cli.api_client import connect

    with connect(server) as client:
        done = client.cancel_all(selection.ids, **selection.filters, tenant=tenant)
    return _report(_cleared("cancelled", selection.ids, done), as_json)


@options.command(
    "retry",
    "asyncinfer retry 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer retry --status failed --model iris",
    "asyncinfer retry --dead",
)
@_selection("retry", ("failed", "cancelled"), "All jobs in this state.")
@click.option("--dead", is_flag=True, help="All dead letters; `asyncinfer dead` lists them.")
@options.tenant
@options.server
@options.as_json
def retry(selection: Selection, tenant: str | None, server: ServerOptions, as_json: bool) -> int:
    """Run failed or cancelled jobs again.

    Each keeps its id and its input, and begins a new round.
    """
    from asyncinfer.cli.api_client import connect

    with connect(server) as client:
        done = client.retry_all(selection.ids, **selection.filters, tenant=tenant)
    return _report({"retried": done.retried, "refused": done.refused}, as_json)


@options.command(
    "purge",
    "asyncinfer purge 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer purge --status completed --model iris",
    "asyncinfer purge --status ended --yes",
)
@_selection(
    "purge",
    ("completed", "failed", "cancelled", "ended"),
    "All jobs in this state; `ended` is any of them.",
)
@click.option("--dead", is_flag=True, help="All dead letters.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@options.tenant
@options.server
@options.as_json
def purge(
    selection: Selection, yes: bool, tenant: str | None, server: ServerOptions, as_json: bool
) -> int:
    """Delete ended jobs with their data.

    Jobs that wait or run are not deleted: cancel them first.
    """
    from asyncinfer.cli.api_client import connect

    if not (selection.ids or yes or _is_confirmed()):
        return 0
    with connect(server) as client:
        done = client.purge(selection.ids, **selection.filters, tenant=tenant)
    return _report(_cleared("purged", selection.ids, done), as_json)


def _is_confirmed() -> bool:
    """Whether the user confirms, who is asked on a terminal; True in a script."""
    return not sys.stdin.isatty() or click.confirm("Delete these jobs and their results?", err=True)


# --- output --------------------------------------------------------------------------------


def _cleared(outcome: str, ids: Sequence[str] | None, done: "ClearedJobs") -> dict[str, Any]:
    """The totals of a cancel or purge by name; for jobs of `ids`, which of them have `outcome`."""
    if ids is None:
        return {"cancelled": done.cancelled, "stopping": done.stopping, "purged": done.purged}
    refused = {job.job_id for job in done.refused}
    return {outcome: [job_id for job_id in ids if job_id not in refused], "refused": done.refused}


def _report(totals: dict[str, Any], as_json: bool) -> int:
    """Prints the totals on stdout and each refusal on stderr; returns 1 if there is a refusal."""
    from asyncinfer.cli.output import say, say_json

    refused = totals.get("refused", ())
    if as_json:
        say_json(totals)
    else:
        counts = {name: _count(value) for name, value in totals.items() if name != "refused"}
        texts = [
            f"{count:,} {_OUTCOME_TEXTS.get(name, name)}" for name, count in counts.items() if count
        ]
        say(f"{', '.join(texts) or 'No jobs'}.\n")
    for refusal in refused:
        say_error(f"{refusal.job_id}: {refusal.detail}")
    return EXIT_FAILED if refused else 0


def _count(value: Any) -> int:
    """A count as it is, or the number of ids in a list."""
    return value if isinstance(value, int) else len(value)

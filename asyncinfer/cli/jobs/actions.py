"""The commands `cancel`, `retry` and `purge`."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from asyncinfer.cli import options
from asyncinfer.cli.api_client import connect
from asyncinfer.cli.exit_codes import EXIT_FAILED, say_error
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.output import counted, say, say_json, say_on_stderr
from asyncinfer.jobs import TERMINAL

if TYPE_CHECKING:
    from asyncinfer.client import ClearedJobs, Client

_MAX_COUNTED: Final = 1000
_OUTCOME_TEXTS: Final = {"stopping": "running and told to stop"}


def _selection(
    verb: str, statuses: Sequence[str], status_help: str
) -> Callable[[Callable[..., int]], Any]:
    """A decorator that adds [ID], --model, --group and --status, to say which jobs to `verb`.

    The command receives what it passes to a method of the client: `job_ids`, which may be None, and
    the filters, `dead` too if it has such a flag. Both ids and filters, or neither, raise
    click.UsageError.
    """

    def add(function: Callable[..., int]) -> Any:
        @click.argument("job_ids", nargs=-1, metavar="[ID]...")
        @click.option("--model", metavar="NAME", help="All jobs of this model.")
        @click.option("--group", metavar="NAME", help="All jobs of this group.")
        @click.option("--status", type=click.Choice(statuses), help=status_help)
        @functools.wraps(function)
        def run(*args: Any, job_ids: tuple[str, ...], **values: Any) -> int:
            if "dead" in values:
                values["dead"] = values["dead"] or None
            filters = (values.get(name) for name in ("model", "group", "status", "dead"))
            if bool(job_ids) == any(value is not None for value in filters):
                raise click.UsageError(
                    f"Say which jobs to {verb}: by ID, or by --status, --model or --group, "
                    "not both."
                )
            return function(*args, job_ids=job_ids or None, **values)

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
@options.tenant("Cancel jobs")
@options.server
@options.as_json
def cancel(server: ServerOptions, as_json: bool, **selection: Any) -> int:
    """Cancel jobs, by id or by filter.

    Running jobs are told to stop. Nothing is deleted: `retry` runs cancelled jobs again.
    """
    with connect(server) as client:
        done = client.cancel_all(**selection)
    return _report(_cleared("cancelled", selection["job_ids"], done), as_json)


@options.command(
    "retry",
    "asyncinfer retry 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer retry --status failed --model iris",
    "asyncinfer retry --dead",
)
@_selection("retry", ("failed", "cancelled"), "All jobs in this state.")
@click.option("--dead", is_flag=True, help="All dead letters; `asyncinfer dead` lists them.")
@options.tenant("Retry jobs")
@options.server
@options.as_json
def retry(server: ServerOptions, as_json: bool, **selection: Any) -> int:
    """Run failed or cancelled jobs again.

    Each keeps its id and its input, and begins a new round.
    """
    with connect(server) as client:
        done = client.retry_all(**selection)
    return _report({"retried": done.retried, "refused": done.refused}, as_json)


@options.command(
    "purge",
    "asyncinfer purge 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer purge --status completed --model iris --yes",
    "asyncinfer purge --status ended --yes",
)
@_selection(
    "purge",
    ("completed", "failed", "cancelled", "ended"),
    "All jobs in this state; `ended` is any of them.",
)
@click.option("--dead", is_flag=True, help="All dead letters.")
@click.option(
    "--yes",
    is_flag=True,
    help="Do not ask. A filter needs it where no terminal is, as in a script.",
)
@options.tenant("Delete jobs")
@options.server
@options.as_json
def purge(yes: bool, server: ServerOptions, as_json: bool, **selection: Any) -> int:
    """Delete ended jobs with their data.

    Jobs that wait or run are not deleted: cancel them first.
    """
    is_by_filter = not (selection["job_ids"] or yes)
    if is_by_filter and not os.isatty(0):
        raise click.UsageError("This deletes all jobs that match: add --yes. Nothing was deleted.")
    with connect(server) as client:
        if is_by_filter and not _is_confirmed(client, selection):
            return 0
        done = client.purge(**selection)
    return _report(_cleared("purged", selection["job_ids"], done), as_json)


def _is_confirmed(client: "Client", selection: dict[str, Any]) -> bool:
    """Whether the user, who is told how many jobs match the filters of `selection`, confirms."""
    filters = {name: value for name, value in selection.items() if name != "job_ids"}
    is_any = filters.pop("status") in (None, "ended")
    statuses: Iterable[Any] = TERMINAL if is_any else (selection["status"],)
    listed = (client.jobs(status=status, limit=_MAX_COUNTED + 1, **filters) for status in statuses)
    count = sum(map(len, listed))
    if not count:
        say_on_stderr("No such jobs.")
        return False
    shown = counted(count, "job") if count <= _MAX_COUNTED else f"more than {_MAX_COUNTED:,} jobs"
    return click.confirm(f"Delete {shown} and their results?", err=True)


# --- output --------------------------------------------------------------------------------


def _cleared(outcome: str, ids: Sequence[str] | None, done: "ClearedJobs") -> dict[str, Any]:
    """The totals of a cancel or purge by name; for jobs of `ids`, which of them have `outcome`."""
    if ids is None:
        return {"cancelled": done.cancelled, "stopping": done.stopping, "purged": done.purged}
    refused = {job.job_id for job in done.refused}
    return {outcome: [job_id for job_id in ids if job_id not in refused], "refused": done.refused}


def _report(totals: dict[str, Any], as_json: bool) -> int:
    """Prints the totals on stdout and each refusal on stderr; returns 1 if there is a refusal."""
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

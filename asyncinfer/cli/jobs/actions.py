"""The commands `cancel`, `retry` and `purge`."""

import sys
from collections.abc import Sequence
from typing import Any, Final

import click
import msgspec

from asyncinfer.cli import options
from asyncinfer.cli.exit_codes import EXIT_FAILED, say_error
from asyncinfer.cli.options import ServerOptions
from asyncinfer.errors import RequestError
from asyncinfer.schemas.responses import ClearResult, RetryResult

_MAX_JOBS_PER_CALL: Final = 1000
_ABORTING_STATUSES: Final = frozenset({401, 403, 503})
"""These concern the key or the server, not one job."""

_OUTCOME_TEXTS: Final = {"stopping": "running and told to stop"}

_of_model = click.option("--model", metavar="NAME", help="All jobs of this model.")
_of_group = click.option("--group", metavar="NAME", help="All jobs of this group.")


@options.command(
    "cancel",
    "asyncinfer cancel 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer cancel --model digits --status pending",
    "asyncinfer cancel --group flowers-1",
    "asyncinfer cancel --tenant acme --model digits",
)
@click.argument("job_ids", nargs=-1, metavar="[ID]...")
@_of_model
@_of_group
@click.option(
    "--status", type=click.Choice(("pending", "processing")), help="Only those in this state."
)
@options.tenant
@options.server
@options.as_json
def cancel(
    job_ids: Sequence[str],
    model: str | None,
    group: str | None,
    status: str | None,
    tenant: str | None,
    server: ServerOptions,
    as_json: bool,
) -> int:
    """Cancel jobs, by id or by filter.

    Running jobs are told to stop. Nothing is deleted: `retry` runs cancelled jobs again.
    """
    query = {"model": model, "group": group, "status": status}
    _reject_unclear_choice("cancel", job_ids, query)
    if job_ids:
        return _delete_each(server, job_ids, as_json, "cancelled", tenant=tenant)
    return _run_for_all_matching(
        server, ClearResult, "DELETE", "/jobs", {**query, "tenant": tenant}, as_json
    )


@options.command(
    "retry",
    "asyncinfer retry 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer retry --status failed --model iris",
    "asyncinfer retry --dead",
)
@click.argument("job_ids", nargs=-1, metavar="[ID]...")
@_of_model
@_of_group
@click.option(
    "--status", type=click.Choice(("failed", "cancelled")), help="All jobs in this state."
)
@click.option("--dead", is_flag=True, help="All dead letters; `asyncinfer dead` lists them.")
@options.tenant
@options.server
@options.as_json
def retry(
    job_ids: Sequence[str],
    model: str | None,
    group: str | None,
    status: str | None,
    dead: bool,
    tenant: str | None,
    server: ServerOptions,
    as_json: bool,
) -> int:
    """Run failed or cancelled jobs again.

    Each keeps its id and its input, and begins a new round.
    """
    query: dict[str, Any] = {
        **{"model": model, "group": group, "status": status},
        "dead": dead or None,
    }
    _reject_unclear_choice("retry", job_ids, query)
    if not job_ids:
        query["tenant"] = tenant
        return _run_for_all_matching(server, RetryResult, "POST", "/jobs/retry", query, as_json)
    from asyncinfer.cli.api_client import ApiClient

    totals: dict[str, Any] = {"retried": [], "refused": []}
    with ApiClient(server) as api:
        for start in range(0, len(job_ids), _MAX_JOBS_PER_CALL):
            body = {"job_ids": list(job_ids[start : start + _MAX_JOBS_PER_CALL])}
            done = api.request_as(RetryResult, "POST", "/jobs/retry", body=body, tenant=tenant)
            _add(totals, done)
    return _report(totals, as_json)


@options.command(
    "purge",
    "asyncinfer purge 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer purge --status completed --model iris",
    "asyncinfer purge --status ended --yes",
)
@click.argument("job_ids", nargs=-1, metavar="[ID]...")
@_of_model
@_of_group
@click.option(
    "--status",
    type=click.Choice(("completed", "failed", "cancelled", "ended")),
    help="All jobs in this state; `ended` is any of them.",
)
@click.option("--dead", is_flag=True, help="All dead letters.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@options.tenant
@options.server
@options.as_json
def purge(
    job_ids: Sequence[str],
    model: str | None,
    group: str | None,
    status: str | None,
    dead: bool,
    yes: bool,
    tenant: str | None,
    server: ServerOptions,
    as_json: bool,
) -> int:
    """Delete ended jobs with their data.

    Jobs that wait or run are not deleted: cancel them first.
    """
    query: dict[str, Any] = {
        **{"model": model, "group": group, "status": status},
        "dead": dead or None,
    }
    _reject_unclear_choice("purge", job_ids, query)
    if job_ids:
        return _delete_each(server, job_ids, as_json, "purged", purge=True, tenant=tenant)
    if not (yes or _is_confirmed()):
        return 0
    query |= {"purge": True, "tenant": tenant}
    return _run_for_all_matching(server, ClearResult, "DELETE", "/jobs", query, as_json)


# --- requests ------------------------------------------------------------------------------


def _reject_unclear_choice(verb: str, job_ids: Sequence[str], query: dict[str, Any]) -> None:
    """Raises click.UsageError if there are both ids and filters, or neither.

    A filter of `query` that is None is not given.
    """
    has_filters = any(value is not None for value in query.values())
    if bool(job_ids) == has_filters:
        raise click.UsageError(
            f"Say which jobs to {verb}: by ID, or by --status, --model or --group, not both."
        )


def _is_confirmed() -> bool:
    """Whether the user confirms, who is asked on a terminal; True in a script."""
    return not sys.stdin.isatty() or click.confirm("Delete these jobs and their results?", err=True)


def _delete_each(
    server: ServerOptions, job_ids: Sequence[str], as_json: bool, outcome: str, **query: Any
) -> int:
    """Sends DELETE for each job, also after one that is refused, and returns the exit code.

    `outcome` is the key of the ids that succeeded, and the word for it. `query` are parameters of
    each request. Prints the totals. Raises an error that concerns the key or the server: then the
    totals are not printed.
    """
    from asyncinfer.cli.api_client import ApiClient, path_part

    totals: dict[str, Any] = {outcome: [], "refused": []}
    with ApiClient(server) as api:
        for job_id in job_ids:
            try:
                api.request_json("DELETE", f"/job/{path_part(job_id)}", **query)
            except RequestError as error:
                if error.status in _ABORTING_STATUSES:
                    raise
                refused = {"job_id": job_id, "code": error.code, "detail": error.detail}
                totals["refused"].append(refused)
            else:
                totals[outcome].append(job_id)
    return _report(totals, as_json)


def _run_for_all_matching(
    server: ServerOptions,
    kind: type[ClearResult | RetryResult],
    method: str,
    path: str,
    query: dict[str, Any],
    as_json: bool,
) -> int:
    """Repeats the request, which handles a bounded number of jobs, until it changes nothing.

    `query` are its parameters, `kind` its response. Prints the totals and returns the exit code: 1
    if a job was refused.
    """
    from asyncinfer.cli.api_client import ApiClient

    totals: dict[str, Any] = {}
    with ApiClient(server) as api:
        while True:
            done = api.request_as(kind, method, path, **query)
            has_changed = _add(totals, done)
            if not (done.more and has_changed):
                return _report(totals, as_json)


def _add(totals: dict[str, Any], done: ClearResult | RetryResult) -> bool:
    """Adds a response to the totals, in place; returns whether it handled any job."""
    added = {name: value for name, value in msgspec.to_builtins(done).items() if name != "more"}
    for name, value in added.items():
        totals[name] = totals[name] + value if name in totals else value
    return any(added.values())


def _report(totals: dict[str, Any], as_json: bool) -> int:
    """Prints the totals on stdout and each refusal on stderr; returns 1 if there is a refusal."""
    from asyncinfer.cli.output import say, say_json

    refused = totals.get("refused", [])
    if as_json:
        say_json(totals)
    else:
        counts = {name: _count(value) for name, value in totals.items() if name != "refused"}
        texts = [
            f"{count:,} {_OUTCOME_TEXTS.get(name, name)}" for name, count in counts.items() if count
        ]
        say(f"{', '.join(texts) or 'No jobs'}.\n")
    for refusal in refused:
        say_error(f"{refusal['job_id']}: {refusal['detail']}")
    return EXIT_FAILED if refused else 0


def _count(value: Any) -> int:
    """A count as it is, or the number of ids in a list."""
    return value if isinstance(value, int) else len(value)

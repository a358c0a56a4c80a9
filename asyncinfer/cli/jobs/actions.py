"""The commands that end jobs, run them again or delete them: `cancel`, `retry`, `purge`."""

import sys
from collections.abc import Sequence
from typing import Any, Final

import click
import msgspec

from asyncinfer.cli import options
from asyncinfer.cli.exit_codes import EXIT_FAILED, complain
from asyncinfer.cli.options import Server
from asyncinfer.errors import RequestError
from asyncinfer.schemas.responses import Cleared, Retried

_A_CALL: Final = 1000
_ABOUT_THE_SERVER: Final = frozenset({401, 403, 503})
_WORDS: Final = {"stopping": "running and told to stop"}

_of_model = click.option("--model", metavar="NAME", help="All of this model.")
_of_group = click.option("--group", metavar="NAME", help="All of this group.")


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
    server: Server,
    as_json: bool,
) -> int:
    """Cancel jobs, by id or all that match.

    Those that run are told to stop. Nothing of them is deleted: `retry` runs them again.
    """
    query = {"model": model, "group": group, "status": status}
    _refuse_unclear("cancel", job_ids, query)
    if job_ids:
        return _one_by_one(server, job_ids, as_json, "cancelled", tenant=tenant)
    return _all_that_match(server, Cleared, "DELETE", "/jobs", {**query, "tenant": tenant}, as_json)


@options.command(
    "retry",
    "asyncinfer retry 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer retry --status failed --model iris",
    "asyncinfer retry --dead",
)
@click.argument("job_ids", nargs=-1, metavar="[ID]...")
@_of_model
@_of_group
@click.option("--status", type=click.Choice(("failed", "cancelled")), help="All that ended so.")
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
    server: Server,
    as_json: bool,
) -> int:
    """Run failed or cancelled jobs again.

    Each begins a new round with the input and the id it had.
    """
    query: dict[str, Any] = {
        **{"model": model, "group": group, "status": status},
        "dead": dead or None,
    }
    _refuse_unclear("retry", job_ids, query)
    if not job_ids:
        query["tenant"] = tenant
        return _all_that_match(server, Retried, "POST", "/jobs/retry", query, as_json)
    from asyncinfer.cli.api_client import Service

    totals: dict[str, Any] = {"retried": [], "refused": []}
    with Service(server) as service:
        for start in range(0, len(job_ids), _A_CALL):
            some = list(job_ids[start : start + _A_CALL])
            body = {"job_ids": some}
            done = service.ask_as(Retried, "POST", "/jobs/retry", body=body, tenant=tenant)
            _add(totals, done)
    return _tell(totals, as_json)


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
    help="All that ended so; `ended` is any of them.",
)
@click.option("--dead", is_flag=True, help="All dead letters.")
@click.option("--yes", is_flag=True, help="Do not ask on a terminal.")
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
    server: Server,
    as_json: bool,
) -> int:
    """Delete ended jobs with their data.

    Jobs that wait or run are left alone: cancel them first.
    """
    query: dict[str, Any] = {
        **{"model": model, "group": group, "status": status},
        "dead": dead or None,
    }
    _refuse_unclear("purge", job_ids, query)
    if job_ids:
        return _one_by_one(server, job_ids, as_json, "purged", purge=True, tenant=tenant)
    if not (yes or _agreed()):
        return 0
    query |= {"purge": True, "tenant": tenant}
    return _all_that_match(server, Cleared, "DELETE", "/jobs", query, as_json)


# --- how -------------------------------------------------------------------------------------


def _refuse_unclear(verb: str, job_ids: Sequence[str], query: dict[str, Any]) -> None:
    named = any(value is not None for value in query.values())
    if bool(job_ids) == named:
        raise click.UsageError(
            f"Say which jobs to {verb}: by ID, or by --status, --model or --group, not both."
        )


def _agreed() -> bool:
    """Scripts are not asked."""
    return not sys.stdin.isatty() or click.confirm("Delete these jobs and their results?", err=True)


def _one_by_one(
    server: Server, job_ids: Sequence[str], as_json: bool, done: str, **query: Any
) -> int:
    """One that is refused stops no other."""
    from asyncinfer.cli.api_client import Service, part

    totals: dict[str, Any] = {done: [], "refused": []}
    with Service(server) as service:
        for job_id in job_ids:
            try:
                service.ask("DELETE", f"/job/{part(job_id)}", **query)
            except RequestError as error:
                if error.status in _ABOUT_THE_SERVER:
                    raise
                refused = {"job_id": job_id, "code": error.code, "detail": error.detail}
                totals["refused"].append(refused)
            else:
                totals[done].append(job_id)
    return _tell(totals, as_json)


def _all_that_match(
    server: Server,
    kind: type[Cleared | Retried],
    method: str,
    path: str,
    query: dict[str, Any],
    as_json: bool,
) -> int:
    """A call does a bounded number; asks again as long as it did something."""
    from asyncinfer.cli.api_client import Service

    totals: dict[str, Any] = {}
    with Service(server) as service:
        while True:
            done = service.ask_as(kind, method, path, **query)
            did_something = _add(totals, done)
            if not (done.more and did_something):
                return _tell(totals, as_json)


def _add(totals: dict[str, Any], done: Cleared | Retried) -> bool:
    """Whether it did something."""
    added = {name: value for name, value in msgspec.to_builtins(done).items() if name != "more"}
    for name, value in added.items():
        totals[name] = totals[name] + value if name in totals else value
    return any(added.values())


def _tell(totals: dict[str, Any], as_json: bool) -> int:
    """What was done goes to stdout; each refusal is a line on stderr, and makes the exit code 1."""
    from asyncinfer.cli.output import say, say_json

    refused = totals.get("refused", [])
    if as_json:
        say_json(totals)
    else:
        counts = {name: _count(it) for name, it in totals.items() if name != "refused"}
        said = [f"{count:,} {_WORDS.get(name, name)}" for name, count in counts.items() if count]
        say(f"{', '.join(said) or 'None'}.\n")
    for one in refused:
        complain(f"{one['job_id']}: {one['detail']}")
    return EXIT_FAILED if refused else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else len(value)

"""The commands that look at jobs: `jobs`, `job`, `dead`."""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import click
from msgspec import Meta, Struct

from asyncinfer.cli import options
from asyncinfer.cli.exit_codes import EXIT_TIMED_OUT
from asyncinfer.cli.options import Server

if TYPE_CHECKING:
    from asyncinfer.cli.api_client import Service

STATUSES: Final = ("pending", "processing", "completed", "failed", "cancelled")
_ENDED: Final = frozenset({"completed", "failed", "cancelled"})
_PAGE: Final = 1000
_WAIT_SECONDS: Final = 30.0
_FIRST_WAIT_SECONDS: Final = 2.0
"""A reason to wait may show itself just after a submit."""
_ERROR_CHARACTERS: Final = 100
_REASON_CHARACTERS: Final = 300

_Moment: TypeAlias = Annotated[datetime, Meta(tz=True)]


_of_model = click.option("--model", metavar="NAME", help="Only jobs of this model.")
_limit = click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=50,
    show_default=True,
    help="How many jobs at most.",
)


@options.command(
    "jobs",
    "asyncinfer jobs --limit 20",
    "asyncinfer jobs --status failed --model iris",
    "asyncinfer jobs --status pending --json",
    "asyncinfer jobs --all-tenants --status failed",
)
@click.option("--status", type=click.Choice(STATUSES), help="Only jobs in this state.")
@_of_model
@click.option("--group", metavar="NAME", help="Only jobs of this group.")
@_limit
@options.tenant
@options.server
@options.as_json
def jobs(
    status: str | None,
    model: str | None,
    group: str | None,
    limit: int,
    tenant: str | None,
    server: Server,
    as_json: bool,
) -> None:
    """List jobs, the newest first."""
    _list(server, limit, as_json, status=status, model=model, group=group, tenant=tenant)


@options.command("dead", "asyncinfer dead", "asyncinfer dead --model iris --json")
@_of_model
@_limit
@options.tenant
@options.server
@options.as_json
def dead(model: str | None, limit: int, tenant: str | None, server: Server, as_json: bool) -> None:
    """List dead letters: jobs given up that may deserve another try.

    `asyncinfer retry --dead` runs them again.
    """
    _list(server, limit, as_json, model=model, dead=True, tenant=tenant)


@options.command(
    "job",
    "asyncinfer job 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer job 019ab5f2c1f77c36b1a2c6f0d3a54e11 --watch --timeout 60    # seconds",
)
@click.argument("job_id", metavar="ID")
@click.option("--watch", is_flag=True, help="Wait for its end, and tell its states on the way.")
@options.timeout("How long to watch. Default: for ever.")
@options.tenant
@options.server
@options.as_json
def job(
    job_id: str,
    watch: bool,
    timeout: float | None,
    tenant: str | None,
    server: Server,
    as_json: bool,
) -> int:
    """Show a job with its result.

    Exits with 1 when the job failed or was cancelled, with 4 when it has not ended within
    --timeout.
    """
    from asyncinfer.cli.api_client import Service
    from asyncinfer.cli.output import say_json

    with Service(server) as service:
        look = partial(_read, service, job_id, tenant)
        found = _watched(look, timeout) if watch else look(0)
    if as_json:
        say_json(found)
    else:
        _show_one(found)
    if watch and found["status"] not in _ENDED:
        return EXIT_TIMED_OUT
    return 1 if found["status"] in ("failed", "cancelled") else 0


class _Reason(Struct, frozen=True):
    code: str
    message: str


class _Status(Struct, frozen=True):
    status: str
    waiting_for: _Reason | None = None


class _Page(Struct, frozen=True):
    jobs: list[dict[str, Any]]
    cursor: str | None = None


class _Listed(Struct, frozen=True, kw_only=True):
    """A job in a list."""

    job_id: str
    status: str
    model: str | None = None
    version: str | None = None
    tenant: str | None = None
    error: _Reason | None = None
    waiting_for: _Reason | None = None
    created_at: _Moment | None = None
    started_at: _Moment | None = None
    finished_at: _Moment | None = None


# --- one -------------------------------------------------------------------------------------


def _read(
    service: "Service", job_id: str, tenant: str | None, wait_seconds: float
) -> dict[str, Any]:
    from asyncinfer.cli.api_client import part

    path = f"/job/{part(job_id)}"
    found = service.ask("GET", path, wait_seconds=wait_seconds, tenant=tenant)
    service.checked(_Status, found, path)
    return service.checked(dict[str, Any], found, path)


def _watched(look: Callable[[float], dict[str, Any]], timeout: float | None) -> dict[str, Any]:
    """Waits in steps; each state that is seen is told on stderr, with why it waits."""
    import time

    from asyncinfer.cli.output import console, status

    until = None if timeout is None else time.monotonic() + timeout
    told = why = ""
    wait = 0.0
    while True:
        found = look(wait)
        reason = found.get("waiting_for") or {"code": ""}
        if (found["status"], reason["code"]) != (told, why):
            told, why = found["status"], reason["code"]
            line = status(told)
            line.append(f"  {reason['message']}" if why else "", "")
            console(stderr=True).print(line, soft_wrap=True)
        left = _WAIT_SECONDS if until is None else until - time.monotonic()
        if told in _ENDED or left <= 0:
            return found
        wait = min(_WAIT_SECONDS if wait else _FIRST_WAIT_SECONDS, left)


def _show_one(found: dict[str, Any]) -> None:
    from asyncinfer.cli.output import show_facts, status

    show_facts(
        (name, status(value) if name == "status" else _value(name, value))
        for name, value in found.items()
        if (name, value) != ("waiting_for", None)
    )


def _value(name: str, value: Any) -> object:
    import msgspec

    if name == "waiting_for":
        return value["message"]
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


# --- many ------------------------------------------------------------------------------------


def _list(server: Server, limit: int, as_json: bool, **query: Any) -> None:
    from asyncinfer.cli.api_client import Service
    from asyncinfer.cli.output import say_aside, say_json, show

    with Service(server) as service:
        found = list(_found(service, limit, query))
    if as_json:
        say_json(found)
        return
    listed = service.checked(list[_Listed], found, "/jobs")
    columns = ("JOB", "STATUS", "MODEL", "MADE", "TOOK", "REASON")
    if query["tenant"]:
        show((*columns, "TENANT"), ([*_row(one), one.tenant] for one in listed))
    else:
        show(columns, map(_row, listed))
    if not listed:
        say_aside("No dead letters." if query.get("dead") else "No such jobs.")


def _found(service: "Service", limit: int, query: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cursor = None
    while limit > 0:
        asked = {"limit": min(limit, _PAGE), "cursor": cursor, **query}
        page = service.ask_as(_Page, "GET", "/jobs", **asked)
        yield from page.jobs
        limit -= len(page.jobs)
        cursor = page.cursor
        if not cursor:
            return


def _row(one: _Listed) -> Sequence[object]:
    from asyncinfer.cli.output import ago, seconds, status

    started, ended = one.started_at, one.finished_at
    took = seconds((ended - started).total_seconds()) if started and ended else None
    told = f"{one.error.code}: {one.error.message}" if one.error else ""
    most = _ERROR_CHARACTERS
    if one.waiting_for:
        # Its end says what to do.
        told, most = one.waiting_for.message, _REASON_CHARACTERS
    model = "/".join(filter(None, (one.model, one.version)))
    if len(told) > most:
        told = f"{told[:most]}..."
    return one.job_id, status(one.status), model, ago(one.created_at), took, told

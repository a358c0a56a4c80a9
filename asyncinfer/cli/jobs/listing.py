"""The commands `jobs`, `job` and `dead`."""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import click
from msgspec import Meta, Struct

from asyncinfer.cli import options
from asyncinfer.cli.exit_codes import EXIT_TIMED_OUT
from asyncinfer.cli.options import ServerOptions

if TYPE_CHECKING:
    from asyncinfer.cli.api_client import ApiClient

STATUSES: Final = ("pending", "processing", "completed", "failed", "cancelled")
_ENDED: Final = frozenset({"completed", "failed", "cancelled"})
_PAGE: Final = 1000
_WAIT_SECONDS: Final = 30.0
_FIRST_WAIT_SECONDS: Final = 2.0
"""The first wait is short, since the reason why a job waits may appear just after its submit."""
_MAX_ERROR_CHARACTERS: Final = 100
_MAX_REASON_CHARACTERS: Final = 300

_Time: TypeAlias = Annotated[datetime, Meta(tz=True)]


_of_model = click.option("--model", metavar="NAME", help="Only jobs of this model.")
_limit = click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=50,
    show_default=True,
    help="Maximum number of jobs.",
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
    server: ServerOptions,
    as_json: bool,
) -> None:
    """List jobs, the newest first."""
    _list_jobs(server, limit, as_json, status=status, model=model, group=group, tenant=tenant)


@options.command("dead", "asyncinfer dead", "asyncinfer dead --model iris --json")
@_of_model
@_limit
@options.tenant
@options.server
@options.as_json
def dead(
    model: str | None, limit: int, tenant: str | None, server: ServerOptions, as_json: bool
) -> None:
    """List dead letters: jobs that were given up and can be retried.

    `asyncinfer retry --dead` runs them again.
    """
    _list_jobs(server, limit, as_json, model=model, dead=True, tenant=tenant)


@options.command(
    "job",
    "asyncinfer job 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer job 019ab5f2c1f77c36b1a2c6f0d3a54e11 --watch --timeout 60    # seconds",
)
@click.argument("job_id", metavar="ID")
@click.option(
    "--watch", is_flag=True, help="Wait until the job ends; print each new state on stderr."
)
@options.timeout("How long to watch. Default: no limit.")
@options.tenant
@options.server
@options.as_json
def job(
    job_id: str,
    watch: bool,
    timeout: float | None,
    tenant: str | None,
    server: ServerOptions,
    as_json: bool,
) -> int:
    """Show a job with its result.

    Exits with 1 if the job failed or was cancelled, with 4 if it has not ended within
    --timeout.
    """
    from asyncinfer.cli.api_client import ApiClient
    from asyncinfer.cli.output import say_json

    with ApiClient(server) as api:
        read = partial(_read_job, api, job_id, tenant)
        view = _watch(read, timeout) if watch else read(0)
    if as_json:
        say_json(view)
    else:
        _show_job(view)
    if watch and view["status"] not in _ENDED:
        return EXIT_TIMED_OUT
    return 1 if view["status"] in ("failed", "cancelled") else 0


class _Reason(Struct, frozen=True):
    code: str
    message: str


class _Status(Struct, frozen=True):
    status: str
    waiting_for: _Reason | None = None


class _Page(Struct, frozen=True):
    jobs: list[dict[str, Any]]
    cursor: str | None = None


class _ListedJob(Struct, frozen=True, kw_only=True):
    """A job in a list; fields may be missing, and fields that are not known here are no error."""

    job_id: str
    status: str
    model: str | None = None
    version: str | None = None
    tenant: str | None = None
    error: _Reason | None = None
    waiting_for: _Reason | None = None
    created_at: _Time | None = None
    started_at: _Time | None = None
    finished_at: _Time | None = None


# --- one job -------------------------------------------------------------------------------


def _read_job(
    api: "ApiClient", job_id: str, tenant: str | None, wait_seconds: float
) -> dict[str, Any]:
    """The job as the API shows it, once it has ended or after `wait_seconds`.

    `tenant` None stands for the key's own. Raises the API's error, such as JobNotFound, and
    NotAsyncinfer if the answer is no job.
    """
    from asyncinfer.cli.api_client import path_part

    path = f"/job/{path_part(job_id)}"
    view = api.request_json("GET", path, wait_seconds=wait_seconds, tenant=tenant)
    api.convert(_Status, view, path)
    return api.convert(dict[str, Any], view, path)


def _watch(read: Callable[[float], dict[str, Any]], timeout: float | None) -> dict[str, Any]:
    """Waits until the job ends or the time is out, and returns the job as it is then.

    `read` takes the seconds that the server may wait, and returns the job. `timeout` is in seconds;
    None is no limit. Prints each new state on stderr, with the reason why the job waits. A timeout
    raises nothing: the status shows it.
    """
    import time

    from asyncinfer.cli.output import console, status

    deadline = None if timeout is None else time.monotonic() + timeout
    shown_status = shown_reason = ""
    wait_seconds = 0.0
    while True:
        view = read(wait_seconds)
        reason = view.get("waiting_for") or {"code": ""}
        if (view["status"], reason["code"]) != (shown_status, shown_reason):
            shown_status, shown_reason = view["status"], reason["code"]
            line = status(shown_status)
            line.append(f"  {reason['message']}" if shown_reason else "", "")
            console(stderr=True).print(line, soft_wrap=True)
        left_seconds = _WAIT_SECONDS if deadline is None else deadline - time.monotonic()
        if shown_status in _ENDED or left_seconds <= 0:
            return view
        wait_seconds = min(_WAIT_SECONDS if wait_seconds else _FIRST_WAIT_SECONDS, left_seconds)


def _show_job(view: dict[str, Any]) -> None:
    """Prints the fields of a job on stdout, a line each."""
    from asyncinfer.cli.output import show_facts, status

    show_facts(
        (name, status(value) if name == "status" else _value(name, value))
        for name, value in view.items()
        if (name, value) != ("waiting_for", None)
    )


def _value(name: str, value: Any) -> object:
    """The text of a field of a job; lists, dicts and numbers are shown as JSON."""
    import msgspec

    if name == "waiting_for":
        return value["message"]
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


# --- lists ---------------------------------------------------------------------------------


def _list_jobs(server: ServerOptions, limit: int, as_json: bool, **query: Any) -> None:
    """Prints the newest jobs that match `query`, at most `limit`, on stdout.

    `query` are parameters of GET /jobs, `tenant` always among them; None is no filter.
    """
    from asyncinfer.cli.api_client import ApiClient
    from asyncinfer.cli.output import say_json, say_on_stderr, show

    with ApiClient(server) as api:
        entries = list(_read_entries(api, limit, query))
    if as_json:
        say_json(entries)
        return
    listed = api.convert(list[_ListedJob], entries, "/jobs")
    columns = ("JOB", "STATUS", "MODEL", "CREATED", "TOOK", "REASON")
    if query["tenant"]:
        show((*columns, "TENANT"), ([*_row(job), job.tenant] for job in listed))
    else:
        show(columns, map(_row, listed))
    if not listed:
        say_on_stderr("No dead letters." if query.get("dead") else "No such jobs.")


def _read_entries(api: "ApiClient", limit: int, query: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the entries of GET /jobs, newest first and at most `limit`, read page by page."""
    cursor = None
    while limit > 0:
        parameters = {"limit": min(limit, _PAGE), "cursor": cursor, **query}
        page = api.request_as(_Page, "GET", "/jobs", **parameters)
        yield from page.jobs
        limit -= len(page.jobs)
        cursor = page.cursor
        if not cursor:
            return


def _row(job: _ListedJob) -> Sequence[object]:
    """The cells of a job; the last is its error, or why it waits, cut to a length."""
    from asyncinfer.cli.output import ago, seconds, status

    started, ended = job.started_at, job.finished_at
    run_time = seconds((ended - started).total_seconds()) if started and ended else None
    reason = f"{job.error.code}: {job.error.message}" if job.error else ""
    max_characters = _MAX_ERROR_CHARACTERS
    if job.waiting_for:
        # The end of this text says what to do, so it gets more room.
        reason, max_characters = job.waiting_for.message, _MAX_REASON_CHARACTERS
    model = "/".join(filter(None, (job.model, job.version)))
    if len(reason) > max_characters:
        reason = f"{reason[:max_characters]}..."
    return job.job_id, status(job.status), model, ago(job.created_at), run_time, reason

"""The commands `jobs`, `job` and `dead`."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from asyncinfer.cli import options
from asyncinfer.cli.api_client import connect
from asyncinfer.cli.exit_codes import EXIT_FAILED, EXIT_TIMED_OUT
from asyncinfer.cli.jobs.job_webhook import webhook_lines
from asyncinfer.cli.jobs.timeline import show_timeline
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.output import (
    ago,
    console,
    counted,
    say_json,
    say_on_stderr,
    seconds,
    show,
    show_facts,
    status,
)
from asyncinfer.jobs import STATUSES, TERMINAL

if TYPE_CHECKING:
    from asyncinfer.client import Job

_WAIT_SECONDS: Final = 30.0
_FIRST_WAIT_SECONDS: Final = 2.0
"""The first wait is short, since the reason why a job waits may appear just after its submit."""
_MAX_ERROR_CHARACTERS: Final = 100
_MAX_REASON_CHARACTERS: Final = 300

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
@click.option("--request-id", metavar="ID", help="Only jobs of the request with this X-Request-ID.")
@_limit
@options.tenant("List jobs", ", without inputs and results")
@options.server
@options.as_json
def jobs(server: ServerOptions, as_json: bool, **filters: Any) -> None:
    """List jobs, the newest first."""
    _list_jobs(server, as_json, **filters)


@options.command("dead", "asyncinfer dead", "asyncinfer dead --model iris --json")
@_of_model
@_limit
@options.tenant("List dead letters", ", without inputs and results")
@options.server
@options.as_json
def dead(server: ServerOptions, as_json: bool, **filters: Any) -> None:
    """List dead letters: jobs that were given up and can be retried.

    `asyncinfer retry --dead` runs them again.
    """
    _list_jobs(server, as_json, dead=True, **filters)


@options.command(
    "job",
    "asyncinfer job 019ab5f2c1f77c36b1a2c6f0d3a54e11",
    "asyncinfer job 019ab5f2c1f77c36b1a2c6f0d3a54e11 --watch --timeout 60    # seconds",
    "asyncinfer job 019ab5f2c1f77c36b1a2c6f0d3a54e11 --timeline",
)
@click.argument("job_id", metavar="ID")
@click.option(
    "--watch", is_flag=True, help="Wait until the job ends; print each new state on stderr."
)
@options.timeout("How long to watch. Default: no limit.")
@click.option("--timeline", is_flag=True, help="Show what happened to it, and when, instead.")
@options.tenant("Show a job", ", without its input and result")
@options.server
@options.as_json
def job(
    job_id: str,
    watch: bool,
    timeout: float | None,
    timeline: bool,
    tenant: str | None,
    server: ServerOptions,
    as_json: bool,
) -> int:
    """Show a job with its result.

    Exits with 1 if the job failed or was cancelled, with 4 if it has not ended within
    --timeout.
    """
    if timeout is not None and not watch:
        raise click.UsageError("--timeout goes with --watch.")
    with connect(server) as client:
        found = client.job(job_id, tenant=tenant)
        if watch:
            _watch(found, timeout)
        course = found.timeline() if timeline else None
        hook = [] if timeline or as_json else list(webhook_lines(found))
    if course:
        show_timeline(course, as_json)
    elif as_json:
        say_json(found.as_dict())
    else:
        _show_job(found.as_dict(), hook)
    if watch and found.status not in TERMINAL:
        return EXIT_TIMED_OUT
    return EXIT_FAILED if found.status in ("failed", "cancelled") else 0


# --- one job -------------------------------------------------------------------------------


def _watch(job: "Job", timeout: float | None) -> None:
    """Waits until the job ends or the time is out.

    `timeout` is in seconds; None is no limit. Prints each new state on stderr, with the reason why
    the job waits. A timeout raises nothing: the status shows it.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    shown: tuple[str, str] | None = None
    wait_seconds = _FIRST_WAIT_SECONDS
    while True:
        reason = job.waiting_for
        # A job behind others is shown with their number once: the waits below do not read that.
        code = reason.code if reason and reason.code != "queue" else ""
        if shown != (job.status, code):
            shown = (job.status, code)
            line = status(job.status)
            line.append(f"  {reason.message}" if reason else "", "")
            console(stderr=True).print(line, soft_wrap=True)
        left_seconds = _WAIT_SECONDS if deadline is None else deadline - time.monotonic()
        if job.status in TERMINAL or left_seconds <= 0:
            return
        job.refresh(min(wait_seconds, left_seconds))
        wait_seconds = _WAIT_SECONDS


def _show_job(view: dict[str, Any], webhook: Sequence[str]) -> None:
    """Prints the fields of a job on stdout, a line each, and those on its webhook."""
    facts: list[Sequence[object]] = [
        (name, status(value) if name == "status" else _value(name, value))
        for name, value in view.items()
        if value is not None or name not in ("waiting_for", "position", "eta_seconds")
    ]
    show_facts([*facts, *(("webhook", line) for line in webhook)])


def _value(name: str, value: Any) -> object:
    """The text of a field of a job; lists, dicts and numbers are shown as JSON."""
    if name == "waiting_for":
        return value["message"]
    if name == "position":
        return f"{'about ' if value['about'] else ''}{counted(value['ahead'], 'job')} ahead"
    if name == "eta_seconds":
        return seconds(value)
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


# --- lists ---------------------------------------------------------------------------------


def _list_jobs(server: ServerOptions, as_json: bool, **filters: Any) -> None:
    """Prints the newest jobs that match on stdout.

    `filters` are arguments of `Client.jobs`, `limit` and `tenant` always among them.
    """
    with connect(server) as client:
        listed = client.jobs(**filters)
    if as_json:
        say_json([job.as_dict() for job in listed])
        return
    columns = ("JOB", "STATUS", "MODEL", "CREATED", "TOOK", "REASON")
    if filters["tenant"]:
        show((*columns, "TENANT"), ([*_row(job), job.tenant] for job in listed))
    else:
        show(columns, map(_row, listed))
    if not listed:
        say_on_stderr("No dead letters." if filters.get("dead") else "No such jobs.")


def _row(job: "Job") -> Sequence[object]:
    """The cells of a job; the last is its error, or why it waits, cut to a length."""
    times = job.times
    started, ended = times.get("started"), times.get("finished")
    run_time = seconds((ended - started).total_seconds()) if started and ended else None
    reason = f"{job.error.code}: {job.error.message}" if job.error else ""
    max_characters = _MAX_ERROR_CHARACTERS
    if job.waiting_for:
        # The end of this text says what to do, so it gets more room.
        reason, max_characters = job.waiting_for.message, _MAX_REASON_CHARACTERS
    model = "/".join(filter(None, (job.model, job.version)))
    if len(reason) > max_characters:
        reason = f"{reason[:max_characters]}..."
    return job.id, status(job.status), model, ago(times.get("created")), run_time, reason

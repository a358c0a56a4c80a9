"""The table of `asyncinfer job ID --timeline`."""

from datetime import datetime
from typing import TYPE_CHECKING, Final

from asyncinfer.cli.output import counted, say_json, say_on_stderr, seconds, show, styled

if TYPE_CHECKING:
    from asyncinfer.client import Timeline, TimelineEvent

_STYLES: Final = {"worker_lost": "bold red", "handed_back": "yellow", "now": "dim"}
_SHA256_CHARACTERS: Final = 12


def show_timeline(timeline: "Timeline", as_json: bool) -> None:
    """Prints the events of a timeline on stdout, a line each, or the whole as JSON."""
    if as_json:
        say_json(timeline)
        return
    show(
        ("TIME (UTC)", "AFTER", "EVENT", "DETAILS"),
        (
            (
                _time(event.at),
                seconds(event.seconds),
                styled(event.event, _STYLES.get(event.event, "")),
                _details(event),
            )
            for event in timeline
        ),
        numeric=("AFTER",),
    )
    if timeline.omitted:
        say_on_stderr(f"{counted(timeline.omitted, 'earlier delivery')} not kept.")


def _time(at: datetime | None) -> str | None:
    """A time in UTC with ms, as ISO 8601 writes it; None for None."""
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z") if at else None


def _details(event: "TimelineEvent") -> str:
    """What is known of an event, in one line."""
    parts = [
        event.delivery and f"delivery {event.delivery}",
        event.worker,
        event.jobs and counted(event.jobs, "job"),
        event.rows is not None and counted(event.rows, "row"),
        event.version and f"version {event.version}",
        event.sha256 and f"sha256 {event.sha256[:_SHA256_CHARACTERS]}",
        event.provider,
        event.http_status and f"HTTP {event.http_status}",
        event.error,
        event.duration_seconds is not None and f"took {seconds(event.duration_seconds)}",
        event.reason,
        event.delay_seconds and f"again in {seconds(event.delay_seconds)}",
        event.status,
        event.code,
    ]
    return ", ".join(part for part in parts if part)

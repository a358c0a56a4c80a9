"""HTML cards of jobs, models, groups and lists for notebooks; every value is escaped.

Colours come from the page (`currentColor`, transparency), so that light and dark themes both do.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any, Final, NamedTuple

import msgspec

from asyncinfer.schemas.timeline import TimelineEvent

_CARD: Final = (
    "display:inline-block;border:1px solid rgba(128,128,128,.4);border-radius:6px;"
    "padding:.5em .8em;font-size:.9em;line-height:1.5;max-width:60em"
)
_QUIET: Final = "opacity:.65"
_COLOURS: Final = {
    "pending": "rgba(128,128,128,.35)",
    "processing": "rgba(30,120,230,.4)",
    "completed": "rgba(30,160,70,.4)",
    "failed": "rgba(220,50,50,.45)",
    "no worker": "rgba(220,50,50,.45)",
    "cancelled": "rgba(220,150,30,.4)",
}
_MAX_CHARACTERS: Final = 400
_MAX_CELL_CHARACTERS: Final = 80
_MAX_LINES: Final = 50
_CELL: Final = "text-align:left;vertical-align:top;padding:.1em .6em .1em 0"
_DOES_AFTER: Final = defaultdict(lambda: "waited", {"claimed": "prepared", "running": "ran"})
"""What a job does after an event."""
_ENDS_SO: Final = {"worker_lost": "lost", "handed_back": "handed back"}
"""Events that say what became of the time before them."""
_SPAN_COLOURS: Final = {
    "waited": "rgba(128,128,128,.5)",
    "prepared": "rgba(110,180,240,.6)",
    "ran": "rgba(30,120,230,.8)",
    "mixed": "rgba(110,180,240,.6)",
    "handed back": "rgba(220,150,30,.75)",
    "lost": "rgba(220,50,50,.75)",
}
_SPAN_TEXTS: Final = {
    "mixed": "waited and ran",
    "handed back": "handed back after",
    "lost": "worker lost within",
}
_MAX_SPANS: Final = 20


def job_card(view: Mapping[str, Any], events: Sequence[TimelineEvent] = ()) -> str:
    """The HTML of a job's card; `view` is the job as the server shows it, `events` are those of its
    timeline, for the picture."""
    rows = {"model": _model_of(view), "group": view.get("group")}
    rows |= {name: view.get(f"{name}_at") for name in ("created", "started", "finished")}
    if reason := view.get("waiting_for"):
        rows["waits"] = reason.get("message")
    elif view.get("eta_seconds") is not None:
        # It is next in turn; the reason of a job behind others says as much.
        rows["left"] = f"about {view['eta_seconds']:,.0f} s"
    if error := view.get("error"):
        rows["error"] = f"{error.get('code')}: {error.get('message')}"
    if view.get("result") is not None:
        rows["result"] = msgspec.json.encode(view["result"]).decode(errors="replace")
    return _card("Job", view["job_id"], _badge(view["status"]), rows, _picture(events))


def timeline_card(job_id: str, status: str, events: Sequence[TimelineEvent]) -> str:
    """The HTML of the card that shows a job's timeline alone."""
    return _card("Timeline of", job_id, _badge(status), {}, _picture(events))


def events_of(times: Mapping[str, datetime]) -> list[TimelineEvent]:
    """The events that follow from the times of a job itself, as far as these tell."""
    names = {"created": "submitted", "started": "running", "finished": "finished"}
    return [
        TimelineEvent(event=names[name], at=at, at_ms=int(at.timestamp() * 1000), seconds=None)
        for name, at in times.items()
    ]


def model_card(name: str, badge: str, rows: Mapping[str, Any]) -> str:
    """The HTML of a model's card; `badge` says that it is paused, or how many workers have it."""
    return _card("Model", name, _badge(badge), rows)


def group_card(view: Mapping[str, Any]) -> str:
    """The HTML of a group's card; `view` is the group as the server shows it."""
    counts = view.get("counts", {})
    eta = view.get("eta_seconds")
    rows = {
        "jobs": f"{view.get('jobs', 0):,}",
        "states": ", ".join(f"{count:,} {name}" for name, count in counts.items() if count),
        "left": None if eta is None else f"about {eta:,.0f} s",
        "failed": ", ".join(view.get("first_failed", ())),
    }
    return _card("Group", view["group"], _bar(float(view.get("progress", 0))), rows)


def table_card(
    kind: str, rows: Sequence[Mapping[str, Any]], below: Mapping[str, Any] | None = None
) -> str:
    """The HTML of a card with a table: a line for each of `rows`, which have the same names.

    A column without any value is left out, and so are lines beyond the first 50. `below` are rows
    under the table, as those of other cards.
    """
    shown = rows[:_MAX_LINES]
    names = [name for name in (shown[0] if shown else ()) if any(_has(row[name]) for row in shown)]
    head = "".join(
        f'<th style="{_CELL};{_QUIET};font-weight:normal">{escape(n)}</th>' for n in names
    )
    lines = "".join(
        '<tr style="background:none">'
        + "".join(f'<td style="{_CELL}">{_cell(row[name])}</td>' for name in names)
        + "</tr>"
        for row in shown
    )
    left_out = len(rows) - len(shown)
    more = f'<div style="{_QUIET}">{left_out:,} more</div>' if left_out else ""
    table = (
        f'<table style="margin:.3em 0 0;border:none"><tr style="background:none">{head}</tr>'
        f"{lines}</table>{more}"
    )
    return _card(kind, f"{len(rows):,}", table if rows else "", below or {})


def _has(value: Any) -> bool:
    """Whether a cell has a value to show."""
    return value is not None and value != ""


def _cell(value: Any) -> str:
    """A value as HTML, empty for None; numbers with separators, texts cut at 80 characters."""
    text = f"{value:,}" if isinstance(value, int) else str(value) if _has(value) else ""
    is_long = len(text) > _MAX_CELL_CHARACTERS
    return escape(f"{text[:_MAX_CELL_CHARACTERS]} …" if is_long else text)


def _card(kind: str, name: str, badge: str, rows: Mapping[str, Any], picture: str = "") -> str:
    """The HTML of a card. `badge` and `picture` are HTML and are not escaped; rows without a value
    are left out."""
    shown = "".join(
        f'<tr style="background:none"><td style="{_QUIET};text-align:left;vertical-align:top">'
        f'{escape(label)}</td><td style="text-align:left;word-break:break-word">'
        f"{escape(_shorten(str(value)))}</td></tr>"
        for label, value in rows.items()
        if value
    )
    return (
        f'<div style="{_CARD}"><span style="{_QUIET}">{escape(kind)}</span> '
        f'<code style="background:none">{escape(name)}</code> {badge}'
        f'<table style="margin:.3em 0 0;border:none">{shown}</table>{picture}</div>'
    )


class _Span(NamedTuple):
    """The time between two events of a job: what it did, for how long."""

    what: str
    seconds: float
    details: str


def _spans(events: Sequence[TimelineEvent]) -> Iterator[_Span]:
    """The times between the events whose times are known."""
    since: TimelineEvent | None = None
    undated: TimelineEvent | None = None
    for event in events:
        if event.event == "webhook":
            return
        if event.at_ms is None:
            undated = event
            continue
        # A worker's loss and what follows are one step.
        if since and since.at_ms is not None and since.event != "worker_lost":
            what = _ENDS_SO.get(event.event) or ("mixed" if undated else _DOES_AFTER[since.event])
            details = event.reason or _details(undated or since)
            yield _Span(what, max(0, event.at_ms - since.at_ms) / 1000, details)
        since, undated = event, None


def _details(event: TimelineEvent) -> str:
    """Where a span began: the worker, and with how many others the job ran."""
    parts = [event.worker if event.event in ("claimed", "running") else None]
    if event.event == "running":
        parts += [
            f"{event.jobs} jobs" if event.jobs and event.jobs > 1 else None,
            f"{event.rows} rows" if event.rows and event.rows > 1 else None,
            event.provider,
        ]
    return ", ".join(part for part in parts if part)


def _picture(events: Sequence[TimelineEvent]) -> str:
    """A bar with a part for each span of a timeline, and what each part is; empty for no span.

    A part is as wide as its time is long, but never too narrow to be seen. The texts wrap in a
    narrow cell.
    """
    spans = list(_spans(events))
    shown = spans[-_MAX_SPANS:]
    if not shown:
        return ""
    longest = max(span.seconds for span in shown) or 1.0
    parts = "".join(
        f'<span style="flex:{max(span.seconds / longest, 0.001):.3f} 1 0;min-width:4px;'
        f'background:{_SPAN_COLOURS[span.what]}" title="{escape(_span_text(span))}"></span>'
        for span in shown
    )
    texts = "".join(
        f'<span><span style="display:inline-block;width:.7em;'
        f'height:.7em;border-radius:2px;background:{_SPAN_COLOURS[span.what]}"></span> '
        f"{escape(_span_text(span))}</span>"
        for span in shown
    )
    left_out = f"<span>{len(spans) - len(shown)} before</span>" if len(spans) > len(shown) else ""
    return (
        '<div style="display:flex;gap:1px;height:.8em;border-radius:4px;overflow:hidden;'
        f'margin:.5em 0 .3em">{parts}</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:0 1em;font-size:.9em">{left_out}{texts}</div>'
    )


def _span_text(span: _Span) -> str:
    """What a span is and how long, such as `ran 12 ms (w-f0fd4a)`."""
    text = f"{_SPAN_TEXTS.get(span.what, span.what)} {duration(span.seconds)}"
    return _shorten(f"{text} ({span.details})" if span.details else text)


def duration(seconds: float) -> str:
    """A number of seconds with a fitting unit."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _badge(text: str) -> str:
    """A word on a coloured ground, as HTML."""
    colour = _COLOURS.get(text, _COLOURS["pending"])
    return (
        f'<span style="background:{colour};border-radius:4px;padding:.1em .5em">'
        f"{escape(text)}</span>"
    )


def _bar(share: float) -> str:
    """A bar that is filled up to `share`, 0 to 1, as HTML."""
    percent = max(0.0, min(share, 1.0)) * 100
    return (
        '<span style="display:inline-block;width:8em;height:.7em;border-radius:4px;'
        f'background:{_COLOURS["pending"]}"><span style="display:block;width:{percent:.1f}%;'
        f'height:100%;border-radius:4px;background:{_COLOURS["completed"]}"></span></span> '
        f"{percent:.0f} %"
    )


def _model_of(view: Mapping[str, Any]) -> str:
    """The job's model with its version, as far as they are known."""
    version = view.get("version")
    return f"{view.get('model', '')}{f' version {version}' if version else ''}"


def _shorten(text: str) -> str:
    """The text, cut at 400 characters."""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} …"

"""HTML cards of jobs, models and groups for notebooks; every value is escaped.

Colours come from the page (`currentColor`, transparency), so that light and dark themes both do.
"""

from collections.abc import Mapping
from html import escape
from typing import Any, Final

import msgspec

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


def job_card(view: Mapping[str, Any]) -> str:
    """The HTML of a job's card; `view` is the job as the server shows it."""
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
    return _card("Job", view["job_id"], _badge(view["status"]), rows)


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


def _card(kind: str, name: str, badge: str, rows: Mapping[str, Any]) -> str:
    """The HTML of a card. `badge` is HTML and is not escaped; rows without a value are left out."""
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
        f'<table style="margin:.3em 0 0;border:none">{shown}</table></div>'
    )


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

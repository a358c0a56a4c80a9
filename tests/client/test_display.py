"""Cards for notebooks: every value of a server is escaped."""

import re
from typing import Any, Final

import pytest

from asyncinfer.client import Client, Model, Timeline, TimelineEvent
from asyncinfer.client._display import group_card, job_card
from asyncinfer.client._models import TensorInfo

EVIL: Final = "<script>alert(1)</script>\"'&"

JOB: Final[dict[str, Any]] = {
    "job_id": EVIL,
    "status": EVIL,
    "model": EVIL,
    "version": EVIL,
    "group": EVIL,
    "created_at": EVIL,
    "error": {"code": EVIL, "message": EVIL},
    "waiting_for": {"code": EVIL, "message": EVIL},
    "result": {"prediction": 0, "class_name": EVIL},
}
GROUP: Final[dict[str, Any]] = {
    "group": EVIL,
    "jobs": 4,
    "counts": {EVIL: 3},
    "progress": 0.75,
    "eta_seconds": 12.3,
    "first_failed": [EVIL],
}
MODEL: Final = Model(
    model=EVIL,
    version=EVIL,
    inputs=(TensorInfo(EVIL, EVIL, (None, EVIL, 3)),),
    outputs=(TensorInfo(EVIL, EVIL, ()),),
    labels=(EVIL,),
    batching=EVIL,
    description=EVIL,
    shown_example={"data": [EVIL]},
)


@pytest.mark.parametrize("card", [job_card(JOB), group_card(GROUP), MODEL._repr_html_()])
def test_every_value_of_a_server_is_escaped(card: str) -> None:
    assert "<script" not in card
    assert "&lt;script&gt;" in card
    assert all(word not in card for word in ("src=", "href=", "url(", "@import"))


def test_the_card_of_a_waiting_job_shows_where_it_is() -> None:
    behind = {"code": "queue", "message": "It waits behind about 4,211 jobs, some 12 s."}
    job = {"job_id": "1", "status": "pending", "position": {"ahead": 4211, "about": True}}
    assert "about 4,211 jobs" in job_card({**job, "waiting_for": behind, "eta_seconds": 12.1})
    next_one = {"position": {"ahead": 0, "about": False}, "waiting_for": None, "eta_seconds": 3.2}
    assert "about 3 s" in job_card({**job, **next_one})


def test_long_results_are_cut_short() -> None:
    card = job_card({"job_id": "1", "status": "completed", "result": list(range(10_000))})
    assert len(card) < 3000


def test_cards_show_the_state_of_jobs_models_and_groups(client: Client) -> None:
    job = client.submit([[5.1, 3.5, 1.4, 0.2]], group="carded").wait()
    card = job._repr_html_()
    assert all(word in card for word in (job.id, "completed", "iris", "setosa", "carded"))

    card = client.model("iris")._repr_html_()
    assert all(word in card for word in ("FP32", "[batch, 4]", "versicolor", "5.1", "probe rows"))

    card = client.group("carded")._repr_html_()
    assert all(word in card for word in ("carded", "1 completed", "100 %"))


def test_the_card_of_a_job_shows_for_how_long_it_waited_and_ran(client: Client) -> None:
    job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris").wait()
    before = job._repr_html_()
    assert re.search(r"waited [0-9.]+ m?s</span>.*ran [0-9.]+ m?s</span>", before)
    timeline = job.timeline()
    card = job._repr_html_()
    assert f"({timeline.events[2].worker}, CPU)" in card
    assert card.count("waited") == 2  # A part of the bar, and its text.
    assert "prepared" in timeline._repr_html_()


def test_the_picture_of_a_timeline_has_a_part_for_each_worker_that_was_lost() -> None:
    times = (0, None, 16_000, 16_000, None, 33_500, 33_500)
    names = ("submitted", "claimed", "worker_lost", "redelivered", "claimed", "worker_lost")
    events = [
        TimelineEvent(event=name, at=None, at_ms=at_ms, seconds=None, worker='<b>"w')
        for name, at_ms in zip((*names, "finished"), times, strict=True)
    ]
    card = Timeline(job_id="1", status="failed", events=tuple(events))._repr_html_()
    assert re.findall(r"> worker lost within ([0-9.]+ s)", card) == ["16.0 s", "17.5 s"]
    assert "waited" not in card
    assert "<b>" not in card

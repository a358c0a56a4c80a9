"""Cards for notebooks: every value of a server is escaped."""

import re
from typing import Any, Final

import msgspec
import pytest

from asyncinfer.client import AsyncClient, Catalog, Client, Model, Timeline, TimelineEvent
from asyncinfer.client._display import group_card, job_card, table_card
from asyncinfer.client._models import TensorInfo, model_row

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


@pytest.mark.parametrize(
    "card",
    [
        job_card(JOB),
        group_card(GROUP),
        MODEL._repr_html_(),
        Catalog(models=(MODEL,), loading=(EVIL,))._repr_html_(),
        table_card(EVIL, [{EVIL: EVIL}]),
    ],
)
def test_every_value_of_a_server_is_escaped(card: str) -> None:
    assert "<script" not in card
    assert "&lt;script&gt;" in card
    assert all(word not in card for word in ("src=", "href=", "url(", "@import"))


async def test_a_notebook_shows_lists_as_tables(client: Client, aclient: AsyncClient) -> None:
    hook = {"url": "https://hook.invalid/"}
    job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="listed", webhook=hook).wait()
    client.pause("iris")
    client.resume("iris")
    calls: list[tuple[str, dict[str, Any], set[str]]] = [
        ("models", {}, {"iris", "default", "FP32 [batch, 4]", "setosa, versicolor"}),
        ("catalog", {}, {"iris", "default", "FP32 [batch, 4]", "setosa, versicolor"}),
        ("queues", {}, {"iris", "waiting", "jobs/s"}),
        ("workers", {}, {"ready", "busy", "loaded"}),
        ("webhooks", {}, {"hook.invalid", "pending"}),
        ("audit", {"limit": 2}, {"pause", "resume", "model iris", "done"}),
        ("jobs", {"group": "listed"}, {job.id, "completed", "listed"}),
    ]
    for name, options, words in calls:
        for listed in (
            getattr(client, name)(**options),
            await getattr(aclient, name)(**options),
        ):
            card = listed._repr_html_()
            assert {word for word in words if word not in card} == set()
            assert card.count("<table") == card.count("</table>") <= 2
    assert client.models() == list(client.models())
    assert client.jobs(group="nothing")._repr_html_().count("<tr") == 0  # type: ignore[attr-defined]


def test_a_table_is_short_however_long_its_list_is() -> None:
    card = table_card("Models", [model_row(MODEL)] * 1000)
    assert "950 more" in card
    long = table_card("Jobs", [{"job": "x" * 10_000, "error": None}])
    assert len(long) < 1500
    assert "error" not in long


def test_a_model_is_printed_with_the_beginning_of_a_long_example() -> None:
    large = msgspec.structs.replace(MODEL, shown_example={"data": [[0.0] * 512]})
    assert "shown_example=\"{'data': [[0.0, 0.0, " in repr(large)
    assert len(repr(large)) - len(repr(MODEL)) < 200
    assert large.example() == [[0.0] * 512]
    assert f"shown_example={MODEL.shown_example!r}" in repr(MODEL)


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

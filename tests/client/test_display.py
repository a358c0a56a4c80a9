"""Cards for notebooks: every value of a server is escaped."""

from typing import Any, Final

import pytest

from asyncinfer.client import Client, Model
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

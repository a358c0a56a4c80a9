"""When a webhook is tried again, and when it is given up."""

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest

from asyncinfer.webhooks.answers import Answer, Failure, retry_after_seconds
from asyncinfer.webhooks.schedule import MAX_TRIES, verdict

NO_ANSWER = Answer(0, "timeout")


def test_a_webhook_is_tried_for_more_than_a_day_and_then_given_up() -> None:
    verdicts = [verdict(tries, NO_ANSWER, jitter=0.0) for tries in range(1, MAX_TRIES + 1)]
    hours = 3600.0
    assert [each.pause_seconds for each in verdicts] == [
        *(5.0, 300.0, 1800.0, 2 * hours, 5 * hours, 10 * hours, 14 * hours),
        0.0,
    ]
    assert [each.outcome for each in verdicts] == [None] * 7 + ["given_up"]


def test_pauses_differ_so_that_not_all_return_together() -> None:
    assert verdict(2, NO_ANSWER, jitter=-1).pause_seconds == pytest.approx(270)
    assert verdict(2, NO_ANSWER, jitter=1).pause_seconds == pytest.approx(330)
    pauses = {verdict(2, NO_ANSWER).pause_seconds for _ in range(20)}
    assert len(pauses) > 10
    assert all(270 <= pause <= 330 for pause in pauses)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        *((200, "delivered"), (204, "delivered"), (299, "delivered"), (410, "gone")),
        *(
            (199, None),
            (301, None),
            (302, None),
            (400, None),
            (404, None),
            (429, None),
            (500, None),
        ),
    ],
)
def test_only_2xx_is_success_and_only_410_ends_at_once(status: int, outcome: str | None) -> None:
    assert verdict(1, Answer(status)).outcome == outcome


def test_retry_after_makes_a_pause_longer_up_to_an_hour_and_never_shorter() -> None:
    def pause(tries: int, retry_after: float) -> float:
        return verdict(tries, Answer(503, "", 0, retry_after), jitter=0.0).pause_seconds

    assert pause(1, 60.0) == 60.0
    assert pause(1, 1.0) == 5.0
    assert pause(1, 1e9) == 3600.0
    assert pause(4, 60.0) == 7200.0
    assert verdict(MAX_TRIES, Answer(503, "", 0, 60.0)).outcome == "given_up"


def test_retry_after_is_seconds_or_a_date() -> None:
    now = 1_800_000_000.0
    in_a_minute = format_datetime(datetime.fromtimestamp(now + 60, UTC), usegmt=True)
    assert retry_after_seconds(" 120 ", now) == 120.0
    assert retry_after_seconds(in_a_minute, now) == 60.0
    assert retry_after_seconds(in_a_minute, now + 90) == 0.0
    for wrong in ("", "-5", "1.5", "soon", "9" * 400, "Mon, 99 Foo 2026 99:99:99 GMT", "²"):
        assert retry_after_seconds(wrong, now) in (0.0, 999_999_999.0)


@pytest.mark.parametrize(
    ("status", "failure", "blames"),
    [
        *((0, "timeout", True), (0, "connection_failed", True), (0, "tls_failed", True)),
        *((500, "", True), (503, "", True), (429, "", True)),
        *((200, "", False), (404, "", False), (410, "", False), (302, "", False)),
        *((0, "no_secret", False), (0, "url_refused", False), (0, "address_refused", False)),
    ],
)
def test_a_host_is_blamed_only_for_what_it_does(
    status: int, failure: Failure, blames: bool
) -> None:
    assert Answer(status, failure).blames_host == blames

"""The lines of a log on a Redis that does not answer."""

import logging

import pytest

from asyncinfer.processes.outage import Outage

REFUSED = "Redis does not answer (ConnectionError). Retry in a moment."


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "asyncinfer.redis")
    return caplog


def test_an_outage_has_a_line_at_its_begin_one_each_30_s_and_one_at_its_end(
    clock: Clock, lines: pytest.LogCaptureFixture
) -> None:
    outage = Outage(clock)
    outage.answered()
    for _ in range(700):
        outage.failed(REFUSED)
        clock.seconds += 0.1
    outage.answered()
    clock.seconds += 0.5
    outage.answered()
    clock.seconds += 0.5
    outage.answered()
    assert lines.messages == [
        "Redis does not answer (ConnectionError). It is asked again until it answers.",
        "Redis has not answered for 30 s. Redis does not answer (ConnectionError).",
        "Redis has not answered for 60 s. Redis does not answer (ConnectionError).",
        "Redis answers again after 70.0 s.",
    ]


def test_a_cause_that_is_found_later_is_logged_at_once_and_once(
    clock: Clock, lines: pytest.LogCaptureFixture
) -> None:
    outage = Outage(clock)
    outage.failed(REFUSED)
    for _ in range(20):
        clock.seconds += 0.4
        outage.failed("Redis refuses the login of this service.")
        outage.failed("Redis does not answer (TimeoutError). Retry in a moment.")
    assert lines.messages == [
        "Redis does not answer (ConnectionError). It is asked again until it answers.",
        "Redis has not answered for 0 s. Redis refuses the login of this service.",
    ]


def test_calls_that_fail_in_turn_with_calls_that_succeed_are_one_outage(
    clock: Clock, lines: pytest.LogCaptureFixture
) -> None:
    outage = Outage(clock)
    for _ in range(100):
        outage.failed(REFUSED)
        clock.seconds += 0.2
        outage.answered()
    clock.seconds += 2
    outage.answered()
    assert len(lines.messages) == 2
    assert lines.messages[1] == "Redis answers again after 20.0 s."


def test_a_call_that_fails_every_6_s_gives_fewer_and_fewer_lines(
    clock: Clock, lines: pytest.LogCaptureFixture
) -> None:
    outage = Outage(clock)
    for _ in range(600):
        outage.failed(REFUSED)
        for _ in range(12):
            clock.seconds += 0.5
            outage.answered()
    assert len(lines.messages) <= 2 * 4 + 3600 / 30


def test_how_long_redis_is_silent_is_counted_from_its_last_answer(clock: Clock) -> None:
    outage = Outage(clock)
    assert outage.silent_seconds == float("inf")
    outage.answered()
    clock.seconds += 4
    assert outage.silent_seconds == 0
    outage.failed(REFUSED)
    clock.seconds += 3
    assert outage.silent_seconds == 7
    outage.answered()
    assert outage.silent_seconds == 0

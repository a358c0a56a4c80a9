"""Measured times: seconds of slot time per job, and seconds per run, by model."""

import pytest

from asyncinfer.worker.running.timings import JobTimes, RunTimes


def test_a_full_batch_counts_by_its_jobs_not_as_one_run() -> None:
    paces = JobTimes()
    paces.add("iris", 1.0, 1, at_seconds=0)
    paces.add("iris", 1.0, 99, at_seconds=0)
    assert paces.seconds_per_job() == {"iris": pytest.approx(2 / 100)}


def test_a_model_is_measured_apart_from_others_and_not_before_it_ran() -> None:
    paces = JobTimes()
    assert paces.seconds_per_job() == {}
    paces.add("fast", 0.1, 1, at_seconds=0)
    paces.add("slow", 10, 1, at_seconds=0)
    assert paces.seconds_per_job() == {"fast": pytest.approx(0.1), "slow": pytest.approx(10)}


def test_a_model_that_became_slower_is_known_to_be_within_minutes() -> None:
    paces = JobTimes()
    for second in range(600):
        paces.add("iris", 0.1, 1, at_seconds=second)
    for second in range(600, 840):
        paces.add("iris", 1.0, 1, at_seconds=second)
    assert paces.seconds_per_job()["iris"] == pytest.approx(1.0, rel=0.07)


def test_a_night_without_jobs_keeps_the_mean_and_gives_it_no_weight() -> None:
    paces = JobTimes()
    paces.add("iris", 1.0, 1000, at_seconds=0)
    assert paces.seconds_per_job() == {"iris": 0.001}
    paces.add("iris", 0.5, 1, at_seconds=1e6)
    assert paces.seconds_per_job() == {"iris": 0.5}


def test_run_times_are_kept_by_model_and_power_of_two() -> None:
    times = RunTimes()

    for rows, seconds in ((1, 0.5), (3, 1.0), (4, 2.0), (5, 8.0)):
        times.add("m", rows, seconds)

    assert times.view() == {"m": {1: 0.5, 4: 1.5, 8: 8.0}}

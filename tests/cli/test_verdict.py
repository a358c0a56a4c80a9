"""The bottleneck that `bench` names, from measurements of each side."""

import msgspec
import pytest

from asyncinfer.cli.bench.verdict import Latency, LoadResult, Sides, verdict

WAITS = LoadResult(
    requests=1000,
    per_second=100,
    latency_ms=Latency(p50=10, p95=20, p99=30),
    refused_full=0,
    errors=0,
    seconds=10,
)
IDLE = Sides(
    client_cpu=0.1,
    machine_cpu=0.3,
    api_ms=1,
    redis_ms=1,
    queue_ms=1,
    run_ms=1,
    slots_busy=0.1,
    workers=1,
    slots=2,
    batched=True,
    run_times={},
)


@pytest.mark.parametrize(
    ("measured", "side"),
    [
        ({}, "none"),
        ({"client_cpu": 0.95}, "client"),
        ({"machine_cpu": 0.97}, "machine"),
        ({"machine_cpu": None, "api_ms": 6.0}, "api"),
        ({"redis_ms": 6.0}, "redis"),
        ({"slots_busy": 0.95}, "worker"),
        ({"queue_ms": 6.0, "run_ms": 2.0}, "worker"),
        ({"workers": 0}, "worker"),
    ],
)
def test_the_bottleneck_is_named(measured: dict[str, float | None], side: str) -> None:
    result = verdict(WAITS, msgspec.structs.replace(IDLE, **measured), 8)
    assert result.side == side
    assert result.because
    assert result.change


def test_one_slot_and_one_connection_are_no_slots_and_connections() -> None:
    alone = msgspec.structs.replace(IDLE, slots=1)
    busy = msgspec.structs.replace(alone, slots_busy=0.95)
    assert "1 connection waited" in verdict(WAITS, alone, 1).because
    assert "1 slot 95% busy" in verdict(WAITS, busy, 1).because


def test_a_saturated_client_is_named_before_any_other_side() -> None:
    sides = msgspec.structs.replace(IDLE, client_cpu=0.95, machine_cpu=0.97, slots_busy=0.95)
    assert verdict(WAITS, sides, 8).side == "client"


def test_for_a_worker_without_batching_the_advice_is_to_fix_that() -> None:
    sides = msgspec.structs.replace(IDLE, slots_busy=0.95)
    assert "do not share runs" not in verdict(WAITS, sides, 8).change
    alone = msgspec.structs.replace(sides, batched=False)
    assert "do not share runs" in verdict(WAITS, alone, 8).change

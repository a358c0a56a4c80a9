"""Measurements of a load, and the bottleneck they show."""

from collections.abc import Sequence
from typing import Final, Literal

from msgspec import Struct

from asyncinfer.cli.output import counted
from asyncinfer.schemas.operations import Percentiles, percentiles

_SATURATED_SHARE: Final = 0.85
"""The busy share of a core or of the slots above which it counts as saturated."""

_LARGE_SHARE: Final = 0.4
"""The share of a request's time above which a side is the bottleneck."""


class Latency(Struct, frozen=True):
    """Percentiles in milliseconds."""

    p50: float
    p95: float
    p99: float


class LoadResult(Struct, frozen=True, kw_only=True):
    """One of the two loads."""

    requests: int
    per_second: float
    latency_ms: Latency
    refused_full: int
    """429: the queue was full, which is no error."""
    errors: int
    seconds: float


class Sides(Struct, frozen=True, kw_only=True):
    """Where the time of a job goes, in milliseconds, and how busy each side is."""

    client_cpu: float
    """The share of one core that this program used."""
    machine_cpu: float | None
    """The busy share of all cores; None if the service runs on another machine."""
    api_ms: float
    """The time of a request that needs the API alone, during the load."""
    redis_ms: float
    """The additional time of a request that needs Redis."""
    queue_ms: float | None
    """From due to start, the median."""
    run_ms: float | None
    """From start to end, the median."""
    slots_busy: float | None
    """The average share of slots that had a batch; None if the key may not see workers."""
    workers: int
    slots: int
    batched: bool
    run_times: dict[str, float]
    """Milliseconds of a run by its number of rows, as the workers measured."""


class Verdict(Struct, frozen=True):
    """The bottleneck: the side, the measurement that shows it, and what to do about it."""

    side: Literal["client", "machine", "api", "redis", "worker", "none"]
    because: str
    change: str


class Bench(Struct, frozen=True, kw_only=True):
    """The result of `bench`: `waits` and `submits` are the loads, the others concern the first."""

    model: str
    connections: int
    waits: LoadResult
    submits: LoadResult
    sides: Sides
    verdict: Verdict


def latency(seconds: Sequence[float]) -> Latency:
    """Percentiles in milliseconds of times in seconds; zeros for no times."""
    found = percentiles(seconds) or Percentiles(0.0, 0.0, 0.0)
    return Latency(*(round(1000 * value, 3) for value in (found.p50, found.p95, found.p99)))


def verdict(waits: LoadResult, sides: Sides, connections: int) -> Verdict:
    """The bottleneck of the first load, in which every connection waited for its jobs.

    `connections` is their number. Of several bottlenecks it names the first of: this client, no
    worker, the machine, the workers, the API, Redis. The side is "none" if no side is saturated.
    """
    total_ms = waits.latency_ms.p50 or 1.0
    if sides.client_cpu > _SATURATED_SHARE:
        return Verdict(
            "client",
            f"this program used {sides.client_cpu:.0%} of a core",
            "run bench on another machine than the service, or several at once; the service can "
            "take more load than this",
        )
    if not sides.workers:
        return Verdict("worker", "no worker serves the model", "asyncinfer work")
    if (sides.machine_cpu or 0) > _SATURATED_SHARE:
        return Verdict(
            "machine",
            f"its cores were {sides.machine_cpu:.0%} busy with client, API, Redis and workers",
            "give it more cores, or run client, API, Redis and workers on separate machines",
        )
    busy = sides.slots_busy or 0.0
    queue, run = sides.queue_ms or 0.0, sides.run_ms or 0.0
    if busy > _SATURATED_SHARE or (
        (queue + run) / total_ms > _LARGE_SHARE and queue + run > sides.api_ms
    ):
        return _worker(sides, total_ms, busy, queue, run)
    if sides.api_ms / total_ms > _LARGE_SHARE:
        return Verdict(
            "api",
            f"a request that needs no Redis took {sides.api_ms:.1f} of {total_ms:.1f} ms",
            "asyncinfer serve --api-processes 2, or more API machines behind a load balancer",
        )
    if sides.redis_ms / total_ms > _LARGE_SHARE:
        return Verdict(
            "redis",
            f"Redis took {sides.redis_ms:.1f} of {total_ms:.1f} ms",
            "run Redis nearer or on a faster core (asyncinfer doctor measures the round trip); "
            "send many rows in one job, which costs Redis little more than one row",
        )
    waiting = counted(connections, "connection")
    return Verdict(
        "none",
        f"no side is saturated: {waiting} waited for {total_ms:.1f} ms at a time",
        f"asyncinfer bench --connections {4 * connections}, for a higher load",
    )


def _worker(sides: Sides, total_ms: float, busy: float, queue: float, run: float) -> Verdict:
    """The verdict on the workers; `queue` and `run` are milliseconds of a job, `busy` a share."""
    because = f"jobs waited {queue:.1f} and ran {run:.1f} of {total_ms:.1f} ms"
    if sides.slots_busy is not None:
        because += f", with {counted(sides.slots, 'slot')} {busy:.0%} busy"
    change = "start workers on other cores or machines: asyncinfer work"
    if not sides.batched:
        change += "; its jobs do not share runs (asyncinfer models NAME says why): fixing that "
        change += "gains more"
    return Verdict("worker", because, change)

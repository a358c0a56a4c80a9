"""What a load measured, and which side limits it."""

import math
from collections.abc import Sequence
from typing import Final, Literal

from msgspec import Struct

_MOST: Final = 0.85
"""Of a core or of the slots: busier is saturated."""

_LARGE_SHARE: Final = 0.4
"""Of a request's time."""


class Latency(Struct, frozen=True):
    """In milliseconds."""

    p50: float
    p95: float
    p99: float


class Load(Struct, frozen=True, kw_only=True):
    """One of the two loads."""

    requests: int
    per_second: float
    latency_ms: Latency
    refused_full: int
    """429: the queue was full, which is no error."""
    errors: int
    seconds: float


class Sides(Struct, frozen=True, kw_only=True):
    """Where the time of a waited-for job goes, in milliseconds, and who is busy."""

    client_cpu: float
    """Of one core, what this program took."""
    machine_cpu: float | None
    """Of all cores, where the service runs on this machine too."""
    api_ms: float
    """An answer that needs nothing but the API, meanwhile."""
    redis_ms: float
    """What an answer that asks Redis takes longer than that."""
    queue_ms: float | None
    """From due to started, the median."""
    run_ms: float | None
    """From started to ended, the median."""
    slots_busy: float | None
    """The share of all slots that had a batch, on average."""
    workers: int
    slots: int
    batched: bool
    run_times: dict[str, float]
    """By rows of a run, its milliseconds, as the workers measured."""


class Verdict(Struct, frozen=True):
    side: Literal["client", "machine", "api", "redis", "worker", "none"]
    because: str
    change: str


class Bench(Struct, frozen=True, kw_only=True):
    model: str
    connections: int
    waits: Load
    submits: Load
    sides: Sides
    verdict: Verdict


def latency(seconds: Sequence[float]) -> Latency:
    """By nearest rank; zeros of none."""
    ordered = sorted(seconds) or [0.0]
    return Latency(
        *(
            round(1000 * ordered[math.ceil(share * len(ordered)) - 1], 3)
            for share in (0.5, 0.95, 0.99)
        )
    )


def verdict(waits: Load, sides: Sides, connections: int) -> Verdict:
    """By what was seen while every connection waited for its jobs."""
    whole = waits.latency_ms.p50 or 1.0
    if sides.client_cpu > _MOST:
        return Verdict(
            "client",
            f"this program took {sides.client_cpu:.0%} of a core",
            "run bench on another machine than the service, or several at once; the service can "
            "take more than it was given",
        )
    if not sides.workers:
        return Verdict("worker", "no worker serves the model", "asyncinfer work")
    if (sides.machine_cpu or 0) > _MOST:
        return Verdict(
            "machine",
            f"its cores were {sides.machine_cpu:.0%} busy with client, API, Redis and workers",
            "give it more cores, or each side a machine of its own",
        )
    busy = sides.slots_busy or 0.0
    queue, run = sides.queue_ms or 0.0, sides.run_ms or 0.0
    if busy > _MOST or ((queue + run) / whole > _LARGE_SHARE and queue + run > sides.api_ms):
        return _worker(sides, whole, busy, queue, run)
    if sides.api_ms / whole > _LARGE_SHARE:
        return Verdict(
            "api",
            f"an answer that needs nothing took {sides.api_ms:.1f} of {whole:.1f} ms",
            "asyncinfer serve --api-processes 2, or more API machines behind a load balancer",
        )
    if sides.redis_ms / whole > _LARGE_SHARE:
        return Verdict(
            "redis",
            f"asking Redis took {sides.redis_ms:.1f} of {whole:.1f} ms",
            "bring Redis nearer or give it a faster core: asyncinfer doctor measures the round "
            "trip; send rows together, a job of many costs it little more than of one",
        )
    return Verdict(
        "none",
        f"no side was busy: {connections} connections waited for {whole:.1f} ms at a time",
        f"asyncinfer bench --connections {4 * connections}, to see more of what it can take",
    )


def _worker(sides: Sides, whole: float, busy: float, queue: float, run: float) -> Verdict:
    because = f"jobs waited {queue:.1f} and ran {run:.1f} of {whole:.1f} ms"
    if sides.slots_busy is not None:
        because += f", {busy:.0%} of {sides.slots} slots were busy"
    change = "start workers on other cores or machines: asyncinfer work"
    if not sides.batched:
        change += "; its jobs do not share runs (asyncinfer models NAME says why), mending that "
        change += "is the larger gain"
    return Verdict("worker", because, change)

"""What people are shown of queues and workers."""

import hashlib
import re
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Final, TypeAlias

from msgspec import Meta, Struct

_WORKER_ID: Final = re.compile(r".+-[0-9]+-([0-9a-f]{6})", re.DOTALL)


@lru_cache(maxsize=256)
def shown_worker(worker_id: str) -> str:
    """A worker as everyone may see it: by the random end of its id, which begins with its host's
    name and its pid. Of an id of another form, by its SHA-256."""
    if ours := _WORKER_ID.fullmatch(worker_id):
        return f"w-{ours[1]}"
    return f"w-{hashlib.sha256(worker_id.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


OldestAge: TypeAlias = Annotated[
    float | None, Meta(description="Of the job that waits longest; null when none is known.")
]
LivingWorkers: TypeAlias = Annotated[
    int, Meta(description="Living workers that claim this model's jobs.")
]
Slots: TypeAlias = Annotated[int, Meta(description="Batches they run side by side.")]
SecondsPerJob: TypeAlias = Annotated[
    float | None,
    Meta(description="Slot time, measured lately; null before the model's first run."),
]
Backlog: TypeAlias = Annotated[
    float | None,
    Meta(description="Due jobs x seconds_per_job; null when jobs wait, unmeasured."),
]

Starved: TypeAlias = Annotated[
    int,
    Meta(
        ge=0, le=1, description="1: jobs are due, and no living worker has the model or loads it."
    ),
]


class WaitingJobs(Struct, frozen=True):
    """Jobs that are due, by priority; those that were cancelled do not count."""

    high: int
    normal: int
    low: int


class Percentiles(Struct, frozen=True):
    """In seconds, over jobs that ended lately."""

    p50: float
    p95: float
    p99: float


class Queue(Struct, frozen=True, kw_only=True):
    """A model's queue: what is in it, how it moves, and who works on it."""

    model: Annotated[str | None, Meta(description="null: the default one, before there is one.")]
    queue: Annotated[str, Meta(description="The list in Redis.")]
    paused: Annotated[bool, Meta(description="While true jobs are taken in, and none is run.")]
    waiting: WaitingJobs
    delayed: Annotated[int, Meta(description="Waiting for a later start, or to be tried again.")]
    running: int
    dead: Annotated[int, Meta(description="Dead letters; GET /jobs?dead=true lists yours.")]
    oldest_age_seconds: OldestAge
    workers: LivingWorkers
    slots: Slots
    starved: Starved = 0
    seconds_per_job: SecondsPerJob
    backlog_seconds: Backlog
    window_seconds: Annotated[
        float, Meta(description="What the rates are counted over: 60, or less where much moves.")
    ]
    submitted_per_second: float
    completed_per_second: float
    failed_per_second: float
    wait_seconds: Annotated[
        Percentiles | None,
        Meta(description="From due to started, of the jobs that ended last; null without any."),
    ]
    run_seconds: Annotated[
        Percentiles | None,
        Meta(description="From started to ended, of the jobs that ended last; null without any."),
    ]


class QueueList(Struct, frozen=True):
    queues: list[Queue]


class JobsDone(Struct, frozen=True):
    """How many jobs came to which end in a worker since it started."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0


class Worker(Struct, frozen=True, kw_only=True):
    """A living worker, as it says itself every few seconds; null is what its release does not."""

    worker: Annotated[str, Meta(description="As jobs and problems name it.")]
    state: Annotated[str, Meta(description="ready, draining or hung.")]
    host: str | None
    pid: int | None
    slots: Annotated[int, Meta(description="Batches it runs side by side.")]
    busy: Annotated[int | None, Meta(description="Slots that have a batch.")]
    started_at: datetime | None
    uptime_seconds: float | None
    heard_seconds: Annotated[float, Meta(description="How long ago it said all this.")]
    jobs_done: JobsDone | None
    models: Annotated[list[str], Meta(description="Those it claims jobs of.")]
    versions: Annotated[
        dict[str, dict[str, str]],
        Meta(description="By model and version, the SHA-256 of the file it has."),
    ]
    served: Annotated[
        dict[str, str], Meta(description="By model, the version of jobs that ask for none.")
    ]
    loaded: Annotated[list[str], Meta(description="model/version in memory, least used first.")]
    problems: Annotated[
        dict[str, dict[str, str]],
        Meta(description="By model and version, why it is not served."),
    ]
    seconds_per_job: Annotated[
        dict[str, float], Meta(description="By model, slot time a job took lately.")
    ]
    run_times: Annotated[
        dict[str, dict[str, float]],
        Meta(description="By model and number of rows, the seconds of a run."),
    ]


class WorkerList(Struct, frozen=True):
    workers: list[Worker]

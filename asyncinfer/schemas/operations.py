"""Answers about queues and workers."""

import hashlib
import math
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Final, TypeAlias

from msgspec import Meta, Struct

_WORKER_ID: Final = re.compile(r".+-[0-9]+-([0-9a-f]{6})", re.DOTALL)


@lru_cache(maxsize=256)
def public_worker_name(worker_id: str) -> str:
    """A worker's name in answers, such as `w-f0fd4a`: the random end of its id.

    The host name and process id that come before it are not shown. Of an id of another form the
    first digits of its SHA-256 are.
    """
    if match := _WORKER_ID.fullmatch(worker_id):
        return f"w-{match[1]}"
    return f"w-{hashlib.sha256(worker_id.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


OldestAge: TypeAlias = Annotated[
    float | None,
    Meta(description="How long the oldest waiting job has waited; null if none is known to wait."),
]
LivingWorkers: TypeAlias = Annotated[
    int, Meta(description="Living workers that claim this model's jobs.")
]
Slots: TypeAlias = Annotated[int, Meta(description="Batches these workers run in parallel.")]
SecondsPerJob: TypeAlias = Annotated[
    float | None, Meta(description="Recent slot time per job; null before the model's first run.")
]
Backlog: TypeAlias = Annotated[
    float | None,
    Meta(description="Due jobs x seconds_per_job; null if jobs wait and seconds_per_job is null."),
]

Starved: TypeAlias = Annotated[
    int,
    Meta(ge=0, le=1, description="1: jobs are due, and no living worker has or loads the model."),
]


class WaitingJobs(Struct, frozen=True):
    """Jobs that are due, by priority, without cancelled ones."""

    high: int
    normal: int
    low: int


class Percentiles(Struct, frozen=True):
    """Percentiles in seconds, over jobs that ended recently."""

    p50: float
    p95: float
    p99: float


def percentiles(seconds: Sequence[float]) -> Percentiles | None:
    """Percentiles by nearest rank, so that each is one of the values; None without values."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return Percentiles(
        *(ordered[math.ceil(share * len(ordered)) - 1] for share in (0.50, 0.95, 0.99))
    )


class QueueWebhooks(Struct, frozen=True):
    """The webhooks that a queue has to tell."""

    reserved: Annotated[
        int, Meta(description="Unfinished jobs with a webhook, and deliveries to come.")
    ] = 0
    reserved_bytes: int = 0
    pending: Annotated[int, Meta(description="Deliveries to come.")] = 0
    due: Annotated[int, Meta(description="Those of them that are due.")] = 0
    oldest_due_seconds: Annotated[
        float | None, Meta(description="How long the oldest due one has been due.")
    ] = None
    given_up: Annotated[int, Meta(description="Deliveries that were given up lately.")] = 0


class Queue(Struct, frozen=True, kw_only=True):
    """The queue of a model: its jobs, their rates and durations, and its workers."""

    model: Annotated[str | None, Meta(description="null: the default model, if there is none yet.")]
    queue: Annotated[str, Meta(description="The name of its list in Redis.")]
    paused: Annotated[bool, Meta(description="True: jobs are accepted, but none is run.")]
    waiting: WaitingJobs
    delayed: Annotated[int, Meta(description="Jobs that start later, or wait to be tried again.")]
    running: int
    dead: Annotated[int, Meta(description="Dead letters; GET /jobs?dead=true lists yours.")]
    oldest_age_seconds: OldestAge
    webhooks: QueueWebhooks = QueueWebhooks()
    workers: LivingWorkers
    slots: Slots
    starved: Starved = 0
    seconds_per_job: SecondsPerJob
    backlog_seconds: Backlog
    window_seconds: Annotated[
        float, Meta(description="The time the rates are counted over: 60, or less in a busy queue.")
    ]
    submitted_per_second: float
    completed_per_second: float
    failed_per_second: float
    wait_seconds: Annotated[
        Percentiles | None,
        Meta(description="From due to started, of the last ended jobs; null if there are none."),
    ]
    run_seconds: Annotated[
        Percentiles | None,
        Meta(description="From started to ended, of the last ended jobs; null if there are none."),
    ]


class QueueList(Struct, frozen=True):
    queues: list[Queue]


class JobsDone(Struct, frozen=True):
    """How many jobs a worker has ended since it started, by their state."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0


class Worker(Struct, frozen=True, kw_only=True):
    """A living worker, as it reports every few seconds. A field that its release does not report
    is null."""

    worker: Annotated[str, Meta(description="Its name in jobs and problems, as w-f0fd4a.")]
    state: Annotated[str, Meta(description="ready, draining or hung.")]
    host: str | None
    pid: int | None
    slots: Annotated[int, Meta(description="Batches it runs in parallel.")]
    busy: Annotated[int | None, Meta(description="Slots that run a batch.")]
    isolating: Annotated[
        bool,
        Meta(
            description="It runs one job alone, or is about to, and takes no other until that has "
            "ended: a worker was lost with the job before, or it was too slow in a batch."
        ),
    ]
    started_at: datetime | None
    uptime_seconds: float | None
    heard_seconds: Annotated[float, Meta(description="Seconds since its last report.")]
    jobs_done: JobsDone | None
    models: Annotated[list[str], Meta(description="The models whose jobs it claims.")]
    versions: Annotated[
        dict[str, dict[str, str]],
        Meta(description="By model and version, the SHA-256 of its model file."),
    ]
    served: Annotated[
        dict[str, str], Meta(description="By model, the version that runs jobs that name none.")
    ]
    loaded: Annotated[
        list[str],
        Meta(description="The versions in memory as model/version, least recently used first."),
    ]
    problems: Annotated[
        dict[str, dict[str, str]], Meta(description="By model and version, why it is not served.")
    ]
    seconds_per_job: Annotated[
        dict[str, float], Meta(description="By model, recent slot time per job.")
    ]
    run_times: Annotated[
        dict[str, dict[str, float]],
        Meta(description="By model and number of rows, how long a run takes, in seconds."),
    ]


class WorkerList(Struct, frozen=True):
    workers: list[Worker]


class AuditEntry(Struct, frozen=True, kw_only=True):
    """What a request or a start of a service did, to which jobs, and how that ended.

    - `at` (when it ended), `action` ("cancel", "cancel_queue", "default", "pause", "purge",
      "redeliver", "resume" or "retry").
    - `tenant` and `key`: who did it. The key is shown as the first 8 hex digits of its SHA-256;
      both are None for a process without a key, as `serve` that gets another default model.
    - `filter`: what was acted on, by name: the `tenant` ("*": all), `model`, `status`, `group`,
      `dead` or `job_id`; `job_ids` is how many were named.
    - `jobs`: how many it changed, as far as is known; None for a model as such.
    - `outcome`: "done", "broken_off" by an error or the end of the service, or an error's code.
    """

    at: Annotated[datetime, Meta(tz=True)]
    action: Annotated[
        str,
        Meta(
            description="`cancel`, `cancel_queue`, `default`, `pause`, `purge`, `redeliver`, "
            "`resume` or `retry`."
        ),
    ]
    tenant: Annotated[
        str | None, Meta(description="The tenant of the key; null: a process without a key.")
    ]
    key: Annotated[
        str | None, Meta(description="The first 8 hex digits of its SHA-256; null without a key.")
    ]
    filter: Annotated[
        dict[str, str | int | bool],
        Meta(description="What was acted on, by name; `job_ids` is how many were named."),
    ]
    jobs: Annotated[
        int | None,
        Meta(description="How many jobs it is known to have changed; null: about a model as such."),
    ]
    outcome: Annotated[str, Meta(description="`done`, `broken_off`, or the code of an error.")]


class AuditList(Struct, frozen=True):
    """A page of the audit log."""

    entries: list[AuditEntry]
    unreadable: Annotated[
        int, Meta(description="Stored entries that were left out, since they are not readable.")
    ]
    cursor: Annotated[
        str | None, Meta(description="The `cursor` of the next page; null on the last page.")
    ]

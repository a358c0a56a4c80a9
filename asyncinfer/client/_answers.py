"""What a client returns besides results: counts of jobs, refusals, and the state of the service."""

from datetime import datetime
from typing import Any

from msgspec import Struct

from asyncinfer.client import _display
from asyncinfer.client._models import TensorInfo
from asyncinfer.client._tables import audit_row
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.schemas.operations import AuditEntry


class RefusedJob(Struct, frozen=True):
    """A job that was left as it is, and why.

    `code` is stable, for machines, such as job_not_found; `detail` is for people.
    """

    job_id: str
    code: str
    detail: str


class Position(Struct, frozen=True):
    """Where a waiting job is in its queue: how many jobs are `ahead` of it.

    `about` says that this is an estimate, as it is where 1,000 jobs or more are ahead.
    """

    ahead: int
    about: bool = False


class ClearedJobs(Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """How many jobs were cancelled or deleted.

    `cancelled` jobs waited, `stopping` jobs run and will stop, and `purged` jobs had ended and were
    deleted with their inputs and results. `refused` has the jobs that were given by id and are left
    as they are.

    >>> client.purge(["no-such-job"]).refused[0].code
    'job_not_found'
    """

    cancelled: int
    stopping: int = 0
    purged: int = 0
    refused: tuple[RefusedJob, ...] = ()


class RedeliveredWebhooks(Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """How many deliveries of webhooks were started anew.

    For `refused` ones the server had no room (MAX_WEBHOOKS).

    >>> client.redeliver_webhooks(given_up=True)
    RedeliveredWebhooks(redelivered=0)
    """

    redelivered: int
    refused: int = 0


class RetriedJobs(Struct, frozen=True, kw_only=True):
    """The ids of the jobs that run again, `retried`, and those that do not, `refused`.

    >>> client.retry_all(["no-such-job"]).refused[0].code
    'job_not_found'
    """

    retried: tuple[str, ...]
    refused: tuple[RefusedJob, ...]


class PausedState(Struct, frozen=True):
    """Whether a `model` is `paused`: its jobs are accepted, and none is run."""

    model: str
    paused: bool


class AuditLog(Struct, frozen=True, kw_only=True):
    """The newest `entries` of the audit log that match, the newest first.

    `unreadable` is how many stored entries were left out since they are not readable: another
    program has written to Redis.

    >>> client.audit(limit=1).unreadable
    0
    """

    entries: tuple[AuditEntry, ...]
    unreadable: int = 0

    def _repr_html_(self) -> str:
        """The table that a notebook shows."""
        rows = list(map(audit_row, self.entries))
        return _display.table_card("Audit log", rows, {"unreadable": self.unreadable or ""})


class Health(Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """The state of a server: `status` is "ok", since one that is not answers with an error.

    `accepting` tells whether it takes new jobs, `reason` why not (`.code`, `.message`).

    With the scope `read` there are also `redis` (its name and version), `queues` (waiting jobs by
    queue), `workers` (the number of living ones) and `starved` (models with due jobs that no worker
    has or loads); else these are None.

    >>> client.health().starved
    ()
    """

    status: str
    accepting: bool = True
    reason: WaitingFor | None = None
    redis: str | None = None
    queues: dict[str, int] | None = None
    workers: int | None = None
    starved: tuple[str, ...] | None = None


class ValidInput(Struct, frozen=True, kw_only=True):
    """An input as the server understands it.

    `model` and `version` would run; `inputs` have the shapes of this input, `outputs` are the names
    of the outputs in the result. `rows` is their number, None if the model fixes it, and `options`
    are those of the job.
    """

    model: str
    version: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[str, ...]
    rows: int | None
    options: dict[str, Any]


class GroupCounts(Struct, frozen=True, kw_only=True):
    """How many jobs of a group are in each state; `expired` ones have ended, and are not kept."""

    pending: int = 0
    processing: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0


class GroupView(Struct, frozen=True, kw_only=True):
    """The fields of a group that a client reads; a newer server may show more."""

    group: str
    jobs: int
    counts: GroupCounts = GroupCounts()
    progress: float = 0.0
    eta_seconds: float | None = None
    first_failed: tuple[str, ...] = ()
    closed: bool = False
    ended_at: datetime | None = None

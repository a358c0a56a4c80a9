"""The services that every handler gets."""

from anyio import CapacityLimiter
from msgspec import Struct

from asyncinfer.api.answer_sizes import AnswerSizes
from asyncinfer.api.catalog import Catalog
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.figures import RequestFigures
from asyncinfer.api.live.event_text import EventTexts
from asyncinfer.api.live.feed import Feed
from asyncinfer.api.live.inbox import Inbox
from asyncinfer.api.queue_looks import QueueLooks
from asyncinfer.api.wait_reasons import WaitReasons
from asyncinfer.api.worker_snapshot import WorkerSnapshot
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.audit import AuditEntries
from asyncinfer.repository.closed_groups import ClosedGroups
from asyncinfer.repository.failed_jobs_log import FailedJobsLog
from asyncinfer.repository.inspect.audit_log import AuditLog
from asyncinfer.repository.inspect.dead_letters import DeadLetters
from asyncinfer.repository.inspect.groups import Groups
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.inspect.selection import Selection
from asyncinfer.repository.inspect.statistics import Statistics
from asyncinfer.repository.inspect.webhooks import WebhookInspection
from asyncinfer.repository.operations import Operations
from asyncinfer.repository.outbox import Outbox
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import Submissions
from asyncinfer.webhooks.checks import WebhookChecks
from asyncinfer.webhooks.figures import WebhookFigures


class Services(Struct, frozen=True, kw_only=True):
    """One object for each API process, made when its lifespan begins, which also runs their
    tasks."""

    config: ApiConfig
    request_figures: RequestFigures
    store: Store
    submissions: Submissions
    announcements: Announcements
    inspection: Inspection
    dead_letters: DeadLetters
    statistics: Statistics
    selection: Selection
    operations: Operations
    groups: Groups
    closed_groups: ClosedGroups
    outbox: Outbox
    webhook_inspection: WebhookInspection
    audit_entries: AuditEntries
    audit_log: AuditLog
    failed_jobs: FailedJobsLog
    inbox: Inbox
    feed: Feed
    event_texts: EventTexts
    catalog: Catalog
    worker_snapshot: WorkerSnapshot
    wait_reasons: WaitReasons
    queue_looks: QueueLooks
    answer_sizes: AnswerSizes
    webhook_checks: WebhookChecks
    """Checks webhooks at a submit."""
    webhook_figures: WebhookFigures
    long_reads: CapacityLimiter
    """Limits the threads that read long requests to one."""
    openapi: bytes
    """The OpenAPI document."""

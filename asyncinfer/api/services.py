"""What handlers are given to answer with."""

from anyio import CapacityLimiter
from msgspec import Struct

from asyncinfer.api.answer_sizes import AnswerSizes
from asyncinfer.api.catalog import Catalog
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.event_text import EventTexts
from asyncinfer.api.waiting_for import Reasons
from asyncinfer.api.workforce import Workforce
from asyncinfer.feed import Feed
from asyncinfer.inbox import Inbox
from asyncinfer.repository.dead import DeadLetters
from asyncinfer.repository.groups import Groups
from asyncinfer.repository.inspect import Inspection
from asyncinfer.repository.observe import Observation
from asyncinfer.repository.operate import Operation
from asyncinfer.repository.select import Selection
from asyncinfer.repository.store import Store
from asyncinfer.repository.submit import Submissions


class Services(Struct, frozen=True, kw_only=True):
    config: ApiConfig
    store: Store
    submissions: Submissions
    inspection: Inspection
    dead_letters: DeadLetters
    observation: Observation
    selection: Selection
    operation: Operation
    groups: Groups
    inbox: Inbox
    feed: Feed
    event_texts: EventTexts
    catalog: Catalog
    workforce: Workforce
    reasons: Reasons
    answer_sizes: AnswerSizes
    long_reads: CapacityLimiter
    """The one thread in which requests are read that take long."""
    openapi: bytes

"""A job as Redis holds it, and the pure decisions about it."""

import os
import random
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from asyncinfer.untrusted.decoding import DECODE_ERRORS, MAX_TIME_MS, lenient_decoder

Status = Literal["pending", "processing", "completed", "failed", "cancelled"]
Priority = Literal["high", "normal", "low"]
Outcome = Literal["completed", "failed", "cancelled", "retry", "dead", "released", "suspect"]

STATUSES: Final[tuple[Status, ...]] = ("pending", "processing", "completed", "failed", "cancelled")
TERMINAL: Final[frozenset[str]] = frozenset({"completed", "failed", "cancelled"})

DEFAULT_TENANT: Final = "default"
"""The tenant of jobs that were submitted without API keys, and of external jobs."""

SCHEMA: Final = 1
"""Version of the record. Fields are only ever added at its end, with a default.

It is raised when a worker that does not know a field would run the job wrongly: such a worker
releases the job to one that does. An older release that rewrites a record of its own version
drops the fields it does not know.
"""

PATTERN_END: Final = "$(?!\\n)"
"""The end of a pattern, in Python as in JSON Schema: `$` alone also matches before a line end."""

GROUP_PATTERN: Final = f"^[A-Za-z0-9][A-Za-z0-9_.:-]{{0,127}}{PATTERN_END}"
NAME_PATTERN: Final = "[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"

GROUP_EXPECTED: Final = {
    "expected": "a name of 1 to 128 letters, digits, `_`, `.`, `:` and `-` that begins with a "
    "letter or digit"
}
"""The pattern in words, for errors."""

MAX_OPTION_SECONDS: Final = 30 * 24 * 3600
"""The largest time that an option may have, whatever the settings allow."""


WebhookEvent = Literal["completed", "failed", "cancelled"]
WEBHOOK_EVENTS: Final[tuple[WebhookEvent, ...]] = ("completed", "failed", "cancelled")

MAX_WEBHOOK_URL: Final = 2048
"""Characters of the URL of a webhook."""


class Webhook(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whom to tell of the end of a job."""

    url: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=MAX_WEBHOOK_URL,
            description="Where the end of the job is POSTed to, signed.",
        ),
    ]
    events: Annotated[
        tuple[WebhookEvent, ...],
        Meta(min_length=1, max_length=3, description="The ends to be told of."),
    ] = WEBHOOK_EVENTS
    metadata: Annotated[
        dict[str, Any],
        Meta(description="Sent back with each event; at most 4 KiB of JSON."),
    ] = {}

    @property
    def event_bits(self) -> int:
        """The wanted events as the facts have them: the sum of 1 for completed, 2 for failed and 4
        for cancelled."""
        return sum(1 << WEBHOOK_EVENTS.index(event) for event in set(self.events))


class Options(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that a request can set for one job. In a record, fields that a later release added are
    ignored."""

    priority: Annotated[
        Priority, Meta(description="High is served before normal, normal before low.")
    ] = "normal"
    delay_seconds: Annotated[
        float, Meta(ge=0, le=MAX_OPTION_SECONDS, description="Do not start before this.")
    ] = 0.0
    start_within_seconds: (
        Annotated[
            float,
            Meta(gt=0, le=MAX_OPTION_SECONDS, description="Fail as `expired` if not started."),
        ]
        | None
    ) = None
    finish_within_seconds: (
        Annotated[
            float,
            Meta(gt=0, le=MAX_OPTION_SECONDS, description="Fail as `expired` if not finished."),
        ]
        | None
    ) = None
    ttl_seconds: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=MAX_OPTION_SECONDS,
                description="How long the ended job is kept; at most the server's MAX_TTL.",
            ),
        ]
        | None
    ) = None
    version: (
        Annotated[
            str,
            Meta(
                pattern=f"^(0|[1-9][0-9]{{0,17}}){PATTERN_END}",
                description="The model's version; without it, the served one.",
                extra={"expected": "a whole number of at most 18 digits, as a string"},
            ),
        ]
        | None
    ) = None
    group: (
        Annotated[
            str,
            Meta(
                pattern=GROUP_PATTERN,
                description="A name that jobs share, to be counted and followed together.",
                extra=GROUP_EXPECTED,
            ),
        ]
        | None
    ) = None
    webhook: Annotated[Webhook, Meta(description="Whom to tell of the end of the job.")] | None = (
        None
    )


class TraceContext(Struct, frozen=True, array_like=True):
    """The W3C trace context of a span, in the values of its two headers."""

    traceparent: str
    """`00-`, the trace's id, the span's id and the flags, in hex digits."""
    tracestate: str = ""


class Delivery(Struct, frozen=True, array_like=True):
    """The delivery that ended a job: its claim, and the run that it had there. All jobs of a run
    share one."""

    claimed_ms: int
    """When it was claimed, by the server's clock, in ms since 1970. `started_ms` of the record is
    the same moment by the worker's clock, which tells by how much they differ."""
    claimed_jobs: int
    """How many jobs the claim had."""
    run_after_ms: int = 0
    """From the claim to the begin of its run, which waits for the engine and for other runs."""
    run_jobs: int = 0
    """How many jobs the run had together; 0 for a job that did not run."""
    run_rows: int = 0
    """How many rows these jobs had."""
    provider: str = ""
    """The execution provider of ONNX Runtime, such as `CPU`, without the rest of its name."""


class PastDelivery(Struct, frozen=True, array_like=True):
    """A delivery that did not end its job. Times are in ms since 1970 by the server's clock."""

    reason: str
    """Why it did not: `worker_lost`, `out_of_memory`, `timeout`, `stopping`, `not_loaded`."""
    ended_ms: int
    """When the job was put back."""
    worker: str
    claimed_ms: int = 0
    """When it was claimed; 0 where that is not known, as of a worker that was lost."""
    delay_ms: int = 0
    """How long the job then waited at least."""


MAX_HANDED_BACK: Final = 16
"""Of the deliveries that a job was handed back from, the record keeps the newest ones."""


class Record(Struct, frozen=True, array_like=True):
    """The value of `job:{id}:meta`: what is known of a job besides its data, status, result and
    error.

    Stored as a msgpack array behind an 8-byte sequence number that `submit` writes; Lua never looks
    inside. An external job has none.
    """

    schema: int
    queue: str
    model: str
    tenant: str
    created_ms: int
    round: int = 1
    version: str | None = None
    """The requested version; None for the one that the worker serves."""
    payload: str = "json"
    """How `job:{id}:data` is written: "json", as the text of `data`; "tensors", as in
    `tensors.packing`."""
    options: Options = Options()
    errors: int = 0
    """Transient model errors in this round; deliveries are counted apart, by the scripts."""
    started_ms: int | None = None
    finished_ms: int | None = None
    worker: str | None = None
    claim: str | None = None
    """The claim that finished it: how a retried finish knows its own work."""
    ran_version: str | None = None
    answer: str = "json"
    """The requested form of the result: "json" text, or "tensors", packed as `data` may be."""
    outputs: tuple[str, ...] = ()
    """Names of the requested outputs; none means all."""
    ran_sha256: str | None = None
    """The SHA-256 of the model file that gave the result, in hex digits."""
    request_id: str = ""
    """The X-Request-ID of the submit; empty in records of earlier releases."""
    idempotency_digest: str = ""
    """A digest of tenant and Idempotency-Key, by which Redis holds the key; empty without a key and
    in records of earlier releases."""
    trace: TraceContext | None = None
    """The span that submitted the job, in whose trace a worker puts the job's spans; None if that
    trace is not recorded."""
    delivery: Delivery | None = None
    """The delivery that ended it; None until then, if no worker ended it, and in records of earlier
    releases."""
    past_deliveries: tuple[PastDelivery, ...] = ()
    """Earlier deliveries of this round, the oldest first: those it was handed back from, at most
    `MAX_HANDED_BACK`; and once a worker has ended the job those that lost their worker, too."""
    handed_back: int = 0
    """How many deliveries of this round handed the job back."""


def started_ms(record: Record) -> int | None:
    """When the delivery that ended the job was claimed, by the server's clock; by the worker's
    where only that is known. None if no worker has ended it."""
    return record.delivery.claimed_ms if record.delivery else record.started_ms


def finished_ms(record: Record) -> int | None:
    """When a worker ended the job, by the clock of `started_ms`; None if none has."""
    begun_ms = record.started_ms
    if record.finished_ms is None or record.delivery is None or begun_ms is None:
        return record.finished_ms
    return record.delivery.claimed_ms + max(0, record.finished_ms - begun_ms)


class _Head(Struct, frozen=True, array_like=True):
    """The fields with which the records of all releases begin."""

    schema: int
    queue: str
    model: str
    tenant: str
    created_ms: int
    round: int = 1


class JobError(Struct, frozen=True):
    """The value of `job:{id}:error`, as JSON: why a job failed."""

    code: str
    message: str


_FACT_LETTERS: Final = {
    "deliveries": "d",
    "suspect": "s",
    "cancel_requested": "c",
    "expired": "e",
    "start_by_ms": "b",
    "finish_by_ms": "l",
    "priority": "p",
    "ttl_seconds": "t",
    "inboxes": "w",
    "claimed_before": "r",
    "idempotency_digest": "k",
    "webhook_events": "h",
    "webhook_round": "n",
    "lost_deliveries": "x",
}
"""In Redis one letter names each fact; `lua/_fact_names.lua` has the same."""


class Facts(Struct, frozen=True, omit_defaults=True, rename=_FACT_LETTERS):
    """What the scripts must know of a job with options or a history; written by Lua. Times are in
    ms since 1970 by the server's clock; 0, empty or missing means that the fact does not hold."""

    deliveries: int = 0
    """How many of its deliveries ended in a lost worker."""
    suspect: int = 0
    """1: it may hang its run."""
    cancel_requested: int = 0
    """1: cancelled while it runs."""
    expired: int = 0
    """1: its finish deadline passed while it runs."""
    start_by_ms: int = 0
    """The start deadline in server time."""
    finish_by_ms: int = 0
    """The finish deadline in server time."""
    priority: str = ""
    """Empty for normal."""
    ttl_seconds: int = 0
    """How long the ended job is kept; 0 for the default."""
    inboxes: tuple[str, ...] = ()
    """Keys of the inboxes of the APIs to notify when the job ends."""
    claimed_before: int = 0
    """1: an external job that was claimed before, so that the log shows it once."""
    idempotency_digest: str = ""
    """That of the record, of a job with a deadline; empty for any other."""
    webhook_events: int = 0
    """The ends that the job's webhook is told of, as in `Webhook.event_bits`; 0: it has none."""
    webhook_round: int = 0
    """The round that the end will be told of, of a job with a webhook; 0 for the first."""
    lost_deliveries: tuple[str, ...] = ()
    """When each of its deliveries was found lost, and its worker: ms, a space, the worker's id. The
    newest, at most MAX_DELIVERIES."""


_encode_msgpack = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_head = msgspec.msgpack.Decoder(_Head).decode
_decode_facts = msgspec.msgpack.Decoder(Facts).decode

_SEQ_BYTES: Final = 8
_LOST_PATTERN: Final = re.compile(r"([0-9]{1,15}) (.+)", re.DOTALL)
_NO_FACTS: Final = Facts()

_read_facts = lenient_decoder(_decode_facts)


def encode_record(record: Record, seq: bytes = b"") -> bytes:
    """The bytes of `job:{id}:meta`. `seq` is the 8-byte prefix of the record it replaces; for a new
    job it is empty, and `submit` adds one."""
    return seq + _encode_msgpack(record)


def decode_record(meta: bytes) -> Record:
    """The record in the bytes of `job:{id}:meta`, its prefix left out. Raises msgspec.DecodeError
    if there is none.

    Of a later release's record only the head is read if the rest has changed; all other fields have
    their defaults then.
    """
    packed = memoryview(meta)[_SEQ_BYTES:]
    try:
        return _decode_record(packed)
    except DECODE_ERRORS as error:
        head = _head_of_later(packed)
        if head is None:
            raise msgspec.DecodeError(str(error)) from error
    return Record(head.schema, head.queue, head.model, head.tenant, head.created_ms, head.round)


def _head_of_later(packed: memoryview) -> _Head | None:
    """The head of a record whose schema is later than this release's; None for any other, or if the
    bytes are corrupt."""
    try:
        head = _decode_head(packed)
    except DECODE_ERRORS:
        return None
    return head if head.schema > SCHEMA else None


def is_later(record: Record) -> bool:
    """Whether a later release wrote the record, so that this one must neither run nor rewrite the
    job."""
    return record.schema > SCHEMA


read_record = lenient_decoder(decode_record)
"""The record in `job:{id}:meta`; None where there is none or it is corrupt."""


def record_seq(meta: bytes) -> bytes:
    """The 8-byte prefix of `job:{id}:meta`, the job's number in its queue; empty for empty
    bytes."""
    return meta[:_SEQ_BYTES]


def decode_facts(facts: bytes | None) -> Facts:
    """The facts in packed bytes; empty facts if those are missing or corrupt. Raises nothing."""
    return (facts and _read_facts(facts)) or _NO_FACTS


def with_lost_deliveries(
    handed_back: tuple[PastDelivery, ...], lost: Sequence[str]
) -> tuple[PastDelivery, ...]:
    """The deliveries of a record and those in the `lost_deliveries` of its facts, the oldest first.
    Leaves out what cannot be read; raises nothing."""
    if not lost:
        return handed_back
    read = (_LOST_PATTERN.fullmatch(entry) for entry in lost)
    found = [PastDelivery("worker_lost", int(match[1]), match[2]) for match in read if match]
    # Of two in one ms the lost one is the first, as the lease of the next has to end.
    return tuple(sorted((*found, *handed_back), key=lambda delivery: delivery.ended_ms))


def now_ms() -> int:
    """The time of this machine's clock, in ms since 1970."""
    return time.time_ns() // 1_000_000


# --- ids -----------------------------------------------------------------------------------

_UUID7_PATTERN = re.compile(r"[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}")
_MAX_ID_BYTES: Final = 128


def new_id(now_ms: int) -> str:
    """A new random UUIDv7 (RFC 9562) as 32 hex digits without hyphens: 48 bits of `now_ms`, in ms
    since 1970, and 74 random ones."""
    noise = int.from_bytes(os.urandom(10), "big")
    high = (now_ms << 16) | 0x7000 | (noise >> 68)
    low = (0b10 << 62) | (noise & ((1 << 62) - 1))
    return f"{high:016x}{low:016x}"


def created_ms(job_id: str) -> int | None:
    """The time in an id that `new_id` made, in ms since 1970; None for any other id.

    An external job's id of 32 random hex digits may look like a UUIDv7; one with a time after the
    year 9999 is certainly not of `new_id`.
    """
    if not _UUID7_PATTERN.fullmatch(job_id):
        return None
    made_ms = int(job_id[:12], 16)
    return made_ms if made_ms <= MAX_TIME_MS else None


def id_text(raw: bytes) -> str:
    """An id as text, whatever bytes an external producer made it of; `id_bytes` returns the same
    bytes. Raises nothing."""
    return raw.decode("utf-8", "surrogateescape")


def id_bytes(text: str) -> bytes:
    """The bytes of an id; the reverse of `id_text`."""
    return text.encode("utf-8", "surrogateescape")


def is_id(text: str) -> bool:
    """Whether `text` can be a job's id: 1 to 128 bytes without control characters. A job of that id
    need not exist."""
    size = len(id_bytes(text))
    return 0 < size <= _MAX_ID_BYTES and not any(ord(c) < 32 or ord(c) == 127 for c in text)


# --- decisions -----------------------------------------------------------------------------

_BACKOFF_BASE_SECONDS: Final = 1.0
_BACKOFF_CAP_SECONDS: Final = 60.0


def retry_or_dead(errors: int, max_errors: int) -> Literal["retry", "dead"]:
    """What becomes of a job after its `errors`-th transient error in a round: "dead" from the
    `max_errors`-th on."""
    return "retry" if errors < max_errors else "dead"


def max_backoff_seconds(errors: int) -> float:
    """How long a job waits at most, in seconds, before try `errors + 1`: twice as long after each
    error, up to 60 s."""
    return min(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS * 2.0 ** min(errors, 30))


def backoff_ms(errors: int, uniform: float | None = None) -> int:
    """Full-jitter back-off before try `errors + 1`, in ms: a random time up to
    `max_backoff_seconds`. `uniform` in [0, 1) replaces chance."""
    chance = random.random() if uniform is None else uniform
    return int(chance * max_backoff_seconds(errors) * 1000)

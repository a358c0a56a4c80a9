"""The name of every Redis key.

`docs/protocol.md` has a row for each: type, TTL, bound, meaning, who writes it, what frees it.

`n` is QUEUE_NAME and `q` a queue: `n` itself for the default model, `n:model` for another.
In `{q}:x` the braces are literal (a hash tag), so that one queue's keys share a slot and no
model's name can collide with them (a bare `n:default` would be the queue of a model `default`).
The scripts build the same names in `lua/_keys.lua` and `lua/_job_keys.lua`; a test compares them.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Final


def queue(n: str, model: str, default_model: str | None) -> str:
    """The name of `model`'s queue, which is also its list of waiting jobs of normal priority."""
    return n if model == default_model else f"{n}:{model}"


def model_of(n: str, q: str, default_model: str | None) -> str | None:
    """The model whose queue `q` is; the reverse of `queue`."""
    return default_model if q == n else q.removeprefix(f"{n}:")


# --- a job ---------------------------------------------------------------------------------


def data(job_id: str) -> str:
    """String, TTL once ended: the job's input, as JSON text or packed tensors."""
    return f"job:{job_id}:data"


def status(job_id: str) -> str:
    """String, TTL once ended: pending, processing, completed, failed or cancelled."""
    return f"job:{job_id}:status"


def result(job_id: str) -> str:
    """String, TTL JOB_TTL: the result of a completed job, as JSON text or packed tensors."""
    return f"job:{job_id}:result"


def error(job_id: str) -> str:
    """String, TTL once ended: why a job failed, as JSON with `code` and `message`; also when a
    script ended it."""
    return f"job:{job_id}:error"


def meta(job_id: str) -> str:
    """String, TTL once ended: the job's `jobs.Record`; an external job has none."""
    return f"job:{job_id}:meta"


# --- a queue -------------------------------------------------------------------------------


def waiting(q: str) -> tuple[str, str, str]:
    """List, no TTL: ids that wait, of high, normal and low priority, in the order served."""
    return f"{{{q}}}:high", q, f"{{{q}}}:low"


def wake(q: str) -> str:
    """List, no TTL, at most 64 tokens: the doorbell, on which idle workers wait with BRPOP."""
    return f"{{{q}}}:wake"


def running(q: str) -> str:
    """Hash, no TTL: the claim token of each running job; only that claim may finish it."""
    return f"{{{q}}}:running"


def leases(q: str) -> str:
    """ZSET, no TTL: by claim token, when its lease ends in ms of the server."""
    return f"{{{q}}}:leases"


def claim(q: str, token: str) -> str:
    """String, no TTL: the ids of one claim, from which a sweep recovers them."""
    return f"{{{q}}}:claim:{token}"


def facts(q: str) -> str:
    """Hash, no TTL: `jobs.Facts` of each unfinished job that has some; most jobs have none."""
    return f"{{{q}}}:facts"


def deadlines(q: str) -> str:
    """ZSET, no TTL: jobs with a deadline, and when it passes in ms."""
    return f"{{{q}}}:deadlines"


def delayed(q: str) -> str:
    """ZSET, no TTL: jobs that wait for a time before they join a list, and that time in ms."""
    return f"{{{q}}}:delayed"


def seq(q: str) -> str:
    """String, no TTL: how many jobs the queue ever had."""
    return f"{{{q}}}:seq"


def bytes_waiting(q: str) -> str:
    """String, no TTL: the bytes of the inputs that wait, external jobs left out."""
    return f"{{{q}}}:bytes"


def kept(q: str) -> str:
    """Hash, no TTL: the bytes that ended jobs keep, by the minute in which their keys expire."""
    return f"{{{q}}}:kept"


def bytes_kept(q: str) -> str:
    """String, no TTL: the sum of the bytes that ended jobs keep."""
    return f"{{{q}}}:keptbytes"


def stale_entries(q: str) -> str:
    """Set, no TTL: ids of ended jobs that are still in a list, until a claim drops them."""
    return f"{{{q}}}:ghosts"


def paused(q: str) -> str:
    """String, no TTL: exists while the queue is paused: it takes jobs in and gives none out."""
    return f"{{{q}}}:paused"


def dead(q: str) -> str:
    """ZSET, no TTL: dead letters, and when each failed in ms; bounded in number and in age."""
    return f"{{{q}}}:dead"


def log(q: str) -> str:
    """Stream, no TTL: an entry for each batch of transitions, trimmed to about 100,000 jobs."""
    return f"{{{q}}}:log"


def log_marks(q: str) -> str:
    """List, no TTL: how many jobs there had been at some entries of the log, to trim it by."""
    return f"{{{q}}}:logmarks"


def control(q: str) -> str:
    """Stream, TTL 1 h: messages to the queue's workers: cancel, expire, pause, resume."""
    return f"{{{q}}}:control"


def idempotency(q: str, digest: str) -> str:
    """String, TTL 24 h, or JOB_TTL if longer; that of its job once ended: the job of an
    Idempotency-Key, and its fingerprint.

    `digest` is a hash over tenant and Idempotency-Key, so neither is readable in Redis.
    """
    return f"{{{q}}}:idem:{digest}"


def reap_gate(q: str) -> str:
    """String, TTL half a tick: exists while another sweep of the queue would come too soon."""
    return f"{{{q}}}:reapgate"


def swept(q: str) -> str:
    """String, TTL two leases: when the queue was last swept; a gap means an outage."""
    return f"{{{q}}}:swept"


def hold(q: str) -> str:
    """String, TTL one lease: exists after an outage, while no expired lease is acted on."""
    return f"{{{q}}}:hold"


def outbox(q: str) -> str:
    """ZSET, no TTL: deliveries of webhooks that are to come, and when each is due in ms."""
    return f"{{{q}}}:outbox"


def undelivered(q: str) -> str:
    """ZSET, no TTL: deliveries that were given up, and when in ms; bounded in number and in age."""
    return f"{{{q}}}:undelivered"


def webhook(q: str, job_id: str) -> str:
    """Hash, TTL once its deliveries are done: where a job's webhook goes, and its deliveries."""
    return f"{{{q}}}:webhook:{job_id}"


def webhooks(q: str) -> str:
    """Hash, no TTL: the bytes reserved by each round whose end a webhook is to deliver."""
    return f"{{{q}}}:webhooks"


def webhook_bytes(q: str) -> str:
    """String, no TTL: the sum of the bytes that are reserved for webhooks."""
    return f"{{{q}}}:webhookbytes"


TYPES_OF_A_QUEUE: Final[dict[str, tuple[Callable[[str], str | tuple[str, ...]], ...]]] = {
    "list": (waiting, wake, log_marks),
    "hash": (running, facts, kept, webhooks),
    "zset": (leases, deadlines, delayed, dead, outbox, undelivered),
    "set": (stale_entries,),
    "stream": (log, control),
    "string": (seq, bytes_waiting, bytes_kept, swept, webhook_bytes),
}
"""The type of each key of a queue, for an error message that names a key of another type."""


# --- all queues ----------------------------------------------------------------------------


def queues(n: str) -> str:
    """Set, no TTL: every queue there is, so that sweeps, repairs and listings find them all."""
    return f"{{{n}}}:queues"


def out_of_place(n: str) -> str:
    """ZSET, TTL 24 h: jobs that a repair found in no list and no claim, and since when."""
    return f"{{{n}}}:odd"


def libraries(n: str) -> str:
    """Hash, no TTL: by library of scripts, when a process last named it as in use, by its clock."""
    return f"{{{n}}}:libraries"


def repair_gate(n: str) -> str:
    """String, TTL 10 min: exists while another repair would come too soon."""
    return f"{{{n}}}:repairgate"


def inbox(n: str, api: str) -> str:
    """Stream, TTL 60 s, renewed by its API process: the ends of the jobs that it waits for."""
    return f"{{{n}}}:inbox:{api}"


def group(n: str, tenant: str, name: str) -> str:
    """List, TTL 7 days after the last submit: the ids of the jobs that `tenant` calls `name`.

    Of a closed group with a webhook, 7 days after its end. Neither is readable in Redis.
    """
    return f"{{{n}}}:group:{group_digest(tenant, name)}"


def closed_group(n: str, tenant: str, name: str) -> str:
    """Hash, TTL 7 days after it was closed: exists once the group takes no more jobs.

    Of one with a webhook, 7 days after its end: what is sent then, and its ended jobs so far.
    """
    return f"{{{n}}}:closed:{group_digest(tenant, name)}"


@lru_cache(maxsize=1024)
def group_digest(tenant: str, name: str) -> str:
    """What names a tenant's group in its keys, in hex digits."""
    return hashlib.sha256(f"{tenant}\0{name}".encode()).hexdigest()


def closing(n: str) -> str:
    """ZSET, no TTL: by digest the closed groups with a webhook whose jobs have not all ended, and
    when each is looked at next in ms."""
    return f"{{{n}}}:closing"


def closers(n: str) -> str:
    """Hash, no TTL: by digest the tenant of each group in `closing`, and by ":" and tenant how many
    it has there."""
    return f"{{{n}}}:closers"


def worker(n: str, worker_id: str) -> str:
    """String, TTL 15 s, renewed by its worker: what the worker says of itself, as JSON."""
    return f"{{{n}}}:worker:{worker_id}"


def workers(n: str) -> str:
    """ZSET, no TTL: the workers, and when each last announced itself in s."""
    return f"{{{n}}}:workers"


def model(n: str, name: str) -> str:
    """Hash, no TTL: the signature of each announced version of a model, as JSON."""
    return f"{{{n}}}:model:{name}"


def models(n: str) -> str:
    """Set, no TTL: the names of the announced models."""
    return f"{{{n}}}:models"


def default_versions(n: str) -> str:
    """Hash, no TTL: by model, the version that `model.toml` makes the default.

    Other models serve their highest version.
    """
    return f"{{{n}}}:default_versions"


def pace(n: str, model: str) -> str:
    """String, TTL 30 days: the seconds that a job of the model took lately."""
    return f"{{{n}}}:pace:{model}"


def default_model(n: str) -> str:
    """String, no TTL: the model whose queue is `n`; empty where there is decided to be none."""
    return f"{{{n}}}:default"


def audit(n: str) -> tuple[str, str]:
    """ZSET, TTL 90 days: the audit entries of operators and admins, and those of tenants.

    They are apart so that no tenant can push out what operators did.
    """
    return f"{{{n}}}:audit", f"{{{n}}}:audit:tenants"

"""The name of every Redis key.

`n` is QUEUE_NAME and `q` a queue: `n` itself for the default model, `n:model` for another.
In `{q}:x` the braces are literal (a hash tag), so that one queue's keys share a slot and no
model's name can collide with them (a bare `n:default` would be the queue of a model `default`).
The scripts build the same names in `lua/_keys.lua` and `lua/_job_keys.lua`; a test compares them.
"""

import hashlib
from collections.abc import Callable
from typing import Final


def queue(n: str, model: str, default_model: str | None) -> str:
    """The list that holds `model`'s waiting jobs of normal priority."""
    return n if model == default_model else f"{n}:{model}"


def model_of(n: str, q: str, default_model: str | None) -> str | None:
    """The model whose queue `q` is; the reverse of `queue`."""
    return default_model if q == n else q.removeprefix(f"{n}:")


# --- a job ---------------------------------------------------------------------------------


def data(job_id: str) -> str:
    return f"job:{job_id}:data"


def status(job_id: str) -> str:
    return f"job:{job_id}:status"


def result(job_id: str) -> str:
    return f"job:{job_id}:result"


def error(job_id: str) -> str:
    return f"job:{job_id}:error"


def meta(job_id: str) -> str:
    return f"job:{job_id}:meta"


# --- a queue -------------------------------------------------------------------------------


def waiting(q: str) -> tuple[str, str, str]:
    """The three lists of a queue in the order they are served: high, normal, low."""
    return f"{{{q}}}:high", q, f"{{{q}}}:low"


def wake(q: str) -> str:
    return f"{{{q}}}:wake"


def running(q: str) -> str:
    return f"{{{q}}}:running"


def leases(q: str) -> str:
    return f"{{{q}}}:leases"


def claim(q: str, token: str) -> str:
    return f"{{{q}}}:claim:{token}"


def facts(q: str) -> str:
    return f"{{{q}}}:facts"


def deadlines(q: str) -> str:
    return f"{{{q}}}:deadlines"


def delayed(q: str) -> str:
    return f"{{{q}}}:delayed"


def seq(q: str) -> str:
    return f"{{{q}}}:seq"


def bytes_waiting(q: str) -> str:
    return f"{{{q}}}:bytes"


def ghosts(q: str) -> str:
    return f"{{{q}}}:ghosts"


def paused(q: str) -> str:
    return f"{{{q}}}:paused"


def dead(q: str) -> str:
    return f"{{{q}}}:dead"


def log(q: str) -> str:
    return f"{{{q}}}:log"


def log_marks(q: str) -> str:
    return f"{{{q}}}:logmarks"


def control(q: str) -> str:
    return f"{{{q}}}:control"


def idempotency(q: str, digest: str) -> str:
    """`digest` is a hash over tenant and Idempotency-Key, so neither is readable in Redis."""
    return f"{{{q}}}:idem:{digest}"


def reap_gate(q: str) -> str:
    return f"{{{q}}}:reapgate"


def swept(q: str) -> str:
    return f"{{{q}}}:swept"


def hold(q: str) -> str:
    return f"{{{q}}}:hold"


TYPES_OF_A_QUEUE: Final[dict[str, tuple[Callable[[str], str | tuple[str, ...]], ...]]] = {
    "list": (waiting, wake, log_marks),
    "hash": (running, facts),
    "zset": (leases, deadlines, delayed, dead),
    "set": (ghosts,),
    "stream": (log, control),
    "string": (seq, bytes_waiting, swept),
}
"""Which type of Redis each key of a queue has, for a message that names one of another type."""


# --- all queues ----------------------------------------------------------------------------


def queues(n: str) -> str:
    return f"{{{n}}}:queues"


def odd(n: str) -> str:
    return f"{{{n}}}:odd"


def write_probe(n: str) -> str:
    """Never exists: written only where it is (SET ... XX), to see whether Redis takes writes."""
    return f"{{{n}}}:writeprobe"


def repair_gate(n: str) -> str:
    return f"{{{n}}}:repairgate"


def inbox(n: str, api: str) -> str:
    return f"{{{n}}}:inbox:{api}"


def group(n: str, tenant: str, name: str) -> str:
    """The list of ids of the jobs that `tenant` calls `name`; neither is readable in Redis."""
    digest = hashlib.sha256(f"{tenant}\0{name}".encode()).hexdigest()
    return f"{{{n}}}:group:{digest}"


def worker(n: str, worker_id: str) -> str:
    return f"{{{n}}}:worker:{worker_id}"


def workers(n: str) -> str:
    return f"{{{n}}}:workers"


def model(n: str, name: str) -> str:
    return f"{{{n}}}:model:{name}"


def models(n: str) -> str:
    return f"{{{n}}}:models"


def default_versions(n: str) -> str:
    """By model, the version that `model.toml` makes the default; others serve the highest."""
    return f"{{{n}}}:default_versions"


def pace(n: str, model: str) -> str:
    return f"{{{n}}}:pace:{model}"


def default_model(n: str) -> str:
    return f"{{{n}}}:default"

"""Queues with jobs that nobody runs, in words, and the command that mends it."""

import shlex
from typing import TYPE_CHECKING

from asyncinfer.cli.output import seconds
from asyncinfer.untrusted.printable import printable_line

if TYPE_CHECKING:
    from asyncinfer.schemas.operations import Queue


def waiting_jobs(queue: "Queue") -> int:
    return queue.waiting.high + queue.waiting.normal + queue.waiting.low


def told_starved(queue: "Queue") -> str:
    """As `3 jobs of iris wait, oldest 10 min, and no worker has it`."""
    return f"{told_waiting(queue)}, and no worker has it"


def told_waiting(queue: "Queue") -> str:
    count = waiting_jobs(queue)
    verb = "waits" if count == 1 else "wait"
    oldest = seconds(queue.oldest_age_seconds)
    age = f", oldest {oldest}" if oldest else ""
    return f"{count:,} job{'s' * (count != 1)} of {printable_line(queue_name(queue))} {verb}{age}"


def mend_starved(queue: "Queue", model_dir: str = "") -> str:
    """`model_dir` where a folder with the model is known, quoted for a shell."""
    name = shlex.quote(printable_line(queue_name(queue)))
    where = model_dir or f"FOLDER    # one that has {name}"
    either = "; or" if not model_dir else "    # or"
    return f"asyncinfer work --model-dir {where}{either} end them: asyncinfer cancel --model {name}"


def queue_name(queue: "Queue") -> str:
    return queue.model or queue.queue

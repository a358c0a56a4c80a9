"""Texts on queues whose jobs no worker runs, and the command that helps."""

import shlex
from typing import TYPE_CHECKING

from asyncinfer.cli.output import seconds
from asyncinfer.untrusted.printable import printable_line

if TYPE_CHECKING:
    from asyncinfer.schemas.operations import Queue


def waiting_jobs(queue: "Queue") -> int:
    return queue.waiting.high + queue.waiting.normal + queue.waiting.low


def starved_text(queue: "Queue") -> str:
    """A text as `3 jobs of iris wait, oldest 10 min, and no worker has it`."""
    return f"{waiting_text(queue)}, and no worker has it"


def waiting_text(queue: "Queue") -> str:
    """A text as `3 jobs of iris wait, oldest 10 min`."""
    count = waiting_jobs(queue)
    verb = "waits" if count == 1 else "wait"
    oldest = seconds(queue.oldest_age_seconds)
    age = f", oldest {oldest}" if oldest else ""
    return f"{count:,} job{'s' * (count != 1)} of {printable_line(queue_name(queue))} {verb}{age}"


def starved_remedy(queue: "Queue", model_dir: str = "") -> str:
    """The command that starts a worker for a queue, and the one that cancels its jobs.

    `model_dir` is a folder that has the model, quoted for a shell, or empty if none is known.
    """
    name = shlex.quote(printable_line(queue_name(queue)))
    folder = model_dir or f"FOLDER    # one that has {name}"
    separator = "; or" if not model_dir else "    # or"
    cancel = f"asyncinfer cancel --model {name}"
    return f"asyncinfer work --model-dir {folder}{separator} cancel them: {cancel}"


def queue_name(queue: "Queue") -> str:
    """The name of its model, else of its list in Redis."""
    return queue.model or queue.queue

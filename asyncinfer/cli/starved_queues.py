"""Texts on queues whose jobs no worker runs, and the command that helps."""

import shlex
from typing import TYPE_CHECKING

from asyncinfer.cli.output import counted, seconds
from asyncinfer.untrusted.printable import printable_line

if TYPE_CHECKING:
    from asyncinfer.schemas.operations import Queue


def waiting_jobs(queue: "Queue") -> int:
    """The number of waiting jobs of all priorities; delayed jobs do not count."""
    return queue.waiting.high + queue.waiting.normal + queue.waiting.low


def starved_text(queue: "Queue") -> str:
    """A text as `3 jobs of iris wait, oldest 10 min, and no worker has it`."""
    return f"{waiting_text(queue)}, and no worker has it"


def waiting_text(queue: "Queue") -> str:
    """A text as `3 jobs of iris wait, oldest 10 min`, in one printable line."""
    count = waiting_jobs(queue)
    verb = "waits" if count == 1 else "wait"
    oldest = seconds(queue.oldest_age_seconds)
    age = f", oldest {oldest}" if oldest else ""
    return f"{counted(count, 'job')} of {printable_line(queue_name(queue))} {verb}{age}"


def starved_remedy(queue: "Queue", model_dir: str = "") -> str:
    """One line for a shell: the command that starts a worker for a queue, or cancels its jobs.

    `model_dir` is a folder that has the model, quoted for a shell; if it is empty, the line has the
    word FOLDER in its place.
    """
    name = shlex.quote(printable_line(queue_name(queue)))
    folder = model_dir or f"FOLDER    # one that has {name}"
    separator = "; or" if not model_dir else "    # or"
    cancel = f"asyncinfer cancel --model {name}"
    return f"asyncinfer work --model-dir {folder}{separator} cancel them: {cancel}"


def queue_name(queue: "Queue") -> str:
    """The name of its model; the list's name in Redis if no model is known for it."""
    return queue.model or queue.queue

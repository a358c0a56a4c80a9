"""Jobs that a script failed of its own accord, as its reply names them."""

from typing import Any

from msgspec import Struct

from asyncinfer.jobs import id_text
from asyncinfer.untrusted import decoding


class FailedJob(Struct, frozen=True):
    """A job that a script failed."""

    job_id: str
    code: str
    token: str = ""
    """Of the claim that was lost, the last one that the job may have."""


class FailedJobs(Struct, frozen=True):
    """The jobs of one queue that one call failed."""

    queue: str
    counts: dict[str, int]
    """By code."""
    named: tuple[FailedJob, ...]
    """At most ten of them."""

    @property
    def total(self) -> int:
        """How many jobs there are, the named ones included."""
        return sum(self.counts.values())


def read_failed_jobs(reply: Any) -> FailedJobs:
    """Decodes what `lua/_failures.lua` makes."""
    queue, flat_counts, flat_jobs = reply
    counts, jobs = iter(flat_counts), iter(flat_jobs)
    return FailedJobs(
        decoding.text(queue),
        {decoding.text(code): number for code, number in zip(counts, counts, strict=True)},
        tuple(
            FailedJob(id_text(job_id), decoding.text(code), decoding.text(token))
            for job_id, code, token in zip(jobs, jobs, jobs, strict=True)
        ),
    )

"""Errors as clients receive them (RFC 9457, problem details)."""

from typing import Annotated

from msgspec import Meta, Struct

from asyncinfer.errors import InputError, JobFailed, RequestError
from asyncinfer.jobs import JobError


class Problem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: Annotated[str, Meta(description="Stable, for machines.")]
    instance: str = ""
    errors: Annotated[
        tuple[InputError, ...],
        Meta(description="Everything that is wrong with the input, by place."),
    ] = ()
    job_id: str | None = None
    error: Annotated[JobError, Meta(description="Why the job failed.")] | None = None


class LineProblem(Problem, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong with one line of a request that has many (RFC 9457)."""

    line: Annotated[int, Meta(description="The number of the line in the request, from 1.")]
    retry_after_seconds: Annotated[
        float | None, Meta(description="When to send this line again.")
    ] = None


def problem_of(error: RequestError, path: str = "") -> Problem:
    """The body that answers a request to `path` with this error; its `instance` is that path."""
    return Problem(
        type=f"urn:asyncinfer:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=error.detail,
        code=error.code,
        instance=path,
        errors=error.faults,
        job_id=error.job_id,
        error=JobError(*error.job_error) if isinstance(error, JobFailed) else None,
    )


def line_problem_of(error: RequestError, line: int) -> LineProblem:
    """The line that answers line number `line`, from 1, of a request with this error."""
    problem = problem_of(error)
    members = {name: getattr(problem, name) for name in problem.__struct_fields__}
    return LineProblem(line=line, retry_after_seconds=error.retry_after_seconds, **members)

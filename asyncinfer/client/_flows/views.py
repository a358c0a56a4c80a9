"""A job as a server shows it: its form, and how it ended."""

from datetime import datetime
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta, Struct

from asyncinfer import jobs
from asyncinfer.client._answers import Position
from asyncinfer.client._decoding import decode_result
from asyncinfer.client._errors import job_failed_error
from asyncinfer.client._requests import RemoteServer, convert
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.errors import Forbidden, JobCancelled
from asyncinfer.jobs import JobError

View = dict[str, Any]
"""A job as the decoded JSON of a server; `check_view` has found it to be a `JobView`."""

_Time: TypeAlias = Annotated[datetime, Meta(tz=True)]


class JobView(Struct, frozen=True, kw_only=True):
    """The fields of a job that a client reads; a newer server may show more."""

    job_id: str
    status: str
    tenant: str | None = None
    model: str | None = None
    version: str | None = None
    group: str | None = None
    round: int | None = None
    request_id: str | None = None
    error: JobError | None = None
    waiting_for: WaitingFor | None = None
    position: Position | None = None
    eta_seconds: float | None = None
    created_at: _Time | None = None
    started_at: _Time | None = None
    finished_at: _Time | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the job had ended when the server showed this."""
        return self.status in jobs.TERMINAL


def check_view(server: RemoteServer, answer: Any) -> View:
    """The same answer; raises NotAsyncinfer if it does not show a job."""
    convert(server, answer, JobView)
    view: View = answer
    return view


def is_job_view(answer: Any) -> bool:
    """Whether decoded JSON shows a job."""
    try:
        msgspec.convert(answer, JobView)
    except msgspec.ValidationError:
        return False
    return True


def as_unfinished(view: View) -> View:
    """A view to wait with, as an ended job may have been retried since it was read.

    A completed job has still ended, so its view is unchanged.
    """
    is_final = view["status"] == "completed"
    kept: View = {name: view[name] for name in ("job_id", "tenant") if name in view}
    return view if is_final else {**kept, "status": "pending"}


def has_outcome(view: View) -> bool:
    """Whether a view shows how the job ended, so that `outcome` may be called.

    Lists leave out results, and operators never see them.
    """
    return view["status"] in ("failed", "cancelled") or (
        view["status"] == "completed" and ("result" in view or "tenant" in view)
    )


def outcome(view: View) -> Any:
    """The decoded result of a job that has ended, from its view.

    Raises JobFailed, JobCancelled, or Forbidden for a job that an operator reads.
    """
    if view["status"] == "failed":
        raise job_failed_error(view.get("error") or {}, view["job_id"])
    if view["status"] == "cancelled":
        raise JobCancelled(
            "The job was cancelled; retry it to have a result.", job_id=view["job_id"]
        )
    if "tenant" in view:
        raise Forbidden(
            f"The result is shown only to keys of its tenant, {view['tenant']}; an operator sees "
            "that the job is completed.",
            job_id=view["job_id"],
        )
    return decode_result(view.get("result"))

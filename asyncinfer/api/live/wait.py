"""Waiting for a job, for as long as its client requested and stays connected."""

import re
from collections.abc import Awaitable
from typing import Any

import anyio

from asyncinfer.api.http.messages import OWS, Request
from asyncinfer.errors import InvalidHeader, RequestError
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.schemas.requests import MAX_WAIT_SECONDS


def preferred_wait(request: Request[Any]) -> int | None:
    """N of the first `Prefer: wait=N` (RFC 7240) in seconds, which may be 0, or None without one.
    Raises InvalidHeader if N is not a number or out of range."""
    for line in request.header_lines(b"prefer"):
        for preference in line.split(","):
            name, _, value = preference.partition(";")[0].partition("=")
            if name.strip(OWS).lower() == "wait":
                request.note_wait()
                return _wait_seconds(value.strip(OWS).strip('"'))
    return None


async def while_client_stays(
    request: Request[Any], waiting: Awaitable[StoredJob | None]
) -> StoredJob | None:
    """The result of `waiting`, or None if the client disconnects first, which cancels it. Raises
    what `waiting` raises, and Unauthorized or Forbidden as soon as the client's key is revoked. The
    request's body must have been read."""
    stored: StoredJob | None = None
    failure: RequestError | None = None

    async def end_when_revoked() -> None:
        nonlocal failure
        failure = await request.admission.revoked()
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(_cancel_on_disconnect, request, group.cancel_scope)
        if request.admission.revocable:
            group.start_soon(end_when_revoked)
        try:
            stored = await waiting
        except RequestError as error:
            # The task group would wrap an error that is raised inside it.
            failure = error
        group.cancel_scope.cancel()
    if failure:
        raise failure
    return stored


async def wait_for_disconnect(request: Request[Any]) -> None:
    """Returns when the client has disconnected; anything it still sends is dropped."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel_on_disconnect(request: Request[Any], scope: anyio.CancelScope) -> None:
    """Cancels the scope when the client has disconnected."""
    await wait_for_disconnect(request)
    scope.cancel()


def _wait_seconds(text: str) -> int:
    """The seconds in the value of `wait`; raises InvalidHeader if it is not a number or out of
    range."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > MAX_WAIT_SECONDS:
        raise InvalidHeader(
            f"Prefer: wait takes whole seconds from 0 to {MAX_WAIT_SECONDS}. For a longer wait "
            "ask GET /job/{id}?wait= again."
        )
    return int(text)

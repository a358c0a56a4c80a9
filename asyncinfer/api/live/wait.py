"""Waiting for a job: as long as its client asks, and only as long as it stays."""

import re
from collections.abc import Awaitable
from typing import Any

import anyio

from asyncinfer.api.http.messages import OWS, Request
from asyncinfer.errors import InvalidHeader, RequestError
from asyncinfer.repository.stored_jobs import Stored
from asyncinfer.schemas.requests import MAX_WAIT_SECONDS


def preferred_wait(request: Request[Any]) -> int | None:
    """N of `Prefer: wait=N` (RFC 7240); None when there is none. The first one counts."""
    for line in request.header_lines(b"prefer"):
        for preference in line.split(","):
            name, _, value = preference.partition(";")[0].partition("=")
            if name.strip(OWS).lower() == "wait":
                return _wait_seconds(value.strip(OWS).strip('"'))
    return None


async def while_client_stays(
    request: Request[Any], waiting: Awaitable[Stored | None]
) -> Stored | None:
    """What `waiting` comes to; None when the client hangs up first. Raises Unauthorized or
    Forbidden as soon as the client's key is revoked."""
    stored: Stored | None = None
    trouble: RequestError | None = None

    async def end_when_revoked() -> None:
        nonlocal trouble
        trouble = await request.admission.revoked()
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(_cancel_when_gone, request, group.cancel_scope)
        if request.admission.revocable:
            group.start_soon(end_when_revoked)
        try:
            stored = await waiting
        except RequestError as error:
            # Raised in here, the group would wrap it.
            trouble = error
        group.cancel_scope.cancel()
    if trouble:
        raise trouble
    return stored


async def until_gone(request: Request[Any]) -> None:
    """Returns when the client has hung up; what it still sends is dropped."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel_when_gone(request: Request[Any], scope: anyio.CancelScope) -> None:
    await until_gone(request)
    scope.cancel()


def _wait_seconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > MAX_WAIT_SECONDS:
        raise InvalidHeader(
            f"Prefer: wait takes whole seconds from 0 to {MAX_WAIT_SECONDS}. For a longer wait "
            "ask GET /job/{id}?wait= again."
        )
    return int(text)

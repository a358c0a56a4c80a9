"""Waiting for a job only as long as its client does."""

from collections.abc import Awaitable
from typing import Any

import anyio

from asyncinfer.api.exchange import Request
from asyncinfer.errors import RequestError
from asyncinfer.repository.submit import Stored


async def while_client_stays(
    request: Request[Any], waiting: Awaitable[Stored | None]
) -> Stored | None:
    """What `waiting` comes to; None when the client hangs up first."""
    stored, trouble = None, None
    async with anyio.create_task_group() as group:
        group.start_soon(_cancel_when_gone, request, group.cancel_scope)
        try:
            stored = await waiting
        except RequestError as error:
            # Raised in here, the group would wrap it.
            trouble = error
        group.cancel_scope.cancel()
    if trouble:
        raise trouble
    return stored


async def _cancel_when_gone(request: Request[Any], scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()

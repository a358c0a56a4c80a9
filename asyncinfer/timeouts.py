"""Waiting for a future, and for how long."""

import asyncio
from typing import Any


async def settled(future: asyncio.Future[Any], seconds: float) -> bool:
    """Whether `future` is done within `seconds`; it goes on where it is not, and if this wait is
    cancelled. What `asyncio.wait` tells of a set of one, for half of its cost."""
    if future.done():
        return True
    loop = asyncio.get_running_loop()
    moment: asyncio.Future[None] = loop.create_future()

    def end(_: object = None) -> None:
        if not moment.done():
            moment.set_result(None)

    timer = loop.call_later(seconds, end)
    future.add_done_callback(end)
    try:
        await moment
    finally:
        timer.cancel()
        future.remove_done_callback(end)
    return future.done()

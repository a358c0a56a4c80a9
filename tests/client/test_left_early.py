"""Maps and events that are left before their end, by their loop or by the close of the client."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest

from asyncinfer.client import AsyncClient, Client, ClientClosed
from asyncinfer.testing import Running
from tests.faults.harness import eventually, eventually_sync
from tests.faults.proxy import proxied

ROWS: Final = np.full((64, 1), 100.0)
"""The milliseconds that each row takes."""
TWO_SHORT_ROWS: Final = np.array([[10.0]] * 2 + [[1000.0]] * 62)
"""The first two end soon: others run or wait when a loop is left, which stops them."""
SLOW: Final[dict[str, Any]] = {"model": "slow_alone", "batch": 1, "in_flight": 4, "progress": False}


class LeftError(Exception):
    """Raised in the body of a loop."""


def leave_by_break(client: Client, group: str) -> None:
    for _ in client.map(TWO_SHORT_ROWS, group=group, **SLOW):
        break


def leave_by_enumerate(client: Client, group: str) -> None:
    for number, _ in enumerate(client.map(TWO_SHORT_ROWS, group=group, **SLOW)):
        if number == 1:
            return


def leave_by_zip(client: Client, group: str) -> None:
    for _ in zip(range(1), client.map(TWO_SHORT_ROWS, group=group, **SLOW), strict=False):
        pass


def leave_by_error(client: Client, group: str) -> None:
    try:
        for _ in client.map(TWO_SHORT_ROWS, group=group, **SLOW):
            raise LeftError
    except LeftError:
        return


def leave_by_del(client: Client, group: str) -> None:
    results = client.map(TWO_SHORT_ROWS, group=group, **SLOW)
    next(results)
    del results


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_enumerate, leave_by_zip, leave_by_error, leave_by_del]
)
def test_a_loop_that_is_left_has_cancelled_what_has_not_run(
    client: Client, leave: Callable[[Client, str], None]
) -> None:
    leave(client, leave.__name__)

    counts = client.group(leave.__name__).counts
    assert counts.pending == 0
    assert counts.cancelled > 0


async def test_an_asynchronous_loop_that_is_left_cancels_what_has_not_run(
    aclient: AsyncClient,
) -> None:
    async for _ in aclient.map(TWO_SHORT_ROWS, group="left-async", **SLOW):
        break

    async def is_cancelled() -> bool:
        counts = (await aclient.group("left-async")).counts
        return counts.pending == 0 and counts.cancelled > 0

    await eventually(is_cancelled, "what waits is cancelled")


async def test_a_client_that_is_closed_awaits_the_end_of_a_loop_that_was_left(
    running: Running, client: Client
) -> None:
    async with AsyncClient(running.url) as left:
        async for _ in left.map(TWO_SHORT_ROWS, group="awaited", **SLOW):
            break

    counts = client.group("awaited").counts
    assert counts.pending == 0
    assert counts.cancelled > 0


def test_a_client_that_is_closed_ends_its_maps(running: Running, client: Client) -> None:
    with Client(running.url) as closed:
        both = [closed.map(ROWS, **SLOW), closed.map(ROWS, **SLOW)]
        assert [next(results).item() for results in both] == [100.0, 100.0]

    for results in both:
        counts = client.group(results.group).counts
        assert counts.pending == 0
        assert counts.cancelled > 0
        with pytest.raises(ClientClosed):
            list(results)
        assert list(results) == []


async def test_an_asynchronous_client_that_is_closed_ends_its_maps(
    running: Running, client: Client
) -> None:
    async with AsyncClient(running.url) as closed:
        both = [closed.map(ROWS, **SLOW), closed.map(ROWS, **SLOW)]
        assert [(await anext(results)).item() for results in both] == [100.0, 100.0]

    for results in both:
        counts = client.group(results.group).counts
        assert counts.pending == 0
        assert counts.cancelled > 0
        with pytest.raises(ClientClosed):
            [result async for result in results]
        assert [result async for result in results] == []


def test_a_map_whose_client_is_closed_by_another_thread_is_ended(
    running: Running, client: Client
) -> None:
    raised: list[BaseException] = []
    begun = threading.Event()

    def use(results: Any) -> None:
        try:
            for _ in results:
                begun.set()
        except ClientClosed as error:
            raised.append(error)

    closed = Client(running.url)
    results = closed.map(ROWS, on_error="return", **SLOW)
    thread = threading.Thread(target=use, args=(results,))
    thread.start()
    assert begun.wait(10)
    closed.close()
    thread.join(10)

    assert len(raised) == 1
    assert client.group(results.group).counts.pending == 0


async def test_a_map_whose_client_is_closed_by_another_task_is_ended(
    running: Running, client: Client
) -> None:
    closed = AsyncClient(running.url)
    results = closed.map(ROWS, on_error="return", **SLOW)
    await anext(results)

    async def use() -> None:
        with pytest.raises(ClientClosed):
            [result async for result in results]

    async with asyncio.TaskGroup() as group:
        group.create_task(use())
        await asyncio.sleep(0)
        await closed.close()

    assert client.group(results.group).counts.pending == 0


@pytest.mark.soak
async def test_a_client_is_closed_within_seconds_though_its_server_is_silent(
    running: Running, client: Client
) -> None:
    """Its requests are taken, and no longer answered."""
    async with proxied(running.url) as proxy:
        closed = AsyncClient(f"http://127.0.0.1:{proxy.port}")
        results = closed.map(ROWS, **SLOW)
        await anext(results)
        proxy.black_hole()
        begun = time.monotonic()
        await closed.close()
        assert time.monotonic() - begun < 25
    client.group(results.group).cancel()


# --- scripts -----------------------------------------------------------------------------------

_SCRIPT: Final = """
import asyncio, sys
import numpy as np
from asyncinfer.client import AsyncClient, Client

url, group, how = sys.argv[1:]
rows = np.array([[10.0]] * 2 + [[1000.0]] * 62)
slow = dict(model="slow_alone", batch=1, in_flight=4, progress=False, group=group)

def plain():
    if how == "open":
        client = Client(url)
        results = client.map(rows, **slow)
        return client, results, next(results)
    with Client(url) as client:
        results = client.map(rows, **slow)
        for _ in results:
            if how == "break":
                return results
            raise KeyboardInterrupt

async def asynchronous():
    if how == "open":
        client = AsyncClient(url)
        results = client.map(rows, **slow)
        return client, results, await anext(results)
    async with AsyncClient(url) as client:
        results = client.map(rows, **slow)
        async for _ in results:
            if how == "break":
                return results
            raise KeyboardInterrupt
"""


_PLAIN: Final = "kept = plain()"
_ASYNCHRONOUS: Final = "kept = asyncio.run(asynchronous())"


@pytest.mark.parametrize(
    ("how", "call"),
    [
        ("break", _ASYNCHRONOUS),
        ("interrupt", _PLAIN),
        ("open", _ASYNCHRONOUS),
        pytest.param("break", _PLAIN, marks=pytest.mark.soak),
        pytest.param("interrupt", _ASYNCHRONOUS, marks=pytest.mark.soak),
        pytest.param("open", _PLAIN, marks=pytest.mark.soak),
    ],
)
def test_a_script_that_leaves_a_map_ends_without_another_traceback(
    running: Running, client: Client, call: str, how: str
) -> None:
    group = f"script-{how}-{len(call)}"
    code = f"{_SCRIPT}\ntry:\n    {call}\nexcept KeyboardInterrupt:\n    pass\n"
    argv = [sys.executable, "-c", code, running.url, group, how]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20)

    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    counts = client.group(group).counts
    assert counts.pending == 0
    assert counts.cancelled > 0
    eventually_sync(lambda: client.group(group).counts.processing == 0, "none runs")


_EVENTS: Final = """
import asyncio, sys
from asyncinfer.client import AsyncClient, Client

options = {"delay_seconds": 60, "group": "left-events"}

def plain(url):
    with Client(url) as client:
        events = client.submit([[5.1, 3.5, 1.4, 0.2]], **options).events()
        for _ in events:
            return events

def never_closed(url):
    events = Client(url).submit([[5.1, 3.5, 1.4, 0.2]], **options).events()
    for _ in events:
        return events

async def asynchronous(url):
    async with AsyncClient(url) as client:
        events = (await client.submit([[5.1, 3.5, 1.4, 0.2]], **options)).events()
        async for _ in events:
            return events
"""


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("plain(sys.argv[1])", marks=pytest.mark.soak),
        "never_closed(sys.argv[1])",
        "asyncio.run(asynchronous(sys.argv[1]))",
    ],
)
def test_a_script_that_leaves_events_ends_without_a_traceback(
    running: Running, client: Client, call: str
) -> None:
    argv = [sys.executable, "-c", f"{_EVENTS}\nkept = {call}\n", running.url]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20)

    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert client.cancel_all(group="left-events").cancelled == 1

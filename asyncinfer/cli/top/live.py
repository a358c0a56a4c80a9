"""A live view: looks again and again, until somebody presses q."""

import asyncio
import contextlib
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asyncinfer.cli.options import Server
from asyncinfer.cli.output import console, say_json_line
from asyncinfer.cli.top import tables
from asyncinfer.cli.top.snapshot import Seen
from asyncinfer.errors import AsyncinferError, Forbidden
from asyncinfer.schemas.operations import QueueList, Worker, WorkerList

if TYPE_CHECKING:
    from asyncinfer.cli.api_client import Service
    from asyncinfer.repository.inspect.statistics import Observation


Look = Callable[[], Seen]


@contextmanager
def http(server: Server) -> Iterator[Look]:
    from asyncinfer.cli.api_client import Service

    with Service(server, retries=0) as service:

        def look() -> Seen:
            queues = service.ask_as(QueueList, "GET", "/queues").queues
            return Seen(time.time(), service.client.url, queues, _workers(service))

        yield look


def _workers(service: "Service") -> list[Worker] | None:
    try:
        return service.ask_as(WorkerList, "GET", "/workers").workers
    except Forbidden:
        return None


@contextmanager
def redis(url: str, queue_name: str) -> Iterator[Look]:
    from asyncinfer.cli.addresses import shown_url
    from asyncinfer.repository.inspect.statistics import Observation
    from asyncinfer.repository.policy import Policy
    from asyncinfer.repository.store import Store

    opened = Store.open(url, queue_name=queue_name, policy=Policy(), name="asyncinfer-top")
    with asyncio.Runner() as runner:
        store = runner.run(opened.__aenter__())
        try:
            runner.run(store.check_server())
            seen = Observation(store)
            yield lambda: runner.run(_look(seen, shown_url(url)))
        finally:
            runner.run(opened.__aexit__(None, None, None))


async def _look(seen: "Observation", source: str) -> Seen:
    return Seen(time.time(), source, await seen.queues(), await seen.workers())


def watch(look: Look, interval: float, *, once: bool, as_json: bool) -> None:
    if as_json:
        _lines(look, interval, once=once)
    elif once or not sys.stdout.isatty():
        tables.say(look())
    else:
        with contextlib.suppress(KeyboardInterrupt):
            _live(look, interval)


def _lines(look: Look, interval: float, *, once: bool) -> None:
    say_json_line(look())
    while not once:
        time.sleep(interval)
        say_json_line(look())


def _live(look: Look, interval: float) -> None:
    """A server that is away for a while is told so, and looked at again."""
    from rich.live import Live

    seen = look()
    with _keys() as pressed, Live(screen=True, auto_refresh=False, console=console()) as live:
        while True:
            trouble = ""
            try:
                seen = look()
            except AsyncinferError as error:
                trouble = error.detail
            live.update(tables.screen(seen, live.console, trouble), refresh=True)
            if pressed(interval) in ("q", "Q", "\x04"):
                return


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Waits at most so many seconds for a key; the terminal is given back as it was."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield _pause
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _key
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _key(seconds: float) -> str:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.read(1) if ready else ""


def _pause(seconds: float) -> str:
    time.sleep(seconds)
    return ""

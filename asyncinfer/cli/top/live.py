"""The live view of `top`: snapshots read through the API or from Redis, again and again."""

import contextlib
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from asyncinfer.cli.addresses import shown_url
from asyncinfer.cli.api_client import connect
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.output import console, say_json_line
from asyncinfer.cli.top import tables
from asyncinfer.cli.top.snapshot import Snapshot
from asyncinfer.errors import AsyncinferError, Forbidden
from asyncinfer.schemas.operations import Worker

if TYPE_CHECKING:
    from asyncinfer.client import Client
    from asyncinfer.repository.inspect.statistics import Statistics


ReadSnapshot = Callable[[], Snapshot]


@contextmanager
def api_reader(server: ServerOptions) -> Iterator[ReadSnapshot]:
    """Opens a connection to the API and yields a function that reads a snapshot through it.

    That function raises an AsyncinferError, such as ConnectionFailed, at once: it retries nothing.
    """
    with connect(server, retries=0) as client:
        yield lambda: Snapshot(
            datetime.now(UTC), shown_url(client.url), client.queues(), _workers(client)
        )


def _workers(client: "Client") -> list[Worker] | None:
    """The workers; None if the API key lacks the scope `admin`."""
    try:
        return client.workers()
    except Forbidden:
        return None


@contextmanager
def redis_reader(url: str, queue_name: str) -> Iterator[ReadSnapshot]:
    """Opens a connection to Redis and yields a function that reads a snapshot from it.

    `url` is a REDIS_URL, and `queue_name` the setting QUEUE_NAME. Raises an AsyncinferError if the
    server does not answer or cannot be used; the function that is yielded may do so too.
    """
    from anyio.from_thread import start_blocking_portal

    from asyncinfer.repository.inspect.statistics import Statistics
    from asyncinfer.repository.policy import Policy
    from asyncinfer.repository.rights import check_start
    from asyncinfer.repository.store import Store

    opened = Store.open(url, queue_name=queue_name, policy=Policy(), name="asyncinfer-top")
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(opened) as store:
        portal.call(check_start, store)
        yield lambda: portal.call(_read_snapshot, Statistics(store), shown_url(url))


async def _read_snapshot(statistics: "Statistics", source: str) -> Snapshot:
    """Reads the queues, then the workers; `source` is the server's name in the view."""
    at = datetime.now(UTC)
    return Snapshot(at, source, await statistics.queues(), await statistics.workers())


def watch(
    read_snapshot: ReadSnapshot, interval_seconds: float, *, once: bool, as_json: bool
) -> None:
    """Prints snapshots on stdout: one (`once`, or in a pipe), JSON lines, or the live view.

    Returns after one snapshot, or when the user presses q or Ctrl-C in the live view; JSON lines
    end only with an exception. Raises the error of a read; the live view shows it instead, unless
    the first read fails.
    """
    if as_json:
        _print_lines(read_snapshot, interval_seconds, once=once)
    elif once or not sys.stdout.isatty():
        tables.say(read_snapshot())
    else:
        with contextlib.suppress(KeyboardInterrupt):
            _run_live(read_snapshot, interval_seconds)


def _print_lines(read_snapshot: ReadSnapshot, interval_seconds: float, *, once: bool) -> None:
    """Prints a snapshot as a line of JSON every `interval_seconds`; returns only if `once`."""
    say_json_line(read_snapshot())
    while not once:
        time.sleep(interval_seconds)
        say_json_line(read_snapshot())


def _run_live(read_snapshot: ReadSnapshot, interval_seconds: float) -> None:
    """Redraws the screen every `interval_seconds`, or at any key, until q or Ctrl-D is pressed.

    Raises the error of the first read. Later it shows the last snapshot with the error, and tries
    again.
    """
    from rich.live import Live

    snapshot = read_snapshot()
    with (
        _keyboard() as wait_for_key,
        Live(screen=True, auto_refresh=False, console=console()) as live,
    ):
        while True:
            error_text = ""
            try:
                snapshot = read_snapshot()
            except AsyncinferError as error:
                error_text = error.detail
            live.update(tables.screen(snapshot, live.console, error_text), refresh=True)
            if wait_for_key(interval_seconds) in ("q", "Q", "\x04"):
                return


@contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    """Yields a function that waits for a key: it returns the key, or "" after the given seconds.

    Without a terminal it only waits, and returns "". The terminal's mode is restored at the end.
    """
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield _wait_without_keys
        return
    import termios
    import tty

    previous_mode = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _wait_for_key
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, previous_mode)


def _wait_for_key(seconds: float) -> str:
    """The next key of the terminal, which must be in cbreak mode; "" if none comes in `seconds`."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.read(1) if ready else ""


def _wait_without_keys(seconds: float) -> str:
    """Sleeps, and returns ""."""
    time.sleep(seconds)
    return ""

"""The results of a map as they come, in order; who leaves early cancels what waits."""

import atexit
import sys
import warnings
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sized,
)
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from msgspec import Struct

from asyncinfer.client import _flows
from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._errors import ConnectionFailed, SlowMapWarning, WaitTimeout
from asyncinfer.client._map import jobs
from asyncinfer.client._map.jobs import Plan
from asyncinfer.client._map.progress import Progress, progress
from asyncinfer.client._map.rows import Block, ablocks_of, blocks_of, columns_of, peeked
from asyncinfer.client._map.threads import Crew, Done
from asyncinfer.client._requests import Server
from asyncinfer.client._wait_reasons import CADENCE, Cadence, Notices, Silence, WaitingFor
from asyncinfer.errors import AsyncinferError

if TYPE_CHECKING:
    from asyncinfer.client._map.tasks import AsyncCrew

OnError = Literal["raise", "return"]

_AHEAD: Final = 2
"""Blocks that may be done or on their way, for each that may be in flight: a slow one at the
front holds the others up only so far, and what is done waits in memory only so much."""

_FEW_ROWS: Final = 64
"""So many run soon enough, each alone."""
_LATE_SECONDS: Final = 2.0
"""How long after a time-out the last answers are waited for."""

_CLIENT: Final = "asyncinfer.client."


class Asked(Struct, frozen=True, kw_only=True):
    """A map as it was asked for."""

    model: str | None
    batch: int | Literal["auto"]
    in_flight: int
    progress: bool
    on_error: OnError
    group: str
    is_named: bool
    """The group was given, and may have jobs already."""
    options: Mapping[str, Any]
    cadence: Cadence = CADENCE


class Window:
    """Which blocks are out, and the results whose turn it is."""

    def __init__(self, asked: Asked) -> None:
        self._size = _AHEAD * asked.in_flight
        self._raises = asked.on_error == "raise"
        self._started = 0
        self._given = 0
        self._row = 0
        self.rows_out = 0
        """Sent, and without an answer."""
        self._done: dict[int, list[Any]] = {}

    @property
    def is_open(self) -> bool:
        return self._started - self._given < self._size

    @property
    def is_empty(self) -> bool:
        return self._started == self._given

    def start(self, rows: int) -> int:
        self._started += 1
        self.rows_out += rows
        return self._started - 1

    def take(self, done: Done, bar: Progress) -> Iterator[Any]:
        """The results that may be given now; raises what is wrong with the map as a whole."""
        if done.error is not None:
            raise done.error
        self._done[done.number] = done.value
        self.rows_out -= len(done.value)
        errors = sum(isinstance(one, AsyncinferError) for one in done.value)
        bar.advance(len(done.value), errors)
        while self._given in self._done:
            yield from map(self._turn, self._done.pop(self._given))
            self._given += 1

    def _turn(self, value: Any) -> Any:
        row, self._row = self._row, self._row + 1
        if not isinstance(value, AsyncinferError):
            return value
        error = _of_row(value, row)
        if self._raises:
            raise error
        return error


class Slowness:
    """Warns once, where many rows go one by one: nothing else tells why that takes long."""

    def __init__(self, plan: Plan) -> None:
        self._model = plan.model
        self._is_open = not plan.model.batched
        self._rows = 0

    def count(self, block: Block) -> None:
        self._rows += len(block)
        if self._is_open and self._rows > _FEW_ROWS:
            self._is_open = False
            told = self._model.batching or "off"
            warnings.warn(
                f"{self._model.model} runs each row alone, so many rows take long. Its batching is "
                f"{told}",
                SlowMapWarning,
                stacklevel=_callers_level(),
            )


class Patience:
    """What is said of a map while no answer comes, and when it has been waited for long enough."""

    def __init__(self, server: Server, plan: Plan, asked: Asked, bar: Progress) -> None:
        self._until = server.until
        self._model = plan.model.model
        self._cadence = asked.cadence
        self._notices = Notices(bar.say, asked.cadence)
        self._reason: WaitingFor | None = None

    def silence(self) -> Silence:
        return Silence(self._until, self._cadence)

    def hear(self, reason: WaitingFor | None, rows: int) -> None:
        self._reason = reason
        waits = f"{_rows(rows)} of {self._model} wait{'s' * (rows == 1)}"
        self._notices.hear(reason, waits, f"{self._model} goes on")

    def heard(self, done: Done, rows: int) -> Done:
        """An answer, which ends the silence; raises WaitTimeout where it says no more than that."""
        if isinstance(done.error, WaitTimeout):
            raise self.timed_out(rows, done.error.waiting_for) from done.error
        self.hear(None, rows)
        return done

    def timed_out(self, rows: int, reason: WaitingFor | None) -> WaitTimeout:
        reason = reason or self._reason
        why = f": {reason.message}" if reason else "."
        return WaitTimeout(
            f"No result in time for {_rows(rows)} of {self._model}{why}",
            waiting_for=reason,
        )


class Results(Iterator[Any]):
    """A result for each row, in order; `group` takes the map up again, in another kernel too.

    In a `with` it is closed whatever happens in the body of a loop over it.
    """

    def __init__(
        self,
        server: Server,
        driver: Driver,
        rows: Iterable[Any],
        asked: Asked,
        bar: Progress | None = None,
    ) -> None:
        """`bar` in place of one of its own."""
        self._server = server
        self._driver = driver
        self._asked = asked
        self._bar = bar
        self._values = self._begin(rows)

    @property
    def group(self) -> str:
        return self._asked.group

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> "Results":
        return self

    def __next__(self) -> Any:
        return next(self._values)

    def __repr__(self) -> str:
        return f"<Results of group {self.group}>"

    def close(self) -> None:
        """Cancels what is not done."""
        self._values.close()

    def _begin(self, rows: Iterable[Any]) -> Generator[Any, None, None]:
        columns = columns_of(rows)
        total = len(rows) if isinstance(rows, Sized) else None
        try:
            first, rest = (columns.first(), iter(())) if columns else peeked(rows)
        except (StopIteration, IndexError):
            return _none()
        plan = self._driver.run(_plan(self._server, first, self._asked))
        blocks = columns.blocks(plan.block) if columns else blocks_of(rest, plan.block)
        return self._run(plan, blocks, len(columns) if columns else total)

    def _run(
        self, plan: Plan, blocks: Iterator[Block], total: int | None
    ) -> Generator[Any, None, None]:
        crew = Crew(self._driver, self._asked.in_flight)
        bar = self._bar or progress(self._asked.progress, total, self.group)
        patience = Patience(self._server, plan, self._asked, bar)
        # A script may end amid a map: later than this nothing can be asked of a server any more.
        close_at_exit = partial(_close, weakref.ref(self))
        atexit.register(close_at_exit)
        try:
            yield from self._through(crew, plan, blocks, bar, patience)
        except BaseException as error:
            crew.stop()
            if isinstance(error, WaitTimeout):
                # The waits of those that are out end with it, and a submit is not broken off.
                crew.leave(_LATE_SECONDS)
            elif not isinstance(error, ConnectionFailed):
                self._cancel(crew)
            error.add_note(_go_on(self.group))
            raise
        finally:
            atexit.unregister(close_at_exit)
            crew.stop()
            bar.close()

    def _through(
        self, crew: Crew, plan: Plan, blocks: Iterator[Block], bar: Progress, patience: Patience
    ) -> Generator[Any, None, None]:
        window = Window(self._asked)
        slowness = Slowness(plan)
        more = True
        while more or not window.is_empty:
            if more and window.is_open and not crew.has_news:
                block = next(blocks, None)
                if more := block is not None:
                    slowness.count(block)
                    crew.start(window.start(len(block)), jobs.run(self._server, plan, block))
            elif not window.is_empty:
                yield from window.take(self._next(crew, patience, window.rows_out), bar)

    def _next(self, crew: Crew, patience: Patience, rows: int) -> Done:
        silence = patience.silence()
        while True:
            done = crew.next(silence.seconds())
            if done is not None:
                return patience.heard(done, rows)
            found = self._driver.run(_flows.why_waiting(self._server, self.group))
            if silence.is_over:
                raise patience.timed_out(rows, found or crew.reason)
            silence.looked()
            patience.hear(found or crew.reason, rows)

    def _cancel(self, crew: Crew) -> None:
        self._driver.run(jobs.cancel(self._server, self.group))
        crew.leave()
        # What was on its way when the others were cancelled.
        self._driver.run(jobs.cancel(self._server, self.group))


class AsyncResults(AsyncIterator[Any]):
    """The same for `async for`; rows may come from an async generator."""

    def __init__(
        self,
        server: Server,
        driver: AsyncDriver,
        rows: Iterable[Any] | AsyncIterable[Any],
        asked: Asked,
    ) -> None:
        self._server = server
        self._driver = driver
        self._asked = asked
        self._values = self._begin(rows)

    @property
    def group(self) -> str:
        return self._asked.group

    async def __aenter__(self) -> "AsyncResults":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> "AsyncResults":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._values)

    def __repr__(self) -> str:
        return f"<AsyncResults of group {self.group}>"

    async def close(self) -> None:
        """Cancels what is not done."""
        await self._values.aclose()

    async def _begin(self, rows: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
        columns = columns_of(rows)
        total = len(rows) if isinstance(rows, Sized) else None
        source = _no_rows() if columns else _as_async(rows)
        try:
            first = columns.first() if columns else await anext(source)
        except (StopAsyncIteration, IndexError):
            return
        plan = await self._driver.run(_plan(self._server, first, self._asked))
        if columns:
            blocks, total = _as_async(columns.blocks(plan.block)), len(columns)
        else:
            blocks = ablocks_of(_chained(first, source), plan.block)
        async for value in self._run(plan, blocks, total):
            yield value

    async def _run(
        self, plan: Plan, blocks: AsyncIterator[Block], total: int | None
    ) -> AsyncGenerator[Any, None]:
        from asyncinfer.client._map.tasks import AsyncCrew

        crew = AsyncCrew(self._driver, self._asked.in_flight)
        bar = progress(self._asked.progress, total, self.group)
        patience = Patience(self._server, plan, self._asked, bar)
        try:
            window = Window(self._asked)
            slowness = Slowness(plan)
            more = True
            while more or not window.is_empty:
                if more and window.is_open and not crew.has_news:
                    block = await anext(blocks, None)
                    if more := block is not None:
                        slowness.count(block)
                        crew.start(window.start(len(block)), jobs.run(self._server, plan, block))
                elif not window.is_empty:
                    done = await self._next(crew, patience, window.rows_out)
                    for value in window.take(done, bar):
                        yield value
        except BaseException as error:
            crew.stop()
            if not isinstance(error, ConnectionFailed | WaitTimeout):
                await self._cancel(crew)
            error.add_note(_go_on(self.group))
            raise
        finally:
            crew.stop()
            await crew.leave()
            bar.close()

    async def _next(self, crew: "AsyncCrew", patience: Patience, rows: int) -> Done:
        silence = patience.silence()
        while True:
            done = await crew.next(silence.seconds())
            if done is not None:
                return patience.heard(done, rows)
            found = await self._driver.run(_flows.why_waiting(self._server, self.group))
            if silence.is_over:
                raise patience.timed_out(rows, found or crew.reason)
            silence.looked()
            patience.hear(found or crew.reason, rows)

    async def _cancel(self, crew: "AsyncCrew") -> None:
        await self._driver.run(jobs.cancel(self._server, self.group))
        await crew.leave()
        # What was on its way when the others were cancelled.
        await self._driver.run(jobs.cancel(self._server, self.group))


def _plan(server: Server, first: Any, asked: Asked) -> Any:
    options = {**asked.options, "group": asked.group}
    return jobs.plan(server, first, asked.model, asked.batch, options, is_named=asked.is_named)


def _go_on(group: str) -> str:
    return f"Map the same rows with group={group!r} to go on: rows that are done do not run again."


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _of_row(error: AsyncinferError, row: int) -> AsyncinferError:
    """An error of its own for each row, since one may be that of a whole job."""
    own = type(error).__new__(type(error))
    own.__dict__.update(error.__dict__)
    own.args = (f"Row {row}: {error}",)
    own.row = row
    return own


def _callers_level() -> int:
    """The `stacklevel` of the line outside of this package that asked for the map."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_CLIENT):
        level, frame = level + 1, frame.f_back
    return level + 1


def _close(results: "weakref.ref[Results]") -> None:
    if found := results():
        found.close()


def _none() -> Generator[Any, None, None]:
    yield from ()


async def _no_rows() -> AsyncIterator[Any]:
    return
    yield


async def _as_async(rows: Any) -> AsyncIterator[Any]:
    if hasattr(rows, "__aiter__"):
        async for row in rows:
            yield row
    else:
        for row in rows:
            yield row


async def _chained(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for row in rest:
        yield row

"""The results of a map as they come, in order; leaving early cancels what has not run."""

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
)
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from msgspec import Struct

from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._errors import ClientClosed, ConnectionFailed, SlowMapWarning, WaitTimeout
from asyncinfer.client._flows.waiting import why_waiting
from asyncinfer.client._map import jobs
from asyncinfer.client._map.jobs import MapPlan
from asyncinfer.client._map.rows import (
    ArrayRows,
    AsyncIteratedRows,
    IteratedRows,
    RowBlock,
    open_async_rows,
    open_rows,
)
from asyncinfer.client._map.threads import FlowOutcome, FlowThreads
from asyncinfer.client._progress import LogProgress, Progress, ProgressBar
from asyncinfer.client._protocol import Flow
from asyncinfer.client._requests import RemoteServer
from asyncinfer.client._wait_reasons import Notices, Silence, WaitingFor
from asyncinfer.errors import AsyncinferError

if TYPE_CHECKING:
    from asyncinfer.client._map.tasks import FlowTasks

OnError = Literal["raise", "return"]

_BLOCKS_PER_FLIGHT: Final = 2
"""Blocks that may be under way or done out of order, for each request that may be in flight. A
slow block at the front holds up the others only so far, and only so many results wait in memory."""
_FEW_ROWS: Final = 64
"""So few rows are run soon enough, each alone."""
_LATE_SECONDS: Final = 2.0
"""How long the last answers are awaited after a time-out."""
_CLIENT: Final = "asyncinfer.client."


class MapOptions(Struct, frozen=True, kw_only=True):
    """The arguments of a map."""

    model: str | None
    batch: int | Literal["auto"]
    in_flight: int
    progress: bool
    on_error: OnError
    group: str
    is_named: bool
    """The caller named the group, which may have jobs already."""
    options: Mapping[str, Any]


class Window:
    """The blocks that are under way, and the results that wait for those before them.

    It bounds both: `start` a block only while `is_open`, and `take` the outcome of each.
    """

    def __init__(self, wanted: MapOptions) -> None:
        self._size = _BLOCKS_PER_FLIGHT * wanted.in_flight
        self._raises = wanted.on_error == "raise"
        self._started = 0
        self._given = 0
        self._row = 0
        self.rows_out = 0
        """Rows that were sent and have no answer."""
        self._waiting: dict[int, list[Any]] = {}

    @property
    def is_open(self) -> bool:
        """Whether another block may be started."""
        return self._started - self._given < self._size

    @property
    def is_empty(self) -> bool:
        """Whether all results of the blocks that were started have been given."""
        return self._started == self._given

    def start(self, rows: int) -> int:
        """Counts a new block of `rows` rows, and returns its number, from 0."""
        self._started += 1
        self.rows_out += rows
        return self._started - 1

    def take(self, outcome: FlowOutcome, bar: Progress) -> Iterator[Any]:
        """Takes the outcome of a block, and yields the results whose turn it is now, maybe none.

        Counts the rows in `bar`. Raises an error that ends the map, or that of a row unless errors
        are returned. It must be iterated to its end.
        """
        if outcome.error is not None:
            raise outcome.error
        self._waiting[outcome.number] = outcome.value
        self.rows_out -= len(outcome.value)
        errors = sum(isinstance(value, AsyncinferError) for value in outcome.value)
        bar.advance(len(outcome.value), errors)
        while self._given in self._waiting:
            yield from map(self._result_of_next_row, self._waiting.pop(self._given))
            self._given += 1

    def _result_of_next_row(self, value: Any) -> Any:
        """The result of the next row, or its error with the row's number, which may be raised."""
        row, self._row = self._row, self._row + 1
        if not isinstance(value, AsyncinferError):
            return value
        error = _error_of_row(value, row)
        if self._raises:
            raise error
        return error


class SlowMapCheck:
    """Warns once if many rows run one by one: nothing else explains why that takes long."""

    def __init__(self, plan: MapPlan) -> None:
        self._model = plan.model
        self._may_warn = not plan.model.batched
        self._rows = 0

    def count(self, block: RowBlock) -> None:
        """Counts the rows of a block, and gives the SlowMapWarning if they have become many."""
        self._rows += len(block)
        if self._may_warn and self._rows > _FEW_ROWS:
            self._may_warn = False
            batching = self._model.batching or "off"
            warnings.warn(
                f"{self._model.model} runs each row alone, so many rows take long. Its batching is "
                f"{batching}",
                SlowMapWarning,
                stacklevel=_callers_level(),
            )


class WaitReporter:
    """Reports why a map gets no answer, and makes the error that ends it when its time is over."""

    def __init__(self, server: RemoteServer, plan: MapPlan, bar: Progress) -> None:
        self._until = server.until
        self._model = plan.model.model
        self._cadence = server.cadence
        self._notices = Notices(server.on_wait or bar.say, server.cadence)
        self._reason: WaitingFor | None = None

    def new_silence(self) -> Silence:
        """The time without an answer, from now on."""
        return Silence(self._until, self._cadence)

    def report(self, reason: WaitingFor | None, rows: int) -> None:
        """Reports why `rows` rows have no answer, if that is due.

        `reason` None says that nothing is wrong, which is reported if something was.
        """
        self._reason = reason
        waits = f"{_count_text(rows)} of {self._model} wait{'s' * (rows == 1)}"
        self._notices.report(reason, waits, f"{self._model} goes on")

    def end_silence(self, outcome: FlowOutcome, rows: int) -> FlowOutcome:
        """Returns the outcome, which ends the silence; raises WaitTimeout if that is its error.

        `rows` is the number of rows that have no answer.
        """
        if isinstance(outcome.error, WaitTimeout):
            raise self.timeout_error(rows, outcome.error.waiting_for) from outcome.error
        self.report(None, rows)
        return outcome

    def timeout_error(self, rows: int, reason: WaitingFor | None) -> WaitTimeout:
        """Returns the error for `rows` rows without an answer.

        `reason` None stands for the last one that was reported.
        """
        reason = reason or self._reason
        why = f": {reason.message}" if reason else "."
        return WaitTimeout(
            f"No result in time for {_count_text(rows)} of {self._model}{why}",
            waiting_for=reason,
        )


class Results(Iterator[Any]):
    """The result of each row of a map, in order.

    Nothing is sent before the first result is taken. A `with` closes it, whatever happens in the
    loop; `client.map(rows, group=results.group)` resumes the map, also in another process.
    """

    def __init__(
        self,
        server: RemoteServer,
        driver: Driver,
        rows: Iterable[Any],
        wanted: MapOptions,
    ) -> None:
        self._server = server
        self._driver = driver
        self._wanted = wanted
        self._values = self._begin(open_rows(rows))

    @property
    def group(self) -> str:
        """The group of its jobs: the one that was given, or a random one."""
        return self._wanted.group

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> "Results":
        return self

    def __next__(self) -> Any:
        """Blocks until the next row's result is there; raises as `Client.map` says."""
        return next(self._values)

    def __repr__(self) -> str:
        return f"<Results of group {self.group}>"

    def close(self) -> None:
        """Ends the map, and cancels its jobs that have not ended; does nothing if it has ended."""
        self._values.close()

    def _begin(self, rows: ArrayRows | IteratedRows) -> Generator[Any, None, None]:
        """Yields the results; makes the plan from the first row, and sends nothing without rows."""
        if first := rows.read_first():
            plan = self._driver.run(_make_plan(self._server, first[0], self._wanted))
            yield from self._run(plan, rows.blocks(plan.max_rows_per_block), rows.total)

    def _run(
        self, plan: MapPlan, blocks: Iterator[RowBlock], total: int | None
    ) -> Generator[Any, None, None]:
        """Yields the results of all blocks.

        Whatever ends it early, also being closed, cancels the jobs that have not ended, unless the
        server is away or the time is over; the error gets a note on how to resume.
        """
        threads = FlowThreads(self._driver, self._wanted.in_flight)
        bar = _new_progress(self._wanted, total)
        reporter = WaitReporter(self._server, plan, bar)
        # A script may end during a map: later than this no request can be sent.
        close_at_exit = partial(_close, weakref.ref(self))
        atexit.register(close_at_exit)
        try:
            yield from self._through(threads, plan, blocks, bar, reporter)
        except BaseException as error:
            threads.stop()
            if isinstance(error, WaitTimeout):
                # Requests in flight end with the wait, and a submit is not interrupted.
                threads.join(_LATE_SECONDS)
            elif not isinstance(error, ConnectionFailed | ClientClosed):
                self._cancel(threads)
            error.add_note(_resume_hint(self.group))
            raise
        finally:
            atexit.unregister(close_at_exit)
            threads.stop()
            bar.close()

    def _through(
        self,
        threads: FlowThreads,
        plan: MapPlan,
        blocks: Iterator[RowBlock],
        bar: Progress,
        reporter: WaitReporter,
    ) -> Generator[Any, None, None]:
        """Starts blocks while the window is open, and yields the results in order."""
        window = Window(self._wanted)
        slow_check = SlowMapCheck(plan)
        has_more, failure = True, None
        while has_more or not window.is_empty:
            if has_more and window.is_open and not threads.has_outcomes:
                try:
                    block = next(blocks, None)
                except Exception as error:  # of the caller's rows
                    block, failure = None, error
                if has_more := block is not None:
                    slow_check.count(block)
                    flow = jobs.run_block(self._server, plan, block)
                    threads.start(window.start(len(block)), flow)
            elif not window.is_empty:
                outcome = self._wait_for_outcome(threads, reporter, window.rows_out)
                yield from window.take(outcome, bar)
        if failure:
            raise failure

    def _wait_for_outcome(
        self, threads: FlowThreads, reporter: WaitReporter, rows: int
    ) -> FlowOutcome:
        """Blocks until a flow has ended, and reports why none does; raises WaitTimeout.

        `rows` is the number of rows that have no answer.
        """
        silence = reporter.new_silence()
        while True:
            outcome = threads.wait_for_outcome(silence.seconds())
            if outcome is not None:
                return reporter.end_silence(outcome, rows)
            reason = self._driver.run(why_waiting(self._server, self.group))
            if silence.is_over:
                raise reporter.timeout_error(rows, reason or threads.retry_reason)
            silence.schedule_next()
            reporter.report(reason or threads.retry_reason, rows)

    def _cancel(self, threads: FlowThreads) -> None:
        """Cancels the jobs of the map, waits for the requests in flight, and cancels again."""
        self._driver.run(jobs.cancel(self._server, self.group))
        threads.join()
        # For jobs that were being submitted when the others were cancelled.
        self._driver.run(jobs.cancel(self._server, self.group))


class AsyncResults(AsyncIterator[Any]):
    """The result of each row of a map, for `async for`; rows may come from an async iterator.

    Nothing is sent before the first result is taken. An `async with` closes it, whatever happens
    in the loop; `client.map(rows, group=results.group)` resumes the map.
    """

    def __init__(
        self,
        server: RemoteServer,
        driver: AsyncDriver,
        rows: Iterable[Any] | AsyncIterable[Any],
        wanted: MapOptions,
    ) -> None:
        self._server = server
        self._driver = driver
        self._wanted = wanted
        self._values = self._begin(open_async_rows(rows))

    @property
    def group(self) -> str:
        """The group of its jobs: the one that was given, or a random one."""
        return self._wanted.group

    async def __aenter__(self) -> "AsyncResults":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> "AsyncResults":
        return self

    async def __anext__(self) -> Any:
        """Waits until the next row's result is there; raises as `Client.map` says."""
        return await anext(self._values)

    def __repr__(self) -> str:
        return f"<AsyncResults of group {self.group}>"

    async def close(self) -> None:
        """Ends the map, and cancels its jobs that have not ended; does nothing if it has ended."""
        await self._values.aclose()

    async def _begin(
        self, rows: ArrayRows | IteratedRows | AsyncIteratedRows
    ) -> AsyncGenerator[Any, None]:
        """Yields the results; makes the plan from the first row, and sends nothing without rows."""
        if isinstance(rows, AsyncIteratedRows):
            first = await rows.read_first()
        else:
            first = rows.read_first()
        if first:
            plan = await self._driver.run(_make_plan(self._server, first[0], self._wanted))
            blocks = rows.blocks(plan.max_rows_per_block)
            async for value in self._run(plan, blocks, rows.total):
                yield value

    async def _run(
        self,
        plan: MapPlan,
        blocks: Iterator[RowBlock] | AsyncIterator[RowBlock],
        total: int | None,
    ) -> AsyncGenerator[Any, None]:
        """Yields the results of all blocks; ends as `Results._run` does."""
        from asyncinfer.client._map.tasks import FlowTasks

        tasks = FlowTasks(self._driver, self._wanted.in_flight)
        bar = _new_progress(self._wanted, total)
        reporter = WaitReporter(self._server, plan, bar)
        try:
            window = Window(self._wanted)
            slow_check = SlowMapCheck(plan)
            has_more, failure = True, None
            while has_more or not window.is_empty:
                if has_more and window.is_open and not tasks.has_outcomes:
                    try:
                        block = await _next(blocks)
                    except Exception as error:  # of the caller's rows
                        block, failure = None, error
                    if has_more := block is not None:
                        slow_check.count(block)
                        flow = jobs.run_block(self._server, plan, block)
                        tasks.start(window.start(len(block)), flow)
                elif not window.is_empty:
                    outcome = await self._wait_for_outcome(tasks, reporter, window.rows_out)
                    for value in window.take(outcome, bar):
                        yield value
            if failure:
                raise failure
        except BaseException as error:
            tasks.stop()
            if not isinstance(error, ConnectionFailed | ClientClosed | WaitTimeout):
                await self._cancel(tasks)
            error.add_note(_resume_hint(self.group))
            raise
        finally:
            tasks.stop()
            await tasks.join()
            bar.close()

    async def _wait_for_outcome(
        self, tasks: "FlowTasks", reporter: WaitReporter, rows: int
    ) -> FlowOutcome:
        """Waits until a flow has ended, and reports why none does; raises WaitTimeout.

        `rows` is the number of rows that have no answer.
        """
        silence = reporter.new_silence()
        while True:
            outcome = await tasks.wait_for_outcome(silence.seconds())
            if outcome is not None:
                return reporter.end_silence(outcome, rows)
            reason = await self._driver.run(why_waiting(self._server, self.group))
            if silence.is_over:
                raise reporter.timeout_error(rows, reason or tasks.retry_reason)
            silence.schedule_next()
            reporter.report(reason or tasks.retry_reason, rows)

    async def _cancel(self, tasks: "FlowTasks") -> None:
        """Cancels the jobs of the map, waits for the requests in flight, and cancels again."""
        await self._driver.run(jobs.cancel(self._server, self.group))
        await tasks.join()
        # For jobs that were being submitted when the others were cancelled.
        await self._driver.run(jobs.cancel(self._server, self.group))


def _make_plan(server: RemoteServer, first: Any, wanted: MapOptions) -> Flow[MapPlan]:
    """The plan of a map from its first row and its arguments."""
    options = {**wanted.options, "group": wanted.group}
    return jobs.make_plan(
        server, first, wanted.model, wanted.batch, options, is_named=wanted.is_named
    )


def _new_progress(wanted: MapOptions, total: int | None) -> Progress:
    """A bar for `total` rows, None if that is unknown, or none, as the arguments say."""
    return ProgressBar(total, wanted.group) if wanted.progress else LogProgress()


def _resume_hint(group: str) -> str:
    """A sentence on how to resume the map, for a note on its error."""
    return f"Map the same rows with group={group!r} to go on: rows that are done do not run again."


def _count_text(rows: int) -> str:
    """The number of rows with its noun, as `1 row`."""
    return f"{rows:,} row{'s' * (rows != 1)}"


def _error_of_row(error: AsyncinferError, row: int) -> AsyncinferError:
    """A copy of an error with the row's number, since several rows may share one error."""
    copy = type(error).__new__(type(error))
    copy.__dict__.update(error.__dict__)
    copy.args = (f"Row {row}: {error}",)
    copy.row = row
    return copy


def _callers_level() -> int:
    """The `stacklevel` of the line outside of this package that takes the results."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_CLIENT):
        level, frame = level + 1, frame.f_back
    return level + 1


def _close(results: "weakref.ref[Results]") -> None:
    """Closes results that are still referred to, at the exit of the interpreter."""
    if alive := results():
        alive.close()


async def _next(blocks: Iterator[RowBlock] | AsyncIterator[RowBlock]) -> RowBlock | None:
    """The next of the blocks, which may come from an iterator of either kind; None at the end."""
    return await anext(blocks, None) if isinstance(blocks, AsyncIterator) else next(blocks, None)

"""The results of a map as they come, in order; leaving early cancels what has not run."""

import atexit
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
)
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._errors import ClientClosed, ConnectionFailed, WaitTimeout
from asyncinfer.client._flows.waiting import why_waiting
from asyncinfer.client._map import jobs
from asyncinfer.client._map.jobs import MapOptions
from asyncinfer.client._map.rows import (
    ArrayRows,
    AsyncIteratedRows,
    IteratedRows,
    MapRows,
    RowBlock,
    open_async_rows,
    open_rows,
)
from asyncinfer.client._map.run import MapRun
from asyncinfer.client._map.threads import CANCEL_PAUSES, FlowOutcome, FlowThreads
from asyncinfer.client._requests import RemoteServer

if TYPE_CHECKING:
    from asyncinfer.client._map.tasks import FlowTasks

_LATE_SECONDS: Final = 2.0
"""How long the last answers are awaited after a time-out."""


class Results(Iterator[Any]):
    """The result of each row of a map, in order.

    Nothing is sent before the first result is taken. A `with` closes it, whatever happens in the
    loop; `client.map(rows, group=results.group)` resumes the map, also in another process.
    """

    def __init__(
        self, server: RemoteServer, driver: Driver, rows: Iterable[Any], wanted: MapOptions
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
            plan = self._driver.run(jobs.make_plan(self._server, first[0], self._wanted))
            yield from self._run(MapRun(self._server, self._wanted, plan, rows), rows)

    def _run(self, run: MapRun, rows: ArrayRows | IteratedRows) -> Generator[Any, None, None]:
        """Yields the results of all rows, and raises the error of their iterable, if it had one.

        Whatever ends it early, also being closed, cancels the jobs that have not ended, unless the
        server is away or the time is over; the error gets a note on how to resume.
        """
        blocks = rows.blocks(run.max_rows_per_block)
        threads = FlowThreads(self._driver, self._wanted.in_flight)
        # A script may end during a map: later than this no request can be sent.
        close_at_exit = partial(_close, weakref.ref(self))
        atexit.register(close_at_exit)
        try:
            while not run.is_over:
                if run.wants_block and not threads.has_outcomes:
                    if started := run.start(next(blocks, None)):
                        threads.start(*started)
                else:
                    outcome = self._wait_for_outcome(threads, run)
                    if run.may_be_last(outcome) and (started := run.start(next(blocks, None))):
                        threads.start(*started)
                    if run.closes_group(outcome):
                        run.close_error = self._driver.run(jobs.close(self._server, self._wanted))
                    yield from run.take(outcome)
            if failure := rows.failure or run.close_error:
                raise failure
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
            run.bar.close()

    def _wait_for_outcome(self, threads: FlowThreads, run: MapRun) -> FlowOutcome:
        """Blocks until a flow has ended, and reports why none does; raises WaitTimeout."""
        silence = run.new_silence()
        while (outcome := threads.wait_for_outcome(silence.seconds())) is None:
            reason = self._driver.run(why_waiting(self._server, self.group))
            run.extend(silence, reason or threads.retry_reason)
        return outcome

    def _cancel(self, threads: FlowThreads) -> None:
        """Cancels the jobs of the map, waits for the requests in flight, and cancels again."""
        for seconds in CANCEL_PAUSES:
            self._driver.run(jobs.cancel(self._server, self.group))
            if threads.join(seconds):
                break
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

    async def _begin(self, rows: MapRows) -> AsyncGenerator[Any, None]:
        """Yields the results; makes the plan from the first row, and sends nothing without rows."""
        if isinstance(rows, AsyncIteratedRows):
            first = await rows.read_first()
        else:
            first = rows.read_first()
        if first:
            plan = await self._driver.run(jobs.make_plan(self._server, first[0], self._wanted))
            run = MapRun(self._server, self._wanted, plan, rows)
            async with aclosing(self._run(run, rows)) as results:
                async for result in results:
                    yield result

    async def _run(self, run: MapRun, rows: MapRows) -> AsyncGenerator[Any, None]:
        """Yields the results of all rows; ends as `Results._run` does."""
        from asyncinfer.client._map.tasks import FlowTasks

        blocks = rows.blocks(run.max_rows_per_block)
        tasks = FlowTasks(self._driver, self._wanted.in_flight)
        try:
            while not run.is_over:
                if run.wants_block and not tasks.has_outcomes:
                    if started := run.start(await _next(blocks)):
                        tasks.start(*started)
                else:
                    outcome = await self._wait_for_outcome(tasks, run)
                    if run.may_be_last(outcome) and (started := run.start(await _next(blocks))):
                        tasks.start(*started)
                    if run.closes_group(outcome):
                        flow = jobs.close(self._server, self._wanted)
                        run.close_error = await self._driver.run(flow)
                    for result in run.take(outcome):
                        yield result
            if failure := rows.failure or run.close_error:
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
            run.bar.close()

    async def _wait_for_outcome(self, tasks: "FlowTasks", run: MapRun) -> FlowOutcome:
        """Waits until a flow has ended, and reports why none does; raises WaitTimeout."""
        silence = run.new_silence()
        while (outcome := await tasks.wait_for_outcome(silence.seconds())) is None:
            reason = await self._driver.run(why_waiting(self._server, self.group))
            run.extend(silence, reason or tasks.retry_reason)
        return outcome

    async def _cancel(self, tasks: "FlowTasks") -> None:
        """Cancels the jobs of the map, waits for the requests in flight, and cancels again."""
        for seconds in CANCEL_PAUSES:
            await self._driver.run(jobs.cancel(self._server, self.group))
            if await tasks.have_ended_within(seconds):
                break
        await tasks.join(0)
        await self._driver.run(jobs.cancel(self._server, self.group))


def _resume_hint(group: str) -> str:
    """A sentence on how to resume the map, for a note on its error."""
    return f"Map the same rows with group={group!r} to go on: rows that are done do not run again."


def _close(results: "weakref.ref[Results]") -> None:
    """Closes results that are still referred to, at the exit of the interpreter."""
    if alive := results():
        alive.close()


async def _next(blocks: Iterator[RowBlock] | AsyncIterator[RowBlock]) -> RowBlock | None:
    """The next of the blocks, which may come from an iterator of either kind; None at the end."""
    return await anext(blocks, None) if isinstance(blocks, AsyncIterator) else next(blocks, None)

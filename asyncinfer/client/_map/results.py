"""The results of a map as they come, in order; leaving early cancels what has not run."""

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
)
from typing import TYPE_CHECKING, Any

from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._flows.waiting import why_waiting
from asyncinfer.client._map import jobs
from asyncinfer.client._map.jobs import MapOptions
from asyncinfer.client._map.open_map import OpenMap
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
from asyncinfer.client._map.threads import FlowOutcome, FlowThreads
from asyncinfer.client._requests import RemoteServer

if TYPE_CHECKING:
    from asyncinfer.client._map.tasks import FlowTasks


class Results(Iterator[Any]):
    """The result of each row of a map, in order.

    Nothing is sent before the first result is taken. A loop that is left closes it, and so does a
    `with`; `client.map(rows, group=results.group)` resumes the map, also in another process.
    """

    def __init__(
        self, server: RemoteServer, driver: Driver, rows: Iterable[Any], wanted: MapOptions
    ) -> None:
        self._wanted = wanted
        # It does not refer to these results: a loop that is left, and has the only reference to
        # them, closes it.
        self._values = _results(server, driver, open_rows(rows), wanted)

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


class AsyncResults(AsyncIterator[Any]):
    """The result of each row of a map, for `async for`; rows may come from an async iterator.

    Nothing is sent before the first result is taken. An `async with` closes it at once, and a loop
    that is left soon after; `client.map(rows, group=results.group)` resumes the map.
    """

    def __init__(
        self,
        server: RemoteServer,
        driver: AsyncDriver,
        rows: Iterable[Any] | AsyncIterable[Any],
        wanted: MapOptions,
    ) -> None:
        self._wanted = wanted
        self._values = _async_results(server, driver, open_async_rows(rows), wanted)

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


def _results(
    server: RemoteServer, driver: Driver, rows: ArrayRows | IteratedRows, wanted: MapOptions
) -> Generator[Any, None, None]:
    """Yields the results of all rows, and raises the error of their iterable, if it had one.

    It makes the plan from the first row, and sends nothing without rows. Raises ClientClosed if
    the map was ended meanwhile.
    """
    first = rows.read_first()
    if not first:
        return
    plan = driver.run(jobs.make_plan(server, first[0], wanted))
    run = MapRun(server, wanted, plan, rows)
    blocks = rows.blocks(run.max_rows_per_block)
    with run.shown(), OpenMap(server, driver, wanted.group, wanted.in_flight) as open_map:
        while not run.is_over:
            open_map.raise_if_ended()
            if run.wants_block and not open_map.threads.has_outcomes:
                if started := run.start(next(blocks, None)):
                    open_map.threads.start(*started)
                continue
            outcome = _wait_for_outcome(server, driver, run, open_map.threads)
            open_map.raise_if_ended()
            if run.may_be_last(outcome) and (started := run.start(next(blocks, None))):
                open_map.threads.start(*started)
            if run.closes_group(outcome):
                run.close_error = driver.run(jobs.close(server, wanted))
            yield from run.take(outcome)
        if failure := rows.failure or run.close_error:
            raise failure


def _wait_for_outcome(
    server: RemoteServer, driver: Driver, run: MapRun, threads: FlowThreads
) -> FlowOutcome:
    """Blocks until a flow has ended, and reports why none does; raises WaitTimeout."""
    silence = run.new_silence()
    while (outcome := threads.wait_for_outcome(silence.seconds())) is None:
        reason = driver.run(why_waiting(server, run.wanted.group))
        run.extend(silence, reason or threads.retry_reason)
    return outcome


async def _async_results(
    server: RemoteServer, driver: AsyncDriver, rows: MapRows, wanted: MapOptions
) -> AsyncGenerator[Any, None]:
    """Yields the results, as `_results` does.

    It is one generator: at its end an event loop closes all that are left at the same time, also
    one inside of another.
    """
    from asyncinfer.client._map.async_open_map import AsyncOpenMap

    first = await _read_first(rows)
    if not first:
        return
    plan = await driver.run(jobs.make_plan(server, first[0], wanted))
    run = MapRun(server, wanted, plan, rows)
    blocks = rows.blocks(run.max_rows_per_block)
    with run.shown():
        async with AsyncOpenMap(server, driver, wanted.group, wanted.in_flight) as open_map:
            while not run.is_over:
                open_map.raise_if_ended()
                if run.wants_block and not open_map.tasks.has_outcomes:
                    if started := run.start(await _next(blocks)):
                        open_map.tasks.start(*started)
                    continue
                outcome = await _wait_for_async_outcome(server, driver, run, open_map.tasks)
                open_map.raise_if_ended()
                if run.may_be_last(outcome) and (started := run.start(await _next(blocks))):
                    open_map.tasks.start(*started)
                if run.closes_group(outcome):
                    run.close_error = await driver.run(jobs.close(server, wanted))
                for value in run.take(outcome):
                    yield value
            if failure := rows.failure or run.close_error:
                raise failure


async def _wait_for_async_outcome(
    server: RemoteServer, driver: AsyncDriver, run: MapRun, tasks: "FlowTasks"
) -> FlowOutcome:
    """Waits until a flow has ended, and reports why none does; raises WaitTimeout."""
    silence = run.new_silence()
    while (outcome := await tasks.wait_for_outcome(silence.seconds())) is None:
        reason = await driver.run(why_waiting(server, run.wanted.group))
        run.extend(silence, reason or tasks.retry_reason)
    return outcome


async def _read_first(rows: MapRows) -> list[Any]:
    """A list of the first row, empty if there is none."""
    return await rows.read_first() if isinstance(rows, AsyncIteratedRows) else rows.read_first()


async def _next(blocks: Iterator[RowBlock] | AsyncIterator[RowBlock]) -> RowBlock | None:
    """The next of the blocks, which may come from an iterator of either kind; None at the end."""
    return await anext(blocks, None) if isinstance(blocks, AsyncIterator) else next(blocks, None)

"""The client for event loops: a line a method, the conversations of the other."""

from collections.abc import AsyncIterable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Unpack

from asyncinfer.client import _flows
from asyncinfer.client._client import asked_of, server_of, warn_if_open
from asyncinfer.client._drivers import AsyncDriver
from asyncinfer.client._flows import JobOptions, Status
from asyncinfer.client._groups import AsyncGroup
from asyncinfer.client._jobs import AsyncJob
from asyncinfer.client._map import dataframes
from asyncinfer.client._map.results import AsyncResults, OnError
from asyncinfer.client._models import Model

_URL: Final = "http://127.0.0.1:8000"


class AsyncClient:
    """The same for `await`: methods, arguments and results are those of `Client`."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 5,
    ) -> None:
        self._server = server_of(url, api_key, timeout, retries)
        self._driver = AsyncDriver(self._server.url)

    @property
    def url(self) -> str:
        return self._server.url

    async def predict(
        self,
        data: Any,
        model: str | None = None,
        *,
        timeout: float | None = None,
        cancel_on_timeout: bool = False,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Any:
        """The result for an input; raises what is wrong with it, or WaitTimeout.

        The job goes on when the time is out, unless `cancel_on_timeout`.
        """
        asked = _flows.submission(data, model, idempotency_key, options)
        return await self._driver.run(
            _flows.predict(self._server, asked, timeout, cancel_on_timeout=cancel_on_timeout)
        )

    async def submit(
        self,
        data: Any,
        model: str | None = None,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncJob:
        """A job that will run. A key of your own makes the same submit the same job for ever."""
        asked = _flows.submission(data, model, idempotency_key, options)
        return self._job(await self._driver.run(_flows.submit(self._server, asked)))

    def map(
        self,
        rows: Iterable[Any] | AsyncIterable[Any],
        model: str | None = None,
        *,
        batch: int | Literal["auto"] = "auto",
        in_flight: int = 8,
        progress: bool = True,
        on_error: OnError = "raise",
        **options: Unpack[JobOptions],
    ) -> AsyncResults:
        """A result for each row, in order, as they come; rows may come from an endless generator.

        A row is one entry along the first axis of an input: a list, an array, or a dict of them
        for several inputs. Or `rows` is an array, or a dict of arrays, whose first axis counts
        them. Rows of models that batch share jobs of at most `batch` rows; `in_flight` requests
        are out at a time. An error of a row is raised, or given as its result with
        `on_error="return"`; it has the row's number as `.row`.

        Leaving early, by Ctrl-C too, cancels what is not done. The same rows with the same
        `group=` (and `batch=`) within a day go on where a map stopped, and run nothing twice.
        """
        asked = asked_of(model, batch, in_flight, progress, on_error, options)
        return AsyncResults(self._server, self._driver, rows, asked)

    async def map_frame(
        self,
        frame: Any,
        columns: Sequence[str] | None = None,
        model: str | None = None,
        *,
        prefix: str = "",
        batch: int | Literal["auto"] = "auto",
        in_flight: int = 8,
        progress: bool = True,
        on_error: OnError = "raise",
        **options: Unpack[JobOptions],
    ) -> Any:
        """The frame, of pandas or polars, with its predictions as columns behind its own.

        `columns` are the model's input, in this order; None: all. Where the model has several
        inputs, they are found by name. A labelled model gives `prediction`, `class_name` and
        `probability`; others a column for each number of an output. `on_error="return"` adds a
        column `error`.
        """
        found = await self._driver.run(_flows.known_model(self._server, model))
        rows = dataframes.rows_of(frame, columns, found)
        asked = asked_of(model, batch, in_flight, progress, on_error, options)
        results = [one async for one in AsyncResults(self._server, self._driver, rows, asked)]
        return dataframes.with_results(frame, results, found, prefix, errors=on_error == "return")

    async def job(self, job_id: str) -> AsyncJob:
        """A job by its id, wherever it was submitted."""
        return self._job(await self._driver.run(_flows.read(self._server, job_id)))

    async def jobs(
        self,
        *,
        status: Status | None = None,
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
        limit: int = 100,
        tenant: str | None = None,
    ) -> list[AsyncJob]:
        """Your jobs, newest first. With the scope `operator`, those of a `tenant`, or of all
        (`"*"`), without inputs and results."""
        query = {"status": status, "model": model, "group": group, "dead": dead, "tenant": tenant}
        found = await self._driver.run(_flows.list_jobs(self._server, limit, query))
        return [self._job(view) for view in found]

    async def models(self) -> list[Model]:
        """What is served."""
        return await self._driver.run(_flows.models(self._server))

    async def model(self, name: str | None = None) -> Model:
        """One model, or the default one; `.example()` is an input that works."""
        return await self._driver.run(_flows.model(self._server, name))

    async def group(self, name: str) -> AsyncGroup:
        """The jobs that were submitted with this `group`."""
        return self._group(await self._driver.run(_flows.group(self._server, name)))

    async def validate(
        self, data: Any, model: str | None = None, **options: Unpack[JobOptions]
    ) -> dict[str, Any]:
        """How an input would be understood; raises what is wrong with it. Runs nothing."""
        return await self._driver.run(_flows.validate(self._server, data, model, options))

    async def cancel_all(
        self,
        *,
        status: Literal["pending", "processing"] | None = None,
        model: str | None = None,
        group: str | None = None,
        tenant: str | None = None,
    ) -> dict[str, Any]:
        """Cancels your jobs that wait or run: how many were, how many were asked to stop.
        `tenant` as in `jobs`."""
        query = {"status": status, "model": model, "group": group, "tenant": tenant}
        return await self._driver.run(_flows.many(self._server, "DELETE", "/jobs", query))

    async def retry_all(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        status: Literal["failed", "cancelled"] | None = None,
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
        tenant: str | None = None,
    ) -> dict[str, Any]:
        """Runs jobs again, those of `job_ids`, else all of your own that are meant. `tenant` as
        in `jobs`."""
        query = {"status": status, "model": model, "group": group, "dead": dead, "tenant": tenant}
        return await self._driver.run(_flows.retry_many(self._server, job_ids, query))

    async def purge(
        self,
        *,
        status: Literal["completed", "failed", "cancelled", "ended"] | None = "ended",
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
        tenant: str | None = None,
    ) -> dict[str, Any]:
        """Deletes your ended jobs and all that is kept of them. `tenant` as in `jobs`."""
        chosen = {"status": status, "model": model, "group": group, "dead": dead}
        query = {**chosen, "purge": True, "tenant": tenant}
        return await self._driver.run(_flows.many(self._server, "DELETE", "/jobs", query))

    async def purge_queue(self, model: str) -> dict[str, Any]:
        """Ends everything that waits for a model, whosever it is; needs the scope `operator`."""
        return await self._driver.run(_flows.purge_queue(self._server, model))

    async def pause(self, model: str) -> dict[str, Any]:
        """Runs none of a model's jobs until `resume`; needs the scope `admin`."""
        return await self._driver.run(_flows.set_paused(self._server, model, True))

    async def resume(self, model: str) -> dict[str, Any]:
        """Runs a paused model's jobs again; needs the scope `admin`."""
        return await self._driver.run(_flows.set_paused(self._server, model, False))

    async def queues(self) -> list[dict[str, Any]]:
        """What waits and runs, and how fast, by model."""
        return await self._driver.run(_flows.listed(self._server, "queues"))

    async def workers(self) -> list[dict[str, Any]]:
        """Who runs jobs, and what each is doing; needs the scope `admin`."""
        return await self._driver.run(_flows.listed(self._server, "workers"))

    async def health(self) -> dict[str, Any]:
        """Whether the server and its Redis answer; with the scope `read` also what waits and how
        many workers there are."""
        return await self._driver.run(_flows.health(self._server))

    async def close(self) -> None:
        """Closes its connections; jobs go on."""
        await self._driver.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncClient of {self.url}>"

    def __del__(self) -> None:
        warn_if_open(self)

    def _job(self, view: _flows.View) -> AsyncJob:
        return AsyncJob(self._server, self._driver, view)

    def _group(self, view: dict[str, Any]) -> AsyncGroup:
        return AsyncGroup(self._server, self._driver, view)

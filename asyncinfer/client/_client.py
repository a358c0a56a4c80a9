"""The two clients: a line a method, each the same conversation for threads and for event loops."""

import os
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Literal, Unpack

from asyncinfer.client import _flows
from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._flows import JobOptions, Server, Status
from asyncinfer.client._groups import AsyncGroup, Group
from asyncinfer.client._jobs import AsyncJob, Job
from asyncinfer.client._models import Model

_URL: Final = "http://127.0.0.1:8000"


class Client:
    """An asyncinfer server, from a script, a notebook or threads.

    `url` is what `asyncinfer serve` shows, else ASYNCINFER_URL; `api_key` else ASYNCINFER_API_KEY.
    `timeout` bounds the wait for a result, in seconds; `retries` says how often a request is sent
    again when the server is away or full (5: for about a minute).

    Inputs are lists, arrays, frames of pandas or polars, or a dict of arrays for several inputs.
    Results are labelled rows where the model has labels, else numpy arrays: of one output the
    array, of several a dict of them. Which of the two does not depend on the form of the input.

    Options of a job, by keyword: `priority` ("high", "normal", "low"), `delay_seconds`,
    `start_within_seconds`, `finish_within_seconds`, `ttl_seconds`, `version`, `group`, `answer`
    ("json" or "tensors").
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 5,
    ) -> None:
        self._server = _server(url, api_key, timeout, retries)
        self._driver = Driver(self._server.url)

    @property
    def url(self) -> str:
        return self._server.url

    def predict(
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
        return self._driver.run(
            _flows.predict(self._server, asked, timeout, cancel_on_timeout=cancel_on_timeout)
        )

    def submit(
        self,
        data: Any,
        model: str | None = None,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Job:
        """A job that will run. A key of your own makes the same submit the same job for ever."""
        asked = _flows.submission(data, model, idempotency_key, options)
        return self._job(self._driver.run(_flows.submit(self._server, asked)))

    def job(self, job_id: str) -> Job:
        """A job by its id, wherever it was submitted."""
        return self._job(self._driver.run(_flows.read(self._server, job_id)))

    def jobs(
        self,
        *,
        status: Status | None = None,
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Your jobs, newest first."""
        query = {"status": status, "model": model, "group": group, "dead": dead}
        found = self._driver.run(_flows.list_jobs(self._server, limit, query))
        return [self._job(view) for view in found]

    def models(self) -> list[Model]:
        """What is served."""
        return self._driver.run(_flows.models(self._server))

    def model(self, name: str | None = None) -> Model:
        """One model, or the default one; `.example()` is an input that works."""
        return self._driver.run(_flows.model(self._server, name))

    def group(self, name: str) -> Group:
        """The jobs that were submitted with this `group`."""
        return self._group(self._driver.run(_flows.group(self._server, name)))

    def validate(
        self, data: Any, model: str | None = None, **options: Unpack[JobOptions]
    ) -> dict[str, Any]:
        """How an input would be understood; raises what is wrong with it. Runs nothing."""
        return self._driver.run(_flows.validate(self._server, data, model, options))

    def cancel_all(
        self,
        *,
        status: Literal["pending", "processing"] | None = None,
        model: str | None = None,
        group: str | None = None,
    ) -> dict[str, Any]:
        """Cancels your jobs that wait or run: how many were, how many were asked to stop."""
        query = {"status": status, "model": model, "group": group}
        return self._driver.run(_flows.many(self._server, "DELETE", "/jobs", query))

    def retry_all(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        status: Literal["failed", "cancelled"] | None = None,
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
    ) -> dict[str, Any]:
        """Runs jobs again, those of `job_ids`, else all of your own that are meant."""
        query = {"status": status, "model": model, "group": group, "dead": dead}
        return self._driver.run(_flows.retry_many(self._server, job_ids, query))

    def purge(
        self,
        *,
        status: Literal["completed", "failed", "cancelled", "ended"] | None = "ended",
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
    ) -> dict[str, Any]:
        """Deletes your ended jobs and all that is kept of them."""
        query = {"status": status, "model": model, "group": group, "dead": dead, "purge": True}
        return self._driver.run(_flows.many(self._server, "DELETE", "/jobs", query))

    def purge_queue(self, model: str) -> dict[str, Any]:
        """Ends everything that waits for a model, whosever it is; needs the scope `admin`."""
        return self._driver.run(_flows.purge_queue(self._server, model))

    def pause(self, model: str) -> dict[str, Any]:
        """Runs none of a model's jobs until `resume`; needs the scope `admin`."""
        return self._driver.run(_flows.set_paused(self._server, model, True))

    def resume(self, model: str) -> dict[str, Any]:
        """Runs a paused model's jobs again; needs the scope `admin`."""
        return self._driver.run(_flows.set_paused(self._server, model, False))

    def queues(self) -> list[dict[str, Any]]:
        """What waits and runs, and how fast, by model."""
        return self._driver.run(_flows.listed(self._server, "queues"))

    def workers(self) -> list[dict[str, Any]]:
        """Who runs jobs, and what each is doing."""
        return self._driver.run(_flows.listed(self._server, "workers"))

    def health(self) -> dict[str, Any]:
        """Whether the server and its Redis answer, what waits, how many workers there are."""
        return self._driver.run(_flows.health(self._server))

    def close(self) -> None:
        """Closes its connections; jobs go on."""
        self._driver.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {self.url}>"

    def __del__(self) -> None:
        _warn_if_open(self)

    def _job(self, view: _flows.View) -> Job:
        return Job(self._server, self._driver, view)

    def _group(self, view: dict[str, Any]) -> Group:
        return Group(self._server, self._driver, view)


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
        self._server = _server(url, api_key, timeout, retries)
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
    ) -> list[AsyncJob]:
        """Your jobs, newest first."""
        query = {"status": status, "model": model, "group": group, "dead": dead}
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
    ) -> dict[str, Any]:
        """Cancels your jobs that wait or run: how many were, how many were asked to stop."""
        query = {"status": status, "model": model, "group": group}
        return await self._driver.run(_flows.many(self._server, "DELETE", "/jobs", query))

    async def retry_all(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        status: Literal["failed", "cancelled"] | None = None,
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
    ) -> dict[str, Any]:
        """Runs jobs again, those of `job_ids`, else all of your own that are meant."""
        query = {"status": status, "model": model, "group": group, "dead": dead}
        return await self._driver.run(_flows.retry_many(self._server, job_ids, query))

    async def purge(
        self,
        *,
        status: Literal["completed", "failed", "cancelled", "ended"] | None = "ended",
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
    ) -> dict[str, Any]:
        """Deletes your ended jobs and all that is kept of them."""
        query = {"status": status, "model": model, "group": group, "dead": dead, "purge": True}
        return await self._driver.run(_flows.many(self._server, "DELETE", "/jobs", query))

    async def purge_queue(self, model: str) -> dict[str, Any]:
        """Ends everything that waits for a model, whosever it is; needs the scope `admin`."""
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
        """Who runs jobs, and what each is doing."""
        return await self._driver.run(_flows.listed(self._server, "workers"))

    async def health(self) -> dict[str, Any]:
        """Whether the server and its Redis answer, what waits, how many workers there are."""
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
        _warn_if_open(self)

    def _job(self, view: _flows.View) -> AsyncJob:
        return AsyncJob(self._server, self._driver, view)

    def _group(self, view: dict[str, Any]) -> AsyncGroup:
        return AsyncGroup(self._server, self._driver, view)


def _server(url: str | None, api_key: str | None, timeout: float, retries: int) -> Server:
    url = url or os.environ.get("ASYNCINFER_URL") or _URL
    key = api_key or os.environ.get("ASYNCINFER_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return Server(url.rstrip("/"), headers, timeout, retries)


def _warn_if_open(client: "Client | AsyncClient") -> None:
    driver = getattr(client, "_driver", None)
    if driver is not None and not driver.closed:
        warnings.warn(
            f"{client!r} was never closed; use `with`, or close() it",
            ResourceWarning,
            source=client,
            stacklevel=2,
        )

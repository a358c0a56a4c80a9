"""The client for event loops: a line a method, with the flows of `Client`."""

import math
import os
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Unpack

from asyncinfer.client._answers import (
    AuditLog,
    ClearedJobs,
    Health,
    PausedState,
    RedeliveredWebhooks,
    RetriedJobs,
    ValidInput,
)
from asyncinfer.client._arguments import with_checked_arguments
from asyncinfer.client._client import (
    Client,
    map_options,
    new_server,
    warn_if_open,
)
from asyncinfer.client._docstrings import with_docstrings_of
from asyncinfer.client._drivers import AsyncDriver
from asyncinfer.client._errors import shown_url
from asyncinfer.client._flows import jobs, models, operations, submitting
from asyncinfer.client._flows.submitting import JobOptions, MapJobOptions
from asyncinfer.client._flows.views import View
from asyncinfer.client._groups import AsyncGroup
from asyncinfer.client._jobs import AsyncJob, job_row
from asyncinfer.client._map import dataframes
from asyncinfer.client._map.jobs import OnError
from asyncinfer.client._map.results import AsyncResults
from asyncinfer.client._models import Catalog, Model, model_row
from asyncinfer.client._requests import call
from asyncinfer.client._tables import Table, host_row, queue_row, worker_row
from asyncinfer.client._wait_reasons import CADENCE, Cadence
from asyncinfer.jobs import Status
from asyncinfer.schemas.operations import Queue, Worker
from asyncinfer.schemas.requests import AuditAction
from asyncinfer.schemas.webhook_views import WebhookHost


@with_checked_arguments
@with_docstrings_of(Client)
class AsyncClient:
    """An asyncinfer server, for event loops: `Client` with methods that are awaited.

        from asyncinfer.client import AsyncClient

        async with AsyncClient("http://127.0.0.1:8000") as client:
            print(await client.predict([[5.1, 3.5, 1.4, 0.2]]))
            async for result in client.map(rows):
                print(result)

    Arguments, results and errors are those of `Client`, of the constructor too. The rows of a map
    may come from an asynchronous iterator.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        total_timeout: float = math.inf,
        wait_for_models: bool = False,
        on_wait: Callable[[str], None] | None = None,
        cadence: Cadence = CADENCE,
        ca: str | os.PathLike[str] | None = None,
    ) -> None:
        self._server = new_server(
            url, api_key, timeout, retries, total_timeout, wait_for_models, on_wait, cadence, ca
        )
        self._driver = AsyncDriver(self._server)

    @property
    def url(self) -> str:
        """The server's URL, without a slash at its end."""
        return self._server.url

    async def predict(
        self,
        data: Any,
        model: str | None = None,
        *,
        timeout: float | None = None,
        cancel_on_timeout: bool = False,
        idempotency_key: str | None = None,
        request_id: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Any:
        """Submits an input, waits for its job, and returns the result."""
        job = submitting.new_job(data, model, idempotency_key, options, request_id)
        return await self._driver.run(
            submitting.predict(self._server, job, timeout, cancel_on_timeout=cancel_on_timeout)
        )

    async def submit(
        self,
        data: Any,
        model: str | None = None,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncJob:
        """Submits an input and returns its job, which is stored and will run."""
        job = submitting.new_job(data, model, idempotency_key, options, request_id)
        return self._job(await self._driver.run(submitting.submit(self._server, job)))

    def map(
        self,
        rows: Iterable[Any] | AsyncIterable[Any],
        model: str | None = None,
        *,
        batch: int | Literal["auto"] = "auto",
        in_flight: int = 8,
        progress: bool = True,
        on_error: OnError = "raise",
        webhook: str | Mapping[str, Any] | None = None,
        **options: Unpack[MapJobOptions],
    ) -> AsyncResults:
        """Returns an iterator of the result of each row, in order, as the results come."""
        wanted = map_options(model, batch, in_flight, progress, on_error, webhook, options)
        return AsyncResults(self._server, self._driver, rows, wanted)

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
        webhook: str | Mapping[str, Any] | None = None,
        **options: Unpack[MapJobOptions],
    ) -> Any:
        """Returns the frame, of pandas or polars, with predictions as columns behind its own."""
        wanted = map_options(model, batch, in_flight, progress, on_error, webhook, options)
        known = await self._driver.run(models.cached_model(self._server, model))
        rows = dataframes.FrameRows(frame, columns, known)
        with rows.named_errors():
            mapped = AsyncResults(self._server, self._driver, rows.arrays, wanted)
            results = [rows.name_columns(result) async for result in mapped]
        returned = on_error == "return"
        answer = options.get("answer")
        return dataframes.with_results(frame, results, known, answer, prefix, errors=returned)

    async def job(self, job_id: str, *, tenant: str | None = None) -> AsyncJob:
        """Returns a job by its id, wherever it was submitted."""
        return self._job(await self._driver.run(jobs.read_job(self._server, job_id, tenant=tenant)))

    async def jobs(
        self,
        *,
        status: Status | None = None,
        model: str | None = None,
        group: str | None = None,
        request_id: str | None = None,
        dead: bool | None = None,
        limit: int = 100,
        tenant: str | None = None,
    ) -> list[AsyncJob]:
        """Returns at most `limit` jobs of your own that match, newest first."""
        query = {
            "status": status,
            "model": model,
            "group": group,
            "request_id": request_id,
            "dead": dead,
            "tenant": tenant,
        }
        views = await self._driver.run(jobs.list_jobs(self._server, limit, query))
        return Table("Jobs", map(self._job, views), job_row)

    async def models(self) -> list[Model]:
        """Returns the models that workers serve."""
        models = (await self.catalog()).models
        return Table("Models", models, model_row)

    async def catalog(self) -> Catalog:
        """Returns the models that workers serve, the names of those that load, and problems."""
        return await self._driver.run(models.catalog(self._server))

    async def model(self, name: str | None = None) -> Model:
        """Returns one model, or the default one; raises ModelNotFound, NoModelAnnounced."""
        return await self._driver.run(models.model(self._server, name))

    async def group(self, name: str) -> AsyncGroup:
        """Returns the group of the jobs that were submitted with `group=name`."""
        return self._group(await self._driver.run(operations.group(self._server, name)))

    async def validate(
        self, data: Any, model: str | None = None, **options: Unpack[JobOptions]
    ) -> ValidInput:
        """Returns how an input would be understood, and runs nothing."""
        return await self._driver.run(submitting.validate(self._server, data, model, options))

    async def cancel_all(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        status: Literal["pending", "processing"] | None = None,
        model: str | None = None,
        group: str | None = None,
        tenant: str | None = None,
    ) -> ClearedJobs:
        """Cancels the jobs of `job_ids`, else your unfinished jobs that match; returns how many."""
        query = {"status": status, "model": model, "group": group, "tenant": tenant}
        return await self._driver.run(jobs.cancel_jobs(self._server, job_ids, query))

    async def retry_all(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        status: Literal["failed", "cancelled"] | None = None,
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
        tenant: str | None = None,
    ) -> RetriedJobs:
        """Runs the jobs of `job_ids` again, else your failed and cancelled jobs that match."""
        query = {"status": status, "model": model, "group": group, "dead": dead, "tenant": tenant}
        return await self._driver.run(jobs.retry_jobs(self._server, job_ids, query))

    async def purge(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        status: Literal["completed", "failed", "cancelled", "ended"] | None = None,
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
        tenant: str | None = None,
    ) -> ClearedJobs:
        """Deletes the jobs of `job_ids`, else your ended jobs that match; returns how many."""
        query = {"status": status, "model": model, "group": group, "dead": dead, "tenant": tenant}
        return await self._driver.run(jobs.purge_jobs(self._server, job_ids, query))

    async def cancel_queue(self, model: str) -> ClearedJobs:
        """Cancels all jobs that wait for a model, of all tenants; returns how many."""
        return await self._driver.run(operations.cancel_queue(self._server, model))

    async def pause(self, model: str) -> PausedState:
        """Stops running a model's jobs until `resume`; they are still accepted."""
        return await self._driver.run(operations.set_paused(self._server, model, True))

    async def resume(self, model: str) -> PausedState:
        """Runs a paused model's jobs again."""
        return await self._driver.run(operations.set_paused(self._server, model, False))

    async def queues(self) -> list[Queue]:
        """Returns what waits and runs, and how fast, for each model."""
        queues = await self._driver.run(operations.queues(self._server))
        return Table("Queues", queues, queue_row)

    async def workers(self) -> list[Worker]:
        """Returns the living workers."""
        workers = await self._driver.run(operations.workers(self._server))
        return Table("Workers", workers, worker_row)

    async def webhooks(self, *, tenant: str | None = None) -> list[WebhookHost]:
        """Returns the hosts that your webhooks go to, those that fail most first."""
        hosts = await self._driver.run(operations.webhooks(self._server, tenant))
        return Table("Webhooks", hosts, host_row)

    async def redeliver_webhooks(
        self,
        *,
        host: str | None = None,
        model: str | None = None,
        given_up: bool = False,
        tenant: str | None = None,
    ) -> RedeliveredWebhooks:
        """Sends webhooks again that were given up or whose last try failed; returns how many."""
        query = {"host": host, "model": model, "given_up": given_up or None, "tenant": tenant}
        return await self._driver.run(operations.redeliver_webhooks(self._server, query))

    async def audit(
        self,
        *,
        action: AuditAction | None = None,
        tenant: str | None = None,
        limit: int = 100,
    ) -> AuditLog:
        """Returns what was done to many jobs, to models and across tenants, newest first."""
        query = {"action": action, "tenant": tenant}
        return await self._driver.run(operations.audit(self._server, limit, query))

    async def health(self) -> Health:
        """Returns the state of the server; raises RedisUnavailable."""
        return await self._driver.run(operations.health(self._server))

    async def request(
        self, method: str, path: str, *, body: Any = None, **query: str | float | None
    ) -> Any:
        """Sends a request for which there is no method here; returns the decoded JSON."""
        return await self._driver.run(call(self._server, method, path, query, body))

    async def close(self) -> None:
        """Closes the connections, after it has ended open maps; `async with` does so at its end."""
        await self._driver.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncClient of {shown_url(self.url)}>"

    def __del__(self) -> None:
        warn_if_open(self)

    def _job(self, view: View) -> AsyncJob:
        """The AsyncJob of a view as the server shows it."""
        return AsyncJob(self._server, self._driver, view)

    def _group(self, view: dict[str, Any]) -> AsyncGroup:
        """The AsyncGroup of a view as the server shows it."""
        return AsyncGroup(self._server, self._driver, view)

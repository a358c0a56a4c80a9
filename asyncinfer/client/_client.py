"""The client for scripts, notebooks and threads: a line a method."""

import os
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Unpack

from asyncinfer.client import _flows
from asyncinfer.client._drivers import Driver
from asyncinfer.client._errors import checked_key, checked_url
from asyncinfer.client._flows import JobOptions, Status
from asyncinfer.client._groups import Group
from asyncinfer.client._jobs import Job
from asyncinfer.client._map import dataframes
from asyncinfer.client._map.results import Asked, OnError, Results
from asyncinfer.client._models import Model
from asyncinfer.client._requests import Server

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
        self._server = server_of(url, api_key, timeout, retries)
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

    def map(
        self,
        rows: Iterable[Any],
        model: str | None = None,
        *,
        batch: int | Literal["auto"] = "auto",
        in_flight: int = 8,
        progress: bool = True,
        on_error: OnError = "raise",
        **options: Unpack[JobOptions],
    ) -> Results:
        """A result for each row, in order, as they come; rows may come from an endless generator.

        A row is one entry along the first axis of an input: a list, an array, or a dict of them
        for several inputs. Or `rows` is an array, or a dict of arrays, whose first axis counts
        them. Rows of models that batch share jobs of at most `batch` rows; `in_flight` requests
        are out at a time. An error of a row is raised, or given as its result with
        `on_error="return"`; it has the row's number as `.row`. Many rows over a model that does not
        batch give a SlowMapWarning with the reason.

        Leaving early, by Ctrl-C too, cancels what is not done. The same rows with the same
        `group=` (and `batch=`) within a day go on where a map stopped, and run nothing twice.
        """
        asked = asked_of(model, batch, in_flight, progress, on_error, options)
        return Results(self._server, self._driver, rows, asked)

    def map_frame(
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
        found = self._driver.run(_flows.known_model(self._server, model))
        rows = dataframes.rows_of(frame, columns, found)
        asked = asked_of(model, batch, in_flight, progress, on_error, options)
        results = [one for one in Results(self._server, self._driver, rows, asked)]
        return dataframes.with_results(frame, results, found, prefix, errors=on_error == "return")

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
        tenant: str | None = None,
    ) -> list[Job]:
        """Your jobs, newest first. With the scope `operator`, those of a `tenant`, or of all
        (`"*"`), without inputs and results."""
        query = {"status": status, "model": model, "group": group, "dead": dead, "tenant": tenant}
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
        tenant: str | None = None,
    ) -> dict[str, Any]:
        """Cancels your jobs that wait or run: how many were, how many were asked to stop.
        `tenant` as in `jobs`."""
        query = {"status": status, "model": model, "group": group, "tenant": tenant}
        return self._driver.run(_flows.many(self._server, "DELETE", "/jobs", query))

    def retry_all(
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
        return self._driver.run(_flows.retry_many(self._server, job_ids, query))

    def purge(
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
        return self._driver.run(_flows.many(self._server, "DELETE", "/jobs", query))

    def purge_queue(self, model: str) -> dict[str, Any]:
        """Ends everything that waits for a model, whosever it is; needs the scope `operator`."""
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
        """Who runs jobs, and what each is doing; needs the scope `admin`."""
        return self._driver.run(_flows.listed(self._server, "workers"))

    def health(self) -> dict[str, Any]:
        """Whether the server and its Redis answer; with the scope `read` also what waits and how
        many workers there are."""
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
        warn_if_open(self)

    def _job(self, view: _flows.View) -> Job:
        return Job(self._server, self._driver, view)

    def _group(self, view: dict[str, Any]) -> Group:
        return Group(self._server, self._driver, view)


def server_of(url: str | None, api_key: str | None, timeout: float, retries: int) -> Server:
    url = checked_url(url or os.environ.get("ASYNCINFER_URL") or _URL)
    key = checked_key(api_key or os.environ.get("ASYNCINFER_API_KEY") or "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return Server(url, headers, timeout, retries)


def asked_of(
    model: str | None,
    batch: int | Literal["auto"],
    in_flight: int,
    progress: bool,
    on_error: OnError,
    options: Mapping[str, Any],
) -> Asked:
    group = options.get("group")
    return Asked(
        model=model,
        batch=batch,
        in_flight=in_flight,
        progress=progress,
        on_error=on_error,
        group=group or f"map-{uuid.uuid4().hex[:12]}",
        is_named=group is not None,
        options={name: one for name, one in options.items() if one is not None},
    )


def warn_if_open(client: Any) -> None:
    driver = getattr(client, "_driver", None)
    if driver is not None and not driver.closed:
        warnings.warn(
            f"{client!r} was never closed; use `with`, or close() it",
            ResourceWarning,
            source=client,
            stacklevel=2,
        )

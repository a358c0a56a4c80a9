"""The client for scripts, notebooks and threads: a line a method."""

import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Unpack

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
from asyncinfer.client._drivers import Driver
from asyncinfer.client._errors import (
    CannotSend,
    checked_ca,
    normalized_key,
    normalized_url,
    shown_url,
)
from asyncinfer.client._flows import jobs, models, operations, submitting
from asyncinfer.client._flows.submitting import JobOptions, MapJobOptions
from asyncinfer.client._flows.views import View
from asyncinfer.client._groups import Group
from asyncinfer.client._jobs import Job, job_row
from asyncinfer.client._map import dataframes
from asyncinfer.client._map.jobs import MapOptions, OnError
from asyncinfer.client._map.results import Results
from asyncinfer.client._models import Catalog, Model, model_row
from asyncinfer.client._requests import RemoteServer, call
from asyncinfer.client._tables import Table, host_row, queue_row, worker_row
from asyncinfer.client._wait_reasons import CADENCE, Cadence
from asyncinfer.jobs import Status
from asyncinfer.schemas.operations import Queue, Worker
from asyncinfer.schemas.requests import AuditAction
from asyncinfer.schemas.webhook_views import WebhookHost

_URL: Final = "http://127.0.0.1:8000"


@with_checked_arguments
class Client:
    """An asyncinfer server, for scripts, notebooks and threads.

        from asyncinfer.client import Client

        with Client("http://127.0.0.1:8000") as client:
            print(client.predict([[5.1, 3.5, 1.4, 0.2]]))

    Arguments:
        url: The URL that `asyncinfer serve` shows; else ASYNCINFER_URL, else
            http://127.0.0.1:8000.
        api_key: An API key; else ASYNCINFER_API_KEY.
        timeout: How long `predict`, `Job.result` and `Job.wait` wait, in seconds.
        retries: How often a request is sent again if the server is away or its queue is full;
            5 last about a minute. Until it has answered once, a connection that cannot be made is
            raised at once.
        total_timeout: The seconds after which this client gives up: nothing is awaited or sent
            again then, and WaitTimeout is raised.
        wait_for_models: Wait for a model that a worker is loading, whatever `retries` says.
        on_wait: Takes lines that say why no answer comes, in the thread that waits. Without it
            those of a map are shown beside its bar or logged, and others are not shown.
        cadence: How soon these lines come, and how often.
        ca: A PEM file with the CA of an https:// server, trusted besides the system's; else
            ASYNCINFER_CA.

    One client may be used from many threads. Each method may raise ConnectionFailed,
    NotAsyncinfer, Unauthorized, Forbidden (the key lacks a scope), RedisUnavailable and
    ClientClosed, and CannotSend for an argument of a wrong type; the constructor raises
    WrongAddress. `AsyncinferError` is the base of all.

    Inputs are nested lists, numpy arrays or frames of pandas or polars, of the shape
    `(rows, *dims)` that the model takes, or a dict of them by name for several inputs. An array
    of another float or whole-number dtype is converted if all numbers fit, except floats for an
    input of whole numbers; NaN and missing values (None, pandas.NA, masked) are sent as NaN to
    inputs of floats.

    Results have one form per model, whatever the form of the input:

    - A model with labels gives a dict per row: `prediction` (int, the class), `class_name` (str)
      and `probabilities` (list of float, one per class). One row gives the dict itself, several
      rows a list of dicts.
    - Other models, and all with `answer="tensors"`, give a numpy array, `(rows, *dims)` in the
      dtype of the output, or a dict of arrays by name if there are several outputs.

    Options of a job, by keyword, in seconds where they say so:

    - `priority`: "high", "normal" or "low".
    - `delay_seconds`: The job does not start earlier.
    - `start_within_seconds`, `finish_within_seconds`: Else it fails with the code `expired`.
    - `ttl_seconds`: How long the job is kept after it has ended, at most the server's MAX_TTL.
    - `version`: The version of the model; without it the served one.
    - `group`: A name that jobs share, to count, follow, cancel and resume them together.
    - `answer`: "json" or "tensors", the form of the result.
    - `webhook`: The URL to which the end of the job is POSTed; or a dict of `url`, `events` (which
      of "completed", "failed" and "cancelled") and `metadata` (a dict that is sent back).
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
        self._driver = Driver(self._server)

    @property
    def url(self) -> str:
        """The server's URL, without a slash at its end."""
        return self._server.url

    def predict(
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
        """Submits an input, waits for its job, and returns the result.

        `data` has the shape `(rows, *dims)`; `model` None is the default model. The input and the
        result are described at `Client`. `timeout` is in seconds, None the client's own. The job
        goes on when the time is out, unless `cancel_on_timeout`. The same `idempotency_key` (1 to
        255 visible ASCII characters) with the same input gives the same job. `request_id` (1 to
        128 visible ASCII characters) is the X-Request-ID that the job and the logs of the server
        show; without it the server makes one.

        Raises InvalidInput (`.faults` has the place of each fault), CannotSend, ModelNotFound,
        VersionNotFound, NoModelAnnounced, QueueFull, IdempotencyConflict, JobFailed
        (`.job_error`), JobCancelled and WaitTimeout (`.job_id`, `.waiting_for`).

        >>> client.predict([[5.1, 3.5, 1.4, 0.2]], "iris")["class_name"]
        'setosa'
        >>> tensors = client.predict([[5.1, 3.5, 1.4, 0.2]], "iris", answer="tensors")
        >>> {name: (array.dtype.name, array.shape) for name, array in tensors.items()}
        {'label': ('int64', (1,)), 'probabilities': ('float32', (1, 3))}
        """
        job = submitting.new_job(data, model, idempotency_key, options, request_id)
        return self._driver.run(
            submitting.predict(self._server, job, timeout, cancel_on_timeout=cancel_on_timeout)
        )

    def submit(
        self,
        data: Any,
        model: str | None = None,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Job:
        """Submits an input and returns its job, which is stored and will run.

        `data`, `model`, `idempotency_key` and `request_id` are as in `predict`. The same key with
        the same input gives the same job, as long as the job is kept. Raises what `predict` raises
        before a job runs: InvalidInput, CannotSend, ModelNotFound, VersionNotFound,
        NoModelAnnounced, QueueFull and IdempotencyConflict.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", priority="high")
        >>> job.result(timeout=10)["class_name"]
        'setosa'
        """
        job = submitting.new_job(data, model, idempotency_key, options, request_id)
        return self._job(self._driver.run(submitting.submit(self._server, job)))

    def map(
        self,
        rows: Iterable[Any],
        model: str | None = None,
        *,
        batch: int | Literal["auto"] = "auto",
        in_flight: int = 8,
        progress: bool = True,
        on_error: OnError = "raise",
        webhook: str | Mapping[str, Any] | None = None,
        **options: Unpack[MapJobOptions],
    ) -> Results:
        """Returns an iterator of the result of each row, in order, as the results come.

        A row is one entry along the first axis of an input, of the shape `(*dims)`: a list, an
        array, or a dict of them for several inputs. `rows` is an iterable of rows, also an
        endless generator; or an array `(rows, *dims)`, or a dict of arrays. A result is that of
        `predict` for this row, without the axis of rows. (A row may also be a whole input
        `(rows, *dims)`; then it is a job of its own, with the result of `predict`.) Nothing is
        sent before the first result is taken, and there is no time limit.

        Rows of a model that batches share jobs of at most `batch` rows ("auto": 256, or what the
        model allows); `in_flight` requests are out at a time. `progress` shows a bar on stderr.
        Many rows over a model that does not batch give a SlowMapWarning with the reason.

        An error of a row (InvalidInput, CannotSend, BodyTooLarge, JobFailed, JobCancelled) is
        raised, or given in the place of its result with `on_error="return"`; `.row` is the number
        of the row, from 0. All other errors end the map: ModelNotFound, NoModelAnnounced,
        Unauthorized, Forbidden, ConnectionFailed, IdempotencyConflict (`group` has other rows). An
        error of the iterable comes after the results of the rows before it. Arguments that cannot
        be right raise CannotSend at once.

        Leaving the loop, also by an error or Ctrl-C, cancels what has not run. So do `with
        client.map(rows) as results:` and `close()`, also while a variable has the results; reading
        on raises ClientClosed after a `close()`. The same rows with the same `group` (and `batch`)
        within a day, or the server's MAX_TTL if that is shorter, go on where a map stopped, and run
        nothing twice.

        With `webhook`, as in `Group.close`, the group is closed when all rows are done, before the
        last results are given, and the server tells of it. A map that ends early, or has no rows,
        closes nothing. An error of the close is raised behind the last result.

        >>> rows = [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]
        >>> [row["class_name"] for row in client.map(rows, "iris", progress=False)]
        ['setosa', 'virginica']
        """
        wanted = map_options(model, batch, in_flight, progress, on_error, webhook, options)
        return Results(self._server, self._driver, rows, wanted)

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
        webhook: str | Mapping[str, Any] | None = None,
        **options: Unpack[MapJobOptions],
    ) -> Any:
        """Returns the frame, of pandas or polars, with predictions as columns behind its own.

        `columns` are the model's input, in this order; None: all columns. If the model has several
        inputs, they are the columns of their names. The names of the new columns begin with
        `prefix`: `prediction`, `class_name` and `probability` (of the predicted class) for a model
        with labels, else one column per number of an output. `on_error="return"` adds a column
        `error`, with a message for each row that failed, which names the columns that cannot be
        sent. If no row has a result, the model's description tells the new columns; an output whose
        size is not fixed is one column then. The other arguments, and the errors, are those of
        `map`; CannotSend also if a column is missing, or exists already.

        >>> import pandas as pd
        >>> flowers = pd.DataFrame([[5.1, 3.5, 1.4, 0.2]], columns=["sl", "sw", "pl", "pw"])
        >>> list(client.map_frame(flowers, model="iris", progress=False).columns)
        ['sl', 'sw', 'pl', 'pw', 'prediction', 'class_name', 'probability']
        """
        wanted = map_options(model, batch, in_flight, progress, on_error, webhook, options)
        known = self._driver.run(models.cached_model(self._server, model))
        rows = dataframes.FrameRows(frame, columns, known)
        with rows.named_errors():
            mapped = Results(self._server, self._driver, rows.arrays, wanted)
            results = [rows.name_columns(result) for result in mapped]
        returned = on_error == "return"
        answer = options.get("answer")
        return dataframes.with_results(frame, results, known, answer, prefix, errors=returned)

    def job(self, job_id: str, *, tenant: str | None = None) -> Job:
        """Returns a job by its id, wherever it was submitted.

        Raises JobNotFound, also for a job of another tenant, and JobExpired. A key with the scope
        `operator` may name the job's `tenant`.

        >>> client.job(client.submit([[5.1, 3.5, 1.4, 0.2]], "iris").id).model
        'iris'
        """
        return self._job(self._driver.run(jobs.read_job(self._server, job_id, tenant=tenant)))

    def jobs(
        self,
        *,
        status: Status | None = None,
        model: str | None = None,
        group: str | None = None,
        request_id: str | None = None,
        dead: bool | None = None,
        limit: int = 100,
        tenant: str | None = None,
    ) -> list[Job]:
        """Returns at most `limit` jobs of your own that match, newest first.

        `request_id` is the `X-Request-ID` of the request that submitted them. `dead=True` selects
        dead letters: jobs that were given up though another try may have helped. A key with the
        scope `operator` lists those of a `tenant`, or of all (`"*"`), without inputs and results.
        A model that is not known has no jobs.

        >>> group = f"docs-{client.submit([[5.1, 3.5, 1.4, 0.2]], 'iris').id}"
        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group=group)
        >>> [listed.id for listed in client.jobs(group=group)] == [job.id]
        True
        """
        query = {
            "status": status,
            "model": model,
            "group": group,
            "request_id": request_id,
            "dead": dead,
            "tenant": tenant,
        }
        views = self._driver.run(jobs.list_jobs(self._server, limit, query))
        return Table("Jobs", map(self._job, views), job_row)

    def models(self) -> list[Model]:
        """Returns the models that workers serve; `catalog` has those that are not served too.

        >>> [model.model for model in client.models() if model.default]
        ['iris']
        """
        models = self.catalog().models
        return Table("Models", models, model_row)

    def catalog(self) -> Catalog:
        """Returns the models that workers serve, the names of those that load, and problems.

        >>> client.catalog().problems
        ()
        """
        return self._driver.run(models.catalog(self._server))

    def model(self, name: str | None = None) -> Model:
        """Returns one model, or the default one; raises ModelNotFound, NoModelAnnounced.

        >>> client.model("iris").inputs
        (TensorInfo(name='input', datatype='FP32', shape=('batch', 4), optional=False),)
        """
        return self._driver.run(models.model(self._server, name))

    def group(self, name: str) -> Group:
        """Returns the group of the jobs that were submitted with `group=name`.

        Raises GroupNotFound; a group is kept for 7 days after its last submit.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs").wait()
        >>> client.group("docs").progress
        1.0
        """
        return self._group(self._driver.run(operations.group(self._server, name)))

    def validate(
        self, data: Any, model: str | None = None, **options: Unpack[JobOptions]
    ) -> ValidInput:
        """Returns how an input would be understood, and runs nothing.

        Raises what `submit` raises for the input.

        >>> client.validate([[5.1, 3.5, 1.4, 0.2]], "iris").inputs[0].shape
        (1, 4)
        """
        return self._driver.run(submitting.validate(self._server, data, model, options))

    def cancel_all(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        status: Literal["pending", "processing"] | None = None,
        model: str | None = None,
        group: str | None = None,
        tenant: str | None = None,
    ) -> ClearedJobs:
        """Cancels the jobs of `job_ids`, else your unfinished jobs that match; returns how many.

        Without `job_ids` at least one of `status`, `model` and `group` is needed: else InvalidQuery
        is raised. `tenant` is as in `jobs`. A job of `job_ids` that cannot be cancelled is among
        the `refused` of the result.

        >>> client.cancel_all(group="docs")
        ClearedJobs(cancelled=0)
        """
        query = {"status": status, "model": model, "group": group, "tenant": tenant}
        return self._driver.run(jobs.cancel_jobs(self._server, job_ids, query))

    def retry_all(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        status: Literal["failed", "cancelled"] | None = None,
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
        tenant: str | None = None,
    ) -> RetriedJobs:
        """Runs the jobs of `job_ids` again, else your failed and cancelled jobs that match.

        Without `job_ids` at least one of `status`, `model`, `group` and `dead` is needed: else
        InvalidQuery is raised. `tenant` is as in `jobs`. A job that cannot be retried is among the
        `refused` of the result.

        >>> client.retry_all(group="docs", status="failed")
        RetriedJobs(retried=(), refused=())
        """
        query = {"status": status, "model": model, "group": group, "dead": dead, "tenant": tenant}
        return self._driver.run(jobs.retry_jobs(self._server, job_ids, query))

    def purge(
        self,
        job_ids: Sequence[str] | None = None,
        *,
        status: Literal["completed", "failed", "cancelled", "ended"] | None = None,
        model: str | None = None,
        group: str | None = None,
        dead: bool | None = None,
        tenant: str | None = None,
    ) -> ClearedJobs:
        """Deletes the jobs of `job_ids`, else your ended jobs that match, with inputs and results.

        Without `job_ids` at least one of `status`, `model`, `group` and `dead` is needed: else
        InvalidQuery is raised. `status="ended"` is all that have ended. Returns how many, `purged`;
        a job of `job_ids` that has not ended is among the `refused`. `tenant` is as in `jobs`.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs-purge").wait()
        >>> client.purge(group="docs-purge").purged
        1
        """
        query = {"status": status, "model": model, "group": group, "dead": dead, "tenant": tenant}
        return self._driver.run(jobs.purge_jobs(self._server, job_ids, query))

    def cancel_queue(self, model: str) -> ClearedJobs:
        """Cancels all jobs that wait for a model, of all tenants; returns how many.

        Needs the scope `operator`; raises ModelNotFound.

        >>> client.cancel_queue("iris")
        ClearedJobs(cancelled=0)
        """
        return self._driver.run(operations.cancel_queue(self._server, model))

    def pause(self, model: str) -> PausedState:
        """Stops running a model's jobs until `resume`; they are still accepted.

        Needs the scope `admin`; raises ModelNotFound.

        >>> client.pause("iris")
        PausedState(model='iris', paused=True)
        >>> client.resume("iris")
        PausedState(model='iris', paused=False)
        """
        return self._driver.run(operations.set_paused(self._server, model, True))

    def resume(self, model: str) -> PausedState:
        """Runs a paused model's jobs again; the result and the errors are those of `pause`.

        >>> client.resume("iris").paused
        False
        """
        return self._driver.run(operations.set_paused(self._server, model, False))

    def queues(self) -> list[Queue]:
        """Returns what waits and runs, and how fast, for each model.

        - `model` (None before there is a default model), `queue` (the list in Redis), `paused`.
        - Numbers of jobs: `waiting` (by priority), `delayed`, `running`, `dead`.
        - `workers`, `slots`, and `starved` (1 if jobs are due and no worker is there for them).
        - Seconds, None while unknown: `oldest_age_seconds`, `seconds_per_job`, `backlog_seconds`.
        - Rates over the last `window_seconds`: `submitted_per_second`, `completed_per_second`,
          `failed_per_second`.
        - Percentiles, None without jobs: `wait_seconds` and `run_seconds`.
        - `webhooks`: how many are `reserved` (with `reserved_bytes`), `pending`, `due` (the oldest
          for `oldest_due_seconds`) and `given_up`.

        >>> [queue.paused for queue in client.queues() if queue.model == "iris"]
        [False]
        """
        queues = self._driver.run(operations.queues(self._server))
        return Table("Queues", queues, queue_row)

    def workers(self) -> list[Worker]:
        """Returns the living workers; needs the scope `admin`.

        - `worker` (its name), `state` ("starting", "ready", "draining" or "hung"), `host`, `pid`.
        - `slots` and `busy` (batches that it can run, and runs), `isolating` (it runs one job alone
          now), `jobs_done` (numbers by status).
        - `started_at`, `uptime_seconds`, `heard_seconds` (the age of all this).
        - `models` (names), `versions` (SHA-256 by model and version), `served` (version by model),
          `loaded` ("model/version" in memory), `problems` (reasons by model and version).
        - `seconds_per_job` (by model), `run_times` (seconds by model and number of rows).

        >>> client.workers()[0].state
        'ready'
        """
        workers = self._driver.run(operations.workers(self._server))
        return Table("Workers", workers, worker_row)

    def webhooks(self, *, tenant: str | None = None) -> list[WebhookHost]:
        """Returns the hosts that your webhooks go to, those that fail most first.

        Each has `host`, numbers of deliveries (`pending` ones to come, those of them that are
        `failing`, and `given_up` ones), `last_status`, `last_error` and `last_at` of the last try,
        and `next_at`. `tenant` is as in `jobs`.

        >>> [host.host for host in client.webhooks() if host.host == "hook.example"]
        []
        """
        hosts = self._driver.run(operations.webhooks(self._server, tenant))
        return Table("Webhooks", hosts, host_row)

    def redeliver_webhooks(
        self,
        *,
        host: str | None = None,
        model: str | None = None,
        given_up: bool = False,
        tenant: str | None = None,
    ) -> RedeliveredWebhooks:
        """Sends webhooks again that were given up or whose last try failed; returns how many.

        Those to a `host` (as `webhooks` has it), of a `model`, or with `given_up` only those that
        were given up: at least one is needed, else InvalidQuery is raised. `tenant` is as in
        `jobs`.

        >>> client.redeliver_webhooks(host="hook.example").redelivered
        0
        """
        query = {"host": host, "model": model, "given_up": given_up or None, "tenant": tenant}
        return self._driver.run(operations.redeliver_webhooks(self._server, query))

    def audit(
        self,
        *,
        action: AuditAction | None = None,
        tenant: str | None = None,
        limit: int = 100,
    ) -> AuditLog:
        """Returns what was done to many jobs, to models and across tenants, newest first.

        At most `limit` entries: each is an `AuditEntry`. `action` selects one action, and `tenant`
        what the keys of a tenant did or was done to its jobs alone. Needs the scope `operator`.

        >>> paused = client.pause("iris")
        >>> [(entry.action, entry.filter["model"]) for entry in client.audit(limit=1).entries]
        [('pause', 'iris')]
        >>> resumed = client.resume("iris")
        """
        query = {"action": action, "tenant": tenant}
        return self._driver.run(operations.audit(self._server, limit, query))

    def health(self) -> Health:
        """Returns the state of the server, if it and its Redis answer.

        Raises RedisUnavailable if Redis does not answer, after all retries.

        >>> client.health().status
        'ok'
        """
        return self._driver.run(operations.health(self._server))

    def request(
        self, method: str, path: str, *, body: Any = None, **query: str | float | None
    ) -> Any:
        """Sends a request for which there is no method here; returns the decoded JSON.

        `path` is one of the server's /openapi.json, and quoted. `body` is sent as JSON, and `query`
        are the parameters, without those that are None. The request is sent again as others are;
        an answer of 400 or above is raised.

        >>> client.request("GET", "/models/iris")["url"]
        '/predict/iris'
        """
        return self._driver.run(call(self._server, method, path, query, body))

    def close(self) -> None:
        """Closes the connections, after it has ended open maps; other jobs go on.

        `with Client() as client:` does so at its end.
        """
        self._driver.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {shown_url(self.url)}>"

    def __del__(self) -> None:
        warn_if_open(self)

    def _job(self, view: View) -> Job:
        """The Job of a view as the server shows it."""
        return Job(self._server, self._driver, view)

    def _group(self, view: dict[str, Any]) -> Group:
        """The Group of a view as the server shows it."""
        return Group(self._server, self._driver, view)


def new_server(
    url: str | None,
    api_key: str | None,
    timeout: float,
    retries: int,
    total_timeout: float,
    wait_for_models: bool,
    on_wait: Callable[[str], None] | None,
    cadence: Cadence,
    ca: str | os.PathLike[str] | None,
) -> RemoteServer:
    """The server of a new client; a URL, key or CA that is None or empty comes from the
    environment.

    The arguments are those of a client. Raises WrongAddress for one that cannot be right. It sends
    nothing.
    """
    url = normalized_url(url or os.environ.get("ASYNCINFER_URL") or _URL)
    key = normalized_key(api_key or os.environ.get("ASYNCINFER_API_KEY") or "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return RemoteServer(
        url=url,
        headers=headers,
        timeout_seconds=timeout,
        retries=retries,
        ca=checked_ca(os.fspath(ca or os.environ.get("ASYNCINFER_CA") or "")),
        until=time.monotonic() + total_timeout,
        waits_for_models=wait_for_models,
        on_wait=on_wait,
        cadence=cadence,
    )


def map_options(
    model: str | None,
    batch: int | Literal["auto"],
    in_flight: int,
    progress: bool,
    on_error: OnError,
    webhook: str | Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> MapOptions:
    """The arguments of a map, with a random group if none is given.

    `options` are the options of each job; those that are None are left out. Raises CannotSend for
    a `batch`, an `in_flight` or an `on_error` that a map does not have.
    """
    if batch != "auto" and (isinstance(batch, str) or batch < 1):
        raise CannotSend(f'batch={batch!r} is neither "auto" nor a number of rows of at least 1.')
    if in_flight < 1:
        raise CannotSend(f"in_flight={in_flight!r} is not a number of requests of at least 1.")
    if on_error not in ("raise", "return"):
        raise CannotSend(f'on_error={on_error!r} is neither "raise" nor "return".')
    options = submitting.given_options(options)
    group = options.get("group") or f"map-{uuid.uuid4().hex[:12]}"
    return MapOptions(
        model=model,
        batch=batch,
        in_flight=in_flight,
        progress=progress,
        on_error=on_error,
        group=group,
        is_named="group" in options,
        webhook=webhook,
        options={**options, "group": group},
    )


def warn_if_open(client: Any) -> None:
    """Gives a ResourceWarning for a client that is deleted without `close()`; closes nothing."""
    driver = getattr(client, "_driver", None)
    if driver is not None and not driver.closed:
        warnings.warn(
            f"{client!r} was never closed; use `with`, or close() it",
            ResourceWarning,
            source=client,
            stacklevel=2,
        )

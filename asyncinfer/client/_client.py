"""The client for scripts, notebooks and threads: a line a method."""

import os
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Unpack

from asyncinfer.client import _flows
from asyncinfer.client._drivers import Driver
from asyncinfer.client._errors import CannotSend, normalized_key, normalized_url
from asyncinfer.client._flows import JobOptions, Status
from asyncinfer.client._groups import Group
from asyncinfer.client._jobs import Job
from asyncinfer.client._map import dataframes
from asyncinfer.client._map.results import MapOptions, OnError, Results
from asyncinfer.client._models import Model
from asyncinfer.client._requests import RemoteServer

_URL: Final = "http://127.0.0.1:8000"


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
            5 last about a minute.

    One client may be used from many threads. Each method may raise ConnectionFailed,
    NotAsyncinfer, Unauthorized, Forbidden (the key lacks a scope), RedisUnavailable and
    ClientClosed; the constructor raises WrongAddress. `AsyncinferError` is the base of all.

    Inputs are nested lists, numpy arrays or frames of pandas or polars, of the shape
    `(rows, *dims)` that the model takes, or a dict of them by name for several inputs. An array
    of another float or whole-number dtype is converted if all numbers fit; NaN and missing values
    (None, pandas.NA, masked) are sent as NaN to inputs of floats.

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
    - `ttl_seconds`: How long the job is kept after it has ended.
    - `version`: The version of the model; without it the served one.
    - `group`: A name that jobs share, to count, follow, cancel and resume them together.
    - `answer`: "json" or "tensors", the form of the result.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 5,
    ) -> None:
        self._server = new_server(url, api_key, timeout, retries)
        self._driver = Driver(self._server.url)

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
        **options: Unpack[JobOptions],
    ) -> Any:
        """Submits an input, waits for its job, and returns the result.

        `data` has the shape `(rows, *dims)`; `model` None is the default model. The input and the
        result are described at `Client`. `timeout` is in seconds, None the client's own. The job
        goes on when the time is out, unless `cancel_on_timeout`. The same `idempotency_key` (1 to
        255 visible ASCII characters) with the same input gives the same job.

        Raises InvalidInput (`.faults` has the place of each fault), CannotSend, ModelNotFound,
        VersionNotFound, NoModelAnnounced, QueueFull, IdempotencyConflict, JobFailed
        (`.job_error`), JobCancelled and WaitTimeout (`.job_id`, `.waiting_for`).

        >>> client.predict([[5.1, 3.5, 1.4, 0.2]], "iris")["class_name"]
        'setosa'
        >>> tensors = client.predict([[5.1, 3.5, 1.4, 0.2]], "iris", answer="tensors")
        >>> {name: (array.dtype.name, array.shape) for name, array in tensors.items()}
        {'label': ('int64', (1,)), 'probabilities': ('float32', (1, 3))}
        """
        job = _flows.new_job(data, model, idempotency_key, options)
        return self._driver.run(
            _flows.predict(self._server, job, timeout, cancel_on_timeout=cancel_on_timeout)
        )

    def submit(
        self,
        data: Any,
        model: str | None = None,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Job:
        """Submits an input and returns its job, which is stored and will run.

        `data`, `model` and `idempotency_key` are as in `predict`. The same key with the same
        input gives the same job, as long as the job is kept. Raises what `predict` raises before
        a job runs: InvalidInput, CannotSend, ModelNotFound, VersionNotFound, NoModelAnnounced,
        QueueFull and IdempotencyConflict.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", priority="high")
        >>> job.result(timeout=10)["class_name"]
        'setosa'
        """
        job = _flows.new_job(data, model, idempotency_key, options)
        return self._job(self._driver.run(_flows.submit(self._server, job)))

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
        of the row. All other errors end the map: ModelNotFound, NoModelAnnounced, Unauthorized,
        Forbidden, ConnectionFailed, IdempotencyConflict (`group` has other rows). A `batch` below
        1 raises CannotSend at once.

        Leaving early, also by Ctrl-C, cancels what has not run; `with client.map(rows) as
        results:` does so too if the body of the loop raises. The same rows with the same `group`
        (and `batch`) within a day go on where a map stopped, and run nothing twice.

        >>> rows = [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]
        >>> [row["class_name"] for row in client.map(rows, "iris", progress=False)]
        ['setosa', 'virginica']
        """
        wanted = map_options(model, batch, in_flight, progress, on_error, options)
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
        **options: Unpack[JobOptions],
    ) -> Any:
        """Returns the frame, of pandas or polars, with predictions as columns behind its own.

        `columns` are the model's input, in this order; None: all columns. If the model has several
        inputs, they are the columns of their names. The names of the new columns begin with
        `prefix`: `prediction`, `class_name` and `probability` (of the predicted class) for a model
        with labels, else one column per number of an output. `on_error="return"` adds a column
        `error`, with a message for each row that failed. The other arguments, and the errors, are
        those of `map`; CannotSend also if a column is missing, or exists already.

        >>> import pandas as pd
        >>> flowers = pd.DataFrame([[5.1, 3.5, 1.4, 0.2]], columns=["sl", "sw", "pl", "pw"])
        >>> list(client.map_frame(flowers, model="iris", progress=False).columns)
        ['sl', 'sw', 'pl', 'pw', 'prediction', 'class_name', 'probability']
        """
        known = self._driver.run(_flows.cached_model(self._server, model))
        rows = dataframes.input_rows(frame, columns, known)
        wanted = map_options(model, batch, in_flight, progress, on_error, options)
        results = [result for result in Results(self._server, self._driver, rows, wanted)]
        return dataframes.with_results(frame, results, known, prefix, errors=on_error == "return")

    def job(self, job_id: str) -> Job:
        """Returns a job by its id, wherever it was submitted.

        Raises JobNotFound, also for a job of another tenant, and JobExpired.

        >>> client.job(client.submit([[5.1, 3.5, 1.4, 0.2]], "iris").id).model
        'iris'
        """
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
        """Returns at most `limit` jobs of your own that match, newest first.

        `dead=True` selects dead letters: jobs that were given up though another try may have
        helped. A key with the scope `operator` lists those of a `tenant`, or of all (`"*"`),
        without inputs and results. A model that is not known has no jobs.

        >>> group = f"docs-{client.submit([[5.1, 3.5, 1.4, 0.2]], 'iris').id}"
        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group=group)
        >>> [listed.id for listed in client.jobs(group=group)] == [job.id]
        True
        """
        query = {"status": status, "model": model, "group": group, "dead": dead, "tenant": tenant}
        views = self._driver.run(_flows.list_jobs(self._server, limit, query))
        return [self._job(view) for view in views]

    def models(self) -> list[Model]:
        """Returns the models that workers serve.

        >>> [model.model for model in client.models() if model.default]
        ['iris']
        """
        return self._driver.run(_flows.models(self._server))

    def model(self, name: str | None = None) -> Model:
        """Returns one model, or the default one; raises ModelNotFound, NoModelAnnounced.

        >>> client.model("iris").inputs
        (TensorInfo(name='input', datatype='FP32', shape=('batch', 4), optional=False),)
        """
        return self._driver.run(_flows.model(self._server, name))

    def group(self, name: str) -> Group:
        """Returns the group of the jobs that were submitted with `group=name`.

        Raises GroupNotFound; a group is kept for 7 days after its last submit.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs").wait()
        >>> client.group("docs").progress
        1.0
        """
        return self._group(self._driver.run(_flows.group(self._server, name)))

    def validate(
        self, data: Any, model: str | None = None, **options: Unpack[JobOptions]
    ) -> dict[str, Any]:
        """Returns how an input would be understood, and runs nothing.

        The keys are `valid` (True), `model`, `version`, `inputs` (dicts of `name`, `datatype` and
        `shape`, a list of int), `outputs` (names), `rows` (int, None if the model fixes their
        number) and `options`. Raises what `submit` raises for the input.

        >>> client.validate([[5.1, 3.5, 1.4, 0.2]], "iris")["inputs"]
        [{'name': 'input', 'datatype': 'FP32', 'shape': [1, 4]}]
        """
        return self._driver.run(_flows.validate(self._server, data, model, options))

    def cancel_all(
        self,
        *,
        status: Literal["pending", "processing"] | None = None,
        model: str | None = None,
        group: str | None = None,
        tenant: str | None = None,
    ) -> dict[str, Any]:
        """Cancels your unfinished jobs that match; returns how many.

        The keys are `cancelled` (int, jobs that waited), `stopping` (int, running jobs that will
        stop) and `purged` (0). At least one of `status`, `model` and `group` is needed:
        else InvalidQuery is raised. `tenant` is as in `jobs`.

        >>> client.cancel_all(group="docs")["cancelled"]
        0
        """
        query = {"status": status, "model": model, "group": group, "tenant": tenant}
        return self._driver.run(_flows.call_until_done(self._server, "DELETE", "/jobs", query))

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
        """Runs the jobs of `job_ids` again, else your failed and cancelled jobs that match.

        The keys of the result are `retried` (list of ids) and `refused` (list of dicts with
        `job_id`, `code` and `detail`). Without `job_ids` at least one of `status`, `model`,
        `group` and `dead` is needed: else InvalidQuery is raised. `tenant` is as in `jobs`.

        >>> client.retry_all(group="docs", status="failed")
        {'retried': [], 'refused': []}
        """
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
        """Deletes your ended jobs that match, with their inputs and results; returns how many.

        Without arguments it deletes all that have ended. The keys are `purged` (int), and
        `cancelled` and `stopping` (0). `tenant` is as in `jobs`.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs-purge").wait()
        >>> client.purge(group="docs-purge")["purged"]
        1
        """
        selected = {"status": status, "model": model, "group": group, "dead": dead}
        query = {**selected, "purge": True, "tenant": tenant}
        return self._driver.run(_flows.call_until_done(self._server, "DELETE", "/jobs", query))

    def purge_queue(self, model: str) -> dict[str, Any]:
        """Cancels all jobs that wait for a model, of all tenants; returns how many.

        The keys are `model` and `cancelled` (int). Needs the scope `operator`; raises
        ModelNotFound.

        >>> sorted(client.purge_queue("iris"))
        ['cancelled', 'model']
        """
        return self._driver.run(_flows.purge_queue(self._server, model))

    def pause(self, model: str) -> dict[str, Any]:
        """Stops running a model's jobs until `resume`; they are still accepted.

        The keys of the result are `model` and `paused` (bool). Needs the scope `admin`; raises
        ModelNotFound.

        >>> client.pause("iris")
        {'model': 'iris', 'paused': True}
        >>> client.resume("iris")
        {'model': 'iris', 'paused': False}
        """
        return self._driver.run(_flows.set_paused(self._server, model, True))

    def resume(self, model: str) -> dict[str, Any]:
        """Runs a paused model's jobs again; the result and the errors are those of `pause`.

        >>> client.resume("iris")
        {'model': 'iris', 'paused': False}
        """
        return self._driver.run(_flows.set_paused(self._server, model, False))

    def queues(self) -> list[dict[str, Any]]:
        """Returns what waits and runs, and how fast, a dict for each model.

        - `model` (str, None before there is a default model), `queue` (the list in Redis),
          `paused` (bool).
        - Numbers of jobs: `waiting` (a dict by priority), `delayed`, `running`, `dead`.
        - `workers`, `slots`, and `starved` (1 if jobs are due and no worker is there for them).
        - Seconds, None while unknown: `oldest_age_seconds`, `seconds_per_job`, `backlog_seconds`.
        - Rates over the last `window_seconds`: `submitted_per_second`, `completed_per_second`,
          `failed_per_second`.
        - `wait_seconds` and `run_seconds` (dicts of `p50`, `p95` and `p99`, None without jobs).

        >>> [queue["paused"] for queue in client.queues() if queue["model"] == "iris"]
        [False]
        """
        return self._driver.run(_flows.list_all(self._server, "queues"))

    def workers(self) -> list[dict[str, Any]]:
        """Returns the living workers, a dict for each; needs the scope `admin`.

        - `worker` (its name), `state` ("starting", "ready", "draining" or "hung"), `host`, `pid`.
        - `slots` and `busy` (batches that it can run, and runs), `jobs_done` (numbers by status).
        - `started_at` (RFC 3339), `uptime_seconds`, `heard_seconds` (the age of all this).
        - `models` (names), `versions` (SHA-256 by model and version), `served` (version by model),
          `loaded` ("model/version" in memory), `problems` (reasons by model and version).
        - `seconds_per_job` (by model), `run_times` (seconds by model and number of rows).

        >>> client.workers()[0]["state"]
        'ready'
        """
        return self._driver.run(_flows.list_all(self._server, "workers"))

    def health(self) -> dict[str, Any]:
        """Returns whether the server and its Redis answer: `status` is "ok".

        With the scope `read` there are also `redis` (its name and version), `queues` (waiting
        jobs by queue), `workers` (int) and `starved` (names of models with due jobs and no
        worker). Raises RedisUnavailable if Redis does not answer, after all retries.

        >>> client.health()["status"]
        'ok'
        """
        return self._driver.run(_flows.health(self._server))

    def close(self) -> None:
        """Closes the connections; jobs go on. `with Client() as client:` does so at its end."""
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
        return f"<Client of {self.url}>"

    def __del__(self) -> None:
        warn_if_open(self)

    def _job(self, view: _flows.View) -> Job:
        """The Job of a view as the server shows it."""
        return Job(self._server, self._driver, view)

    def _group(self, view: dict[str, Any]) -> Group:
        """The Group of a view as the server shows it."""
        return Group(self._server, self._driver, view)


def new_server(url: str | None, api_key: str | None, timeout: float, retries: int) -> RemoteServer:
    """The server of a new client; what is None or empty comes from the environment.

    `timeout` is in seconds. Raises WrongAddress for a URL or key that cannot be one. It sends
    nothing.
    """
    url = normalized_url(url or os.environ.get("ASYNCINFER_URL") or _URL)
    key = normalized_key(api_key or os.environ.get("ASYNCINFER_API_KEY") or "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return RemoteServer(url, headers, timeout, retries)


def map_options(
    model: str | None,
    batch: int | Literal["auto"],
    in_flight: int,
    progress: bool,
    on_error: OnError,
    options: Mapping[str, Any],
) -> MapOptions:
    """The arguments of a map, with a random group if none is given.

    `options` are the options of each job; those that are None are left out. Raises CannotSend if
    `batch` is neither "auto" nor at least 1.
    """
    if batch != "auto" and (not isinstance(batch, int) or batch < 1):
        raise CannotSend(f'batch={batch!r} is neither "auto" nor a number of rows of at least 1.')
    group = options.get("group")
    return MapOptions(
        model=model,
        batch=batch,
        in_flight=in_flight,
        progress=progress,
        on_error=on_error,
        group=group or f"map-{uuid.uuid4().hex[:12]}",
        is_named=group is not None,
        options={name: option for name, option in options.items() if option is not None},
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

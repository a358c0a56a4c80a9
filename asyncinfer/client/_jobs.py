"""Jobs: the state of one, waiting for it, and acting on it."""

from collections.abc import AsyncIterator, Generator, Iterator
from datetime import datetime
from typing import Any

import msgspec

from asyncinfer.client import _display, _events
from asyncinfer.client._answers import Position
from asyncinfer.client._arguments import with_checked_arguments
from asyncinfer.client._docstrings import with_docstrings_of
from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._flows import jobs, views, waiting
from asyncinfer.client._flows.views import JobView, View
from asyncinfer.client._protocol import Event
from asyncinfer.client._requests import RemoteServer
from asyncinfer.client._tables import time_text
from asyncinfer.client._timeline import Timeline
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.jobs import JobError, WebhookEvent
from asyncinfer.schemas.webhook_views import JobWebhook
from asyncinfer.untrusted.printable import printable_line


class JobState:
    """A job as a client last read it; `refresh()` reads it again."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._timeline: Timeline | None = None
        """As last read, for the card of a notebook."""

    @property
    def _fields(self) -> JobView:
        return msgspec.convert(self._view, JobView)

    @property
    def id(self) -> str:
        """The id with which `client.job(id)` finds it again."""
        return self._fields.job_id

    @property
    def status(self) -> str:
        """pending, processing, completed, failed or cancelled, as last read."""
        return self._fields.status

    @property
    def model(self) -> str | None:
        """The name of its model; None until the job is read after its submit."""
        return self._fields.model

    @property
    def version(self) -> str | None:
        """The version of the model that ran or was asked for; None while it is not known."""
        return self._fields.version

    @property
    def group(self) -> str | None:
        """The `group` that it was submitted with, if it had one and the job was read again."""
        return self._fields.group

    @property
    def request_id(self) -> str | None:
        """The X-Request-ID of its submit, for the logs of the server; None until it is read."""
        return self._fields.request_id

    @property
    def tenant(self) -> str | None:
        """Its tenant, if an operator read it or listed the jobs of tenants; else None."""
        return self._fields.tenant

    @property
    def error(self) -> JobError | None:
        """Why a failed job failed, its `code` and `message`; else None."""
        return self._fields.error

    @property
    def waiting_for(self) -> WaitingFor | None:
        """Why it is not run now, as last read; None while it is next in turn, or runs."""
        return self._fields.waiting_for

    @property
    def position(self) -> Position | None:
        """How many jobs are ahead of it, where it waits and `refresh()` or `client.job` read it.

        None where it does not wait for its turn, and where it was last read by a submit, a list or
        a wait.
        """
        return self._fields.position

    @property
    def eta_seconds(self) -> float | None:
        """An estimate of the seconds until it has ended, when its `position` was read.

        None where nothing is known, such as without a worker.
        """
        return self._fields.eta_seconds

    @property
    def times(self) -> dict[str, datetime]:
        """The times, with time zone, when it was `created`, `started` and `finished`, so far."""
        job = self._fields
        times = {"created": job.created_at, "started": job.started_at, "finished": job.finished_at}
        return {name: time for name, time in times.items() if time}

    def as_dict(self) -> View:
        """All that the server says of it.

        Always `job_id` and `status`; as far as known `result` (as JSON), `error`, `model`,
        `version`, `sha256`, `group`, `priority`, `worker`, `round`, `request_id`, `created_at`,
        `started_at`, `finished_at` (RFC 3339), `waiting_for`, `position` and `eta_seconds`.
        """
        return dict(self._view)

    def __repr__(self) -> str:
        model = f" of {self.model}" if self.model else ""
        reason = f", {printable_line(self.waiting_for.message)}" if self.waiting_for else ""
        return f"<{type(self).__name__} {self.id}{model}: {self.status}{reason}>"

    def _repr_html_(self) -> str:
        """The card that a notebook shows."""
        job, timeline = self._fields, self._timeline
        if timeline and (timeline.status, timeline.round) == (job.status, job.round or 1):
            return _display.job_card(self._view, timeline.events)
        return _display.job_card(self._view, _display.events_of(self.times))


def job_row(job: JobState) -> dict[str, Any]:
    """The row of a job in a table."""
    times = job.times
    return {
        "job": job.id,
        "status": job.status,
        "model": job.model,
        "group": job.group,
        "tenant": job.tenant,
        "created": time_text(times.get("created")),
        "finished": time_text(times.get("finished")),
        "error": job.error and job.error.code,
    }


@with_checked_arguments
class Job(JobState):
    """A job; `client.submit()` makes one, `client.job(id)` and `client.jobs()` find it again.

    >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris")
    >>> job.result()["class_name"]
    'setosa'
    >>> job.status
    'completed'
    """

    def __init__(self, server: RemoteServer, driver: Driver, view: View) -> None:
        super().__init__(view)
        self._server = server
        self._driver = driver

    def result(self, timeout: float | None = None, *, cancel_on_timeout: bool = False) -> Any:
        """Waits until the job has ended, and returns its result.

        `timeout` is in seconds; None is the client's own, `math.inf` waits without a limit. The
        job goes on when the time is out, unless `cancel_on_timeout`. The result is that of
        `Client.predict`: a dict per row for a model with labels, else numpy arrays
        `(rows, *dims)`.

        Raises JobFailed (`.job_error` has its code and message), JobCancelled, WaitTimeout,
        JobNotFound and JobExpired if it is no longer kept, and Forbidden for the job of another
        tenant.

        >>> client.submit([[5.1, 3.5, 1.4, 0.2]], "iris").result(timeout=10)["prediction"]
        0
        """
        self.wait(timeout, cancel_on_timeout=cancel_on_timeout)
        return views.outcome(self._view)

    def wait(self, timeout: float | None = None, *, cancel_on_timeout: bool = False) -> "Job":
        """Waits until the job has ended, and returns it, however it ended.

        The arguments are those of `result`. Raises WaitTimeout, JobNotFound and JobExpired.

        >>> client.submit([[5.1, 3.5, 1.4, 0.2]], "iris").wait().status
        'completed'
        """
        flow = waiting.wait(
            self._server,
            views.as_unfinished(self._view),
            waiting.deadline(self._server, timeout),
            cancel_on_timeout=cancel_on_timeout,
        )
        self._view = self._driver.run(flow)
        return self

    def refresh(self, wait_seconds: float = 0) -> "Job":
        """Reads its state again, and returns it; raises JobNotFound and JobExpired.

        Unless the job has ended, the server answers when it does, or after `wait_seconds`, at most
        60.

        >>> client.submit([[5.1, 3.5, 1.4, 0.2]], "iris").refresh().model
        'iris'
        """
        flow = jobs.read_job(self._server, self.id, wait_seconds, self.tenant)
        self._view = self._driver.run(flow)
        return self

    def cancel(self) -> "Job":
        """Cancels it, and returns it: cancelled if it waited, still processing if it runs.

        A running job ends as cancelled as soon as its worker stops it. Raises JobFinished if it
        has completed or failed already.

        >>> client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", delay_seconds=60).cancel().status
        'cancelled'
        """
        self._view = self._driver.run(jobs.cancel_job(self._server, self.id, self.tenant))
        return self

    def retry(self) -> "Job":
        """Runs it again under the same id, and returns it, pending.

        Raises JobNotRetryable unless it has failed or was cancelled.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", delay_seconds=60).cancel()
        >>> job.retry().cancel().status
        'cancelled'
        """
        self._view = self._driver.run(jobs.retry_job(self._server, self.id, self.tenant))
        return self

    def timeline(self) -> Timeline:
        """Reads what has happened to it: each delivery, where it ran, and when, with the seconds
        between.

        It is of the present round: a retry begins a new one. Raises JobNotFound and JobExpired.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris").wait()
        >>> job.timeline().events[-1].status
        'completed'
        """
        self._timeline = self._driver.run(jobs.read_timeline(self._server, self.id, self.tenant))
        return self._timeline

    def webhook(self) -> JobWebhook:
        """Reads its webhook: where it goes, and a delivery for each round that ended so.

        - `url`, `events`, and `deliveries`: each has `webhook_id`, `round`, `event`, `status`
          ("pending", "delivered", "gone" or "given_up"), `tries` and `next_at`.
        - `attempts` of a delivery: `at`, `status` (of the answer), `error` (why there was none) and
          `seconds`.

        Raises WebhookNotFound if it was submitted without one.

        >>> hook = {"url": "https://hook.invalid/", "events": ["failed"]}
        >>> client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", webhook=hook).webhook().deliveries
        []
        """
        return self._driver.run(jobs.read_webhook(self._server, self.id, self.tenant))

    def redeliver_webhook(self, event: WebhookEvent | None = None) -> JobWebhook:
        """Sends its last delivery again, or the last one of an event, and returns the webhook.

        The tries begin anew, at once, under the same `webhook-id`. Raises WebhookNotFound if there
        is no such delivery, and WebhooksFull.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", webhook="https://hook.invalid/")
        >>> [delivery.event for delivery in job.wait().redeliver_webhook().deliveries]
        ['completed']
        """
        flow = jobs.redeliver_webhook(self._server, self.id, event, self.tenant)
        return self._driver.run(flow)

    def purge(self) -> None:
        """Deletes it with its input and result; raises JobNotFinished until it has ended.

        >>> client.submit([[5.1, 3.5, 1.4, 0.2]], "iris").wait().purge()
        """
        self._driver.run(jobs.purge_job(self._server, self.id, self.tenant))

    def events(self) -> Iterator[Event]:
        """Yields each change as it happens, its present state first, until it has ended.

        The first event is a `snapshot`; the last has the status with which it ended, or is that
        snapshot. A stream that is cut is resumed at its last event. Raises ConnectionFailed if
        the server stays away, and JobNotFound.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris")
        >>> [event.data["status"] for event in job.events()][-1]
        'completed'
        """
        subscription = _events.EventSubscription(self._server, job_id=self.id)
        return _events.follow(self._driver, subscription)


@with_checked_arguments
@with_docstrings_of(Job)
class AsyncJob(JobState):
    """A `Job` whose methods are awaited; `await job` itself gives its result.

    `events()` is for `async for`.
    """

    def __init__(self, server: RemoteServer, driver: AsyncDriver, view: View) -> None:
        super().__init__(view)
        self._server = server
        self._driver = driver

    def __await__(self) -> Generator[Any, Any, Any]:
        """Waits until the job has ended, and gives its result or raises, as `result` does."""
        return self.result().__await__()

    async def result(self, timeout: float | None = None, *, cancel_on_timeout: bool = False) -> Any:
        """Waits until the job has ended, and returns or raises as `Job.result` does."""
        await self.wait(timeout, cancel_on_timeout=cancel_on_timeout)
        return views.outcome(self._view)

    async def wait(
        self, timeout: float | None = None, *, cancel_on_timeout: bool = False
    ) -> "AsyncJob":
        """Waits until the job has ended, and returns itself, however it ended.

        Raises WaitTimeout.
        """
        flow = waiting.wait(
            self._server,
            views.as_unfinished(self._view),
            waiting.deadline(self._server, timeout),
            cancel_on_timeout=cancel_on_timeout,
        )
        self._view = await self._driver.run(flow)
        return self

    async def refresh(self, wait_seconds: float = 0) -> "AsyncJob":
        """Reads its state again, and returns itself; raises JobNotFound and JobExpired."""
        flow = jobs.read_job(self._server, self.id, wait_seconds, self.tenant)
        self._view = await self._driver.run(flow)
        return self

    async def cancel(self) -> "AsyncJob":
        """Cancels it, and returns it: cancelled if it waited, still processing if it runs."""
        self._view = await self._driver.run(jobs.cancel_job(self._server, self.id, self.tenant))
        return self

    async def retry(self) -> "AsyncJob":
        """Runs it again under the same id, and returns it, pending."""
        self._view = await self._driver.run(jobs.retry_job(self._server, self.id, self.tenant))
        return self

    async def timeline(self) -> Timeline:
        """Reads what has happened to it, and when."""
        flow = jobs.read_timeline(self._server, self.id, self.tenant)
        self._timeline = await self._driver.run(flow)
        return self._timeline

    async def webhook(self) -> JobWebhook:
        """Reads its webhook: where it goes, and a delivery for each round that ended so."""
        return await self._driver.run(jobs.read_webhook(self._server, self.id, self.tenant))

    async def redeliver_webhook(self, event: WebhookEvent | None = None) -> JobWebhook:
        """Sends its last delivery again, or the last one of an event, and returns the webhook."""
        flow = jobs.redeliver_webhook(self._server, self.id, event, self.tenant)
        return await self._driver.run(flow)

    async def purge(self) -> None:
        """Deletes it with its input and result; raises JobNotFinished until it has ended."""
        await self._driver.run(jobs.purge_job(self._server, self.id, self.tenant))

    def events(self) -> AsyncIterator[Event]:
        """Yields each change as it happens, its present state first, until it has ended."""
        subscription = _events.EventSubscription(self._server, job_id=self.id)
        return _events.follow_async(self._driver, subscription)

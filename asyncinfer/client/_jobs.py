"""A job in hand: what it is, and what can be done with it."""

from collections.abc import AsyncIterator, Generator, Iterator
from datetime import datetime
from typing import Any, Final

from asyncinfer.client import _display, _events, _flows
from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._flows import View
from asyncinfer.client._protocol import Event
from asyncinfer.client._requests import Server
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.untrusted.printable import printable_line

_TIMES: Final = ("created_at", "started_at", "finished_at")


class JobState:
    """What a client last saw of a job; `refresh()` looks again."""

    def __init__(self, view: View) -> None:
        self._view = view

    @property
    def id(self) -> str:
        return str(self._view["job_id"])

    @property
    def status(self) -> str:
        """pending, processing, completed, failed or cancelled, as last seen."""
        return str(self._view["status"])

    @property
    def model(self) -> str | None:
        return self._view.get("model")

    @property
    def tenant(self) -> str | None:
        """Whose it is, where an operator asked over tenants; else None."""
        return self._view.get("tenant")

    @property
    def error(self) -> dict[str, Any] | None:
        """Why a failed job failed: its `code` and `message`."""
        return self._view.get("error")

    @property
    def waiting_for(self) -> WaitingFor | None:
        """Why it is not run now, as last seen; None while it only waits for its turn, or runs."""
        return _flows.waiting_for(self._view)

    @property
    def timeline(self) -> dict[str, datetime]:
        """When it was created, started and finished, as far as it has come."""
        return {
            name.removesuffix("_at"): datetime.fromisoformat(self._view[name])
            for name in _TIMES
            if self._view.get(name)
        }

    def as_dict(self) -> View:
        """All that the server said of it."""
        return dict(self._view)

    def __repr__(self) -> str:
        model = f" of {self.model}" if self.model else ""
        reason = f", {printable_line(self.waiting_for.message)}" if self.waiting_for else ""
        return f"<{type(self).__name__} {self.id}{model}: {self.status}{reason}>"

    def _repr_html_(self) -> str:
        return _display.job_card(self._view)


class Job(JobState):
    def __init__(self, server: Server, driver: Driver, view: View) -> None:
        super().__init__(view)
        self._server = server
        self._driver = driver

    def result(self, timeout: float | None = None, *, cancel_on_timeout: bool = False) -> Any:
        """Waits for the job and gives its result; raises JobFailed, JobCancelled or WaitTimeout.

        `timeout` in seconds; None is the client's own, `math.inf` waits for ever.
        """
        self.wait(timeout, cancel_on_timeout=cancel_on_timeout)
        return _flows.outcome(self._view)

    def wait(self, timeout: float | None = None, *, cancel_on_timeout: bool = False) -> "Job":
        """Waits until it has ended, however it ends; raises WaitTimeout."""
        over_at = _flows.over_at(self._server, timeout)
        flow = _flows.wait(
            self._server, _flows.doubted(self._view), over_at, cancel_on_timeout=cancel_on_timeout
        )
        self._view = self._driver.run(flow)
        return self

    def refresh(self) -> "Job":
        """Looks at it again."""
        self._view = self._driver.run(_flows.read(self._server, self.id, tenant=self.tenant))
        return self

    def cancel(self) -> "Job":
        """Ends it, waiting or running; raises JobFinished where it has ended already."""
        self._view = self._driver.run(_flows.cancel_job(self._server, self.id, self.tenant))
        return self

    def retry(self) -> "Job":
        """Runs it again, if it failed or was cancelled, under the same id."""
        self._view = self._driver.run(_flows.retry_job(self._server, self.id, self.tenant))
        return self

    def purge(self) -> None:
        """Deletes all of it, once it has ended."""
        self._driver.run(_flows.purge_job(self._server, self.id, self.tenant))

    def events(self) -> Iterator[Event]:
        """Each change as it happens, the present state first; ends with the job."""
        return _events.follow(self._driver, _events.Story(self._server, job_id=self.id))


class AsyncJob(JobState):
    """The same for `await`; awaiting the job itself gives its result."""

    def __init__(self, server: Server, driver: AsyncDriver, view: View) -> None:
        super().__init__(view)
        self._server = server
        self._driver = driver

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.result().__await__()

    async def result(self, timeout: float | None = None, *, cancel_on_timeout: bool = False) -> Any:
        """Waits for the job and gives its result; raises JobFailed, JobCancelled or WaitTimeout.

        `timeout` in seconds; None is the client's own, `math.inf` waits for ever.
        """
        await self.wait(timeout, cancel_on_timeout=cancel_on_timeout)
        return _flows.outcome(self._view)

    async def wait(
        self, timeout: float | None = None, *, cancel_on_timeout: bool = False
    ) -> "AsyncJob":
        """Waits until it has ended, however it ends; raises WaitTimeout."""
        over_at = _flows.over_at(self._server, timeout)
        flow = _flows.wait(
            self._server, _flows.doubted(self._view), over_at, cancel_on_timeout=cancel_on_timeout
        )
        self._view = await self._driver.run(flow)
        return self

    async def refresh(self) -> "AsyncJob":
        """Looks at it again."""
        self._view = await self._driver.run(_flows.read(self._server, self.id, tenant=self.tenant))
        return self

    async def cancel(self) -> "AsyncJob":
        """Ends it, waiting or running; raises JobFinished where it has ended already."""
        self._view = await self._driver.run(_flows.cancel_job(self._server, self.id, self.tenant))
        return self

    async def retry(self) -> "AsyncJob":
        """Runs it again, if it failed or was cancelled, under the same id."""
        self._view = await self._driver.run(_flows.retry_job(self._server, self.id, self.tenant))
        return self

    async def purge(self) -> None:
        """Deletes all of it, once it has ended."""
        await self._driver.run(_flows.purge_job(self._server, self.id, self.tenant))

    def events(self) -> AsyncIterator[Event]:
        """Each change as it happens, the present state first; ends with the job."""
        return _events.afollow(self._driver, _events.Story(self._server, job_id=self.id))

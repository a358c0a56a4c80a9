"""Groups: the progress of jobs that share a name."""

from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime
from typing import Any

import msgspec

from asyncinfer.client import _display, _events
from asyncinfer.client._answers import ClearedJobs, GroupCounts, GroupView
from asyncinfer.client._arguments import with_checked_arguments
from asyncinfer.client._docstrings import with_docstrings_of
from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._flows import operations
from asyncinfer.client._protocol import Event
from asyncinfer.client._requests import RemoteServer
from asyncinfer.schemas.webhook_views import GroupWebhook


class GroupState:
    """A group as a client last read it; `refresh()` reads it again."""

    def __init__(self, view: dict[str, Any]) -> None:
        self._view = view

    @property
    def _fields(self) -> GroupView:
        return msgspec.convert(self._view, GroupView)

    @property
    def name(self) -> str:
        """The `group` that the jobs were submitted with."""
        return self._fields.group

    @property
    def jobs(self) -> int:
        """The number of its jobs, ended ones included; at most the newest 1,000,000 count."""
        return self._fields.jobs

    @property
    def counts(self) -> GroupCounts:
        """The number of its jobs by state."""
        return self._fields.counts

    @property
    def progress(self) -> float:
        """The share of its jobs that have ended, 0 to 1."""
        return self._fields.progress

    @property
    def eta_seconds(self) -> float | None:
        """An estimate of the seconds until all jobs have ended; None if that is not known."""
        return self._fields.eta_seconds

    @property
    def closed(self) -> bool:
        """Whether it takes no more jobs."""
        return self._fields.closed

    @property
    def ended_at(self) -> datetime | None:
        """When all its jobs had ended; None before, and if it was closed without a webhook."""
        return self._fields.ended_at

    def as_dict(self) -> dict[str, Any]:
        """All that the server says of it.

        The keys are `group`, `jobs`, `counts`, `progress`, `eta_seconds`, `created_at` and
        `ended_at` (RFC 3339), `first_failed` (up to 10 ids of failed jobs) and `closed`.
        """
        return dict(self._view)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.jobs} jobs, {self.progress:.0%} ended>"

    def _repr_html_(self) -> str:
        """The card that a notebook shows."""
        return _display.group_card(self._view)


@with_checked_arguments
class Group(GroupState):
    """The jobs that were submitted with one `group`; `client.group(name)` gives it.

    >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs-group").wait()
    >>> client.group("docs-group").counts.failed
    0
    """

    def __init__(self, server: RemoteServer, driver: Driver, view: dict[str, Any]) -> None:
        super().__init__(view)
        self._server = server
        self._driver = driver

    def refresh(self) -> "Group":
        """Reads its state again, and returns it; raises GroupNotFound once it is no longer kept.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs-refresh")
        >>> group = client.group("docs-refresh")
        >>> job.wait().status, group.refresh().progress
        ('completed', 1.0)
        """
        self._view = self._driver.run(operations.group(self._server, self.name))
        return self

    def cancel(self) -> ClearedJobs:
        """Cancels all its unfinished jobs; returns how many.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs-cancel").wait()
        >>> client.group("docs-cancel").cancel()
        ClearedJobs(cancelled=0)
        """
        return self._driver.run(operations.cancel_group(self._server, self.name))

    def close(self, *, webhook: str | Mapping[str, Any] | None = None) -> "Group":
        """Lets no more jobs join it: a later submit raises GroupClosed. Returns it as it is then.

        A failed job may still be retried. `webhook`, a URL or a dict of `url` and `metadata`, is
        delivered once all jobs have ended, with the counts; it may also be given later. Raises
        GroupNotFound once it is no longer kept, GroupClosed if it has another webhook, and
        InvalidInput for a webhook that the server does not take.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs-close")
        >>> client.group("docs-close").close().closed
        True
        """
        self._driver.run(operations.close_group(self._server, self.name, webhook))
        return self.refresh()

    def webhook(self) -> GroupWebhook:
        """Reads its webhook: `url` and `deliveries`, which are as those of `Job.webhook()`.

        There is one once all jobs have ended. Raises WebhookNotFound if it was not closed with a
        webhook.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs-hook")
        >>> client.group("docs-hook").close(webhook="https://hook.invalid/").webhook().url
        'https://hook.invalid/'
        """
        return self._driver.run(operations.group_webhook(self._server, self.name))

    def redeliver_webhook(self) -> GroupWebhook:
        """Sends its webhook again, at once, under the same `webhook-id`, and returns the webhook.

        Raises WebhookNotFound before all jobs have ended, and WebhooksFull.

        >>> from time import sleep
        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs-again")
        >>> group = client.group("docs-again").close(webhook="https://hook.invalid/")
        >>> while not group.refresh().ended_at:
        ...     sleep(0.1)
        >>> [delivery.event for delivery in group.redeliver_webhook().deliveries]
        ['ended']
        """
        return self._driver.run(operations.redeliver_group_webhook(self._server, self.name))

    def events(self) -> Iterator[Event]:
        """Yields each change of its jobs as it happens; goes on until the loop is left.

        The first event is a `snapshot`, whose `data` is that of `as_dict()`; `done` comes
        whenever all jobs have ended. A stream that is cut is resumed at its last event. Raises
        ConnectionFailed if the server stays away.

        >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris", group="docs-events").wait()
        >>> next(client.group("docs-events").events()).name
        'snapshot'
        """
        subscription = _events.EventSubscription(self._server, group=self.name)
        return _events.follow(self._driver, subscription)


@with_checked_arguments
@with_docstrings_of(Group)
class AsyncGroup(GroupState):
    """A `Group` whose methods are awaited; `events()` is for `async for`."""

    def __init__(self, server: RemoteServer, driver: AsyncDriver, view: dict[str, Any]) -> None:
        super().__init__(view)
        self._server = server
        self._driver = driver

    async def refresh(self) -> "AsyncGroup":
        """Reads its state again, and returns itself; raises GroupNotFound."""
        self._view = await self._driver.run(operations.group(self._server, self.name))
        return self

    async def cancel(self) -> ClearedJobs:
        """Cancels all its unfinished jobs; returns how many."""
        return await self._driver.run(operations.cancel_group(self._server, self.name))

    async def close(self, *, webhook: str | Mapping[str, Any] | None = None) -> "AsyncGroup":
        """Lets no more jobs join it, and returns it as it is then."""
        await self._driver.run(operations.close_group(self._server, self.name, webhook))
        return await self.refresh()

    async def webhook(self) -> GroupWebhook:
        """Reads its webhook: where it goes, and what became of its delivery."""
        return await self._driver.run(operations.group_webhook(self._server, self.name))

    async def redeliver_webhook(self) -> GroupWebhook:
        """Sends its webhook again, at once, and returns the webhook."""
        flow = operations.redeliver_group_webhook(self._server, self.name)
        return await self._driver.run(flow)

    def events(self) -> AsyncIterator[Event]:
        """Yields each change of its jobs as it happens; goes on until the loop is left."""
        subscription = _events.EventSubscription(self._server, group=self.name)
        return _events.follow_async(self._driver, subscription)

"""The jobs that share a name: how far they are."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

from asyncinfer.client import _display, _events, _flows
from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._protocol import Event
from asyncinfer.client._requests import Server


class GroupState:
    """What a client last saw of a group; `refresh()` looks again."""

    def __init__(self, view: dict[str, Any]) -> None:
        self._view = view

    @property
    def name(self) -> str:
        return str(self._view["group"])

    @property
    def jobs(self) -> int:
        return int(self._view["jobs"])

    @property
    def counts(self) -> dict[str, int]:
        """How many of its jobs are in which state."""
        return dict(self._view["counts"])

    @property
    def progress(self) -> float:
        """Ended jobs of all, 0 to 1."""
        return float(self._view["progress"])

    @property
    def eta_seconds(self) -> float | None:
        return self._view.get("eta_seconds")

    def as_dict(self) -> dict[str, Any]:
        return dict(self._view)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.jobs} jobs, {self.progress:.0%} ended>"

    def _repr_html_(self) -> str:
        return _display.group_card(self._view)


class Group(GroupState):
    def __init__(self, server: Server, driver: Driver, view: dict[str, Any]) -> None:
        super().__init__(view)
        self._server = server
        self._driver = driver

    def refresh(self) -> "Group":
        self._view = self._driver.run(_flows.group(self._server, self.name))
        return self

    def cancel(self) -> dict[str, Any]:
        """Cancels all its jobs that wait or run: how many were, how many were told to stop."""
        return self._driver.run(_flows.cancel_group(self._server, self.name))

    def events(self) -> Iterator[Event]:
        """Each change of its jobs as it happens; `done` whenever all have ended."""
        return _events.follow(self._driver, _events.Story(self._server, group=self.name))


class AsyncGroup(GroupState):
    def __init__(self, server: Server, driver: AsyncDriver, view: dict[str, Any]) -> None:
        super().__init__(view)
        self._server = server
        self._driver = driver

    async def refresh(self) -> "AsyncGroup":
        self._view = await self._driver.run(_flows.group(self._server, self.name))
        return self

    async def cancel(self) -> dict[str, Any]:
        """Cancels all its jobs that wait or run: how many were, how many were told to stop."""
        return await self._driver.run(_flows.cancel_group(self._server, self.name))

    def events(self) -> AsyncIterator[Event]:
        """Each change of its jobs as it happens; `done` whenever all have ended."""
        return _events.afollow(self._driver, _events.Story(self._server, group=self.name))

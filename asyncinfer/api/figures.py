"""What one API process counts of its requests."""

from collections.abc import Mapping
from typing import Final, TypeAlias

from asyncinfer.monitoring.counts import OTHER, Counts, Labels
from asyncinfer.monitoring.histogram import SECONDS, Histogram

REQUEST_LABELS: Final = ("method", "route", "status", "wait")

_ABANDONED_STATUS: Final = 499
"""The status of a request whose client has gone before its answer, as proxies log it."""

RequestKey: TypeAlias = tuple[str | None, str, int | None, bool]
"""Of a request: a method that its route has, else None; the template of its path; the status of its
answer, None if its client has gone; whether it asked to wait for a job."""


class RequestFigures:
    """Requests by route and status, and refusals by error code. One object for each API process;
    its methods are called in the event loop."""

    def __init__(self) -> None:
        self.refusals = Counts()
        """By the code of the error: requests, and lines of bulk requests."""
        self.swept_jobs = Counts()
        """By model, outcome and code of the error: jobs that sweeps of this process failed."""
        self._requests: dict[RequestKey, Histogram] = {}

    def answered(self, request: RequestKey, seconds: float) -> None:
        """Counts a request, and the seconds until its answer was made."""
        histogram = self._requests.get(request) or self.of(request)
        histogram.observe(seconds)

    def of(self, request: RequestKey) -> Histogram:
        """The seconds of such requests, for who counts many of them."""
        # Bounded: routes and methods are those of the table, statuses those of errors.
        return self._requests.setdefault(request, Histogram.of(SECONDS))

    def refused(self, code: str) -> None:
        """Counts a request or a line that was answered with an error."""
        self.refusals.add((code,))

    def request_seconds(self) -> Mapping[Labels, Histogram]:
        """By `REQUEST_LABELS`, how long requests took."""
        return {
            (
                method or OTHER,
                route,
                str(status or _ABANDONED_STATUS),
                "yes" if waited else "no",
            ): histogram
            for (method, route, status, waited), histogram in self._requests.items()
        }

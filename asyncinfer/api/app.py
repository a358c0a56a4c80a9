"""The ASGI application, which routes requests and turns every error into a reply."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache
from typing import Any, NoReturn

import anyio
import msgspec
from starlette.routing import Route as StarletteRoute
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from asyncinfer.api.access_log import answer_and_log
from asyncinfer.api.admission import reach_of
from asyncinfer.api.answer_sizes import AnswerSizes
from asyncinfer.api.audit import note_refusal
from asyncinfer.api.catalog import Catalog
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.figures import RequestFigures
from asyncinfer.api.guard import Guard
from asyncinfer.api.http.authority import authority_of
from asyncinfer.api.http.body import discard
from asyncinfer.api.http.byte_budget import SMALL_BODY_BYTES, ByteBudget, Reservation
from asyncinfer.api.http.header_fields import read_fields
from asyncinfer.api.http.messages import (
    ABORT_CONNECTION,
    REQUEST_ID,
    ClientGone,
    ClientTooSlow,
    Reply,
    Request,
    Stream,
    StreamBroken,
    asked_to_wait,
    end_reply,
    read_query,
    send_large_reply,
    send_reply,
    send_stream,
)
from asyncinfer.api.http.problems import internal_error, problem_reply
from asyncinfer.api.live.event_text import EventTexts
from asyncinfer.api.live.feed import Feed
from asyncinfer.api.live.inbox import Inbox
from asyncinfer.api.openapi import document
from asyncinfer.api.queue_looks import QueueLooks
from asyncinfer.api.routes import ROUTES, Route
from asyncinfer.api.sending import sending_webhooks
from asyncinfer.api.services import Services
from asyncinfer.api.wait_reasons import WaitReasons
from asyncinfer.errors import (
    BodyTooLarge,
    Forbidden,
    InternalError,
    MethodNotAllowed,
    RedisUnavailable,
    RequestError,
    RouteNotFound,
    StorageFull,
    TooManyDownloads,
    TooManyUploads,
)
from asyncinfer.monitoring.figures import Figures
from asyncinfer.processes.memory import resident_bytes
from asyncinfer.processes.outage import report_of
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.audit import AuditEntries
from asyncinfer.repository.closed_groups import ClosedGroups, follow_closed_groups
from asyncinfer.repository.failed_jobs_log import FailedJobsLog
from asyncinfer.repository.inspect.audit_log import AuditLog
from asyncinfer.repository.inspect.dead_letters import DeadLetters
from asyncinfer.repository.inspect.groups import Groups
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.inspect.selection import Selection
from asyncinfer.repository.inspect.statistics import Statistics
from asyncinfer.repository.inspect.webhooks import WebhookInspection
from asyncinfer.repository.operations import Operations
from asyncinfer.repository.outbox import Outbox
from asyncinfer.repository.reaper import reap_forever
from asyncinfer.repository.rights import check_start
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import Submissions
from asyncinfer.repository.unserved_models import UnservedModels
from asyncinfer.webhooks.checks import WebhookChecks
from asyncinfer.webhooks.figures import WebhookFigures

_log = logging.getLogger(__name__)


def create_app(config: ApiConfig) -> "Api":
    """Makes an API, which connects to Redis when its lifespan begins."""
    return Api(config)


class Api:
    """Answers requests within its lifespan, which a server or `async with app.lifespan()` runs."""

    def __init__(self, config: ApiConfig) -> None:
        self.config = config
        self._guard = Guard(config)
        self._webhook_checks = WebhookChecks(
            config.webhooks, needs_secret=config.api_keys is not None
        )
        self._services: Services | None = None
        self.request_figures = RequestFigures()
        self.clock = time.monotonic
        """Seconds; within the lifespan that of the event loop, which uvloop reads once for each of
        its turns: to read the system's for each request took 2 % of the CPU time of a submit."""
        self.uploads = ByteBudget(
            max(config.max_inflight_bytes, config.max_body_bytes, config.max_json_bytes),
            body_seconds=config.body_timeout_seconds,
            wait_seconds=config.room_wait_seconds,
        )
        self.downloads = ByteBudget(
            config.max_inflight_bytes,
            body_seconds=config.body_timeout_seconds,
            wait_seconds=config.room_wait_seconds,
            error=TooManyDownloads,
        )
        resources = {path: Resource(path, routes, self) for path, routes in _by_path(ROUTES)}
        self._by_plain_path = {
            path: resource for path, resource in resources.items() if "{" not in path
        }
        """Resources whose path has no parameters, which need no router: that took 9 % of the API's
        CPU time for a submit."""
        self._router = Router(
            [StarletteRoute(path, resource) for path, resource in resources.items()],
            redirect_slashes=False,
            default=_no_such_route,
            lifespan=lambda _: self.lifespan(),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers an HTTP request; the router handles other ASGI scopes. Every exception becomes a
        reply, or the end of the connection if the answer has begun; none is raised."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
        elif self.config.access_log:
            await answer_and_log(self._answer_safely, scope, receive, send)
        else:
            await self._answer_safely(scope, receive, send)

    async def _answer_safely(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers an HTTP request as `__call__` does."""
        try:
            await self._resource_for(scope)(scope, receive, send)
        except ClientGone:
            return
        except ClientTooSlow as error:
            _log.info("%s was aborted: %s", _about(scope), error, extra=_fields(scope))
            if abort := scope.get("state", {}).get(ABORT_CONNECTION):
                abort()
        except StreamBroken:
            # The server closes a connection whose answer is incomplete, which tells the client.
            _log.exception(
                "%s failed while its answer was sent", _about(scope), extra=_fields(scope)
            )
        except (BodyTooLarge, TooManyUploads) as error:
            await send_reply(self.error_reply(error, scope), scope, send, more=True)
            await discard(receive, dict(scope["headers"]))
            await end_reply(send)
        except Exception as error:
            await send_reply(self.error_reply(error, scope), scope, send)

    def error_reply(self, error: Exception, scope: Scope) -> Reply:
        """The reply for an error of a request, which is counted; one that is no RequestError is
        logged. Of the ordinary and the short way."""
        if not isinstance(error, RequestError):
            _log.error("%s failed", _about(scope), extra=_fields(scope), exc_info=error)
            error = internal_error()
        self.request_figures.refused(error.code)
        return problem_reply(error, scope["path"])

    def _resource_for(self, scope: Scope) -> ASGIApp:
        """Returns the application for the request's path, which may be the router or the one for
        unknown paths. Empties the scope's `path_params` if the path has no parameters."""
        if resource := self._by_plain_path.get(scope["path"]):
            scope["path_params"] = {}
            if b"%" not in scope["raw_path"]:
                return resource
        if b"%" in scope["raw_path"] and _cannot_match(scope):
            return _no_such_route
        return resource or self._router

    async def answer(self, route: Route, scope: Scope, receive: Receive) -> Reply | Stream:
        """Admits the request, calls the route's handler and returns its answer; a stream to a
        caller with a key also ends when the key is revoked. Raises RequestError, ClientGone or what
        else the handler raises."""
        request = self.admit(route, scope, read_fields(scope["headers"]), receive)
        try:
            check_scope(route, request)
        except Forbidden as error:
            await note_refusal(self.services, request, route.method, route.path, error)
            raise
        try:
            answer = await route.handler(self.services, request)
        finally:
            request.release_body()
        if isinstance(answer, Stream) and request.admission.revocable:
            return msgspec.structs.replace(answer, revoked=request.admission.revoked)
        return answer

    def admit(
        self, route: Route, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive
    ) -> Request[Any]:
        """Checks the head, the caller's key and the query of a request, whose scope `check_scope`
        checks; reads no body. `headers` are the scope's, by name. Raises RequestError."""
        admission = self._guard.admit(route.scope, scope, headers)
        return Request(
            scope,
            receive,
            headers=headers,
            query=read_query(scope, route.query),
            admission=admission,
            reach=admission.own,
            uploads=self.uploads,
            downloads=self.downloads,
        )

    @property
    def services(self) -> Services:
        """Those of the lifespan, which must have been started."""
        assert self._services is not None, "the lifespan has not been started"
        return self._services

    async def send_large(
        self, reply: Reply, reservation: Reservation, scope: Scope, send: Send
    ) -> None:
        """Sends a large answer, and releases its reservation once it is not in memory any more.
        Raises ClientTooSlow."""
        try:
            await send_large_reply(reply, scope, send, self.config.body_timeout_seconds)
        finally:
            reservation.release()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Opens the store and runs the background tasks. Raises StartError if the Redis server
        cannot be used, or its default model is another one."""
        config = self.config
        async with Store.open(
            config.redis_url,
            queue_name=config.queue_name,
            policy=config.policy,
            name="api",
            report=report_of(config.redis_url),
        ) as store:
            await _check_redis(store, config.default_model)
            self._services = _services(store, config, self.request_figures, self._webhook_checks)
            self.clock = asyncio.get_running_loop().time
            await self._services.catalog.refresh()
            await self._services.worker_snapshot.refresh()
            async with (
                sending_webhooks(self._services),
                anyio.create_task_group() as group,
            ):
                group.start_soon(self._services.submissions.run)
                group.start_soon(self._services.inbox.run)
                group.start_soon(self._services.feed.run)
                group.start_soon(self._services.catalog.run)
                group.start_soon(self._services.worker_snapshot.run)
                group.start_soon(self._services.queue_looks.run)
                group.start_soon(reap_forever, store, self._services.failed_jobs)
                group.start_soon(follow_closed_groups, store)
                if self._guard.keys:
                    group.start_soon(self._guard.keys.run)
                try:
                    yield
                finally:
                    with anyio.CancelScope(shield=True):
                        await self.stop_waiting()
                    group.cancel_scope.cancel()
            self._services.failed_jobs.flush()

    @property
    def store(self) -> Store:
        """The connections to Redis, within the lifespan."""
        return self.services.store

    def figures(self) -> Figures:
        """What this process has counted since its start, and what it holds now. Call it within the
        lifespan, in the event loop."""
        return figures_of(self.services)

    async def stop_waiting(self) -> None:
        """Answers every client that waits for a job with the job as it is now, and ends all event
        streams; later waits end at once. May be called twice; does nothing before the lifespan."""
        if self._services:
            await self._services.feed.close()
            await self._services.inbox.close()


class Resource:
    """The application of one path: calls the route for a request's method, for HEAD that of GET."""

    def __init__(self, path: str, routes: Sequence[Route], api: Api) -> None:
        """`path` is the template of the table."""
        self._path = path
        self._api = api
        self._figures = api.request_figures
        self._routes: dict[str, Route] = {route.method: route for route in routes}
        if "GET" in self._routes:
            self._routes["HEAD"] = self._routes["GET"]
        self._allow = ", ".join(sorted(self._routes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the route's answer, and counts the request. Raises MethodNotAllowed, and what
        `Api.answer` and the sending raise."""
        started_at = self._api.clock()
        method = scope["method"]
        route = self._routes.get(method)
        try:
            if route is None:
                self._refuse_method(scope)
            answer = await self._api.answer(route, scope, receive)
        except BaseException as error:
            known = method if route else None
            key = (known, self._path, _status_of(error), asked_to_wait(scope))
            self._figures.answered(key, self._api.clock() - started_at)
            raise
        # Not the time to send it, which is as long as the client needs to read it, or as there are
        # events.
        key = (method, self._path, answer.status, asked_to_wait(scope))
        self._figures.answered(key, self._api.clock() - started_at)
        if isinstance(answer, Stream):
            await send_stream(answer, scope, send)
            return
        if answer.reservation:
            await self._api.send_large(answer, answer.reservation, scope, send)
            return
        size_bytes = len(answer.body)
        if size_bytes <= SMALL_BODY_BYTES or not route.has_large_answers:
            await send_reply(answer, scope, send)
        elif reservation := self._api.downloads.try_reserve(size_bytes):
            await self._api.send_large(answer, reservation, scope, send)
        else:
            # It is made again once there is room: while it waits it must not be in memory.
            del answer
            reservation = await self._api.downloads.reserve_complete(size_bytes)
            await self._answer_again(route, reservation, scope, receive, send)

    def _refuse_method(self, scope: Scope) -> NoReturn:
        """Raises MethodNotAllowed, or InvalidHeader for an invalid head."""
        check_head(scope)
        raise MethodNotAllowed(
            f"{scope['method']} is not allowed here; use {self._allow}.",
            headers=[("allow", self._allow)],
        )

    async def _answer_again(
        self, route: Route, reservation: Reservation, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answers a request whose first answer had no room; releases the reservation. Raises as
        `__call__` does."""
        try:
            answer = await self._api.answer(route, scope, receive)
            assert isinstance(answer, Reply), "no route with large answers has streams"
            await self._api.send_large(answer, reservation, scope, send)
        finally:
            reservation.release()


def check_scope(route: Route, request: Request[Any]) -> None:
    """Sets whose jobs the request is about. Raises Forbidden if its key lacks the route's scope, or
    that of another tenant."""
    tenant = getattr(request.query, "tenant", None)
    request.reach = reach_of(request.admission, route.scope, tenant)


def _status_of(error: BaseException) -> int | None:
    """The status of the answer to a request that raised this; None if its client has gone."""
    if isinstance(error, RequestError):
        return error.status
    is_ours = isinstance(error, Exception) and not isinstance(error, ClientGone)
    return InternalError.status if is_ours else None


def check_head(scope: Scope) -> None:
    """Raises InvalidHeader for a head that no server may accept, whatever its path or method (RFC
    9112, 3.2): without a valid Host, or with a single-valued field sent twice."""
    authority_of(scope, read_fields(scope["headers"]))


def _about(scope: Scope) -> str:
    """A request in a line of the log."""
    return f"{scope['method']} {scope['path']!r} (request {scope.get(REQUEST_ID, '-')})"


def _fields(scope: Scope) -> dict[str, str]:
    """The fields of a line on a request."""
    request_id = scope.get(REQUEST_ID, "")
    return {"method": scope["method"], "path": scope["path"], "request_id": request_id}


def _by_path(routes: Iterable[Route]) -> Iterable[tuple[str, list[Route]]]:
    """Each path with its routes, both in the order of the table."""
    paths: dict[str, list[Route]] = {}
    for route in routes:
        paths.setdefault(route.path, []).append(route)
    return paths.items()


def _cannot_match(scope: Scope) -> bool:
    """Whether the router would match a path that it must not match.

    An encoded slash separates nothing (RFC 3986, 2.2), but the router sees it decoded: a proxy that
    keeps callers from `/jobs/retry` lets `/jobs%2Fretry` pass. And the router's patterns end in
    `$`, which also matches before a line end.
    """
    return b"%2f" in scope["raw_path"].lower() or scope["path"].endswith("\n")


async def _no_such_route(scope: Scope, receive: Receive, send: Send) -> None:
    """The application for unknown paths. Raises RouteNotFound, or InvalidHeader for an invalid
    head."""
    check_head(scope)
    raise RouteNotFound("There is nothing at this path; GET / and /openapi.json list the routes.")


async def _check_redis(store: Store, default_model: str | None) -> None:
    """Raises a StartError if the Redis server cannot keep jobs safely, or jobs or workers use
    another default model. The API starts without a server that does not answer yet or is full. None
    means that no default model is configured, which is not checked."""
    with suppress(RedisUnavailable, StorageFull):
        _log.info("Connected to %s", await check_start(store))
        if default_model:
            await UnservedModels(store).claim_default_model(default_model)


def _services(
    store: Store, config: ApiConfig, request_figures: RequestFigures, webhook_checks: WebhookChecks
) -> Services:
    """Makes the services of one API process; connects to nothing and starts no task."""
    submissions = Submissions(store)
    operations = Operations(store)
    inspection = Inspection(store)
    catalog = Catalog(inspection, store, config.default_model, config.own_worker_since_ms)
    wait_reasons = WaitReasons(catalog.worker_snapshot, store, lambda: catalog.default_model)
    return Services(
        config=config,
        request_figures=request_figures,
        store=store,
        submissions=submissions,
        announcements=Announcements(store),
        inspection=inspection,
        dead_letters=DeadLetters(store),
        statistics=Statistics(store),
        selection=Selection(store),
        operations=operations,
        groups=Groups(store, operations),
        closed_groups=ClosedGroups(store),
        outbox=Outbox(store),
        webhook_inspection=WebhookInspection(store),
        audit_entries=AuditEntries(store),
        audit_log=AuditLog(store),
        failed_jobs=FailedJobsLog(
            store,
            lambda queue: keys.model_of(store.queue_name, queue, catalog.default_model),
            request_figures.swept_jobs,
        ),
        inbox=Inbox(store, submissions),
        feed=Feed(store),
        event_texts=EventTexts(catalog, wait_reasons),
        answer_sizes=AnswerSizes(),
        webhook_checks=webhook_checks,
        webhook_figures=WebhookFigures(),
        long_reads=anyio.CapacityLimiter(1),
        catalog=catalog,
        worker_snapshot=catalog.worker_snapshot,
        wait_reasons=wait_reasons,
        queue_looks=QueueLooks(store, catalog.worker_snapshot, lambda: catalog.default_model),
        openapi=_document(),
    )


def figures_of(services: Services) -> Figures:
    """What these services have counted, and hold now."""
    counts = services.request_figures
    return Figures(
        counts={
            "asyncinfer_submits": dict(services.submissions.accepted),
            "asyncinfer_refusals": dict(counts.refusals),
            "asyncinfer_jobs": dict(counts.swept_jobs),
            "asyncinfer_redis_errors": dict(services.store.errors),
            "asyncinfer_webhook_tries": dict(services.webhook_figures.tries),
            "asyncinfer_api_cpu_seconds": {(): time.process_time()},
        },
        histograms={
            "asyncinfer_request_seconds": dict(counts.request_seconds()),
            "asyncinfer_webhook_seconds": dict(services.webhook_figures.try_seconds),
        },
        gauges={
            "asyncinfer_api_processes": {(): 1},
            "asyncinfer_api_resident_memory_bytes": {(): resident_bytes() or 0},
            "asyncinfer_streams_open": {(): services.feed.count},
            "asyncinfer_waits_open": {(): services.inbox.waiters},
        },
    )


@cache
def _document() -> bytes:
    """The OpenAPI document as JSON, made once per process."""
    return document(ROUTES)

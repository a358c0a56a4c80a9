"""The ASGI application: the route table behind one edge where every error is answered."""

import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import cache

import anyio
import msgspec
from starlette.routing import Route as StarletteRoute
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from asyncinfer.api.admission import reach
from asyncinfer.api.answer_sizes import AnswerSizes
from asyncinfer.api.catalog import Catalog
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.guard import Guard
from asyncinfer.api.http.authority import authority_of
from asyncinfer.api.http.body import discard
from asyncinfer.api.http.header_fields import read_fields
from asyncinfer.api.http.messages import (
    BREAK_OFF,
    ClientGone,
    ClientTooSlow,
    Reply,
    Request,
    Stream,
    StreamBroken,
    end_reply,
    read_query,
    send_reply,
    send_stream,
)
from asyncinfer.api.http.problems import internal_error, problem_reply
from asyncinfer.api.live.event_text import EventTexts
from asyncinfer.api.live.feed import Feed
from asyncinfer.api.live.inbox import Inbox
from asyncinfer.api.openapi import document
from asyncinfer.api.routes import ROUTES, Route
from asyncinfer.api.services import Services
from asyncinfer.api.wait_reasons import Reasons
from asyncinfer.errors import (
    BodyTooLarge,
    MethodNotAllowed,
    RedisUnavailable,
    RequestError,
    RouteNotFound,
    StorageFull,
)
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.inspect.dead_letters import DeadLetters
from asyncinfer.repository.inspect.groups import Groups
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.inspect.selection import Selection
from asyncinfer.repository.inspect.statistics import Observation
from asyncinfer.repository.leftovers import Leftovers
from asyncinfer.repository.operations import Operations
from asyncinfer.repository.reaper import reap_forever
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import Submissions

_log = logging.getLogger(__name__)


def create_app(config: ApiConfig) -> "Api":
    return Api(config)


class Api:
    """Answers within its lifespan, which a server runs, or `async with app.lifespan():`."""

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        self._guard = Guard(config)
        self._services: Services | None = None
        resources = {path: Resource(routes, self) for path, routes in _by_path(ROUTES)}
        self._plain = {path: one for path, one in resources.items() if "{" not in path}
        """Paths without parameters, which need no search."""
        self._router = Router(
            [StarletteRoute(path, resource) for path, resource in resources.items()],
            redirect_slashes=False,
            default=_no_such_route,
            lifespan=lambda _: self.lifespan(),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        try:
            await self._at(scope)(scope, receive, send)
        except ClientGone:
            return
        except ClientTooSlow as error:
            _log.info("%s %r is broken off: %s", scope["method"], scope["path"], error)
            if break_off := scope.get("state", {}).get(BREAK_OFF):
                break_off()
        except StreamBroken:
            # A server closes a connection whose answer was not finished: that tells the client.
            _log.exception("%s %r broke off", scope["method"], scope["path"])
        except BodyTooLarge as error:
            await send_reply(problem_reply(error, scope["path"]), scope, send, more=True)
            await discard(receive, dict(scope["headers"]))
            await end_reply(send)
        except RequestError as error:
            await send_reply(problem_reply(error, scope["path"]), scope, send)
        except Exception:
            _log.exception("%s %r failed", scope["method"], scope["path"])
            await send_reply(problem_reply(internal_error(), scope["path"]), scope, send)

    def _at(self, scope: Scope) -> ASGIApp:
        """What answers at the path of a request."""
        if resource := self._plain.get(scope["path"]):
            scope["path_params"] = {}
            if b"%" not in scope["raw_path"]:
                return resource
        if b"%" in scope["raw_path"] and _is_no_route(scope):
            return _no_such_route
        return resource or self._router

    async def answer(self, route: Route, scope: Scope, receive: Receive) -> Reply | Stream:
        assert self._services is not None, "the lifespan has not been started"
        headers = read_fields(scope["headers"])
        admission = self._guard.admit(route.scope, scope, headers)
        query = read_query(scope, route.query)
        about = reach(admission, route.scope, getattr(query, "tenant", None))
        request = Request(
            scope, receive, headers=headers, query=query, admission=admission, reach=about
        )
        answer = await route.handler(self._services, request)
        if isinstance(answer, Stream) and admission.revocable:
            return msgspec.structs.replace(answer, revoked=admission.revoked)
        return answer

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        config = self._config
        async with Store.open(
            config.redis_url, queue_name=config.queue_name, policy=config.policy, name="api"
        ) as store:
            await _introduce(store, config.default_model)
            self._services = _services(store, config)
            await self._services.catalog.refresh()
            await self._services.workforce.refresh()
            async with anyio.create_task_group() as group:
                group.start_soon(self._services.submissions.run)
                group.start_soon(self._services.inbox.run)
                group.start_soon(self._services.feed.run)
                group.start_soon(self._services.catalog.run)
                group.start_soon(self._services.workforce.run)
                group.start_soon(reap_forever, store)
                if self._guard.keys:
                    group.start_soon(self._guard.keys.run)
                try:
                    yield
                finally:
                    with anyio.CancelScope(shield=True):
                        await self.stop_waiting()
                    group.cancel_scope.cancel()

    async def stop_waiting(self) -> None:
        """Answers every client that waits for a job with the job as it is now, and ends what
        goes on for as long as its client stays."""
        if self._services:
            await self._services.feed.close()
            await self._services.inbox.close()


class Resource:
    """One path: finds the route for a request's method."""

    def __init__(self, routes: Sequence[Route], api: Api) -> None:
        self._api = api
        self._routes: dict[str, Route] = {route.method: route for route in routes}
        if "GET" in self._routes:
            self._routes["HEAD"] = self._routes["GET"]
        self._allow = ", ".join(sorted(self._routes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["method"])
        if route is None:
            check_head(scope)
            raise MethodNotAllowed(
                f"{scope['method']} is not possible here; use {self._allow}.",
                headers=[("allow", self._allow)],
            )
        answer = await self._api.answer(route, scope, receive)
        if isinstance(answer, Stream):
            await send_stream(answer, scope, send)
        else:
            await send_reply(answer, scope, send)


def check_head(scope: Scope) -> None:
    """Raises InvalidHeader for a head that no server may take, whatever the request is for
    (RFC 9112, 3.2)."""
    authority_of(scope, read_fields(scope["headers"]))


def _by_path(routes: Iterable[Route]) -> Iterable[tuple[str, list[Route]]]:
    paths: dict[str, list[Route]] = {}
    for route in routes:
        paths.setdefault(route.path, []).append(route)
    return paths.items()


def _is_no_route(scope: Scope) -> bool:
    """An encoded slash separates nothing (RFC 3986, 2.2), but decoded it would: a proxy that keeps
    callers from `/jobs/retry` lets `/jobs%2Fretry` pass. And the router's patterns end in `$`,
    which also matches before a line end."""
    return b"%2f" in scope["raw_path"].lower() or scope["path"].endswith("\n")


async def _no_such_route(scope: Scope, receive: Receive, send: Send) -> None:
    check_head(scope)
    raise RouteNotFound("There is nothing at this path; GET / and /openapi.json list what is.")


async def _introduce(store: Store, default_model: str | None) -> None:
    """Refuses a server that cannot keep the promise. One that is not there yet may come."""
    try:
        _log.info("Connected to %s", await store.check_server())
        if default_model:
            await Leftovers(store).claim_default_model(default_model)
    except (RedisUnavailable, StorageFull) as error:
        _log.warning("%s The API starts without it and is ready once it answers.", error.detail)


def _services(store: Store, config: ApiConfig) -> Services:
    submissions = Submissions(store)
    operations = Operations(store)
    inspection = Inspection(store)
    catalog = Catalog(inspection, store, config.default_model, config.own_worker_since_ms)
    reasons = Reasons(catalog.workforce, store, lambda: catalog.default_model)
    return Services(
        config=config,
        store=store,
        submissions=submissions,
        announcements=Announcements(store),
        inspection=inspection,
        dead_letters=DeadLetters(store),
        observation=Observation(store),
        selection=Selection(store),
        operations=operations,
        groups=Groups(store, operations),
        inbox=Inbox(store, submissions),
        feed=Feed(store),
        event_texts=EventTexts(catalog, reasons),
        answer_sizes=AnswerSizes(),
        long_reads=anyio.CapacityLimiter(1),
        catalog=catalog,
        workforce=catalog.workforce,
        reasons=reasons,
        openapi=_document(),
    )


@cache
def _document() -> bytes:
    return document(ROUTES)

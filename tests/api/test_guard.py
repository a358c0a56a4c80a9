"""The entry check: Host, Origin, API keys, tenants."""

from pathlib import Path

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.api import guard
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.routes import ROUTES, Route
from asyncinfer.errors import KeyFileRefused
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store

from .harness import (
    KEYS,
    QUEUE,
    ROW,
    ManualWorker,
    announce,
    assert_problem,
    client_of,
    running,
    submit,
)

# --- Host and Origin -------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"])
async def test_the_api_answers_as_localhost(api: httpx2.AsyncClient, host: str) -> None:
    assert (await api.get("/", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.1", "[::2]"])
async def test_a_name_made_to_point_here_is_refused(
    api: httpx2.AsyncClient, server: redis.Redis, host: str
) -> None:
    assert_problem(await api.get("/", headers={"host": host}), 403, "host_refused")
    reply = await api.post("/predict", json={"data": ROW}, headers={"host": host})
    assert_problem(reply, 403, "host_refused")
    assert server.llen(QUEUE) == 0


async def test_more_hosts_can_be_allowed(config: ApiConfig, store: Store) -> None:
    named = msgspec.structs.replace(config, allowed_hosts=("api.example",))
    async with running(named) as port, client_of(port) as client:
        assert (await client.get("/", headers={"host": "api.example"})).status_code == 200
        assert (await client.get("/", headers={"host": "b.example"})).status_code == 403


async def test_bound_to_every_address_it_answers_to_addresses_but_not_to_names(
    config: ApiConfig, store: Store
) -> None:
    public = msgspec.structs.replace(config, host="0.0.0.0")
    async with running(public) as port, client_of(port) as client:
        assert (await client.get("/", headers={"host": "10.1.2.3:8000"})).status_code == 200
        assert (await client.get("/", headers={"host": "[fd00::1]"})).status_code == 200
        assert (await client.get("/", headers={"host": "evil.example"})).status_code == 403


async def test_an_invalid_host_is_refused_even_where_any_host_is_allowed(
    config: ApiConfig, store: Store
) -> None:
    open_to_all = msgspec.structs.replace(config, allowed_hosts=("*",))
    async with running(open_to_all) as port, client_of(port) as client:
        assert (await client.get("/", headers={"host": "any.example:80"})).status_code == 200
        for host in ("user@any.example", "any.example:port", "any example"):
            assert_problem(await client.get("/", headers={"host": host}), 400, "invalid_header")


async def test_preferences_may_come_in_several_lines(api: httpx2.AsyncClient) -> None:
    twice = [("host", "localhost"), ("prefer", "respond-async"), ("prefer", "wait=0")]
    reply = await api.post("/predict", json={"data": ROW}, headers=twice)
    assert reply.headers["preference-applied"] == "wait=0"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", ""])
async def test_a_script_of_another_page_changes_nothing(
    api: httpx2.AsyncClient, server: redis.Redis, origin: str
) -> None:
    headers = {"origin": origin}
    job_id = await submit(api)
    for reply in (
        await api.post("/predict", json={"data": ROW}, headers=headers),
        await api.delete(f"/job/{job_id}", headers=headers),
        await api.post(f"/job/{job_id}/retry", headers=headers),
    ):
        assert_problem(reply, 403, "origin_refused")
    assert (await api.get("/jobs", headers=headers)).status_code == 200
    assert server.llen(QUEUE) == 1


async def test_pages_of_this_server_and_of_allowed_origins_may_submit(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    friendly = msgspec.structs.replace(config, allowed_origins=("https://app.example",))
    async with running(friendly) as port, client_of(port) as client:
        for origin in (f"http://127.0.0.1:{port}", "https://app.example"):
            await submit(client, headers={"origin": origin})


# --- API keys --------------------------------------------------------------------------------


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _example(route: Route, job_id: str = "x") -> str:
    return route.path.replace("{id}", job_id).replace("{model}", "iris")


async def _call(client: httpx2.AsyncClient, route: Route, job_id: str = "x") -> httpx2.Response:
    body = {"data": ROW} if route.bodies else None
    async with client.stream(route.method, _example(route, job_id), json=body) as reply:
        if not reply.headers["content-type"].startswith("text/event-stream"):
            await reply.aread()
    return reply


async def test_every_route_but_the_open_ones_needs_a_key(two_tenant_port: int) -> None:
    async with (
        client_of(two_tenant_port) as nobody,
        client_of(two_tenant_port, **bearer("guess")) as guesser,
    ):
        for route in ROUTES:
            if route.scope is None:
                assert (await _call(nobody, route)).status_code == 200
                continue
            for client in (nobody, guesser):
                reply = await _call(client, route)
                assert_problem(reply, 401, "unauthorized")
                assert reply.headers["www-authenticate"] == "Bearer"


async def test_every_route_needs_its_scope(two_tenant_port: int) -> None:
    async with client_of(two_tenant_port, **bearer("reader")) as reader:
        for route in ROUTES:
            reply = await _call(reader, route)
            if route.scope in ("submit", "admin", "operator"):
                detail = assert_problem(reply, 403, "forbidden")["detail"]
                assert f"`{route.scope}`" in detail
                assert f"asyncinfer keygen --scopes {route.scope}" in detail
            else:
                assert reply.status_code in (200, 404)
    async with client_of(two_tenant_port, **bearer("sender")) as sender:
        await submit(sender)
        assert_problem(await sender.get("/jobs"), 403, "forbidden")


OF_OTHERS = ("?tenant=*", "?tenant=bob")


@pytest.mark.parametrize("key", [name for name, _, _ in KEYS])
async def test_no_route_fails_for_a_key_without_its_scope(two_tenant_port: int, key: str) -> None:
    (scopes,) = (words.split(",") for name, _, words in KEYS if name == key)
    async with client_of(two_tenant_port, **bearer(key)) as client:
        for route in ROUTES:
            if route.scope is None or route.scope in scopes:
                continue
            for query in ("", "?unknown=1", *(() if "operator" in scopes else OF_OTHERS)):
                reply = await client.request(route.method, _example(route) + query)
                assert reply.status_code in (400, 403), (route.method, route.path, query)
                code = {400: "invalid_query", 403: "forbidden"}[reply.status_code]
                assert_problem(reply, reply.status_code, code)
                assert code == "forbidden" or query, (route.method, route.path)


async def test_a_key_comes_in_either_header_and_a_tenant_may_have_two(two_tenant_port: int) -> None:
    async with client_of(two_tenant_port) as client:
        job_id = await submit(client, headers=bearer("alice"))
        for headers in (bearer("alice-2"), {"x-api-key": "alice"}):
            assert (await client.get(f"/job/{job_id}", headers=headers)).status_code == 200


OF_A_JOB = [route for route in ROUTES if "{id}" in route.path]


@pytest.mark.parametrize("route", OF_A_JOB, ids=lambda route: f"{route.method} {route.path}")
async def test_a_job_of_another_tenant_is_not_found(
    two_tenant_port: int, manual_worker: ManualWorker, server: redis.Redis, route: Route
) -> None:
    async with client_of(two_tenant_port, **bearer("alice")) as alice:
        job_id = await submit(alice)
        ended = await submit(alice)
        await manual_worker.fail()
        before = [server.get(keys.status(name)) for name in (job_id, ended)]
        async with client_of(two_tenant_port, **bearer("bob")) as bob:
            for name in (job_id, ended):
                theirs = await _call(bob, route, name)
                absent = await _call(bob, route, name[:-4] + "0000")
                assert_problem(theirs, 404, "job_not_found")
                assert theirs.text.replace(name, "") == absent.text.replace(name[:-4] + "0000", "")
            assert (await bob.get("/jobs")).json()["jobs"] == []
        assert [server.get(keys.status(name)) for name in (job_id, ended)] == before
        assert len((await alice.get("/jobs")).json()["jobs"]) == 2


async def test_an_external_job_belongs_to_the_default_tenant_only(
    two_tenant_port: int, server: redis.Redis
) -> None:
    server.set("job:x:status", "completed", ex=60)
    async with client_of(two_tenant_port, **bearer("alice")) as alice:
        assert_problem(await alice.get("/job/x"), 404, "job_not_found")


async def test_two_keys_that_differ_are_refused(two_tenant_port: int) -> None:
    both = {"authorization": "Bearer alice", "x-api-key": "bob"}
    async with client_of(two_tenant_port) as client:
        assert_problem(await client.get("/jobs", headers=both), 400, "invalid_header")
        alike = both | {"x-api-key": "alice"}
        assert (await client.get("/jobs", headers=alike)).status_code == 200


async def test_one_idempotency_key_of_two_tenants_is_two_jobs(two_tenant_port: int) -> None:
    async with client_of(two_tenant_port, **{"idempotency-key": "k"}) as client:
        assert await submit(client, headers=bearer("alice")) != await submit(
            client, headers=bearer("bob")
        )


def test_an_unreadable_key_file_stops_the_start(config: ApiConfig, tmp_path: Path) -> None:
    with pytest.raises(KeyFileRefused):
        guard.Guard(msgspec.structs.replace(config, api_keys=tmp_path / "missing"))

"""The routes about the service: models, health, and the OpenAPI document."""

import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.api.app import create_app
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.probe_paths import HEALTH_PATHS
from asyncinfer.api.openapi import document
from asyncinfer.api.routes import ROUTES
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually
from tests.faults.proxy import proxied
from tests.queue_driver import QueueDriver
from tests.restricted_user import restricted_user

from .harness import (
    QUEUE,
    ROW,
    ManualWorker,
    announce,
    assert_problem,
    client_of,
    running,
    signature,
    submit,
)
from .refusals import REFUSALS, refusing

READY: Final = {"status": "ok", "accepting": True}


def test_every_health_route_is_answered_as_a_probe() -> None:
    assert {route.path for route in ROUTES if route.path.startswith("/health")} == HEALTH_PATHS


async def test_models_are_listed_with_a_request_that_works(api: httpx2.AsyncClient) -> None:
    models = (await api.get("/models")).json()["models"]
    assert [(model["model"], model["default"]) for model in models] == [
        ("digits", False),
        ("iris", True),
    ]
    for model in models:
        reply = await api.post(model["url"], json=model["example"])
        assert reply.status_code == 202


async def test_a_model_shows_its_signature_and_newest_version(
    api: httpx2.AsyncClient, store: Store
) -> None:
    versions = {
        version: msgspec.json.encode(signature("wine", version)) for version in ("9", "10", "2")
    }
    await Announcements(store).announce_models({"wine": versions})
    model = (await api.get("/models/wine")).json()
    assert (model["version"], model["versions"]) == ("10", ["10", "9", "2"])
    assert model["inputs"] == [
        {"name": "input", "datatype": "FP32", "shape": ["batch", 4], "optional": False}
    ]
    assert model["version_sha256"] == dict.fromkeys(model["versions"], "0" * 64)
    assert model["symbols"] == {"batch": ["input[0]", "label[0]", "probabilities[0]"]}
    assert_problem(await api.get("/models/wines"), 404, "model_not_found")


async def test_an_unreadable_announcement_hides_no_other_model(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    await Announcements(store).announce_models({"odd": {"1": b"\xff"}})
    async with running(config) as port, client_of(port) as client:
        assert [model["model"] for model in (await client.get("/models")).json()["models"]] == [
            "iris"
        ]


async def test_health_shows_waiting_jobs_and_workers(api: httpx2.AsyncClient, store: Store) -> None:
    await Announcements(store).announce_worker("w", {}, ttl_seconds=60)
    body = (await api.get("/health")).json()
    assert body["status"] == "ok"
    assert body["redis"].split()[0] in ("Valkey", "Redis")
    assert (body["queues"], body["workers"]) == ({"predict_queue": 0}, 1)


async def test_the_queue_of_a_model_that_is_gone_is_shown_only_while_it_has_jobs(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    async def shown() -> tuple[set[str], set[str]]:
        queues = (await api.get("/queues")).json()["queues"]
        return {queue["queue"] for queue in queues}, {*(await api.get("/health")).json()["queues"]}

    both = {QUEUE, f"{QUEUE}:gone"}
    await hands.submit_one(queue=f"{QUEUE}:gone")
    assert await shown() == (both, both)
    claim = await hands.claim_jobs(queues=(f"{QUEUE}:gone",))
    await hands.finish(claim, "dead")
    assert await shown() == (both, {QUEUE})
    hands.redis.delete(keys.dead(f"{QUEUE}:gone"))
    assert await shown() == ({QUEUE}, {QUEUE})


@pytest.mark.soak
async def test_without_redis_the_api_is_live_and_after_a_while_not_ready(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    async with proxied(config.redis_url) as proxy:
        patient = msgspec.structs.replace(config, redis_url=proxy.url, unready_after_seconds=3.0)
        async with running(patient) as port, client_of(port) as client:
            assert (await client.get("/health/ready")).json() == READY
            proxy.black_hole()
            assert (await client.get("/health/live")).status_code == 200
            submit = await client.get("/health/ready?for=submit")
            assert_problem(submit, 503, "redis_unavailable")
            reply = await client.get("/health/ready")
            assert (reply.status_code, reply.json()["accepting"]) == (200, False)
            assert reply.json()["reason"]["code"] == "redis_unavailable"

            async def is_not_ready() -> bool:
                return (await client.get("/health/ready")).status_code == 503

            await eventually(is_not_ready, "it is not ready")
            proxy.restore()

            async def is_ready() -> bool:
                return (await client.get("/health/ready")).text == json.dumps(
                    READY, separators=(",", ":")
                )

            await eventually(is_ready, "it is ready again")


async def test_an_api_that_stops_is_not_ready(config: ApiConfig, store: Store) -> None:
    await announce(store, "iris", default="iris")
    app = create_app(config)
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.lifespan(),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        assert (await client.get("/health/ready")).status_code == 200
        await app.stop_waiting()
        assert_problem(await client.get("/health/ready"), 503, "server_stopping")


@pytest.mark.parametrize("code", REFUSALS)
async def test_an_api_stays_ready_while_redis_takes_no_jobs_and_says_why(
    code: str,
    config: ApiConfig,
    store: Store,
    server: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await announce(store, "iris", default="iris")
    caplog.set_level(logging.INFO)
    async with proxied(config.redis_url) as proxy:
        fresh = msgspec.structs.replace(config, redis_url=proxy.url)
        async with running(fresh) as port, client_of(port) as client:
            job_id = await submit(client)

            async def says_why() -> bool:
                # What is under way when the API leaves a replica is answered `redis_unavailable`,
                # since it may have been done.
                asked = await client.get("/health/ready?for=submit")
                refused = await client.post("/predict", json={"data": ROW})
                if "redis_unavailable" in asked.text + refused.text:
                    return False
                reason = {"code": code, "message": assert_problem(asked, 503, code)["detail"]}
                assert_problem(refused, 503, code)
                for path in ("/health/ready", "/health"):
                    body = (await client.get(path)).json()
                    assert (body["status"], body["accepting"]) == ("ok", False)
                    assert body["reason"] == reason
                return True

            with refusing(server, *REFUSALS[code]):
                await eventually(says_why, "all answers say why")
                assert (await client.get(f"/job/{job_id}")).json()["status"] == "pending"

            async def is_accepting() -> bool:
                # A permission counts as missing until a submit is taken.
                await client.post("/predict", json={"data": ROW})
                return (await client.get("/health/ready?for=submit")).status_code == 200

            await eventually(is_accepting, "jobs are accepted again")
            assert (await client.get("/health")).json()["accepting"] is True
    lines = [record.getMessage() for record in caplog.records if record.name == "asyncinfer.redis"]
    # Those of calls that got no reply, as on a busy machine, are left out.
    lines = [line for line in lines if "answer" not in line]
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"{code}: ")
    assert lines[1].startswith("Redis takes jobs again after ")
    assert lines[1].endswith(f"({code}).")


async def test_all_that_reads_is_answered_while_redis_takes_no_writes(
    api: httpx2.AsyncClient, server: redis.Redis, manual_worker: ManualWorker
) -> None:
    in_group = {"data": ROW, "options": {"group": "g"}}
    job_id = (await api.post("/predict", json=in_group)).json()["job_id"]
    await manual_worker.complete()
    waiting_id = (await api.post("/predict", json=in_group)).json()["job_id"]
    paths = [
        *(f"/job/{job_id}{rest}" for rest in ("", "?wait=1", "/result", "/timeline")),
        *(f"/job/{waiting_id}{rest}" for rest in ("", "?wait=0.1", "/timeline")),
        *("/jobs", "/jobs?group=g", "/jobs?dead=true", "/jobs?status=completed", "/group/g"),
        *("/models", "/models/iris", "/queues", "/workers", "/scale/iris", "/webhooks", "/audit"),
        *("/health", "/health/live", "/health/ready", "/openapi.json", "/"),
    ]
    with refusing(server, *REFUSALS["too_few_replicas"]):
        answers = {path: await api.get(path) for path in paths}
        valid = await api.post("/models/iris/validate", json={"data": ROW})
    assert {
        path: answer.text for path, answer in answers.items() if answer.status_code != 200
    } == {}
    assert valid.status_code == 200


async def test_a_right_that_the_redis_user_lost_is_named_to_those_who_may_read(
    config: ApiConfig, store: Store, server: redis.Redis, redis_url: str, key_file: Path
) -> None:
    await announce(store, "iris", default="iris")
    acl: Any = server
    with restricted_user(server, redis_url, "~*", "&*", "+@all") as url:
        with_keys = msgspec.structs.replace(config, redis_url=url, api_keys=key_file)
        async with running(with_keys) as port, client_of(port) as anyone:
            bob = {"x-api-key": "bob"}
            assert (await anyone.get("/health/ready")).json() == READY
            acl.execute_command("ACL", "SETUSER", "restricted", "-@scripting")
            named = await reason_of_no_jobs(anyone, bob)
            assert "no permission to run EVALSHA (NOPERM). Give it +@scripting" in named
            assert "NOPERM" not in await reason_of_no_jobs(anyone, {})
            acl.execute_command("ACL", "SETUSER", "restricted", "+@scripting")
            await submit(anyone, headers=bob)
            assert (await anyone.get("/health/ready")).json() == READY


async def test_a_redis_user_who_may_not_write_is_found_before_a_submit_and_forgotten_at_once(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    rules = (("ACL", "SETUSER", "default", right) for right in ("-@write", "+@all"))
    with refusing(server, *rules):
        named = await reason_of_no_jobs(api, {})
        assert "no permission to run MSET (NOPERM). Give it +@read +@write" in named
        refused = await api.post("/predict", json={"data": ROW})
        assert_problem(refused, 503, "redis_permission_denied")
    assert (await api.get("/health/ready?for=submit")).json() == READY


async def test_an_api_whose_redis_user_may_not_read_the_state_of_redis_names_the_right(
    config: ApiConfig, server: redis.Redis, redis_url: str
) -> None:
    acl: Any = server
    code = "redis_permission_denied"
    with restricted_user(server, redis_url, "~*", "&*", "+@all") as url:
        with_user = msgspec.structs.replace(config, redis_url=url)
        async with running(with_user) as port, client_of(port) as client:
            acl.execute_command("ACL", "SETUSER", "restricted", "-info")
            body = (await client.get("/health/ready")).json()
            assert (body["status"], body["accepting"]) == ("ok", False)
            assert body["reason"]["code"] == code
            assert "Give it +info with ACL SETUSER" in body["reason"]["message"]
            for path in ("/health/ready?for=submit", "/health"):
                problem = assert_problem(await client.get(path), 503, code)
                assert "Give it +info with ACL SETUSER" in problem["detail"]


async def reason_of_no_jobs(client: httpx2.AsyncClient, headers: dict[str, str]) -> str:
    """Why the API accepts no jobs, which all routes about its health must say alike."""
    code = "redis_permission_denied"
    refused = await client.get("/health/ready?for=submit", headers=headers)
    reason = str(assert_problem(refused, 503, code)["detail"])
    for path in ("/health/ready", "/health"):
        body = (await client.get(path, headers=headers)).json()
        assert (body["status"], body["accepting"]) == ("ok", False)
        assert body["reason"] == {"code": code, "message": reason}
    return reason


async def test_a_start_on_a_full_disk_says_so_and_not_that_no_worker_has_a_model(
    config: ApiConfig, disk_full: Callable[[], Awaitable[None]]
) -> None:
    await disk_full()
    async with running(config) as port, client_of(port) as client:
        problem = assert_problem(
            await client.post("/predict", json={"data": ROW}), 503, "disk_full"
        )
        assert "Free space there" in problem["detail"]


async def test_a_full_disk_is_told_by_its_name(
    api: httpx2.AsyncClient, disk_full: Callable[[], Awaitable[None]]
) -> None:
    await disk_full()
    problem = assert_problem(await api.get("/health/ready?for=submit"), 503, "disk_full")
    assert "Nothing was taken in" in problem["detail"]
    assert_problem(await api.post("/predict", json={"data": ROW}), 503, "disk_full")
    body = (await api.get("/health/ready")).json()
    assert (body["accepting"], body["reason"]["code"]) == (False, "disk_full")


async def test_the_api_starts_before_redis_does(config: ApiConfig) -> None:
    away = msgspec.structs.replace(config, redis_url="unix:///nowhere/there.sock")
    async with running(away) as port, client_of(port) as client:
        assert (await client.get("/health/live")).status_code == 200
        for path in ("/health", "/health/ready", "/models", "/jobs", "/job/x"):
            assert_problem(await client.get(path), 503, "redis_unavailable")
        reply = await client.post("/predict", json={"data": [[1, 2, 3, 4]]})
        assert_problem(reply, 503, "redis_unavailable")
        assert int(reply.headers["retry-after"]) > 0


async def test_the_root_lists_the_main_routes(api: httpx2.AsyncClient) -> None:
    body = (await api.get("/")).json()
    assert body["name"] == "asyncinfer"
    for path in body["links"].values():
        assert (await api.get(path)).status_code in (200, 405)


async def test_head_is_get_without_the_body(api: httpx2.AsyncClient) -> None:
    reply = await api.head("/")
    assert (reply.status_code, reply.content) == (200, b"")
    assert int(reply.headers["content-length"]) > 0


# --- OpenAPI document ------------------------------------------------------------------------


async def test_every_route_is_in_the_document(api: httpx2.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        assert operation["summary"]
        assert set(map(str, route.answers)) <= set(operation["responses"])
        assert {str(error.status) for error in route.all_errors} <= set(operation["responses"])
        named = {
            parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"
        }
        assert named == set(re.findall(r"{(\w+)}", route.path))
        assert ("security" in operation) == (route.scope is not None)
        assert ("requestBody" in operation) == bool(route.bodies)


async def test_the_document_knows_binary_bodies_and_results(api: httpx2.AsyncClient) -> None:
    paths = (await api.get("/openapi.json")).json()["paths"]
    binary = {"application/octet-stream", "application/x-npy"}
    for path in ("/predict", "/models/{model}/validate"):
        content = paths[path]["post"]["requestBody"]["content"]
        assert content.keys() - {"application/x-ndjson"} == {"application/json", *binary}
        assert len(content["application/json"]["schema"]["oneOf"]) == 2
        names = {parameter["name"] for parameter in paths[path]["post"]["parameters"]}
        assert {"version", "priority", "Inference-Header-Content-Length"} <= names
    result = paths["/job/{id}/result"]["get"]["responses"]
    assert result["200"]["content"].keys() == {"application/json", *binary}
    assert {"404", "406", "409", "422"} <= result.keys()


def test_operation_ids_are_unique_and_references_resolve() -> None:
    described = json.loads(document(ROUTES))
    names = [
        operation["operationId"]
        for path in described["paths"].values()
        for operation in path.values()
    ]
    assert len(names) == len(set(names)) == len(ROUTES)
    for reference in _references(described):
        target = described
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        for inner in part.values():
            yield from _references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _references(inner)

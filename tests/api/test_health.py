"""The routes about the service: models, health, and the OpenAPI document."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.probe_paths import HEALTH_PATHS
from asyncinfer.api.openapi import document
from asyncinfer.api.routes import ROUTES
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store
from tests.queue_driver import QueueDriver
from tests.restricted_user import restricted_user

from .harness import QUEUE, ProxiedApi, announce, assert_problem, client_of, running, signature


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
    await Announcements(store).announce_worker("w", {}, ttl_seconds=10)
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


async def test_without_redis_the_api_is_live_but_not_ready(proxied_api: ProxiedApi) -> None:
    async with client_of(proxied_api.port) as client:
        assert (await client.get("/health/ready")).status_code == 200
        proxied_api.proxy.black_hole()
        assert (await client.get("/health/live")).status_code == 200
        assert_problem(await client.get("/health/ready"), 503, "redis_unavailable")


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
        assert {str(error.status) for error in route.errors} <= set(operation["responses"])
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


async def test_a_right_that_the_redis_user_lost_is_named_to_those_who_may_read(
    config: ApiConfig, server: redis.Redis, redis_url: str, key_file: Path
) -> None:
    acl: Any = server
    with restricted_user(server, redis_url, "~*", "&*", "+@all") as url:
        with_keys = msgspec.structs.replace(config, redis_url=url, api_keys=key_file)
        async with running(with_keys) as port, client_of(port) as anyone:
            reader = {"x-api-key": "reader"}
            assert (await anyone.get("/health/ready")).status_code == 200
            acl.execute_command("ACL", "SETUSER", "restricted", "-@scripting")
            for path in ("/health/ready", "/health"):
                problem = assert_problem(
                    await anyone.get(path, headers=reader), 503, "redis_unavailable"
                )
                assert "no permission to run EVALSHA (NOPERM)" in problem["detail"]
                assert "Give it +@scripting" in problem["detail"]
                problem = assert_problem(await anyone.get(path), 503, "redis_unavailable")
                assert "NOPERM" not in problem["detail"]
            acl.execute_command("ACL", "SETUSER", "restricted", "+@scripting")
            assert (await anyone.get("/health/ready")).status_code == 200

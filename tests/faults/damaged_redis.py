"""A working service whose Redis keys are damaged, and requests to all its routes afterwards."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import httpx2
import msgspec
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.api.routes import ROUTES
from asyncinfer.errors import ModelLoading, NoModelAnnounced, WrongKeyType
from asyncinfer.jobs import SCHEMA, Options, Record, encode_record
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.cursors import encode_cursor
from asyncinfer.repository.policy import Policy
from tests.api.harness import client_of, running

from .harness import eventually

N: Final = "predict_queue"
OTHER: Final = f"{N}:picky"
QUEUES: Final = (N, OTHER)
MODELS: Final = ("slow", "picky")
TYPES: Final = ("string", "list", "set", "zset", "hash", "stream")

_NOT_ANNOUNCED: Final = {NoModelAnnounced.code, ModelLoading.code}

EXPECTED_503_CODES: Final = {
    "/scale/{model}": {WrongKeyType.code, *_NOT_ANNOUNCED},
    "/models/{model}": _NOT_ANNOUNCED,
    "/events": _NOT_ANNOUNCED,
}
"""The only 5xx replies to a GET: a 503 with one of these codes, by route.

An autoscaler that gets 0 where jobs cannot be counted would remove the workers. A model whose
announcement is destroyed is not announced, or its worker is about to announce it again.
"""

_LATE_ID: Final = "ffffffffffff7fff8fffffffffffffff"
_EXTERNAL_ID: Final = "external"


def _nested_json(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def _record(**fields: Any) -> bytes:
    record = Record(SCHEMA, N, "slow", "default", 1_700_000_000_000)
    return encode_record(msgspec.structs.replace(record, **fields), b"12345678")


def _worker(**fields: Any) -> bytes:
    return msgspec.json.encode({"models": MODELS, "state": "ready", "concurrency": 1, **fields})


_HUGE_MS: Final = (1 << 63) - 1
_INPUT: Final = {"name": "x", "datatype": "FP32", "shape": ["batch", 1]}

HOSTILE_VALUES: Final = (
    b"",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\0",
    b"nan",
    b"-inf",
    b"1" * 5000,
    b"-" + b"9" * 25,
    b"18446744073709551615",
    _nested_json(20_000),
    b'{"code":"x","message":' + _nested_json(20_000) + b"}",
    b"\x91" * 20_000 + b"\x90",
    b"\xdd\xff\xff\xff\xff",
    b'{"code":"\\ud800","message":"x"}',
    b"\xff" * 24,
    b"1 \xff",
    b"20000 x",
    _LATE_ID.encode(),
    b"completed",
    b"failed",
    b"processing",
    b"pending",
    b'{"outputs": [',
    b"\x01\xff\xff\xff\xff",
    b"\x01\x01\x00\x00\x00\x90",
    _record(created_ms=_HUGE_MS, started_ms=-_HUGE_MS, finished_ms=_HUGE_MS),
    _record(created_ms=-62_135_596_800_001, finished_ms=253_402_300_800_000),
    _record(round=_HUGE_MS, errors=_HUGE_MS, schema=-5),
    _record(queue="job:x:data", model="\0", tenant="default", worker="w", claim="c"),
    _record(queue=f"{N}:log", options=Options(group="g", delay_seconds=1e6)),
    _record(options=Options(delay_seconds=float("nan"))),
    msgspec.msgpack.encode({"d": 1 << 60, "t": 0, "w": [N, keys.queues(N)], "p": "running"}),
    msgspec.msgpack.encode({"t": -5, "c": 1, "s": 1}),
    msgspec.msgpack.encode({"b": 1.5, "l": float("nan")}),
    msgspec.msgpack.encode([_LATE_ID, "", "\U0001f600", "a/b?c#d%00"]),
    msgspec.msgpack.encode([b"\xff", 1, None, [[]]]),
    msgspec.msgpack.encode(["x"] * 20_000),
    _worker(pid=10**30, started_ms=10**300, concurrency=10**30),
    _worker(started_ms=-(10**18), seconds_per_job={"slow": 1e308}),
    _worker(problems={"slow": {"1": "no"}, "": {"": ""}}, loaded=[""], host="\U0001f600"),
    msgspec.json.encode(
        {"model": "slow", "version": "1", "sha256": "", "inputs": [], "outputs": []}
    ),
    msgspec.json.encode(
        {
            **{"model": "slow", "version": "1", "sha256": "", "outputs": []},
            "inputs": [{**_INPUT, "shape": [-1, 1 << 70]}],
        }
    ),
    msgspec.json.encode(
        {
            **{"model": "slow", "version": "1", "sha256": "", "outputs": [], "max_rows": 10**30},
            "inputs": [{**_INPUT, "datatype": "FP31"}],
        }
    ),
    msgspec.json.encode(
        {
            **{"model": "slow", "version": "1", "sha256": "", "outputs": []},
            "inputs": [_INPUT],
            "example_inputs": {"x": {"no": [1, "tensor"]}},
        }
    ),
)
"""Values that have broken a decoder, or would break a careless one."""

SCORES: Final = (float("inf"), float("-inf"), -1.0, 0.0, 1e300, 2.0**63)


class Damage(NamedTuple):
    """A change of one key: to another type or content, or of a part of it."""

    kind: str
    key: int
    """The index of the key, modulo the number of existing and possible keys."""
    content: bytes
    at: int
    """A number that chooses a score, a bit, a length or a field."""


KINDS: Final = (*TYPES, "add", "flip", "cut", "delete")


class DamagedService:
    """A service with jobs in every state, whose keys can be saved, damaged and restored."""

    def __init__(self, client: httpx2.AsyncClient, redis_url: str) -> None:
        self.client = client
        self.server = redis.Redis.from_url(redis_url)
        self.jobs: list[str] = []
        self._saved: dict[bytes, tuple[bytes, int]] = {}
        self.names: list[bytes] = []

    async def populate(self) -> None:
        """Makes jobs: completed, failed, waiting, delayed, in a group, and external."""
        body = {"data": [[1.0]], "options": {"group": "g"}}
        for model in MODELS:
            reply = await self.client.post(
                f"/predict/{model}", json=body, headers={"prefer": "wait=20"}
            )
            assert reply.status_code == 200, reply.text
            self.jobs.append(reply.json()["job_id"])
        delayed = {"data": [[1.0]], "options": {"group": "g", "delay_seconds": 3600}}
        for model in MODELS:
            self.jobs.append(
                (await self._post(f"/predict/{model}", delayed, key=f"k-{model}"))["job_id"]
            )
        await self._post(f"/models/{MODELS[1]}/pause", None)
        self.jobs.append((await self._post(f"/predict/{MODELS[1]}", body))["job_id"])
        self.server.mset({keys.data(_EXTERNAL_ID): "nonsense", keys.data(_LATE_ID): "[[1.0]]"})
        for job_id in (_EXTERNAL_ID, _LATE_ID):
            self.server.set(keys.status(job_id), "pending")
            self.server.lpush(N, job_id)
            self.jobs.append(job_id)
        await eventually(
            lambda: self.server.get(keys.status(_LATE_ID)) == b"completed", "the job ran"
        )
        self.server.zadd(keys.dead(N), {self.jobs[0]: 1_700_000_000_000})
        self._save()

    async def _post(self, path: str, body: Any, key: str = "") -> Any:
        headers = {"idempotency-key": key} if key else {}
        reply = await self.client.post(path, json=body, headers=headers)
        assert reply.status_code in (200, 202), reply.text
        return reply.json()

    def _save(self) -> None:
        names = sorted(self.server.scan_iter(count=1000))
        for name in names:
            if content := self.server.dump(name):
                self._saved[name] = (content, max(0, self.server.pttl(name)))
        self.names = sorted({*self._saved, *(name.encode() for name in _possible_keys(self.jobs))})

    def restore(self) -> None:
        pipeline = self.server.pipeline(transaction=True)
        pipeline.flushall()
        for name, (content, ttl_ms) in self._saved.items():
            pipeline.restore(name, ttl_ms, content)
        pipeline.execute()

    # --- damage ------------------------------------------------------------------------------

    def damage(self, damage: Damage) -> None:
        """Does nothing if a key that the service writes at the same time has the wrong type."""
        with contextlib.suppress(redis.ResponseError):
            self._damage(damage)

    def _damage(self, damage: Damage) -> None:
        name = self.names[damage.key % len(self.names)]
        if damage.kind in TYPES:
            self.server.delete(name)
            self._add(name, damage.kind, damage)
        elif damage.kind == "delete":
            self.server.delete(name)
        else:
            kind = self._kind(name)
            if kind == "none":
                kind = TYPES[damage.at % len(TYPES)]
            if damage.kind == "add":
                self._add(name, kind, damage)
            else:
                self._add(
                    name, kind, damage._replace(content=_mutated(self._part(name, kind), damage))
                )

    def _add(self, name: bytes, kind: str, damage: Damage) -> None:
        """Adds the content to a key of this type; existing members stay."""
        server, content = self.server, damage.content
        field = (b"field", b"1", b"slow", b"submitted", b"completed", b"\1x")[damage.at % 6]
        if kind == "string":
            server.set(name, content)
        elif kind == "list":
            server.rpush(name, content)
        elif kind == "set":
            server.sadd(name, content)
        elif kind == "zset":
            server.zadd(name, {content: SCORES[damage.at % len(SCORES)]})
        elif kind == "hash":
            server.hset(name, *((field, content) if damage.at % 2 else (content, field)))
        else:
            self._add_entry(name, field, damage)

    def _add_entry(self, name: bytes, field: bytes, damage: Damage) -> None:
        fields: Any = {field: damage.content} if damage.at % 3 else {damage.content: field}
        ids = ["*", "*", "*"]
        if b":inbox:" not in name:
            # After such an entry an inbox would be read again only seconds later.
            ids += ["18446744073709551615-18446744073709551615", "99999999999999-1"]
        try:
            self.server.xadd(name, fields, id=ids[damage.at % len(ids)])
        except redis.ResponseError:
            # An entry with the highest id allows no further entry.
            self.server.delete(name)
            self.server.xadd(name, fields)

    def _kind(self, name: bytes) -> str:
        server: Any = self.server
        return str(server.type(name), "ascii")

    def _part(self, name: bytes, kind: str) -> bytes:
        """One member or value of the key; empty if it has none."""
        # redis-py types every reply as a union of all that RESP can say.
        server: Any = self.server
        if kind == "string":
            return bytes(server.get(name) or b"")
        if kind == "hash":
            return next(iter(server.hvals(name)), b"")
        if kind == "stream":
            entries = server.xrange(name, count=1)
            return next(iter(entries[0][1].values()), b"") if entries else b""
        reads: dict[str, Callable[[], list[bytes]]] = {
            "list": lambda: server.lrange(name, 0, 0),
            "set": lambda: list(server.smembers(name)),
            "zset": lambda: server.zrange(name, 0, 0),
        }
        members = reads[kind]()
        return members[0] if members else b""

    # --- requests ----------------------------------------------------------------------------

    async def read_everything(self) -> None:
        """Requests every GET route for every job, model and group; fails for an unexpected 5xx."""
        # A request for an unknown model makes the API read all announcements.
        await self.client.get("/models/nobody")
        for route, path in self._paths():
            if "events" in path:
                await self._read_first_event(route, path)
            else:
                reply = await self.client.get(path)
                assert_expected(route, path, reply)
                if reply.headers["content-type"] == "application/json":
                    msgspec.json.decode(reply.content)

    async def change_everything(self) -> None:
        """Requests every other route for jobs, models and groups.

        A request that a damaged key makes impossible is refused with 503 and its reason.
        """
        body = {"data": [[1.0]], "options": {"group": "g"}}
        for route in ROUTES:
            if route.method == "GET":
                continue
            for path in self._filled(route.path):
                for query in _CHANGES.get(route.path, ("",)):
                    url = f"{path}?{query}"
                    content = body if "predict" in path or "validate" in path else None
                    reply = await self.client.request(route.method, url, json=content)
                    if reply.status_code >= 500:
                        assert reply.status_code == 503, f"{url}: {reply.text}"
                        assert reply.json()["code"] in _503_CODES, f"{url}: {reply.text}"

    def _paths(self) -> Iterator[tuple[str, str]]:
        for route in ROUTES:
            if route.method != "GET":
                continue
            for path in self._filled(route.path):
                yield route.path, path
                for query in _QUERIES.get(route.path, ()):
                    yield route.path, f"{path}?{query}"

    def _filled(self, path: str) -> Iterator[str]:
        values = {"{id}": [*self.jobs, "\udcff"], "{model}": [*MODELS], "{group}": ["g"]}
        for part, names in values.items():
            if part in path:
                for name in names:
                    yield path.replace(
                        part, quote(name.encode("utf-8", "surrogateescape"), safe="")
                    )
                return
        yield path

    async def _read_first_event(self, route: str, path: str) -> None:
        """Reads the beginning of an event stream; later events come from the feed."""
        async with self.client.stream("GET", path) as reply:
            if reply.status_code != 200:
                await reply.aread()
                assert_expected(route, path, reply)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_EVENT_SECONDS):
                    async for chunk in reply.aiter_bytes():
                        if b"data:" in chunk or "last_event_id" in path:
                            return

    async def assert_works(self) -> None:
        """Asserts that a job of each model completes.

        An API whose inbox had an entry with the highest id is notified again a moment later, and
        polls its jobs until then.
        """
        await self.client.get("/models/nobody")
        for model in MODELS:
            await self.client.post(f"/models/{model}/resume")
            reply = await self.client.post(
                f"/predict/{model}", json={"data": [[1.0]]}, headers={"prefer": "wait=20"}
            )
            assert reply.status_code == 200, reply.text
            assert reply.json()["status"] == "completed", reply.text


_FIRST_EVENT_SECONDS: Final = 0.03

_QUERIES: Final[dict[str, Sequence[str]]] = {
    "/job/{id}": ("wait=0.01",),
    "/job/{id}/result": ("output=y",),
    "/jobs": (
        *("limit=1", "status=failed", "model=slow", "model=picky", "group=g", "dead=true"),
        *("group=g&limit=1", "dead=true&limit=1"),
        f"cursor={encode_cursor([((1 << 64) - 1, 0), N, 5])}",
        f"dead=true&cursor={encode_cursor([1e300, N, 'x'])}",
        f"group=g&cursor={encode_cursor([1, 'x'])}",
    ),
    "/events": ("group=g", "model=slow", f"last_event_id={encode_cursor([0])}"),
    "/job/{id}/events": (f"last_event_id={encode_cursor([0, {N: [(1 << 63) - 1] * 3}])}",),
}


_CHANGES: Final[dict[str, Sequence[str]]] = {
    "/job/{id}": ("", "purge=true"),
    "/jobs": ("status=failed&purge=true", "model=slow", "group=g", "dead=true&purge=true"),
    "/jobs/retry": ("status=failed", "dead=true", "model=picky"),
}
_503_CODES: Final = {WrongKeyType.code, *_NOT_ANNOUNCED}


def assert_expected(route: str, path: str, reply: httpx2.Response) -> None:
    """Asserts that a reply is no 5xx, except those of EXPECTED_503_CODES."""
    if reply.status_code < 500:
        return
    assert reply.status_code == 503, f"{path}: {reply.text}"
    code = reply.json()["code"]
    assert code in EXPECTED_503_CODES.get(route, ()), f"{path}: {reply.text}"


def _mutated(value: bytes, damage: Damage) -> bytes:
    if damage.kind == "cut" or not value:
        return value[: damage.at % (len(value) + 1)] + damage.content
    at = damage.at % len(value)
    return value[:at] + bytes([value[at] ^ (1 << damage.at % 8)]) + value[at + 1 :]


def _possible_keys(jobs: Sequence[str]) -> Iterator[str]:
    """Keys that queues, jobs, models, workers and APIs may have."""
    of_queue: list[Callable[[str], str | tuple[str, ...]]] = [
        *(keys.waiting, keys.wake, keys.running, keys.leases, keys.facts, keys.deadlines),
        *(keys.delayed, keys.seq, keys.bytes_waiting, keys.stale_entries, keys.paused, keys.dead),
        *(keys.log, keys.log_marks, keys.control, keys.reap_gate, keys.swept, keys.hold),
    ]
    for q in QUEUES:
        for make_key in of_queue:
            made = make_key(q)
            yield from [made] if isinstance(made, str) else made
    for job_id in jobs:
        for make_job_key in (keys.data, keys.status, keys.result, keys.error, keys.meta):
            yield make_job_key(job_id)
    yield from (keys.queues(N), keys.workers(N), keys.models(N), keys.default_versions(N))
    yield from (
        keys.default_model(N),
        keys.out_of_place(N),
        keys.worker(N, "w"),
        keys.group(N, "default", "g"),
    )
    for model in MODELS:
        yield from (keys.model(N, model), keys.pace(N, model))


@asynccontextmanager
async def running_service(redis_url: str, policy: Policy) -> AsyncIterator[DamagedService]:
    async with AsyncExitStack() as stack:
        config = ApiConfig(redis_url=redis_url, policy=policy, default_model=MODELS[0])
        port = await stack.enter_async_context(running(config))
        client = await stack.enter_async_context(client_of(port))
        service = DamagedService(client, redis_url)
        stack.callback(service.server.close)
        await eventually(has_models(client), "both models are announced")
        await service.populate()
        yield service


def has_models(client: httpx2.AsyncClient) -> Callable[[], Awaitable[bool]]:
    """A condition: the API lists both models."""

    async def is_ready() -> bool:
        await client.get("/models/nobody")
        reply = await client.get("/models")
        return {model["model"] for model in reply.json()["models"]} == {*MODELS}

    return is_ready

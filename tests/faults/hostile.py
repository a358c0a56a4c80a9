"""A working service whose Redis is damaged key by key, and all that is read of it then."""

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

EXPECTED_REFUSALS: Final = {
    "/scale/{model}": {WrongKeyType.code, *_NOT_ANNOUNCED},
    "/models/{model}": _NOT_ANNOUNCED,
    "/events": _NOT_ANNOUNCED,
}
"""The only answers of 5xx, each a 503 that says why. An autoscaler that was told of no jobs where
nobody can count them would take the workers away; and a model whose announcement is destroyed is
one that nobody has announced, or that a living worker is about to announce again."""

_LATE_ID: Final = "ffffffffffff7fff8fffffffffffffff"
_STRANGER: Final = "stranger"


def _nested_json(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def _record(**more: Any) -> bytes:
    whole = Record(SCHEMA, N, "slow", "default", 1_700_000_000_000)
    return encode_record(msgspec.structs.replace(whole, **more), b"12345678")


def _worker(**more: Any) -> bytes:
    return msgspec.json.encode({"models": MODELS, "state": "ready", "concurrency": 1, **more})


_FAR_MS: Final = (1 << 63) - 1
_INPUT: Final = {"name": "x", "datatype": "FP32", "shape": ["batch", 1]}

HOSTILE: Final = (
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
    _record(created_ms=_FAR_MS, started_ms=-_FAR_MS, finished_ms=_FAR_MS),
    _record(created_ms=-62_135_596_800_001, finished_ms=253_402_300_800_000),
    _record(round=_FAR_MS, errors=_FAR_MS, schema=-5),
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
"""Values that broke a decoder once, or would break a careless one."""

SCORES: Final = (float("inf"), float("-inf"), -1.0, 0.0, 1e300, 2.0**63)


class Damage(NamedTuple):
    """What is done to one key: what it becomes, or which part of it is changed."""

    kind: str
    key: int
    """Of those that are there and those that could be, modulo their number."""
    content: bytes
    at: int
    """Of what can be chosen with a number: a score, a bit, a length."""


KINDS: Final = (*TYPES, "add", "flip", "cut", "delete")


class Scene:
    """A service with jobs in every state, restored before each damage."""

    def __init__(self, client: httpx2.AsyncClient, redis_url: str) -> None:
        self.client = client
        self.server = redis.Redis.from_url(redis_url)
        self.jobs: list[str] = []
        self._saved: dict[bytes, tuple[bytes, int]] = {}
        self.names: list[bytes] = []

    async def populate(self) -> None:
        """Jobs that ended, failed, wait, are delayed, belong to a group; a stranger's."""
        ask = {"data": [[1.0]], "options": {"group": "g"}}
        for model in MODELS:
            reply = await self.client.post(
                f"/predict/{model}", json=ask, headers={"prefer": "wait=20"}
            )
            assert reply.status_code == 200, reply.text
            self.jobs.append(reply.json()["job_id"])
        late = {"data": [[1.0]], "options": {"group": "g", "delay_seconds": 3600}}
        for model in MODELS:
            self.jobs.append(
                (await self._post(f"/predict/{model}", late, key=f"k-{model}"))["job_id"]
            )
        await self._post(f"/models/{MODELS[1]}/pause", None)
        self.jobs.append((await self._post(f"/predict/{MODELS[1]}", ask))["job_id"])
        self.server.mset({keys.data(_STRANGER): "nonsense", keys.data(_LATE_ID): "[[1.0]]"})
        for job_id in (_STRANGER, _LATE_ID):
            self.server.set(keys.status(job_id), "pending")
            self.server.lpush(N, job_id)
            self.jobs.append(job_id)
        await eventually(lambda: self.server.get(keys.status(_LATE_ID)) == b"completed", "it ran")
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
        self.names = sorted({*self._saved, *(one.encode() for one in _possible(self.jobs))})

    def restore(self) -> None:
        pipeline = self.server.pipeline(transaction=True)
        pipeline.flushall()
        for name, (content, ttl_ms) in self._saved.items():
            pipeline.restore(name, ttl_ms, content)
        pipeline.execute()

    # --- damage ------------------------------------------------------------------------------

    def damage(self, one: Damage) -> None:
        """What the service writes at the same moment may be in the way; then it has won."""
        with contextlib.suppress(redis.ResponseError):
            self._damage(one)

    def _damage(self, one: Damage) -> None:
        name = self.names[one.key % len(self.names)]
        if one.kind in TYPES:
            self.server.delete(name)
            self._add(name, one.kind, one)
        elif one.kind == "delete":
            self.server.delete(name)
        else:
            kind = self._kind(name)
            if kind == "none":
                kind = TYPES[one.at % len(TYPES)]
            if one.kind == "add":
                self._add(name, kind, one)
            else:
                self._add(name, kind, one._replace(content=_mutated(self._part(name, kind), one)))

    def _add(self, name: bytes, kind: str, one: Damage) -> None:
        """Puts the content into a key of this type, beside what is there."""
        server, content = self.server, one.content
        field = (b"field", b"1", b"slow", b"submitted", b"completed", b"\1x")[one.at % 6]
        if kind == "string":
            server.set(name, content)
        elif kind == "list":
            server.rpush(name, content)
        elif kind == "set":
            server.sadd(name, content)
        elif kind == "zset":
            server.zadd(name, {content: SCORES[one.at % len(SCORES)]})
        elif kind == "hash":
            server.hset(name, *((field, content) if one.at % 2 else (content, field)))
        else:
            self._add_entry(name, field, one)

    def _add_entry(self, name: bytes, field: bytes, one: Damage) -> None:
        fields: Any = {field: one.content} if one.at % 3 else {one.content: field}
        ids = ["*", "*", "*"]
        if b":inbox:" not in name:
            # An inbox with such an entry is read again only seconds later.
            ids += ["18446744073709551615-18446744073709551615", "99999999999999-1"]
        try:
            self.server.xadd(name, fields, id=ids[one.at % len(ids)])
        except redis.ResponseError:
            # Entries of the future leave no room for more.
            self.server.delete(name)
            self.server.xadd(name, fields)

    def _kind(self, name: bytes) -> str:
        server: Any = self.server
        return str(server.type(name), "ascii")

    def _part(self, name: bytes, kind: str) -> bytes:
        """Something that the key holds."""
        # redis-py types every reply as a union of all that RESP can say.
        server: Any = self.server
        if kind == "string":
            return bytes(server.get(name) or b"")
        if kind == "hash":
            return next(iter(server.hvals(name)), b"")
        if kind == "stream":
            found = server.xrange(name, count=1)
            return next(iter(found[0][1].values()), b"") if found else b""
        reads: dict[str, Callable[[], list[bytes]]] = {
            "list": lambda: server.lrange(name, 0, 0),
            "set": lambda: list(server.smembers(name)),
            "zset": lambda: server.zrange(name, 0, 0),
        }
        members = reads[kind]()
        return members[0] if members else b""

    # --- what is read ------------------------------------------------------------------------

    async def read_everything(self) -> None:
        """Every GET route, about every job, model and group; raises for a 5xx that is not due."""
        # Asked for a model that is not there, the API looks at all announcements.
        await self.client.get("/models/nobody")
        for route, path in self._paths():
            if "events" in path:
                await self._glance(route, path)
            else:
                reply = await self.client.get(path)
                check(route, path, reply)
                if reply.headers["content-type"] == "application/json":
                    msgspec.json.decode(reply.content)

    async def change_everything(self) -> None:
        """Every verb, on jobs, models and groups; what a damaged key makes impossible is refused
        with 503 and its reason."""
        body = {"data": [[1.0]], "options": {"group": "g"}}
        for route in ROUTES:
            if route.method == "GET":
                continue
            for path in self._filled(route.path):
                for query in _CHANGES.get(route.path, ("",)):
                    asked = f"{path}?{query}"
                    given = body if "predict" in path or "validate" in path else None
                    reply = await self.client.request(route.method, asked, json=given)
                    if reply.status_code >= 500:
                        assert reply.status_code == 503, f"{asked}: {reply.text}"
                        assert reply.json()["code"] in _REFUSALS, f"{asked}: {reply.text}"

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
                for one in names:
                    yield path.replace(part, quote(one.encode("utf-8", "surrogateescape"), safe=""))
                return
        yield path

    async def _glance(self, route: str, path: str) -> None:
        """The beginning of a stream of events; what comes later is the feed's."""
        async with self.client.stream("GET", path) as reply:
            if reply.status_code != 200:
                await reply.aread()
                check(route, path, reply)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GLANCE_SECONDS):
                    async for chunk in reply.aiter_bytes():
                        if b"data:" in chunk or "last_event_id" in path:
                            return

    async def works(self) -> None:
        """A job of each model is run and waited for.

        An API that was told of entries of the future hears of its jobs again a moment later, and
        asks for them until then.
        """
        await self.client.get("/models/nobody")
        for model in MODELS:
            await self.client.post(f"/models/{model}/resume")
            reply = await self.client.post(
                f"/predict/{model}", json={"data": [[1.0]]}, headers={"prefer": "wait=20"}
            )
            assert reply.status_code == 200, reply.text
            assert reply.json()["status"] == "completed", reply.text


_GLANCE_SECONDS: Final = 0.03

_QUERIES: Final[dict[str, Sequence[str]]] = {
    "/job/{id}": ("wait=0.01",),
    "/job/{id}/result": ("output=y",),
    "/jobs": (
        *("limit=1", "status=failed", "model=slow", "model=picky", "group=g", "dead=true"),
        *("group=g&limit=1", "dead=true&limit=1"),
        f"cursor={encode_cursor(['18446744073709551615-0', N, 5])}",
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
_REFUSALS: Final = {WrongKeyType.code, *_NOT_ANNOUNCED}


def check(route: str, path: str, reply: httpx2.Response) -> None:
    """That an answer is no 5xx, but for those that are expected."""
    if reply.status_code < 500:
        return
    assert reply.status_code == 503, f"{path}: {reply.text}"
    code = reply.json()["code"]
    assert code in EXPECTED_REFUSALS.get(route, ()), f"{path}: {reply.text}"


def _mutated(value: bytes, one: Damage) -> bytes:
    if one.kind == "cut" or not value:
        return value[: one.at % (len(value) + 1)] + one.content
    at = one.at % len(value)
    return value[:at] + bytes([value[at] ^ (1 << one.at % 8)]) + value[at + 1 :]


def _possible(jobs: Sequence[str]) -> Iterator[str]:
    """Keys that may come to be there, of queues, jobs, models, workers and APIs."""
    of_queue: list[Callable[[str], str | tuple[str, ...]]] = [
        *(keys.waiting, keys.wake, keys.running, keys.leases, keys.facts, keys.deadlines),
        *(keys.delayed, keys.seq, keys.bytes_waiting, keys.stale_entries, keys.paused, keys.dead),
        *(keys.log, keys.log_marks, keys.control, keys.reap_gate, keys.swept, keys.hold),
    ]
    for q in QUEUES:
        for make in of_queue:
            made = make(q)
            yield from [made] if isinstance(made, str) else made
    for job_id in jobs:
        for word in (keys.data, keys.status, keys.result, keys.error, keys.meta):
            yield word(job_id)
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
async def staged(redis_url: str, policy: Policy) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        config = ApiConfig(redis_url=redis_url, policy=policy, default_model=MODELS[0])
        port = await stack.enter_async_context(running(config))
        client = await stack.enter_async_context(client_of(port))
        scene = Scene(client, redis_url)
        stack.callback(scene.server.close)
        await eventually(has_models(client), "both models are announced")
        await scene.populate()
        yield scene


def has_models(client: httpx2.AsyncClient) -> Callable[[], Awaitable[bool]]:
    async def is_ready() -> bool:
        await client.get("/models/nobody")
        reply = await client.get("/models")
        return {one["model"] for one in reply.json()["models"]} == {*MODELS}

    return is_ready

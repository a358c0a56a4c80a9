"""The connections to one Redis, and the way to call a script on them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
import redis.exceptions as redis_errors
from hiredis import pack_command
from msgspec import Struct
from redis.asyncio import Redis

from asyncinfer.errors import (
    DefaultModelChanged,
    ServerRefused,
    WritesRefused,
    WrongKeyType,
)
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.endpoint import Endpoint, close
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.redis_errors import (
    FAILURES,
    NO_REPLY,
    WRONG_TYPE,
    failure_of,
    translate_errors,
    why_no_writes,
    wrong_key_type,
)
from asyncinfer.repository.scripts import Script, script
from asyncinfer.untrusted import decoding

_AT_ONCE: Final = 16
"""Commands one process has under way; more wait here, not in Redis."""

_LARGE_BYTES: Final = 64 << 10
_FEW_ARGUMENTS: Final = 32


_FIRST_TRY: Final = 0.45
"""How much of a call's time its first try has."""

_log = LimitedLog(logging.getLogger(__name__))

_LEFT_OUT_SECONDS: Final = 30.0

encode_args = msgspec.msgpack.Encoder().encode


class PackedArguments(Struct, frozen=True):
    """Arguments as the wire has them, packed before there is a turn to call."""

    count: int
    content: memoryview

    @classmethod
    def of(cls, args: Sequence[Any]) -> "PackedArguments":
        return cls(len(args), _without_count(pack_command(tuple(args))))


class BlockingConnection:
    """One connection for calls that block. Ended by closing it, never by cancelling the call:
    on Python 3.11 a cancelled read can swallow the cancellation."""

    _MARGIN_SECONDS: Final = 1.0

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._left_out: dict[str, float] = {}
        """Keys of another type than they should have, and when they are tried again."""
        self.closed = False

    async def pop(self, lists: Sequence[str], wait_seconds: float) -> str | None:
        """The list a token was drawn from (BRPOP); None when none came.

        A key that is no list is left out for a while, as in `read`.
        """
        sound = self._sound(lists, "list") if self._left_out else lists
        pop = ("BRPOP", *sound, wait_seconds)
        try:
            reply = await self._bounded(wait_seconds, _exchange(self._client, pop))
        except WrongKeyType:
            await self._leave_out(sound, b"list")
            return None
        return None if reply is None else bytes(reply[0]).decode()

    async def read(
        self, streams: Mapping[str, bytes], wait_seconds: float, count: int = 1000
    ) -> list[tuple[str, bytes, dict[bytes, bytes]]]:
        """New entries of streams (XREAD), each (stream, entry id, fields).

        A key that is no stream is left out for a while, since it would keep all the others from
        being read. Raises WrongKeyType where there are no others.
        """
        sound = self._sound(list(streams), "stream") if self._left_out else list(streams)
        read = (
            *("XREAD", "COUNT", count, "BLOCK", int(wait_seconds * 1000), "STREAMS"),
            *sound,
            *(streams[name] for name in sound),
        )
        try:
            reply = await self._bounded(wait_seconds, _exchange(self._client, read))
        except WrongKeyType:
            await self._leave_out(sound, b"stream")
            return []
        return [
            (stream.decode(), entry_id, dict(zip(flat[::2], flat[1::2], strict=True)))
            for stream, entries in reply or ()
            for entry_id, flat in entries
        ]

    def _sound(self, names: Sequence[str], kind: str) -> list[str]:
        """Those that are not left out; raises WrongKeyType where all are."""
        now = time.monotonic()
        sound = [name for name in names if now >= self._left_out.get(name, 0.0)]
        if names and not sound:
            raise wrong_key_type(f": {names[0]!r} should be a {kind}")
        return sound

    async def _leave_out(self, names: Sequence[str], kind: bytes) -> None:
        for name in names:
            found = await self._bounded(0.0, _exchange(self._client, ("TYPE", name)))
            if found not in (kind, b"none"):
                _log.warning(WRONG_TYPE.format(repr(name)))
                self._left_out[name] = time.monotonic() + _LEFT_OUT_SECONDS

    async def _bounded(self, wait_seconds: float, call: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(wait_seconds + self._MARGIN_SECONDS):
                return await call
        except FAILURES as error:
            raise await failure_of(self._client, error) from error

    async def close(self) -> None:
        """Ends the call under way, if any, with RedisUnavailable, and the connection."""
        self.closed = True
        await self._client.connection_pool.disconnect()
        await close(self._client)


class Store:
    """One process's connections to Redis, with the queue's name and policy."""

    def __init__(
        self, endpoint: Endpoint, queue_name: str, policy: Policy, name: str, call_seconds: float
    ) -> None:
        self.endpoint = endpoint
        self.n = queue_name
        self.policy = policy
        self.name = name
        self.call_seconds = call_seconds
        self.redis = endpoint.client(name, reply_seconds=None)
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._clock_behind_ms: float | None = None
        self.writes_refused: WritesRefused | None = None
        """Why the server took no writes, as far as is known from the last call."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str, *, queue_name: str, policy: Policy, name: str, call_seconds: float = 1.0
    ) -> AsyncIterator["Store"]:
        """`call_seconds` bounds one call: waiting for a connection, connecting and the reply."""
        store = cls(Endpoint.parse(url), queue_name, policy, name, call_seconds)
        try:
            yield store
        finally:
            await close(store.redis)

    def blocking(self) -> BlockingConnection:
        """A connection of its own for calls that block; the caller closes it."""
        return BlockingConnection(self.endpoint.client(self.name, reply_seconds=None))

    async def call(
        self,
        verb: Script,
        names: Sequence[str],
        args: Sequence[Any],
        more: PackedArguments | None = None,
    ) -> Any:
        """Runs a script, `more` its last arguments; raises RedisUnavailable or StorageFull."""
        keys_and_args = (len(names), *names, *args)

        async def run() -> Any:
            try:
                return await _exchange(self.redis, ("EVALSHA", verb.sha, *keys_and_args), more)
            except redis_errors.NoScriptError:
                return await _exchange(self.redis, ("EVAL", verb.text, *keys_and_args), more)

        try:
            reply = await self._answered(run)
        except WrongKeyType as error:
            raise await self.damage(names) from error
        # Redis takes every script of ours for one that writes.
        self.writes_refused = None
        return reply

    async def command(self, *command: Any) -> Any:
        """Runs one command; raises as `call` does."""
        try:
            return await self._answered(lambda: self.redis.execute_command(*command))  # type: ignore[no-untyped-call]
        except WrongKeyType as error:
            raise wrong_key_type(f": {command[1]!r}") from error

    async def look(self, *command: Any, otherwise: Any) -> Any:
        """Runs a command that only reads. A key of another type, the command's second part, is
        read as `otherwise`, and the log says so: one damaged key must not hide all the rest."""
        try:
            return await self.command(*command)
        except WrongKeyType:
            _log.warning(WRONG_TYPE.format(repr(command[1])))
            return otherwise

    async def check_writes(self) -> None:
        """Raises StorageFull or WritesRefused where the server takes no writes now.

        The key does not exist, so nothing is written and nothing goes to replicas or to disk; but
        the server refuses the command as it refuses any other write.
        """
        await self.command("SET", keys.write_probe(self.n), "", "XX")

    async def types_of(self, names: Sequence[str]) -> list[str]:
        """The types of keys, in the words of TYPE; `none` of one that is not there."""
        return [decoding.text(await self.command("TYPE", one)) for one in names]

    async def together(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Runs commands as one transaction; raises as `call` does."""

        async def run() -> list[Any]:
            pipeline = self.redis.pipeline(transaction=True)
            for command in commands:
                pipeline.execute_command(*command)
            return await pipeline.execute()

        replies: list[Any] = await self._answered(run)
        return replies

    async def damage(self, queues: Sequence[str]) -> WrongKeyType:
        """An error that names the queues' keys of another type than they should have."""
        expected = {
            key: kind
            for queue in queues
            # A name in braces is none of a queue but of what a script needs beside it.
            if not queue.startswith("{")
            for kind, makers in keys.TYPES_OF_A_QUEUE.items()
            for made in (make(queue) for make in makers)
            for key in ([made] if isinstance(made, str) else made)
        }
        found = await self.types_of(list(expected))
        wrong = [
            f"{key!r} is a {is_now} and should be a {kind}"
            for (key, kind), is_now in zip(expected.items(), found, strict=True)
            if is_now not in (kind, "none")
        ]
        return wrong_key_type(f": {'; '.join(wrong[:3])}" if wrong else "")

    async def _answered(self, send: Callable[[], Awaitable[Any]]) -> Any:
        """Sends once more what got no reply. redis-py would send it to the address it had, and
        not ask the sentinels who is primary by now (redis-py issue 3874)."""
        try:
            try:
                return await self._sent(send, self.call_seconds * _FIRST_TRY)
            except NO_REPLY as lost:
                return await self._sent_again(send, lost)
        except FAILURES as error:
            failure = await failure_of(self.redis, error)
            if isinstance(failure, WritesRefused):
                self.writes_refused = failure
            raise failure from error

    async def _sent_again(self, send: Callable[[], Awaitable[Any]], lost: Exception) -> Any:
        try:
            return await self._sent(send, self.call_seconds * (1 - _FIRST_TRY))
        except redis_errors.ResponseError as error:
            if why_no_writes(error) is None:
                raise
            # This time nothing was done, but whatever was sent before may have been.
            await failure_of(self.redis, error)
            raise lost from error

    async def _sent(self, send: Callable[[], Awaitable[Any]], seconds: float) -> Any:
        async with asyncio.timeout(seconds), self._slots:
            return await send()

    # --- the server's clock ------------------------------------------------------------------

    async def time_ms(self) -> int:
        """The server's time in ms since 1970."""
        seconds, micros = await self.command("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    def saw_server_time(self, server_ms: int) -> None:
        """Notes a reply's server time. It is older than now, so the estimate errs early."""
        self._clock_behind_ms = server_ms - time.monotonic() * 1000

    async def not_after_ms(self) -> int:
        """Server time after which a call sent now has been given up here."""
        if self._clock_behind_ms is None:
            self.saw_server_time(await self.time_ms())
        assert self._clock_behind_ms is not None
        return int(self._clock_behind_ms + time.monotonic() * 1000 + self.call_seconds * 1000)

    # --- the queues ---------------------------------------------------------------------------

    async def queues(self) -> list[str]:
        """Every queue there is, the default model's included; a name that is not ours is none."""
        known = await self.look("SMEMBERS", keys.queues(self.n), otherwise=())
        names = filter(None, map(decoding.name, known))
        return sorted({self.n, *(name for name in names if name.startswith(f"{self.n}:"))})

    async def queues_with_jobs(self, queues: Sequence[str]) -> set[str]:
        """Those of `queues` in which a job waits, is delayed or runs."""
        if not queues:
            return set()
        counts = await self.together(*(("EXISTS", *_job_keys(one)) for one in queues))
        return {queue for queue, count in zip(queues, counts, strict=True) if count}

    async def is_empty(self, queue: str) -> bool:
        """Whether no job waits there or is run; delayed ones do not count."""
        lists = [await self.command("LLEN", name) for name in keys.waiting(queue)]
        return not any(lists) and not await self.command("HLEN", keys.running(queue))

    # --- the server and what it is used for --------------------------------------------------

    async def check_server(self) -> str:
        """The server's name and version; raises ServerRefused when it cannot keep the promise."""
        with translate_errors():
            async with asyncio.timeout(self.call_seconds):
                try:
                    info = await self.redis.info("everything")
                except redis_errors.AuthenticationError as error:
                    raise ServerRefused(
                        f"Redis lets us not in ({error}). Put user and password into REDIS_URL: "
                        "redis://user:password@host:6379."
                    ) from error
        return checked_server(info)

    async def default_model(self) -> str | None:
        """The name of the model that QUEUE_NAME itself serves; None where no one can read it."""
        return await self.decided_default_model() or None

    async def decided_default_model(self) -> str | None:
        """As `default_model`; empty where it was decided that there is none."""
        (stored,) = await self.command("MGET", keys.default_model(self.n))
        return decoding.name(stored)

    async def agree_on_default_model(self, name: str) -> str:
        """The model that QUEUE_NAME itself serves: `name` where Redis has none, else Redis's.
        Empty where it was decided that there is none."""
        key = keys.default_model(self.n)
        current = await self.decided_default_model()
        if current is None and not await self.command("SET", key, name, "NX"):
            # Another process was first just now, or the key holds no name.
            current = await self.decided_default_model()
            if current is None:
                _log.warning(
                    f"The key {key!r} should hold the name of the default model, and holds none. "
                    "Delete it; workers write it again."
                )
        return name if current is None else current

    async def claim_default_model(self, name: str) -> None:
        """Makes `name` the model that QUEUE_NAME itself serves.

        Raises DefaultModelChanged when another one is, and a job waits or runs that would change
        its model.
        """
        current = await self.agree_on_default_model(name)
        while current != name:
            jobs = await self.replace_default_model(current, name)
            if jobs is None:
                return
            if any(jobs):
                raise DefaultModelChanged(self._why_not(current, name, *jobs))
            current = await self.agree_on_default_model(name)

    async def replace_default_model(self, current: str, name: str) -> tuple[int, int] | None:
        """Makes `name` the default model in place of `current`; an empty `name` decides that there
        is none. Returns None when that is done, else how many jobs of each model keep it from
        being done; (0, 0) when the default is not `current` any more."""
        own_queues = (keys.queue(self.n, one, None) for one in (current, name))
        names = [keys.default_model(self.n), self.n, *own_queues]
        args = [encode_args({"from": current, "to": name})]
        verdict, *jobs = await self.call(script("default"), names, args)
        if verdict == b"taken":
            return None
        return (jobs[0], jobs[1]) if jobs else (0, 0)

    def _why_not(self, current: str, name: str, old: int, new: int) -> str:
        which = current if old else name
        count = old or new
        jobs = "1 job of it waits or runs" if count == 1 else f"{count} jobs of it wait or run"
        return (
            f"DEFAULT_MODEL is {name!r}, but the default model on this Redis (queue {self.n!r}) is "
            f"{current!r}. It can be changed only while no job of either waits, and of {which!r} "
            f"{jobs}. Start without DEFAULT_MODEL, or with DEFAULT_MODEL={current}; let them end, "
            f"or end them with `asyncinfer cancel --model {which}`; then start with "
            f"DEFAULT_MODEL={name} again."
        )


def _job_keys(queue: str) -> tuple[str, ...]:
    """The keys of a queue, one of which exists while any job is in it."""
    return (*keys.waiting(queue), keys.delayed(queue), keys.leases(queue))


async def _exchange(
    client: Redis, command: tuple[Any, ...], more: PackedArguments | None = None
) -> Any:
    """What redis-py's client does, without what it does beside: it packs in Python, which took
    longer than all the rest of a call of many arguments."""
    pool = client.connection_pool
    connection = await pool.get_connection()  # type: ignore[no-untyped-call]
    try:
        if more:
            count = b"*%d\r\n" % (len(command) + more.count)
            packed = [count, _without_count(pack_command(command)), more.content]
        elif _is_large(command):
            packed = connection.pack_command(*command)
        else:
            packed = pack_command(command)
        await connection.send_packed_command(packed, check_health=False)
        return await connection.read_response()
    finally:
        await pool.release(connection)


def _without_count(packed: bytes) -> memoryview:
    """A command as the wire has it, without the number of its parts."""
    return memoryview(packed)[packed.index(b"\n") + 1 :]


def _is_large(command: tuple[Any, ...]) -> bool:
    """Whether an argument should go out as it is: packed with the rest it would be copied twice.
    A command of many arguments is bounded by whoever made it."""
    return len(command) <= _FEW_ARGUMENTS and any(
        type(one) is bytes and len(one) > _LARGE_BYTES for one in command
    )


def checked_server(info: Mapping[str, Any]) -> str:
    """`info` is the reply to INFO. Managed services forbid CONFIG GET, so all is read here."""
    valkey = info.get("valkey_version")
    name, version = ("Valkey", valkey) if valkey else ("Redis", info.get("redis_version", "0"))
    oldest = (7, 2) if valkey else (7, 0)
    found = tuple(int(part) for part in str(version).split(".")[:2])
    if found < oldest:
        raise ServerRefused(
            f"This is {name} {version}; asyncinfer needs Redis >= 7.0 or Valkey >= 7.2. "
            "Upgrade it, or unset REDIS_URL to use the embedded Valkey."
        )
    if int(info.get("cluster_enabled", 0)):
        raise ServerRefused(
            "This server runs in cluster mode, which is not supported: use one primary "
            "(with Sentinel or a managed fail-over)."
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ServerRefused(
            f"This server evicts keys when full (maxmemory-policy {policy}), so accepted jobs "
            "could vanish. Set `maxmemory-policy noeviction`."
        )
    return f"{name} {version}"

"""The store: the connections of one process to Redis, and calls of scripts on them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import msgspec
import redis.exceptions as redis_errors
from redis.asyncio import Redis

from asyncinfer.errors import (
    DefaultModelChanged,
    PermissionDenied,
    RedisUnavailable,
    ServerRefused,
    StorageFull,
    WritesRefused,
    WrongKeyType,
)
from asyncinfer.monitoring.counts import Counts
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.processes.outage import RedisReport
from asyncinfer.repository import keys
from asyncinfer.repository.diagnosis import diagnose
from asyncinfer.repository.endpoint import Endpoint, close
from asyncinfer.repository.functions import Functions
from asyncinfer.repository.link import BeforeSend, Command, Lanes, new_link
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.redis_errors import (
    CALL_ERRORS,
    NO_REPLY_ERRORS,
    WRONG_TYPE_WARNING,
    is_not_primary,
    server_refusal,
    translate,
    write_refusal,
    wrong_type_error,
)
from asyncinfer.repository.scripts import Script, script
from asyncinfer.untrusted import decoding

_TRY_SHARE: Final = 0.6
"""How long Redis may be silent in each of two tries, of `call_seconds`."""

_LARGE_BYTES: Final = 64 << 10
"""Calls with more than this go beside the small ones, which would have to wait for them."""

_FIRST_TLS_SECONDS: Final = 3.0

_log = LimitedLog(logging.getLogger(__name__))

_LEAVE_SECONDS: Final = 0.5
"""The shortest time between two disconnections from a server that is no primary: each ends calls of
others, which are sent once more, and some of them it would have answered."""

_SKIP_SECONDS: Final = 30.0
"""How long a blocking call leaves out a key of the wrong type."""

encode_args = msgspec.msgpack.Encoder().encode

Refused: TypeAlias = StorageFull | WritesRefused | PermissionDenied
"""Why a server that answers takes no new jobs."""


class BlockingConnection:
    """A connection for calls that block. A call is ended by `close`, never by cancelling it: on
    Python 3.11 a cancelled read can swallow the cancellation."""

    _MARGIN_SECONDS: Final = 1.0

    def __init__(self, client: Redis, errors: Counts, report: RedisReport | None = None) -> None:
        """Its failures are added to `errors`, those of the store, and noted in `report`, those that
        `close` causes excepted."""
        self._client = client
        self._errors = errors
        self._report = report
        self._link = new_link(client)
        self._skipped_until: dict[str, float] = {}
        """{key of the wrong type: when it is tried again}."""
        self.closed = False

    async def pop(self, lists: Sequence[str], wait_seconds: float) -> str | None:
        """Takes a token from one of the lists (BRPOP) and returns that list; None if none came.

        Leaves out a key that is no list for a while, as `read` does.
        """
        usable = self._usable(lists, "list") if self._skipped_until else lists
        pop = ("BRPOP", *usable, wait_seconds)
        try:
            reply = await self._ask(pop, wait_seconds)
        except WrongKeyType:
            await self._skip_wrong_types(usable, b"list")
            return None
        return None if reply is None else bytes(reply[0]).decode()

    async def read(
        self, streams: Mapping[str, bytes], wait_seconds: float, count: int = 1000
    ) -> list[tuple[str, bytes, dict[bytes, bytes]]]:
        """Waits for new entries of streams (XREAD), each (stream, entry id, fields); empty if none
        came.

        Leaves out a key that is no stream for a while, since no stream could be read with it.
        Raises WrongKeyType if no stream is left, and RedisUnavailable.
        """
        usable = self._usable(list(streams), "stream") if self._skipped_until else list(streams)
        read = (
            *("XREAD", "COUNT", count, "BLOCK", int(wait_seconds * 1000), "STREAMS"),
            *usable,
            *(streams[name] for name in usable),
        )
        try:
            reply = await self._ask(read, wait_seconds)
        except WrongKeyType:
            await self._skip_wrong_types(usable, b"stream")
            return []
        return [
            (stream.decode(), entry_id, dict(zip(flat[::2], flat[1::2], strict=True)))
            for stream, entries in reply or ()
            for entry_id, flat in entries
        ]

    def _usable(self, names: Sequence[str], kind: str) -> list[str]:
        """The keys that are not skipped; raises WrongKeyType if all are."""
        now = time.monotonic()
        usable = [name for name in names if now >= self._skipped_until.get(name, 0.0)]
        if names and not usable:
            raise wrong_type_error(f": {names[0]!r} should be a {kind}")
        return usable

    async def _skip_wrong_types(self, names: Sequence[str], kind: bytes) -> None:
        for name in names:
            found = await self._ask(("TYPE", name), 0.0)
            if found not in (kind, b"none"):
                _log.warning(WRONG_TYPE_WARNING.format(repr(name)))
                self._skipped_until[name] = time.monotonic() + _SKIP_SECONDS

    async def _ask(self, command: Command, wait_seconds: float) -> Any:
        try:
            reply = await self._link.ask(command, wait_seconds + self._MARGIN_SECONDS)
        except CALL_ERRORS as error:
            if is_not_primary(error):
                await self._link.disconnect()
            failure = translate(error)
            if not self.closed:
                self._errors.add((failure.code,))
                note_failure(self._report, failure)
            raise failure from error
        if self._report:
            self._report.outage.answered()
        return reply

    async def close(self) -> None:
        """Closes the connection; a call in progress raises RedisUnavailable."""
        self.closed = True
        await self._link.close()
        await close(self._client)


class Store:
    """The connections of one process to Redis, with QUEUE_NAME (`queue_name`) and the policy."""

    def __init__(
        self,
        endpoint: Endpoint,
        queue_name: str,
        policy: Policy,
        name: str,
        call_seconds: float,
        report: RedisReport | None = None,
    ) -> None:
        self.report = report
        self._is_closed = False
        self.endpoint = endpoint
        self.queue_name = queue_name
        self.policy = policy
        self.name = name
        self.call_seconds = call_seconds
        self.errors = Counts()
        """By code, the calls that Redis did not answer, or refused."""
        self.functions = Functions(queue_name)
        self._client = endpoint.client(name)
        # A copy, since a ClientLink clears those of the client.
        self._parsers: dict[Any, Any] = dict(self._client.response_callbacks)
        self._lanes = Lanes(self._client)
        self._link = new_link(self._client, self._lanes.open_ahead)
        self._clock_behind_ms: float | None = None
        self._left_at = -_LEAVE_SECONDS

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        *,
        queue_name: str,
        policy: Policy,
        name: str,
        call_seconds: float = 1.0,
        report: RedisReport | None = None,
    ) -> AsyncIterator["Store"]:
        """Opens a store without connecting yet. `call_seconds` bounds the silence of Redis in a
        call, to 0.6 of it in each of two tries. What Redis does not answer or refuses is noted in
        `report`, None for commands that tell their user. Raises InvalidSetting for a bad URL."""
        store = cls(Endpoint.parse(url), queue_name, policy, name, call_seconds, report)
        try:
            yield store
        finally:
            await store.close()

    async def close(self) -> None:
        """Closes all connections; calls in progress raise RedisUnavailable."""
        self._is_closed = True
        await self._link.close()
        await self._lanes.close()
        await close(self._client)
        # Transports that were aborted close their sockets in the next turn of the event loop.
        await asyncio.sleep(0)

    def blocking_connection(self) -> BlockingConnection:
        """A new connection for calls that block; the caller closes it."""
        return BlockingConnection(self.endpoint.client(self.name), self.errors, self.report)

    @property
    def moved_at(self) -> float:
        """When Redis last gave a sign of life, on the clock of the event loop."""
        return max(self._link.moved_at, self._lanes.moved_at)

    async def call(
        self,
        verb: Script,
        names: Sequence[str],
        args: Sequence[Any],
        before_send: BeforeSend = lambda: None,
    ) -> Any:
        """Runs a script and returns its reply.

        A call without a reply is sent once more, so that it may run twice. Raises RedisUnavailable
        or one of its kinds (WritesRefused, RedisRefused, WrongKeyType), which tell whether it may
        have run, or StorageFull; also what `before_send` raises, which is called each time that it
        is about to be sent.
        """
        ask = self._lanes.ask if _is_large(args) else self._link.ask
        was_sent = False

        def note_send() -> None:
            nonlocal was_sent
            before_send()
            was_sent = True

        async def run(seconds: float) -> Any:
            call = self.functions.call(verb, names, args)
            command = next(call)
            try:
                while True:
                    try:
                        reply = await ask(command, seconds, note_send)
                    except redis_errors.ResponseError as error:
                        command = call.throw(error)
                    else:
                        command = call.send(reply)
            except StopIteration as end:
                return end.value

        try:
            return await self._with_retry(run)
        except WrongKeyType as error:
            raise await self.wrong_keys_error(names) from error
        except RedisUnavailable as error:
            error.may_have_run = error.may_have_run and was_sent
            raise

    async def command(self, *command: Any, is_large: bool = False) -> Any:
        """Runs one command and returns its reply as redis-py parses it; raises as `call` does.
        `is_large` says that the reply may be large, so that small calls must not wait for it."""
        ask = self._lanes.ask if is_large else self._link.ask
        packable = _packable(command)
        try:
            reply = await self._with_retry(lambda seconds: ask(packable, seconds))
            return self._parse(command, reply)
        except WrongKeyType as error:
            raise wrong_type_error(f": {command[1]!r}") from error

    async def read(self, *command: Any, otherwise: Any) -> Any:
        """Runs a command that only reads. If the key (the command's second part) has the wrong
        type, logs that and returns `otherwise`: one damaged key must not hide all the others."""
        try:
            return await self.command(*command)
        except WrongKeyType:
            _log.warning(WRONG_TYPE_WARNING.format(repr(command[1])))
            return otherwise

    async def types_of(self, names: Sequence[str]) -> list[str]:
        """The type of each key in the words of TYPE; `none` for a key that does not exist."""
        return [decoding.text(await self.command("TYPE", name)) for name in names]

    async def transaction(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Runs commands as one transaction and returns their replies, in order; while the memory of
        Redis is full, one after the other.

        Without a reply all are sent once more, so that they may run twice. Raises as `call` does,
        also if a single command fails; the others may have run then.
        """
        packable = [_packable(command) for command in commands]

        async def run(seconds: float) -> list[Any]:
            try:
                return await self._link.ask_together(packable, seconds)
            except redis_errors.OutOfMemoryError:
                # Redis queues no command for a transaction then, not even one that reads. Sent
                # alone, only those are refused that need memory.
                return [await self._link.ask(command, seconds) for command in packable]

        replies = await self._with_retry(run)
        return [self._parse(*pair) for pair in zip(commands, replies, strict=True)]

    def _parse(self, command: Command, reply: Any) -> Any:
        """A reply as redis-py returns it."""
        parser = self._parsers.get(command[0])
        return parser(reply) if parser else reply

    async def wrong_keys_error(self, queues: Sequence[str]) -> WrongKeyType:
        """An error that names those keys of the queues that have the wrong type."""
        wrong = await self.wrong_keys(queues)
        return wrong_type_error(f": {'; '.join(wrong[:3])}" if wrong else "")

    async def wrong_keys(self, queues: Sequence[str]) -> list[str]:
        """Those keys of the queues that have the wrong type, each with that and the right one."""
        expected_types = {
            key: expected
            for queue in queues
            # A name in braces is no queue but a key that a script needs besides the queues.
            if not queue.startswith("{")
            for expected, makers in keys.TYPES_OF_A_QUEUE.items()
            for made in (make(queue) for make in makers)
            for key in ([made] if isinstance(made, str) else made)
        }
        types = await self.types_of(list(expected_types))
        return [
            f"{key!r} is a {actual} and should be a {expected}"
            for (key, expected), actual in zip(expected_types.items(), types, strict=True)
            if actual not in (expected, "none")
        ]

    async def _with_retry(self, send: Callable[[float], Awaitable[Any]]) -> Any:
        """Sends once more a call that got no reply. redis-py's own retry would use the address that
        it had, and not ask the sentinels which server is primary by now (redis-py issue 3874)."""
        try:
            try:
                reply = await send(self.call_seconds * _TRY_SHARE)
            except NO_REPLY_ERRORS as lost:
                reply = await self._send_again(send, lost)
        except CALL_ERRORS as error:
            raise await self._failure(error) from error
        if self.report:
            self.report.outage.answered()
        return reply

    async def _failure(self, error: Exception) -> StorageFull | RedisUnavailable:
        """What to raise for an error of a call. As a local variable of the frame that raises it, it
        would keep the call's arguments in memory until the garbage collector finds the cycle."""
        failure = await self._translate(error)
        if not self._is_closed:
            self.errors.add((failure.code,))
            note_failure(self.report, failure)
        return failure

    async def _send_again(self, send: Callable[[float], Awaitable[Any]], lost: Exception) -> Any:
        try:
            return await send(self.call_seconds * _TRY_SHARE)
        except redis_errors.ResponseError as error:
            if write_refusal(error) is None:
                raise
            # The second call did nothing, but the first one may have run.
            await self._translate(error)
            raise lost from error

    async def _translate(self, error: Exception) -> StorageFull | RedisUnavailable:
        """As `translate`; disconnects from a server that is no primary any more."""
        now = time.monotonic()
        if is_not_primary(error) and now - self._left_at > _LEAVE_SECONDS:
            self._left_at = now
            await self._link.disconnect()
            await self._lanes.disconnect()
        return translate(error)

    # --- the server's clock ------------------------------------------------------------------

    async def time_ms(self) -> int:
        """The server's time in ms since 1970."""
        seconds, micros = await self.command("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    def note_server_time(self, server_ms: int) -> None:
        """Notes the server time in a reply. It is older than now, so that the estimate is early."""
        self._clock_behind_ms = server_ms - time.monotonic() * 1000

    async def not_after_ms(self) -> int:
        """The server time at which this process has given up a call sent now."""
        if self._clock_behind_ms is None:
            self.note_server_time(await self.time_ms())
        assert self._clock_behind_ms is not None
        return int(self._clock_behind_ms + time.monotonic() * 1000 + self.call_seconds * 1000)

    # --- the queues ---------------------------------------------------------------------------

    async def queues(self) -> list[str]:
        """All queues, sorted, the default model's included; ignores names of another QUEUE_NAME."""
        reply = await self.read("SMEMBERS", keys.queues(self.queue_name), otherwise=())
        names = filter(None, map(decoding.name, reply))
        return sorted(
            {self.queue_name, *(name for name in names if name.startswith(f"{self.queue_name}:"))}
        )

    async def queues_of(self, model: str | None, default_model: str | None) -> list[str]:
        """The queue of a model, or all queues for None."""
        if model is None:
            return await self.queues()
        return [keys.queue(self.queue_name, model, default_model)]

    async def queues_with_jobs(self, queues: Sequence[str]) -> set[str]:
        """The subset of `queues` in which a job waits, is delayed or runs."""
        if not queues:
            return set()
        counts = await self.transaction(*(("EXISTS", *_job_keys(queue)) for queue in queues))
        return {queue for queue, count in zip(queues, counts, strict=True) if count}

    async def is_queue_empty(self, queue: str) -> bool:
        """Whether no job waits or runs in the queue; delayed jobs do not count."""
        lengths = [await self.command("LLEN", name) for name in keys.waiting(queue)]
        return not any(lengths) and not await self.command("HLEN", keys.running(queue))

    # --- the server and the default model -----------------------------------------------------

    async def check_server(self) -> str:
        """The server's name and version. Raises ServerRefused if it cannot keep jobs safe, and as
        `read_info` does."""
        return check_info(await self.read_info())

    def warn_of_unsafe_server(self, refusal: ServerRefused) -> None:
        """Logs why a server that was accepted at the start may lose jobs now, once in 30 s."""
        _log.warning(f"{RedisUnavailable.code}: {refusal.detail}")

    async def read_info(self) -> Mapping[str, Any]:
        """The reply to INFO. Raises ServerRefused if login, TLS or database are refused,
        PermissionDenied if INFO is, and RedisUnavailable if the server does not answer."""
        try:
            reply = await self._link.ask(("INFO", "everything"), self._first_seconds())
        except CALL_ERRORS as error:
            raise await self._why_no_info(error) from error
        if self.report:
            self.report.outage.answered()
        info: Mapping[str, Any] = self._parse(("INFO",), reply)
        return info

    def _first_seconds(self) -> float:
        """How long a call waits that may have to connect first; by TLS that takes several round
        trips and a look into files, and only its end says why it failed."""
        url = self.endpoint.url
        is_slow = not self.moved_at and (url.has_tls or url.sentinel_tls)
        return max(_FIRST_TLS_SECONDS, self.call_seconds) if is_slow else self.call_seconds

    async def _why_no_info(self, error: Exception) -> Exception:
        if refusal := server_refusal(error, self.endpoint.url.database):
            if self.report and isinstance(error, redis_errors.ResponseError):
                self.report.outage.answered()
            denied = translate(error)
            return denied if isinstance(denied, PermissionDenied) else ServerRefused(f"{refusal}.")
        # A server that is named as a sentinel does answer, but not with the primary.
        may_be_misnamed = isinstance(error, NO_REPLY_ERRORS) or bool(self.endpoint.url.sentinels)
        if self.moved_at or not may_be_misnamed:
            return await self._failure(error)
        found = await diagnose(self.endpoint, error)
        if found.is_final:
            return ServerRefused(f"Redis cannot be used: {found.reason}.")
        no_answer = f"Redis does not answer: {found.reason}."
        unavailable = RedisUnavailable(no_answer, retry_after_seconds=1)
        if not self._is_closed:
            note_failure(self.report, unavailable)
        return unavailable

    async def default_model(self) -> str | None:
        """The name of the default model, whose queue is QUEUE_NAME itself; None if there is none,
        or if it is not decided yet."""
        return await self.stored_default_model() or None

    async def stored_default_model(self) -> str | None:
        """As `default_model`, but empty if it is decided that there is none."""
        (stored,) = await self.command("MGET", keys.default_model(self.queue_name))
        return decoding.name(stored)

    async def agree_on_default_model(self, name: str) -> str:
        """Stores `name` as the default model unless Redis has one; returns the one Redis has now.
        Empty if it is decided that there is none."""
        key = keys.default_model(self.queue_name)
        current = await self.stored_default_model()
        if current is None and not await self.command("SET", key, name, "NX"):
            # Another process was faster, or the key holds no name.
            current = await self.stored_default_model()
            if current is None:
                _log.warning(
                    f"The key {key!r} should hold the name of the default model, and holds none. "
                    "Delete it; workers write it again."
                )
        return name if current is None else current

    async def claim_default_model(self, name: str) -> str | None:
        """Makes `name` the default model, whose queue is QUEUE_NAME itself; returns the one that it
        replaced, None if it replaced none.

        Raises DefaultModelChanged if another model is, and a waiting or running job would change
        its model by it.
        """
        current = await self.agree_on_default_model(name)
        while current != name:
            jobs = await self.replace_default_model(current, name)
            if jobs is None:
                return current
            if any(jobs):
                raise DefaultModelChanged(self._explain_refusal(current, name, *jobs))
            current = await self.agree_on_default_model(name)
        return None

    async def replace_default_model(self, current: str, name: str) -> tuple[int, int] | None:
        """Makes `name` the default model in place of `current`; an empty `name` decides that there
        is none. Returns None if that is done; else how many jobs of `current` and of `name`
        prevent it; (0, 0) if the default is not `current` any more."""
        own_queues = (keys.queue(self.queue_name, model, None) for model in (current, name))
        names = [keys.default_model(self.queue_name), self.queue_name, *own_queues]
        args = [encode_args({"from": current, "to": name})]
        verdict, *jobs = await self.call(script("default"), names, args)
        if verdict == b"taken":
            return None
        return (jobs[0], jobs[1]) if jobs else (0, 0)

    def _explain_refusal(self, current: str, name: str, old: int, new: int) -> str:
        which = current if old else name
        count = old or new
        jobs = "1 job of it waits or runs" if count == 1 else f"{count} jobs of it wait or run"
        return (
            f"DEFAULT_MODEL is {name!r}, but the default model on this Redis (queue "
            f"{self.queue_name!r}) is {current!r}. It can be changed only while no job of either "
            f"waits, and of {which!r} {jobs}. Start without DEFAULT_MODEL, or with "
            f"DEFAULT_MODEL={current}; let them end, or end them with `asyncinfer cancel --model "
            f"{which}`; then start with DEFAULT_MODEL={name} again."
        )


def note_failure(report: RedisReport | None, failure: StorageFull | RedisUnavailable) -> None:
    """Notes the error of a call: an outage, or a server that takes no writes."""
    if report is None:
        return
    if type(failure) is RedisUnavailable:
        report.outage.failed(failure.detail)
        return
    report.outage.answered()
    if isinstance(failure, StorageFull | WritesRefused):
        report.refusal.refused(failure.code, failure.detail)


def _is_large(args: Sequence[Any]) -> bool:
    return sum(len(arg) for arg in args if type(arg) is bytes) > _LARGE_BYTES


def _packable(command: Command) -> Command:
    """The command with its words apart, as Redis takes them, such as `XINFO` and `STREAM`."""
    return (*command[0].split(), *command[1:])


def _job_keys(queue: str) -> tuple[str, ...]:
    """The keys of a queue, one of which exists while any job is in it."""
    return (*keys.waiting(queue), keys.delayed(queue), keys.leases(queue))


def check_info(info: Mapping[str, Any]) -> str:
    """The server's name and version, from the reply to INFO: managed services forbid CONFIG GET.
    Raises ServerRefused for an unsupported version or mode, or if the server evicts keys."""
    server = server_name(info)
    name, _, version = server.partition(" ")
    oldest = (7, 2) if name == "Valkey" else (7, 0)
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        raise ServerRefused(
            f"This is {server}; asyncinfer needs Redis >= 7.0 or Valkey >= 7.2. "
            "Upgrade it, or unset REDIS_URL to use the embedded Valkey."
        )
    if is_sentinel(info):
        raise ServerRefused(
            "This is a sentinel, which holds no jobs. Name it in REDIS_URL as "
            "sentinel://host:26379/service, with the name of its service."
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
    return server


def is_sentinel(info: Mapping[str, Any]) -> bool:
    """Whether the reply to INFO is that of a sentinel."""
    return "sentinel" in (info.get("redis_mode"), info.get("server_mode"))


def server_name(info: Mapping[str, Any]) -> str:
    """The server's name and version, such as `Valkey 8.1.1`, from the reply to INFO."""
    valkey = info.get("valkey_version")
    return f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version', '0')}"

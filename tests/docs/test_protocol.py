"""The page on the queue protocol: compared with the code of keys and scripts, and with a server."""

import inspect
import re
import shlex
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pytest
import redis

from asyncinfer.jobs import SCHEMA, TERMINAL, Facts, Outcome, Record, Webhook
from asyncinfer.repository import keys
from asyncinfer.repository.audit import AuditEntries, StoredEntry
from asyncinfer.repository.closed_groups import ClosedGroups
from asyncinfer.repository.deliveries import Attempt, Member, Target
from asyncinfer.repository.intake import why_no_jobs
from asyncinfer.repository.leases import Leases
from asyncinfer.repository.libraries import Libraries
from asyncinfer.repository.outbox import Outbox
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.rights import check_start
from asyncinfer.repository.scripts import NAMES
from asyncinfer.repository.store import Store
from asyncinfer.settings import Settings
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY
from tests.queue_driver import Q, QueueDriver
from tests.restricted_user import restricted_user, without_commands
from tests.serving import running_serve

PAGE: Final = (files("asyncinfer") / "docs" / "protocol.md").read_text()
LUA: Final = files("asyncinfer.repository") / "lua"

OTHER: Final = f"{Q}:digits"
LONG: Final = Policy(
    lease_seconds=30, reap_seconds=5, job_ttl_seconds=600, failed_ttl_seconds=900, max_log_jobs=10
)
"""Times so long that the rest of a key's TTL shows which TTL it was given."""


# --- the page --------------------------------------------------------------------------------


def chapter(title: str) -> str:
    """The text under a heading, up to the next heading of its level."""
    match = re.search(
        rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |^\1 |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
    assert match, f"the page has no chapter {title!r}"
    return match[2]


def table(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]


def code(text: str) -> list[str]:
    """The parts of a text that are set as code."""
    return re.findall(r"`([^`]+)`", text)


class Row(NamedTuple):
    """The row of the page about a key, or about the lists of a queue."""

    patterns: tuple[str, ...]
    type: str
    ttl: str

    def matches(self, name: str) -> bool:
        return any(re.fullmatch(_as_regex(pattern), name) for pattern in self.patterns)


def _as_regex(pattern: str) -> str:
    queue, braces = rf"{Q}(?::[^{{}}]+)?", {"{": r"\{", "}": r"\}", "N": Q}
    parts = re.split(r"(<\w+>|[{}]|\bQ\b|\bN\b)", pattern)
    return "".join(
        ".+" if part.startswith("<") else queue if part == "Q" else braces.get(part, part)
        for part in parts
    )


ROWS: Final = [
    Row(tuple(code(cells[0])), cells[1], cells[2].replace("`", ""))
    for title in ("Of a job", "Of a queue", "Of all queues")
    for cells in table(chapter(title))
]


def row_of(name: str) -> Row:
    rows = [row for row in ROWS if row.matches(name)]
    assert len(rows) == 1, f"{name!r} has {len(rows)} rows"
    return rows[0]


DELIVERIES: Final = {row_of(keys.webhook(Q, "x"))}
"""The row of keys that have no TTL while there is something to deliver."""


def ttl_seconds(row: Row, policy: Policy, status: bytes | None) -> float | None:
    """The TTL of a row in seconds, None for none; `status` is that of the job of a job's key."""
    if row.ttl == "once ended":
        if status is None or status.decode() not in TERMINAL:
            return None
        failed = status == b"failed"
        return policy.failed_ttl_seconds if failed else policy.job_ttl_seconds
    return {
        "none": None,
        "once its deliveries are done": None,
        "JOB_TTL": policy.job_ttl_seconds,
        "FAILED_TTL": policy.failed_ttl_seconds,
        "24 h, or JOB_TTL if longer; that of its job once ended": policy.idempotency_seconds,
        "half a tick": policy.tick_ms / 2000,
        "one lease": policy.lease_seconds,
        "two leases": 2 * policy.lease_seconds,
        "15 s": 15,
        "60 s": 60,
        "10 min": 600,
        "1 h": 3600,
        "24 h": 24 * 3600,
        "7 days": 7 * 24 * 3600,
        "30 days": 30 * 24 * 3600,
        "90 days": 90 * 24 * 3600,
    }[row.ttl]


# --- keys ------------------------------------------------------------------------------------

PLACEHOLDERS: Final = {
    "q": "Q",
    "n": "N",
    "job_id": "<id>",
    "token": "<token>",
    "digest": "<digest>",
    "api": "<api>",
    "worker_id": "<worker>",
    "model": "<model>",
}
NOT_KEYS: Final = ("queue", "model_of", "group_digest")


def key_functions() -> dict[str, Callable[..., str | tuple[str, ...]]]:
    return {
        name: function
        for name, function in inspect.getmembers(keys, inspect.isfunction)
        if function.__module__ == keys.__name__
        and not name.startswith("__")
        and name not in NOT_KEYS
    }


def patterns_of(function: Callable[..., str | tuple[str, ...]]) -> tuple[str, ...]:
    """The keys that a function returns, with placeholders as its arguments."""
    names = list(inspect.signature(function).parameters)
    made = function(*(PLACEHOLDERS.get(name, "<model>") for name in names))
    patterns = (made,) if isinstance(made, str) else made
    return tuple(re.sub("[0-9a-f]{64}", "<digest>", pattern) for pattern in patterns)


def test_every_key_has_a_row_and_every_row_has_a_key() -> None:
    made = sorted(patterns_of(function) for function in key_functions().values())
    assert sorted(row.patterns for row in ROWS) == made


def test_the_docstring_of_every_key_has_the_type_and_ttl_of_its_row() -> None:
    by_patterns = {row.patterns: row for row in ROWS}
    for name, function in key_functions().items():
        row = by_patterns[patterns_of(function)]
        ttl = {"none": "no TTL", "never exists": None}.get(row.ttl, f"TTL {row.ttl}")
        kind = "ZSET" if row.type == "zset" else row.type.capitalize()
        start = f"{kind}, {ttl}" if ttl else "Never exists"
        assert (function.__doc__ or "").startswith(start), f"{name} should begin with {start!r}"


def test_a_message_about_a_key_of_another_type_names_the_type_of_its_row() -> None:
    types = {row.patterns: row.type for row in ROWS}
    for kind, functions in keys.TYPES_OF_A_QUEUE.items():
        assert {types[patterns_of(function)] for function in functions} == {kind}


def test_the_page_names_the_queues_of_the_default_model_and_of_others() -> None:
    assert f"`{keys.queue('N', 'm', 'm')}` for the default model" in PAGE
    assert f"`{keys.queue('N', '<model>', 'm')}` for another" in PAGE


# --- the keys of a server --------------------------------------------------------------------


class KeyCheck:
    """Compares all keys of a server with the rows, as often as `run` is called."""

    def __init__(self, server: redis.Redis, policy: Policy) -> None:
        self._server: Any = server
        self._policy = policy
        self._longest: dict[Row, float] = {}
        """The largest rest of its TTL that a key of each row had, from 0 to 1; 1 without a TTL."""

    def run(self) -> None:
        names = list(self._server.scan_iter(count=1000))
        pipeline = self._server.pipeline()
        for name in names:
            pipeline.type(name).pttl(name).get(re.sub(rb"^(job:.*):\w+$", rb"\1:status", name))
        replies = pipeline.execute(raise_on_error=False)
        for name, *found in zip(names, replies[::3], replies[1::3], replies[2::3], strict=True):
            self._compare(name.decode(), *found)

    def _compare(self, name: str, kind: bytes, left_ms: int, status: Any) -> None:
        row = row_of(name)
        if kind == b"none":
            return  # it was deleted after its name was read
        assert kind.decode() == row.type, f"{name!r} is a {kind.decode()}"
        status = status if name.startswith("job:") else None
        seconds = ttl_seconds(row, self._policy, status)
        if row in DELIVERIES and left_ms > 0:
            seconds = self._policy.failed_ttl_seconds
        if seconds is None:
            assert left_ms == -1, f"{name!r} has a TTL of {left_ms} ms"
            left = 1.0
        else:
            left = left_ms / 1000 / seconds
            assert 0 <= left <= 1, f"{name!r} has {left_ms} ms left of {seconds} s"
        self._longest[row] = max(left, self._longest.get(row, 0.0))

    @property
    def seen(self) -> set[Row]:
        """The rows with a key that has existed."""
        return set(self._longest)

    def assert_full_ttls(self, rows: Iterable[Row]) -> None:
        """Asserts that keys were given no less than the TTL of their rows."""
        for row in rows:
            left = self._longest[row]
            assert left > 0.5, f"{row.patterns} had never more than {left:.0%} of its TTL"


def rows(*names: str) -> set[Row]:
    return {row_of(name) for name in names}


WRITTEN_BY_PROCESSES: Final = rows(
    *(keys.models(Q), keys.model(Q, "iris"), keys.pace(Q, "iris"), keys.default_model(Q)),
)
"""Rows of keys that APIs and workers write without a script."""


@pytest.fixture
def policy() -> Policy:
    return LONG


@pytest.fixture
def driver(store: Store, server: redis.Redis) -> QueueDriver:
    return QueueDriver(store, server)


@pytest.fixture
def key_check(server: redis.Redis) -> KeyCheck:
    return KeyCheck(server, LONG)


OUTCOMES: Final[tuple[Outcome, ...]] = (
    *("completed", "failed", "dead", "released", "suspect", "cancelled"),
)


async def use_every_script(driver: QueueDriver, after_each: Callable[[], None]) -> None:
    """Brings jobs of every kind to every end; calls `after_each` after each step."""
    await driver.submit_many(3, queue=OTHER, data=b"x" * 2000)
    await driver.submit_one(key="k", group="g")
    for options in (
        {"priority": "high"},
        {"priority": "low"},
        {"delay_seconds": 60},
        {"start_within_seconds": 60, "finish_within_seconds": 60},
    ):
        await driver.submit_one(**options)
    driver.add_external_job("external")
    after_each()
    for outcome in OUTCOMES:
        await driver.submit_many(3)
        claim = await driver.claim_jobs(3)
        after_each()
        await driver.finish(claim, outcome)
        after_each()
    await _lose_cancel_and_expire(driver, after_each)
    await _tell_webhooks(driver, after_each)
    await driver.cancel_in_one_call(*await driver.submit_many(12))
    after_each()
    for paused in (True, False):
        await driver.operations.pause(Q, paused=paused)
        after_each()
    job_id = await driver.submit_one()
    await driver.cancel(job_id)
    await driver.retry(job_id)
    driver.redis.mset({keys.data("nowhere"): b"[]", keys.status("nowhere"): b"pending"})
    await driver.maintenance.repair(600)
    await driver.announcements.announce_default_versions({"iris": "1"})
    await driver.announcements.announce_worker("w", {}, 15)
    await AuditEntries(driver.store).add("pause", {"model": "iris"})
    await AuditEntries(driver.store).add("cancel", {"group": "g"}, of_tenants=True)
    await driver.submissions.keep_inbox(keys.inbox(Q, "api"), 60)
    await Libraries(driver.store).tidy()
    after_each()
    await driver.run_all()
    await driver.operations.cancel_queue(OTHER)
    after_each()
    await _close_groups(driver)
    after_each()


async def _close_groups(driver: QueueDriver) -> None:
    """Closes a group that has ended, and one that has not."""
    groups = ClosedGroups(driver.store)
    await driver.submit_one(group="ended")
    await driver.run_all()
    await driver.submit_one(group="unfinished")
    for name in ("ended", "unfinished"):
        target = Target("https://example.com/hook", "default")
        assert await groups.close("default", name, target) == "closed"
    assert await groups.follow() == 1


async def _tell_webhooks(driver: QueueDriver, after_each: Callable[[], None]) -> None:
    outbox, target = Outbox(driver.store), Target("https://example.com/hook", "default")
    job_id = await driver.submit_one(webhook=Webhook(url=target.url))
    after_each()
    await driver.run_all()
    assert await outbox.add(Q, Member("group-g", 1, "ended"), target, b"{}", 600)
    for delivery in await outbox.take([Q], 10, 1000):
        after_each()
        await outbox.keep_body(delivery, b"{}")
        await outbox.note(delivery, Attempt(1, 500), None, "given_up")
        after_each()
    assert await outbox.redeliver(await driver.read(job_id), now_ms=1) == "ok"
    after_each()


async def _lose_cancel_and_expire(driver: QueueDriver, after_each: Callable[[], None]) -> None:
    await driver.maintenance.sweep()
    after_each()
    lost, cancelled, late = await driver.submit_many(3, finish_within_seconds=60, priority="high")
    claim = await driver.claim_jobs(20)
    await driver.cancel(cancelled)
    driver.make_due(keys.deadlines(Q), late)
    await driver.sweep()
    after_each()
    renewals = Leases(driver.store)
    renewal = renewals.renew({Q: [claim.token]})
    renewals.close()
    assert (renewal.cancelled, renewal.expired) == ((cancelled,), (late,))
    driver.expire_leases()
    assert (await driver.sweep()).put_back > 0
    assert lost in driver.waiting_ids()
    after_each()
    await driver.run_all()
    after_each()


@pytest.mark.parametrize(
    "forbidden", [(), pytest.param(("fcall", "function"), marks=pytest.mark.soak)]
)
async def test_every_key_that_the_scripts_write_has_the_type_and_ttl_of_its_row(
    forbidden: tuple[str, ...], server: redis.Redis, redis_url: str, key_check: KeyCheck
) -> None:
    with without_commands(server, redis_url, *forbidden) as url:
        async with Store.open(url, queue_name=Q, policy=LONG, name="test") as store:
            await use_every_script(QueueDriver(store, server), key_check.run)
            assert store.functions.are_refused is bool(forbidden)
    of_functions = rows(keys.libraries(Q)) if forbidden else set()
    assert key_check.seen == set(ROWS) - WRITTEN_BY_PROCESSES - of_functions
    key_check.assert_full_ttls(key_check.seen)


async def test_the_page_lists_all_fields_of_the_log_and_of_control_messages(
    driver: QueueDriver,
) -> None:
    await use_every_script(driver, lambda: None)
    for title, name in (("Log", keys.log), ("Control", keys.control)):
        entries = [entry for queue in (Q, OTHER) for entry in driver.redis.xrange(name(queue))]
        words = {word.decode() for _, fields in entries for word in fields}
        named = set(code(chapter(title)))
        assert words <= named, title
        assert named - words <= {keys.control("Q")}, title


async def test_the_user_of_redis_that_the_security_page_makes_may_do_all_that_is_needed(
    server: redis.Redis, redis_url: str
) -> None:
    page = (files("asyncinfer") / "docs" / "security.md").read_text()
    made = re.search(r"^ACL SETUSER asyncinfer on >PASSWORD (.*)$", page, re.MULTILINE)
    assert made
    with restricted_user(server, redis_url, *made[1].split()) as url:
        async with Store.open(url, queue_name=Q, policy=LONG, name="test") as store:
            await check_start(store)
            assert await why_no_jobs(store) is None
            await use_every_script(QueueDriver(store, server), lambda: None)
            assert not store.functions.are_refused
            blocking = store.blocking_connection()
            await blocking.pop([keys.wake(Q)], 0.01)
            await blocking.read({keys.log(Q): b"0"}, 0.01)
            await blocking.close()


# --- packed records --------------------------------------------------------------------------


def test_the_page_lists_the_stored_letters_of_facts() -> None:
    named = [tuple(code(f"{cells[0]} {cells[1]}")) for cells in table(chapter("Facts"))]
    fields = msgspec.structs.fields(Facts)
    assert [letter for letter, _ in named] == [field.encode_name for field in fields]
    assert all(field.name in words for field, words in zip(fields, named, strict=True))


def test_the_page_lists_the_stored_fields_of_the_record() -> None:
    fields = [name for cells in table(chapter("The record")) for name in code(cells[0])]
    assert fields == list(Record.__struct_fields__)


def test_the_page_lists_the_stored_fields_of_an_audit_entry() -> None:
    fields = [name for cells in table(chapter("Audit")) for name in code(cells[0])]
    assert fields == list(StoredEntry.__struct_fields__)


def test_the_page_has_the_current_version_of_the_record() -> None:
    assert re.findall(r"\(now (\d+)\)|record, now (\d+)", PAGE) == [
        ("", str(SCHEMA)),
        (str(SCHEMA), ""),
    ]


# --- scripts ---------------------------------------------------------------------------------


def header(name: str) -> list[str]:
    """The parts of a script's first comment: its summary, then `KEYS ...` and so on."""
    lines = (LUA / f"{name}.lua").read_text().split("\n")[1:]
    end = next(number for number, line in enumerate(lines) if not line.startswith("--"))
    text = "\n".join(line.removeprefix("-- ") for line in lines[:end])
    parts = re.split(r"\n(?=\w+  )|\n(?=Returns )", text)
    return [" ".join(part.split()) for part in parts]


def numbers(listed: str) -> list[str]:
    """The numbers in a list of KEYS, `4..` for an open end; none for a list of queues."""
    return re.findall(r"(?:^|, )(\d+(?:\.\.)?) ", listed)


def test_every_script_has_a_section_in_the_order_of_their_list() -> None:
    assert re.findall(r"^### `(\w+)`$", chapter("Scripts"), re.MULTILINE) == list(NAMES)


def test_a_section_has_the_summary_and_keys_of_its_script() -> None:
    offenders = {}
    for name in NAMES:
        summary, *parts = header(name)
        text = " ".join(chapter(f"`{name}`").split())
        summary = summary.removeprefix(f"{name}: ").removesuffix(".")
        shown, _, rest = text.partition(" - KEYS: ")
        if shown != f"{summary[0].upper()}{summary[1:]}.":
            offenders[name] = f"its summary is {shown}"
        documented = next(part for part in parts if part.startswith("KEYS ")).removeprefix("KEYS ")
        if numbers(rest.split(" - ")[0]) != numbers(documented):
            offenders[name] = f"its keys are {documented}"
    assert offenders == {}


# --- the example -----------------------------------------------------------------------------


def steps() -> Iterable[tuple[list[str], str]]:
    """Each command of the page's session, with the reply that it shows."""
    match = re.search(r"```console\n(.*?)```", chapter("Programs that speak only Redis"), re.DOTALL)
    assert match
    for step in match[1].split("$ redis-cli ")[1:]:
        command, _, reply = step.partition("\n")
        yield shlex.split(command), reply.strip()


def as_shown(reply: Any) -> str:
    """A reply as redis-cli prints it."""
    if isinstance(reply, bool):
        return "OK"
    if isinstance(reply, int):
        return f"(integer) {reply}"
    return '"{}"'.format(reply.decode().replace('"', '\\"'))


def without_varying_parts(shown: str) -> str:
    """Replaces numbers that differ between machines or times."""
    shown = re.sub(r"\d+\.\d+(?:e-\d+)?", "0.0", shown)
    return re.sub(r"^\(integer\) 3[56]\d\d$", "(integer) 3600", shown)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the embedded Valkey of an `asyncinfer serve` without settings."""
    for name in Settings.__struct_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    data = tmp_path / "data"
    with running_serve(cwd=tmp_path, DATA_DIR=str(data), PYTHONPATH=str(REPOSITORY)) as serve:
        eventually_sync(lambda: len(serve.get("/models")["models"]) == 2, "both models are listed")
        connected = redis.Redis(unix_socket_path=(data / "valkey" / "socket").read_text())
        yield connected
        connected.close()


@pytest.mark.soak
def test_the_session_of_the_page_gives_its_replies_and_leaves_only_keys_of_the_rows(
    client: Any,
) -> None:
    key_check = KeyCheck(client, Policy())
    for command, shown in steps():
        if command[1].endswith(":status"):
            unfinished = (b"pending", b"processing")
            eventually_sync(lambda: client.get(command[1]) not in unfinished, "it has ended")  # noqa: B023
        assert without_varying_parts(
            as_shown(client.execute_command(*command))
        ) == without_varying_parts(shown), command
        key_check.run()

    def have_processes_written() -> bool:
        key_check.run()
        return key_check.seen >= WRITTEN_BY_PROCESSES

    eventually_sync(have_processes_written, "every process has written its keys")
    key_check.assert_full_ttls(WRITTEN_BY_PROCESSES)

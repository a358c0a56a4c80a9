"""The page on the queue protocol: compared with the keys, the scripts and what a server holds."""

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

from asyncinfer.jobs import SCHEMA, TERMINAL, Facts, Outcome, Record
from asyncinfer.repository import keys
from asyncinfer.repository.leases import Renewals
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import NAMES
from asyncinfer.repository.store import Store
from asyncinfer.settings import Settings
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY
from tests.queue_driver import Hands, Q
from tests.serving import serving

PAGE: Final = (files("asyncinfer") / "docs" / "protocol.md").read_text()
LUA: Final = files("asyncinfer.repository") / "lua"

OTHER: Final = f"{Q}:digits"
LONG: Final = Policy(
    lease_seconds=30, reap_seconds=5, job_ttl_seconds=600, failed_ttl_seconds=900, log_jobs=10
)
"""Times so long that what a key has left of its TTL shows which TTL it was given."""


# --- the page --------------------------------------------------------------------------------


def chapter(title: str) -> str:
    """What is under a heading, up to the next one of its level."""
    found = re.search(
        rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |^\1 |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
    assert found, f"the page has no chapter {title!r}"
    return found[2]


def table(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


class Row(NamedTuple):
    """What the page says of a key, or of the lists of a queue."""

    patterns: tuple[str, ...]
    type: str
    ttl: str

    def is_of(self, name: str) -> bool:
        return any(re.fullmatch(_as_regex(one), name) for one in self.patterns)


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
    found = [row for row in ROWS if row.is_of(name)]
    assert len(found) == 1, f"{name!r} has {len(found)} rows"
    return found[0]


def ttl_seconds(row: Row, policy: Policy, status: bytes | None) -> float | None:
    """What a row says in seconds; `status` is that of the job, if the key is a job's."""
    if row.ttl == "once ended":
        if status is None or status.decode() not in TERMINAL:
            return None
        failed = status == b"failed"
        return policy.failed_ttl_seconds if failed else policy.job_ttl_seconds
    return {
        "none": None,
        "JOB_TTL": policy.job_ttl_seconds,
        "FAILED_TTL": policy.failed_ttl_seconds,
        "24 h, or JOB_TTL if longer": policy.idempotency_seconds,
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
NOT_KEYS: Final = ("queue", "model_of")


def key_functions() -> dict[str, Callable[..., str | tuple[str, ...]]]:
    return {
        name: function
        for name, function in inspect.getmembers(keys, inspect.isfunction)
        if function.__module__ == keys.__name__ and name not in NOT_KEYS
    }


def patterns_of(function: Callable[..., str | tuple[str, ...]]) -> tuple[str, ...]:
    """The keys that a function makes, with placeholders for what it is given."""
    names = list(inspect.signature(function).parameters)
    made = function(*(PLACEHOLDERS.get(name, "<model>") for name in names))
    patterns = (made,) if isinstance(made, str) else made
    return tuple(re.sub("[0-9a-f]{64}", "<digest>", one) for one in patterns)


def test_every_key_has_a_row_and_every_row_is_of_a_key() -> None:
    made = sorted(patterns_of(function) for function in key_functions().values())
    assert sorted(row.patterns for row in ROWS) == made


def test_every_key_says_in_the_code_what_its_row_says() -> None:
    by_patterns = {row.patterns: row for row in ROWS}
    for name, function in key_functions().items():
        row = by_patterns[patterns_of(function)]
        ttl = {"none": "no TTL", "never exists": None}.get(row.ttl, f"TTL {row.ttl}")
        says = "ZSET" if row.type == "zset" else row.type.capitalize()
        start = f"{says}, {ttl}" if ttl else "Never exists"
        assert (function.__doc__ or "").startswith(start), f"{name} should begin with {start!r}"


def test_a_message_about_a_key_of_another_type_names_the_type_of_its_row() -> None:
    types = {row.patterns: row.type for row in ROWS}
    for kind, functions in keys.TYPES_OF_A_QUEUE.items():
        assert {types[patterns_of(function)] for function in functions} == {kind}


def test_the_names_of_queues_are_those_of_the_page() -> None:
    assert f"`{keys.queue('N', 'm', 'm')}` for the default model" in PAGE
    assert f"`{keys.queue('N', '<model>', 'm')}` for another" in PAGE


# --- what a server holds ---------------------------------------------------------------------


class Look:
    """Looks at all that a server holds, again and again, and compares it with the rows."""

    def __init__(self, server: redis.Redis, policy: Policy) -> None:
        self._server: Any = server
        self._policy = policy
        self._longest: dict[Row, float] = {}
        """Of each row that was seen, how much of its TTL a key had left at most; 1 without one."""

    def again(self) -> None:
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
            return  # it went after its name was read
        assert kind.decode() == row.type, f"{name!r} is a {kind.decode()}"
        status = status if name.startswith("job:") else None
        seconds = ttl_seconds(row, self._policy, status)
        if seconds is None:
            assert left_ms == -1, f"{name!r} has a TTL of {left_ms} ms"
            left = 1.0
        else:
            left = left_ms / 1000 / seconds
            assert 0 <= left <= 1, f"{name!r} has {left_ms} ms left of {seconds} s"
        self._longest[row] = max(left, self._longest.get(row, 0.0))

    @property
    def seen(self) -> set[Row]:
        """The rows of which a key was there."""
        return set(self._longest)

    def check_ttls(self, rows: Iterable[Row]) -> None:
        """That keys were given all of the TTL that their rows name, and no less."""
        for row in rows:
            left = self._longest[row]
            assert left > 0.5, f"{row.patterns} had never more than {left:.0%} of its TTL"


def rows(*names: str) -> set[Row]:
    return {row_of(name) for name in names}


SAID_BY_PROCESSES: Final = rows(
    *(keys.inbox(Q, "api"), keys.worker(Q, "w"), keys.workers(Q), keys.models(Q)),
    *(keys.model(Q, "iris"), keys.pace(Q, "iris"), keys.default_model(Q)),
)
"""What APIs and workers write beside the scripts."""

NEVER_THERE: Final = rows(keys.write_probe(Q))


@pytest.fixture
def policy() -> Policy:
    return LONG


@pytest.fixture
def hands(store: Store, server: redis.Redis) -> Hands:
    return Hands(store, server)


@pytest.fixture
def look(server: redis.Redis) -> Look:
    return Look(server, LONG)


OUTCOMES: Final[tuple[Outcome, ...]] = (
    *("completed", "failed", "dead", "released", "suspect", "cancelled"),
)


async def everything_happens(hands: Hands, after_each: Callable[[], None]) -> None:
    """Jobs of every kind come to every end; `after_each` is called in between."""
    await hands.some(3, queue=OTHER)
    await hands.one(key="k", group="g")
    for options in (
        {"priority": "high"},
        {"priority": "low"},
        {"delay_seconds": 60},
        {"start_within_seconds": 60, "finish_within_seconds": 60},
    ):
        await hands.one(**options)
    hands.stranger("external")
    after_each()
    for outcome in OUTCOMES:
        await hands.some(3)
        claim = await hands.take(3)
        after_each()
        await hands.finish(claim, outcome)
        after_each()
    await _lost_cancelled_and_late(hands, after_each)
    await hands.cancel_in_one_call(*await hands.some(12))
    after_each()
    for paused in (True, False):
        await hands.operations.pause(Q, paused=paused)
        after_each()
    job_id = await hands.one()
    await hands.cancel(job_id)
    await hands.retry(job_id)
    hands.redis.mset({keys.data("nowhere"): b"[]", keys.status("nowhere"): b"pending"})
    await hands.maintenance.repair(600)
    await hands.announcements.announce_default_versions({"iris": "1"})
    after_each()
    await hands.run_all()
    await hands.operations.purge(OTHER)
    after_each()


async def _lost_cancelled_and_late(hands: Hands, after_each: Callable[[], None]) -> None:
    await hands.maintenance.sweep()
    after_each()
    lost, unwanted, late = await hands.some(3, finish_within_seconds=60, priority="high")
    claim = await hands.take(20)
    await hands.cancel(unwanted)
    hands.let_come_due(keys.deadlines(Q), late)
    await hands.sweep()
    after_each()
    renewals = Renewals(hands.store)
    renewal = renewals.renew({Q: [claim.token]})
    renewals.close()
    assert (renewal.cancelled, renewal.expired) == ((unwanted,), (late,))
    hands.let_leases_end()
    assert (await hands.sweep()).put_back > 0
    assert lost in hands.waiting()
    after_each()
    await hands.run_all()
    after_each()


async def test_every_key_that_the_scripts_write_is_as_its_row_says(
    hands: Hands, look: Look
) -> None:
    await everything_happens(hands, look.again)
    assert look.seen == set(ROWS) - SAID_BY_PROCESSES - NEVER_THERE
    look.check_ttls(look.seen)


async def test_the_words_of_the_log_and_of_messages_are_those_of_the_page(hands: Hands) -> None:
    await everything_happens(hands, lambda: None)
    for title, name in (("Log", keys.log), ("Control", keys.control)):
        entries = [one for queue in (Q, OTHER) for one in hands.redis.xrange(name(queue))]
        words = {word.decode() for _, fields in entries for word in fields}
        named = set(code(chapter(title)))
        assert words <= named, title
        assert named - words <= {keys.control("Q")}, title


# --- what is packed --------------------------------------------------------------------------


def test_the_letters_of_facts_are_those_that_are_stored() -> None:
    named = [tuple(code(f"{cells[0]} {cells[1]}")) for cells in table(chapter("Facts"))]
    fields = msgspec.structs.fields(Facts)
    assert [letter for letter, _ in named] == [field.encode_name for field in fields]
    assert all(field.name in both for field, both in zip(fields, named, strict=True))


def test_the_fields_of_the_record_are_those_that_are_stored() -> None:
    fields = [name for cells in table(chapter("The record")) for name in code(cells[0])]
    assert fields == list(Record.__struct_fields__)


def test_the_version_of_the_record_is_the_one_that_is_written() -> None:
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
    """Those that KEYS gives, `4..` for what goes on; none for a list of queues."""
    return re.findall(r"(?:^|, )(\d+(?:\.\.)?) ", listed)


def test_every_script_has_a_section_in_the_order_of_their_list() -> None:
    assert re.findall(r"^### `(\w+)`$", chapter("Scripts"), re.MULTILINE) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_section_says_of_a_script_what_its_header_says(name: str) -> None:
    summary, *parts = header(name)
    text = " ".join(chapter(f"`{name}`").split())
    said = summary.removeprefix(f"{name}: ").removesuffix(".")
    assert text.startswith(f"{said[0].upper()}{said[1:]}. - KEYS: "), text[:100]
    listed = text.split("- KEYS: ")[1].split(" - ")[0]
    documented = next(part for part in parts if part.startswith("KEYS ")).removeprefix("KEYS ")
    assert numbers(listed) == numbers(documented)


# --- the example -----------------------------------------------------------------------------


def steps() -> Iterable[tuple[list[str], str]]:
    """Each command of the page's session, and the reply it shows."""
    found = re.search(r"```console\n(.*?)```", chapter("Programs that speak only Redis"), re.DOTALL)
    assert found
    for step in found[1].split("$ redis-cli ")[1:]:
        command, _, reply = step.partition("\n")
        yield shlex.split(command), reply.strip()


def as_shown(reply: Any) -> str:
    """A reply as redis-cli prints it."""
    if isinstance(reply, bool):
        return "OK"
    if isinstance(reply, int):
        return f"(integer) {reply}"
    return '"{}"'.format(reply.decode().replace('"', '\\"'))


def alike(shown: str) -> str:
    """Without what differs from one time or machine to the next."""
    shown = re.sub(r"\d+\.\d+(?:e-\d+)?", "0.0", shown)
    return re.sub(r"^\(integer\) 3[56]\d\d$", "(integer) 3600", shown)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the embedded Valkey of an `asyncinfer serve` with nothing set."""
    for name in Settings.__struct_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    data = tmp_path / "data"
    with serving(cwd=tmp_path, DATA_DIR=str(data), PYTHONPATH=str(REPOSITORY)) as serve:
        eventually_sync(lambda: len(serve.get("/models")["models"]) == 2, "both models are up")
        found = redis.Redis(unix_socket_path=(data / "valkey" / "socket").read_text())
        yield found
        found.close()


def test_the_session_of_the_page_goes_as_shown_and_leaves_what_the_rows_say(client: Any) -> None:
    look = Look(client, Policy())
    for command, shown in steps():
        if command[1].endswith(":status"):
            unfinished = (b"pending", b"processing")
            eventually_sync(lambda: client.get(command[1]) not in unfinished, "it has ended")  # noqa: B023
        assert alike(as_shown(client.execute_command(*command))) == alike(shown), command
        look.again()

    def are_all_there() -> bool:
        look.again()
        return look.seen >= SAID_BY_PROCESSES

    eventually_sync(are_all_there, "every process has said what it has to say")
    look.check_ttls(SAID_BY_PROCESSES)

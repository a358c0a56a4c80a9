"""The rights of the Redis user: those of the security page are enough, and each is needed."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from asyncinfer.errors import PermissionDenied, ServerRefused
from asyncinfer.repository import keys
from asyncinfer.repository.intake import why_no_jobs
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.rights import check_start
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store
from tests.queue_driver import Q, QueueDriver, new_job
from tests.redis_server import running_server
from tests.restricted_user import restricted_user

_PAGE: Final = (files("asyncinfer") / "docs" / "security.md").read_text()
_LINE: Final = re.search(r"^ACL SETUSER asyncinfer on >PASSWORD (.*)$", _PAGE, re.MULTILINE)
assert _LINE
RIGHTS: Final = _LINE[1].split()
GIVEN: Final = [right for right in RIGHTS if right != "-@dangerous"]


async def start_and_run_a_job(url: str, server: redis.Redis) -> None:
    """What API and worker do: start, submit, claim, finish and list."""
    async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
        await check_start(store)
        hands = QueueDriver(store, server)
        await hands.announcements.announce_worker("w", {}, 15)
        await hands.submit_one()
        await store.time_ms()
        assert await hands.finish_for_verdicts(await hands.claim_jobs()) == ["completed"]
        await store.transaction(("LLEN", Q), ("GET", keys.default_model(Q)))
        bell = store.blocking_connection()
        await bell.pop([keys.wake(Q)], 0.01)
        await bell.close()


@pytest.mark.parametrize("removed", GIVEN)
async def test_each_right_of_the_security_page_is_needed_and_its_lack_is_named(
    removed: str, server: redis.Redis, redis_url: str
) -> None:
    rights = [right for right in RIGHTS if right != removed]
    with (
        restricted_user(server, redis_url, *rights) as url,
        pytest.raises(ServerRefused) as refused,
    ):
        await start_and_run_a_job(url, server)
    message = refused.value.detail
    assert "NOPERM" in message
    assert "another type" not in message
    if removed in ("+info", "+time", "+@scripting", "+@transaction", "+@connection"):
        assert f"Give it {removed} with ACL SETUSER" in message
    elif removed.startswith("~"):
        assert "Give it ~job:* ~QUEUE_NAME* ~{QUEUE_NAME*" in message
    else:
        assert "Give it +@read +@write" in message


async def test_the_table_of_rights_names_each_right_of_the_line() -> None:
    table = _PAGE.partition("| right | without it |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.split("\n")[2:]]
    named = re.findall(r"`([~+][^`]+)`", "".join(cells))
    assert named == [right for right in GIVEN if right.startswith("~")] + [
        right for right in GIVEN if right.startswith("+")
    ]


@pytest.mark.parametrize(
    ("rights", "words"),
    [
        (("~*", "+@all", "-@scripting"), "permission to run EVALSHA (NOPERM). Give it +@scripting"),
        (("~*", "+@all", "-@write"), "permission to run MSET (NOPERM). Give it +@read +@write"),
        (
            ("%R~*", "+@all"),
            "permission to use a key that asyncinfer needs (NOPERM). Give it ~job:*",
        ),
        (("~*", "+@all", "-info"), "permission to run INFO (NOPERM). Give it +info"),
        (("~other*", "+@all"), "permission to use a key that asyncinfer needs (NOPERM)"),
        (("~*", "+@all", "-client"), "permission to run CLIENT SETNAME (NOPERM). Give it +@conn"),
        ((), "NOPERM"),
    ],
)
async def test_a_user_who_lacks_a_right_is_refused_at_the_start_with_its_name(
    rights: tuple[str, ...], words: str, server: redis.Redis, redis_url: str
) -> None:
    with restricted_user(server, redis_url, *rights) as url:
        async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
            with pytest.raises(ServerRefused) as refused:
                await check_start(store)
    assert words in refused.value.detail
    assert "another type" not in refused.value.detail


def commands_of_a_submit() -> set[str]:
    called = set(re.findall(r"redis\.p?call\('([A-Z]+)'", script("submit").text))
    assert {"MSET", "XADD", "TIME"} < called
    return called


async def test_each_command_of_a_submit_that_is_denied_is_found_without_a_job(
    server: redis.Redis, redis_url: str
) -> None:
    acl: Any = server
    with restricted_user(server, redis_url, "~*", "+@all") as url:
        async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
            for command in commands_of_a_submit():
                assert await why_no_jobs(store) is None
                acl.execute_command("ACL", "SETUSER", "restricted", f"-{command}")
                assert isinstance(await why_no_jobs(store), PermissionDenied), command
                acl.execute_command("ACL", "SETUSER", "restricted", "+@all")
    assert server.keys() == []


@pytest.mark.parametrize(
    "patterns",
    [
        ("~job:*", "~*:*", "~{*"),
        ("~job:*", f"~{Q}", "~{*"),
        ("~job:*", "~p*", f"~{{{Q}:*"),
        ("~job:*", "~p*", f"~{{{Q}}}*"),
        ("~job:*", "~p*", "%R~{*"),
        ("~p*", "~{*", "%R~job:*"),
    ],
)
async def test_keys_of_a_submit_that_are_denied_are_found_without_a_job(
    patterns: tuple[str, ...], server: redis.Redis, redis_url: str
) -> None:
    with restricted_user(server, redis_url, "+@all", *patterns) as url:
        async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
            assert isinstance(await why_no_jobs(store), PermissionDenied)


async def test_looking_whether_jobs_are_taken_writes_nothing(
    server: redis.Redis, store: Store
) -> None:
    def changes() -> int:
        found: Any = server.info("persistence")
        return int(found["rdb_changes_since_last_save"])

    assert await why_no_jobs(store) is None
    before = changes()
    assert await why_no_jobs(store) is None
    assert changes() == before


@pytest.mark.system("redis-server")
@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ("+@scripting", "permission to run EVALSHA (NOPERM). Give it +@scripting"),
        *(
            (right, "to run a command that a script needs (NOPERM). Give it +@read +@write")
            for right in ("+@read", "+@write")
        ),
        ("~job:*", "permission to use a key that asyncinfer needs (NOPERM). Give it ~job:*"),
        ("+info", "permission to run INFO (NOPERM). Give it +info"),
        (None, None),
    ],
)
async def test_redis_says_it_in_other_words_than_valkey_and_is_understood_too(
    removed: str | None, words: str | None, tmp_path: Path
) -> None:
    with running_server("redis-server", "--port", "{port}", "--dir", str(tmp_path)) as port:
        server = redis.Redis(port=port)
        rights = [right for right in RIGHTS if right != removed]
        with restricted_user(server, f"redis://127.0.0.1:{port}", *rights) as url:
            if words is None:
                await start_and_run_a_job(url, server)
            else:
                with pytest.raises(ServerRefused) as refused:
                    await start_and_run_a_job(url, server)
                assert words in refused.value.detail
        server.close()


@pytest.mark.system("redis-server")
async def test_a_command_that_is_denied_inside_of_a_script_is_among_the_rights_that_are_named(
    tmp_path: Path,
) -> None:
    """Redis 7.0 does not say which command of a script it denies; TIME is none that reads."""
    with running_server("redis-server", "--port", "{port}", "--dir", str(tmp_path)) as port:
        server: Any = redis.Redis(port=port)
        with restricted_user(server, f"redis://127.0.0.1:{port}", *RIGHTS) as url:
            async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
                hands = QueueDriver(store, server)
                await hands.run_all()
                server.execute_command("ACL", "SETUSER", "restricted", "-time")
                with pytest.raises(PermissionDenied, match=r"Give it .*\+time"):
                    await hands.claim_jobs()
        server.close()


async def test_a_script_that_may_not_be_called_has_certainly_not_run(
    server: redis.Redis, redis_url: str
) -> None:
    with restricted_user(server, redis_url, "~*", "+@all", "-@scripting") as url:
        async with Store.open(url, queue_name=Q, policy=Policy(), name="test") as store:
            with pytest.raises(PermissionDenied) as denied:
                await QueueDriver(store, server).submit(new_job())
    assert not denied.value.may_have_run
    assert denied.value.job_id is None

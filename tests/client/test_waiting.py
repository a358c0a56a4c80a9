"""The reasons of waits: jobs, maps and time-outs say why no result comes."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
import pytest

from asyncinfer.api.config import ApiConfig
from asyncinfer.client import AsyncClient, Cadence, Position, WaitingFor, WaitTimeout
from asyncinfer.client._map.results import AsyncResults
from asyncinfer.client._wait_reasons import Notices
from asyncinfer.errors import NoModelAnnounced
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.api.harness import ManualWorker, announce, hosted, running

SETOSA: Final = [5.1, 3.5, 1.4, 0.2]
AT_ONCE: Final = Cadence(first_check_seconds=0.05, max_check_seconds=0.05, repeat_seconds=60.0)
NO_WORKER: Final = "No worker has had iris since"


@pytest.fixture
def config(redis_url: str, policy: Policy) -> ApiConfig:
    return ApiConfig(redis_url=redis_url, policy=policy)


@pytest.fixture
async def starved(config: ApiConfig, store: Store) -> AsyncIterator[AsyncClient]:
    """A client of an API whose only model was announced by a worker that left."""
    await announce(store, "iris", default="iris")
    async with (
        hosted(running(config)) as port,
        AsyncClient(f"http://127.0.0.1:{port}", cadence=AT_ONCE) as client,
    ):
        yield client


def mapped(client: AsyncClient, rows: list[Any], *, progress: bool = False) -> AsyncResults:
    """A map with a job for each row; its client reports the reason of a wait at once."""
    return client.map(rows, batch=1, in_flight=4, progress=progress)


async def wait_for_log_line(caplog: pytest.LogCaptureFixture, words: str) -> str:
    async with asyncio.timeout(20):
        while True:
            for line in caplog.messages:
                if words in line:
                    return line
            await asyncio.sleep(0.01)


async def test_a_job_shows_why_it_waits(starved: AsyncClient) -> None:
    job = await starved.submit([SETOSA])
    (listed,) = await starved.jobs()

    for seen in (job, listed, await job.refresh()):
        assert seen.waiting_for
        assert seen.waiting_for.code == "no_worker"
        assert NO_WORKER in seen.waiting_for.message
        assert NO_WORKER in repr(seen)
        assert NO_WORKER in seen._repr_html_()


async def test_a_job_that_has_ended_waits_for_nothing(starved: AsyncClient, store: Store) -> None:
    job = await starved.submit([SETOSA])
    await ManualWorker(store).complete()

    assert (await job.wait()).waiting_for is None
    assert NO_WORKER not in repr(job) + job._repr_html_()


async def test_a_job_that_is_read_again_shows_where_it_is(
    starved: AsyncClient, store: Store
) -> None:
    first, second = await starved.submit([SETOSA]), await starved.submit([SETOSA])
    assert (second.position, second.eta_seconds) == (None, None)
    await second.refresh()
    assert second.position == Position(ahead=1, about=False)
    assert second.eta_seconds is None, "without a worker"
    await ManualWorker(store).complete()
    ended = await asyncio.gather(first.refresh(), second.refresh())
    assert [job.position for job in ended] == [None, None]


async def test_a_time_out_says_why_no_result_came(starved: AsyncClient) -> None:
    job = await starved.submit([SETOSA])
    for late in (job.wait(timeout=0), starved.predict([SETOSA], timeout=0.1)):
        with pytest.raises(WaitTimeout, match=NO_WORKER) as timed_out:
            await late
        assert timed_out.value.waiting_for
        assert timed_out.value.waiting_for.code == "no_worker"


async def test_a_map_reports_why_no_result_comes_and_that_it_goes_on(
    starved: AsyncClient, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "asyncinfer.client")
    results = mapped(starved, [SETOSA, SETOSA])
    first = asyncio.create_task(anext(results))
    assert (await wait_for_log_line(caplog, NO_WORKER)).startswith("2 rows of iris wait: ")

    while not first.done():
        hand = ManualWorker(store)
        await hand.complete()
        await asyncio.wait([first], timeout=5)
    await results.close()

    lines = [line for line in caplog.messages if "iris" in line]
    assert lines[1:] == ["iris goes on."]


async def test_the_reason_is_given_to_whoever_wants_it(starved: AsyncClient, store: Store) -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()
    async with (
        AsyncClient(starved.url, cadence=AT_ONCE, on_wait=lines.put_nowait) as client,
        mapped(client, [SETOSA]) as results,
        asyncio.timeout(20),
    ):
        first = asyncio.create_task(anext(results))
        assert (await lines.get()).startswith(f"1 row of iris waits: {NO_WORKER}")
        await ManualWorker(store).complete()
        await first
        while await lines.get() != "iris goes on.":
            continue


async def test_the_reason_is_shown_beside_a_bar(
    starved: AsyncClient, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    results = mapped(starved, [SETOSA], progress=True)
    first = asyncio.create_task(anext(results))
    shown = ""
    async with asyncio.timeout(20):
        while NO_WORKER not in shown:
            await asyncio.sleep(0.01)
            shown += capsys.readouterr().err
    await ManualWorker(store).complete()
    await first
    await results.close()

    assert "1 row of iris waits: " in shown.replace("\r", "\n")
    assert "iris goes on." in capsys.readouterr().err


async def test_a_full_queue_is_reported_as_the_reason(
    starved: AsyncClient, store: Store, config: ApiConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "asyncinfer.client")
    small = msgspec.structs.replace(config.policy, max_queue=1)
    async with (
        hosted(running(msgspec.structs.replace(config, policy=small))) as port,
        AsyncClient(f"http://127.0.0.1:{port}", cadence=AT_ONCE) as client,
    ):
        await client.submit([SETOSA])
        results = mapped(client, [SETOSA])
        waiting = asyncio.create_task(anext(results))
        try:
            assert "is full" in await wait_for_log_line(caplog, "1 row of iris waits: ")
        finally:
            waiting.cancel()
            await asyncio.wait([waiting])


async def test_a_default_model_that_is_being_loaded_is_awaited(
    config: ApiConfig, store: Store
) -> None:
    announcements = Announcements(store)
    says = {"state": "starting", "default_model": "iris", "loading": ["iris"]}
    await announcements.announce_worker("host-1-aaaaaa", says, ttl_seconds=10)
    async with (
        hosted(running(config)) as port,
        AsyncClient(f"http://127.0.0.1:{port}", cadence=AT_ONCE) as client,
    ):
        found = asyncio.create_task(client.model())
        await asyncio.wait([found], timeout=0.1)
        assert not found.done()
        await announce(store, "iris", default="iris")
        assert (await found).model == "iris"


@pytest.mark.soak
async def test_a_folder_without_a_model_is_an_error_at_once_without_retries(
    config: ApiConfig, store: Store
) -> None:
    says = {"state": "ready", "default_model": None}
    await Announcements(store).announce_worker("host-1-aaaaaa", says, ttl_seconds=10)
    async with (
        hosted(running(config)) as port,
        AsyncClient(f"http://127.0.0.1:{port}", timeout=5.0) as client,
    ):
        async with asyncio.timeout(20):
            with pytest.raises(NoModelAnnounced, match="folder is empty"):
                await client.submit([SETOSA], model="iris")


def test_a_reason_is_reported_when_it_is_new_and_again_after_a_while() -> None:
    lines: list[str] = []
    clock = [0.0]
    notices = Notices(lines.append, Cadence(repeat_seconds=30.0), lambda: clock[0])
    no_worker, paused = WaitingFor("no_worker", "None."), WaitingFor("paused", "Paused.")
    reasons = {
        0: no_worker,
        29: no_worker,
        31: no_worker,
        32: paused,
        40: None,
        41: None,
        42: paused,
    }

    for seconds, reason in reasons.items():
        clock[0] = seconds
        notices.report(reason, "Rows wait", "It goes on")

    assert lines == [
        "Rows wait: None.",
        "Rows wait: None.",
        "Rows wait: Paused.",
        "It goes on.",
        "Rows wait: Paused.",
    ]

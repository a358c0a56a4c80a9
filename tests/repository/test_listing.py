"""The listing of jobs, its cursors, and the health of the queues."""

import base64
import itertools

import msgspec
import pytest
import redis

from asyncinfer.errors import InvalidQuery, ServerRefused
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.listing import Page
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.store import check_info
from tests.faults.harness import eventually
from tests.queue_driver import Q, QueueDriver, ids_of, new_job

OTHER = f"{Q}:digits"


async def listed(
    hands: QueueDriver, *, tenant: str = "default", status: str = "", **criteria: str
) -> list[str]:
    statuses = frozenset([status]) if status else None
    wanted = Filter(tenant=tenant, statuses=statuses, **criteria)  # type: ignore[arg-type]
    return ids_of((await hands.inspection.jobs(wanted)).jobs)


async def pages(hands: QueueDriver, limit: int) -> list[list[str]]:
    """The ids of all pages of a listing."""
    found: list[list[str]] = []
    cursor: str | None = None
    while True:
        page = await hands.inspection.jobs(Filter(tenant="default"), limit=limit, cursor=cursor)
        found.append(ids_of(page.jobs))
        cursor = page.cursor
        if cursor is None:
            return found


async def over_three_queues(hands: QueueDriver) -> list[str]:
    """Submits jobs to three queues in calls of one to four; returns the ids, newest first."""
    jobs: list[str] = []
    sizes = itertools.cycle((1, 4, 2, 3))
    for queue, size in zip([Q, OTHER, f"{Q}:iris2"] * 6, sizes, strict=False):
        jobs += await hands.submit_many(size, queue=queue)
        await next_ms(hands)
    return jobs[::-1]


async def next_ms(hands: QueueDriver) -> None:
    """Lets a ms pass: only the time orders the entries of two logs."""
    now_ms = hands.now_ms()
    await eventually(lambda: hands.now_ms() > now_ms, "another millisecond")


# --- the listing ---------------------------------------------------------------------------


async def test_jobs_are_listed_newest_first(hands: QueueDriver) -> None:
    jobs = [*await hands.submit_many(3), *await hands.submit_many(2)]
    assert await listed(hands) == jobs[::-1]


async def test_a_listing_shows_each_job_as_it_is_now(hands: QueueDriver) -> None:
    done, running, cancelled, waiting = await hands.submit_many(4)
    await hands.finish(await hands.claim_jobs(1))
    await hands.claim_jobs(1)
    await hands.cancel(cancelled)
    page = await hands.inspection.jobs(Filter(tenant="default"))
    statuses = {job.job_id: job.status for job in page.jobs}
    assert statuses == {
        **{waiting: "pending", cancelled: "cancelled"},
        **{running: "processing", done: "completed"},
    }
    assert page.cursor is None


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
async def test_pages_over_several_queues_have_neither_gaps_nor_repeats(
    hands: QueueDriver, limit: int
) -> None:
    jobs = await over_three_queues(hands)
    found = await pages(hands, limit)
    assert list(itertools.chain(*found)) == jobs
    assert all(len(page) == limit for page in found[:-1])


async def test_pages_are_complete_while_new_jobs_arrive(hands: QueueDriver) -> None:
    jobs = await over_three_queues(hands)
    first = await hands.inspection.jobs(Filter(tenant="default"), limit=5)
    await over_three_queues(hands)
    second = await hands.inspection.jobs(Filter(tenant="default"), limit=100, cursor=first.cursor)
    assert ids_of(first.jobs) + ids_of(second.jobs) == jobs


async def test_pages_are_complete_while_jobs_run_and_end(hands: QueueDriver) -> None:
    jobs = await over_three_queues(hands)
    found: list[str] = []
    cursor: str | None = None
    while len(found) < len(jobs):
        page = await hands.inspection.jobs(Filter(tenant="default"), limit=3, cursor=cursor)
        found += ids_of(page.jobs)
        cursor = page.cursor
        if claim := (await hands.claim(2, queues=(OTHER, Q))).claim:
            await hands.finish(claim)
    assert found == jobs


async def test_two_queues_that_log_in_the_same_ms_are_listed_completely(hands: QueueDriver) -> None:
    jobs = [await hands.submit_one(queue=queue) for queue in (Q, OTHER)]
    for queue, job_id in zip((Q, OTHER), jobs, strict=True):
        hands.redis.delete(keys.log(queue))
        packed = msgspec.msgpack.encode([job_id])
        hands.redis.xadd(keys.log(queue), {"submitted": packed}, id="5-1")
    assert sorted(itertools.chain(*await pages(hands, 1))) == sorted(jobs)


async def test_a_log_longer_than_a_page_of_entries_is_read_to_its_end(hands: QueueDriver) -> None:
    jobs = [await hands.submit_one() for _ in range(230)]
    assert list(itertools.chain(*await pages(hands, 90))) == jobs[::-1]


async def test_a_listing_can_be_filtered_by_status(hands: QueueDriver) -> None:
    done, waiting = await hands.submit_many(2)
    await hands.finish(await hands.claim_jobs(1))
    assert await listed(hands, status="completed") == [done]
    assert await listed(hands, status="pending") == [waiting]
    assert await listed(hands, status="failed") == []


async def test_a_listing_can_be_filtered_by_model(hands: QueueDriver) -> None:
    await hands.store.claim_default_model("iris")
    iris, digits = await hands.submit_one(), await hands.submit_one(queue=OTHER)
    assert await listed(hands, model="iris") == [iris]
    assert await listed(hands, model="digits") == [digits]
    assert await listed(hands, model="unknown") == []


async def test_a_tenant_sees_its_own_jobs_only(hands: QueueDriver) -> None:
    mine, theirs = new_job(tenant="me"), new_job(tenant="them")
    await hands.submit(mine, theirs)
    assert await listed(hands, tenant="me") == [mine.job_id]
    assert await listed(hands, tenant="them") == [theirs.job_id]
    assert await listed(hands) == []


async def test_a_rare_filter_fills_its_page_from_far_back(hands: QueueDriver) -> None:
    rare = [new_job(tenant="rare") for _ in range(3)]
    for job in rare:
        await hands.submit(job)
        await hands.submit_many(100)
    page = await hands.inspection.jobs(Filter(tenant="rare"), limit=2)
    assert ids_of(page.jobs) == [rare[2].job_id, rare[1].job_id]
    rest = await hands.inspection.jobs(Filter(tenant="rare"), limit=2, cursor=page.cursor)
    assert (ids_of(rest.jobs), rest.cursor) == ([rare[0].job_id], None)


async def test_a_job_that_is_no_longer_kept_is_no_longer_listed(hands: QueueDriver) -> None:
    gone, kept = await hands.submit_many(2)
    await hands.cancel(gone)
    hands.redis.delete(*(f"job:{gone}:{word}" for word in ("data", "status", "meta")))
    assert await listed(hands) == [kept]


async def test_a_retried_job_is_listed_once(hands: QueueDriver) -> None:
    first, second = await hands.submit_many(2)
    await hands.cancel(first)
    await hands.retry(first)
    assert await listed(hands) == [second, first]


async def test_a_damaged_record_does_not_stop_the_listing(hands: QueueDriver) -> None:
    damaged, job_id = await hands.submit_many(2)
    hands.redis.set(keys.meta(damaged), b"12345678\x91\xa2\xff\xfe")
    assert await listed(hands) == [job_id]
    await hands.run_all()
    hands.redis.delete(keys.meta(damaged))


async def test_an_empty_queue_lists_nothing(hands: QueueDriver) -> None:
    assert await hands.inspection.jobs(Filter(tenant="default")) == Page((), None)


# --- external jobs in the listing ----------------------------------------------------------


async def test_an_external_job_is_listed_when_claimed_as_the_default_tenants(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one()
    hands.add_external_job("theirs")
    assert await listed(hands) == [job_id]
    await hands.run_all()
    assert await listed(hands) == ["theirs", job_id]
    assert await listed(hands, tenant="me") == []


@pytest.mark.parametrize("outcome", ["released", "suspect", "retry", "lost"])
async def test_an_external_job_that_runs_twice_is_listed_once(
    hands: QueueDriver, outcome: str
) -> None:
    hands.add_external_job("theirs")
    claim = await hands.claim_jobs()
    if outcome == "lost":
        hands.expire_leases()
        await hands.sweep()
    else:
        await hands.finish(claim, outcome)  # type: ignore[arg-type]
    assert await hands.run_all("failed") == ["theirs"]
    await hands.retry("theirs")
    assert await hands.run_all() == ["theirs"]
    assert await listed(hands) == ["theirs"]


async def test_an_external_id_that_is_not_text_hides_no_other_job(hands: QueueDriver) -> None:
    hands.add_external_job("first")
    hands.add_external_job(b"\xff\xfe")
    hands.add_external_job("second")
    await hands.run_all()
    assert await listed(hands) == ["second", "first"]


# --- cursors -------------------------------------------------------------------------------


def forged(*place: object) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(place)).decode().rstrip("=")


@pytest.mark.parametrize(
    "cursor",
    [
        *("", "x", "????", "é", "AAAA", "a" * 5000, forged((5, 1), Q), forged((5, 1), Q, -1)),
        *(forged("5-1", Q, 0), forged((5,), Q, 0), forged((-5, 1), Q, 0), forged(5, Q, 0)),
        *(forged((1e30, 1), Q, 0), forged((5, 1, 1), Q, 0), forged((5, 1), ["list"], 0)),
    ],
)
async def test_a_forged_cursor_is_refused_not_an_error(hands: QueueDriver, cursor: str) -> None:
    await hands.submit_one()
    with pytest.raises(InvalidQuery, match="cursor"):
        await hands.inspection.jobs(Filter(tenant="default"), cursor=cursor)


async def test_a_cursor_of_a_removed_queue_continues_with_the_other_queues(
    hands: QueueDriver,
) -> None:
    jobs = await hands.submit_many(2)
    cursor = forged((9999999999999, 1), f"{Q}:gone", 3)
    page = await hands.inspection.jobs(Filter(tenant="default"), cursor=cursor)
    assert ids_of(page.jobs) == jobs[::-1]


# --- health and the server -----------------------------------------------------------------


async def test_health_counts_the_waiting_jobs_of_each_queue(hands: QueueDriver) -> None:
    await hands.submit_many(2)
    await hands.submit_one(priority="high")
    await hands.submit_one(queue=OTHER, priority="low")
    await hands.submit_one(delay_seconds=60)
    await hands.announcements.announce_worker("w", {}, 60)
    health = await hands.inspection.health()
    assert health.server.startswith(("Valkey ", "Redis "))
    assert (health.queues, health.workers) == ({Q: 3, OTHER: 1}, 1)


@pytest.mark.parametrize(
    ("info", "named"),
    [
        ({"redis_version": "7.0.15"}, "Redis 7.0.15"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, "Valkey 9.1.2"),
        ({"redis_version": "10.0.0", "cluster_enabled": "0"}, "Redis 10.0.0"),
    ],
)
def test_supported_servers_are_named(info: dict[str, str], named: str) -> None:
    assert check_info(info) == named


async def test_a_listing_passes_expired_jobs_in_few_calls(hands: QueueDriver) -> None:
    """With one call for each log entry, a listing took 4,900 calls and over a second."""
    oldest = await hands.submit_one()
    expired = [await hands.submit_one() for _ in range(300)]
    hands.redis.delete(
        *(key for job_id in expired for key in (keys.status(job_id), keys.meta(job_id)))
    )
    hands.redis.delete(*(keys.data(job_id) for job_id in expired))
    before = _reads(hands.redis)

    assert await listed(hands) == [oldest]
    assert _reads(hands.redis) - before < 20
    hands.redis.flushall()


def _reads(server: redis.Redis) -> int:
    stats: dict[str, dict[str, int]] = server.info("commandstats")
    return stats.get("cmdstat_mget", {}).get("calls", 0)


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({"redis_version": "6.2.14"}, ">= 7.0"),
        ({"redis_version": "7.2.4", "valkey_version": "7.0.1"}, "Valkey >= 7.2"),
        ({"redis_version": "7.4.0", "cluster_enabled": 1}, "cluster"),
        ({"redis_version": "7.4.0", "maxmemory_policy": "allkeys-lru"}, "noeviction"),
        ({}, ">= 7.0"),
    ],
)
def test_unsupported_servers_are_refused(info: dict[str, str], why: str) -> None:
    with pytest.raises(ServerRefused, match=why):
        check_info(info)

"""Models without a live worker are retracted, and never while a job needs them."""

import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from asyncinfer.errors import DefaultModelChanged
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.audit_log import AuditLog
from asyncinfer.repository.store import Store
from asyncinfer.repository.unserved_models import UnservedModels
from tests.queue_driver import Q, QueueDriver

OTHER = f"{Q}:digits"


@pytest.fixture
def leftovers(store: Store) -> UnservedModels:
    return UnservedModels(store)


async def _a_high_one(hands: QueueDriver, queue: str) -> None:
    await hands.submit_one(queue=queue, priority="high")


async def _a_low_one(hands: QueueDriver, queue: str) -> None:
    await hands.submit_one(queue=queue, priority="low")


async def _a_normal_one(hands: QueueDriver, queue: str) -> None:
    await hands.submit_one(queue=queue)


async def _a_delayed_one(hands: QueueDriver, queue: str) -> None:
    await hands.submit_one(queue=queue, delay_seconds=60)


async def _a_running_one(hands: QueueDriver, queue: str) -> None:
    await hands.submit_one(queue=queue)
    await hands.claim_jobs(queues=(queue,))


async def _one_among_stale_entries(hands: QueueDriver, queue: str) -> None:
    await hands.submit_one(queue=queue)
    await hands.cancel_in_one_call(*await hands.submit_many(20, queue=queue), queue=queue)


UNENDED = pytest.mark.parametrize(
    "job",
    [
        *(_a_high_one, _a_normal_one, _a_low_one, _a_delayed_one, _a_running_one),
        _one_among_stale_entries,
    ],
)
Job = Callable[[QueueDriver, str], Awaitable[None]]


async def announced(hands: QueueDriver, *labels: str) -> None:
    for label in labels:
        model, version = label.split("/")
        await hands.announcements.announce_models({model: {version: b"{}"}})


async def worker(hands: QueueDriver, name: str = "w", **says: Any) -> None:
    await hands.announcements.announce_worker(name, says, ttl_seconds=60)


async def left(hands: QueueDriver) -> dict[str, list[str]]:
    names = hands.redis.smembers(keys.models(Q))
    return {
        name.decode(): sorted(await hands.announcements.read_versions(name.decode()))
        for name in names
    }


# --- the default model -----------------------------------------------------------------------


async def test_another_default_model_is_accepted_while_no_job_waits(
    hands: QueueDriver, leftovers: UnservedModels
) -> None:
    for name in ("iris", "iris", "digits"):
        await leftovers.claim_default_model(name)
        assert await hands.store.default_model() == name


async def test_a_replaced_default_model_leaves_one_entry_in_the_audit_log(
    hands: QueueDriver, leftovers: UnservedModels
) -> None:
    for name in ("iris", "iris", "digits", "digits"):
        await leftovers.claim_default_model(name)
    await leftovers.replace_default_model("iris", "wine")  # is not the default any more
    await leftovers.replace_default_model("digits", None)
    entries = (await AuditLog(hands.store).page()).entries
    assert [(entry.action, entry.tenant, entry.filter) for entry in entries] == [
        ("default", None, {"model": ""}),
        ("default", None, {"model": "digits"}),
    ]


@UNENDED
@pytest.mark.parametrize(("queue", "of"), [(Q, "iris"), (OTHER, "digits")])
async def test_another_default_model_is_refused_while_a_job_of_either_has_not_ended(
    job: Job, queue: str, of: str, hands: QueueDriver, leftovers: UnservedModels
) -> None:
    await leftovers.claim_default_model("iris")
    await job(hands, queue)
    with pytest.raises(DefaultModelChanged) as refused:
        await leftovers.claim_default_model("digits")
    assert await hands.store.default_model() == "iris"
    for words in ("1 job of it", f"cancel --model {of}`", "DEFAULT_MODEL=iris"):
        assert words in refused.value.detail
    assert "delete" not in refused.value.detail


async def test_cancelled_jobs_keep_no_default_model(
    hands: QueueDriver, leftovers: UnservedModels
) -> None:
    await leftovers.claim_default_model("iris")
    await hands.cancel_in_one_call(*await hands.submit_many(20))
    assert hands.count_stale_entries() > 0
    await leftovers.claim_default_model("digits")
    assert await hands.store.default_model() == "digits"


async def test_another_default_model_is_refused_while_a_worker_serves_the_old_one(
    hands: QueueDriver, leftovers: UnservedModels
) -> None:
    await leftovers.claim_default_model("iris")
    await worker(hands, models=["iris"], host="other", pid=7)
    with pytest.raises(DefaultModelChanged, match=r"other \(pid 7\)"):
        await leftovers.claim_default_model("digits")
    await hands.announcements.retract_worker("w")
    await worker(hands, models=["digits"], default_model="iris")
    await leftovers.claim_default_model("digits")


async def test_a_model_stays_paused_or_not_when_it_becomes_the_default(
    hands: QueueDriver, leftovers: UnservedModels
) -> None:
    await leftovers.claim_default_model("iris")
    await hands.operations.pause(Q, paused=True)
    await leftovers.claim_default_model("digits")
    assert await hands.inspection.paused([Q, f"{Q}:iris", OTHER]) == [False, True, False]
    await leftovers.claim_default_model("iris")
    assert await hands.inspection.paused([Q, f"{Q}:iris", OTHER]) == [True, False, False]


async def test_that_there_is_no_default_model_can_be_decided_and_changed(
    hands: QueueDriver, leftovers: UnservedModels
) -> None:
    await leftovers.claim_default_model("iris")
    assert await leftovers.replace_default_model("iris", None) is None
    assert await hands.store.default_model() is None
    # A worker that knew it as the default does this in each round; it must not come back by that.
    assert await hands.store.agree_on_default_model("iris") == ""
    await leftovers.claim_default_model("digits")
    assert await hands.store.default_model() == "digits"


# --- versions --------------------------------------------------------------------------------


async def test_a_version_that_a_live_worker_has_or_loads_is_not_unserved(
    hands: QueueDriver, leftovers: UnservedModels
) -> None:
    await announced(hands, "gone/1", "here/1", "here/2", "loads/1", "leaves/1", "old/1")
    await worker(
        hands,
        models=["here", "leaves", "old"],
        versions={"here": {"2": "sha"}},
        loading=["loads"],
    )
    found = await leftovers.unserved_versions(await leftovers.workers())
    assert found == {"gone": ["1"], "here": ["1"]}


async def test_a_version_without_a_worker_is_retracted_when_no_job_waits(
    hands: QueueDriver, leftovers: UnservedModels
) -> None:
    await announced(hands, "gone/1", "here/1", "here/2")
    await hands.announcements.announce_default_versions({"gone": "1", "here": "2"})
    for model in ("gone", "here"):
        assert await leftovers.retract(model, ["1"]) == 0
    assert await left(hands) == {"here": ["2"]}
    assert await hands.announcements.read_default_versions() == {"here": "2"}


@UNENDED
@pytest.mark.parametrize(("default", "queue"), [("iris", OTHER), ("digits", Q), ("digits", OTHER)])
async def test_no_version_of_a_model_with_an_unfinished_job_is_retracted(
    job: Job, default: str, queue: str, hands: QueueDriver, leftovers: UnservedModels
) -> None:
    await leftovers.claim_default_model(default)
    await announced(hands, "digits/1")
    await job(hands, queue)
    assert await leftovers.retract("digits", ["1"]) == 1
    assert await left(hands) == {"digits": ["1"]}


async def test_a_job_submitted_after_its_model_was_retracted_is_listed_and_runs_later(
    hands: QueueDriver, leftovers: UnservedModels
) -> None:
    """As by an API that still had the model in its cache."""
    await announced(hands, "digits/1")
    await leftovers.retract("digits", ["1"])
    job_id = await hands.submit_one(queue=OTHER)
    assert OTHER in await hands.store.queues()
    assert (await hands.inspection.health()).queues[OTHER] == 1
    claim = await hands.claim_jobs(queues=(OTHER,))
    assert [job.job_id for job in claim.jobs] == [job_id]


@pytest.fixture
def ended_pid() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.mark.skipif(sys.platform == "win32", reason="there is no asking for a process")
async def test_a_worker_whose_process_has_ended_on_this_machine_is_not_live(
    ended_pid: int, hands: QueueDriver, store: Store
) -> None:
    for name, host, pid in (
        ("ended", socket.gethostname(), ended_pid),
        ("alive", socket.gethostname(), os.getpid()),
        ("elsewhere", "another-host", ended_pid),
    ):
        await worker(hands, name, models=[name], host=host, pid=pid)
    found = await UnservedModels(store, all_here=True).workers()
    assert {worker.models for worker in found} == {("alive",), ("elsewhere",)}
    assert len(await UnservedModels(store).workers()) == 3

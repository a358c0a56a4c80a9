"""Two releases side by side on one Redis: this one, and the one before or after it."""

import itertools
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import redis

from asyncinfer.jobs import SCHEMA
from asyncinfer.repository import keys
from tests.faults.load_client import transitions
from tests.process import REPOSITORY

from .harness import assert_at_rest, eventually, eventually_sync
from .services import Services, open_services

pytestmark = pytest.mark.soak

QUEUE = "predict_queue"
ROWS = {
    "setosa": [[5.1, 3.5, 1.4, 0.2]],
    "versicolor": [[5.9, 3.0, 4.2, 1.5]],
    "virginica": [[6.5, 3.0, 5.8, 2.2]],
}
_MOVED_WITH_THE_LAYOUT = "asyncinfer/keys.py"
"""The release to compare with is the last whose tree still had this file at this place: the last
before the package was divided into rooms. To be replaced once the bytes in Redis change."""

_NOTIFIED_SECONDS = 2.0
"""A wait ends at once with a notification; without one it ends at a poll, every 4 to 6 s."""

_DELAY_SECONDS = 0.2


def _git(*arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, check=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the release before is taken from git: {error.stderr.decode().strip()}")
    return done.stdout


def _commit_before() -> str:
    """The last commit of the release before this one."""
    removed = ("--diff-filter=D", "--", _MOVED_WITH_THE_LAYOUT)
    parents = _git("log", "-1", "--format=%P", *removed).decode().split()
    if not parents:
        pytest.skip("the release before is not in this clone's history, which may be a shallow one")
    return parents[0]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of the release before."""
    archive = _git("archive", _commit_before(), "asyncinfer")
    tree = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(tree, filter="data")
    done = subprocess.run(
        [sys.executable, "-c", "import asyncinfer; print(asyncinfer.__file__)"],
        cwd=tree,
        env={"PYTHONPATH": str(tree)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.startswith(str(tree))
    return tree


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The source of a later release, whose records have a higher schema than this one knows."""
    tree = tmp_path / "later"
    shutil.copytree(REPOSITORY / "asyncinfer", tree / "asyncinfer")
    source = tree / "asyncinfer" / "jobs.py"
    schema_line = f"SCHEMA: Final = {SCHEMA}"
    text = source.read_text()
    assert schema_line in text
    source.write_text(text.replace(schema_line, f"SCHEMA: Final = {SCHEMA + 1}"))
    return tree


class Apis(NamedTuple):
    """URLs of an API of the other release and of one of this release."""

    other: str
    this: str


@pytest.fixture
def services(
    redis_url: str, server: redis.Redis, shipped_models: Path, tmp_path: Path
) -> Iterator[Services]:
    environ = {"REDIS_URL": redis_url, "MODEL_DIR": str(shipped_models), "MODELS": "iris"}
    with open_services(tmp_path, **environ, LEASE_SECONDS="2", REAP_SECONDS="0.3") as services:
        yield services


@pytest.mark.system("git")
async def test_each_release_runs_jobs_that_the_other_accepted(
    before: Path, services: Services, server: redis.Redis
) -> None:
    worker = services.work(tree=before)
    apis = Apis(services.serve(tree=before), services.serve())
    async with httpx2.AsyncClient(timeout=30) as client:
        await _assert_apis_agree(client, apis)
        await _stop(worker)
        waiting = [await _submit(client, url, "virginica") for url in apis]
        worker = services.work()
        await _assert_all_completed(client, apis, waiting, "virginica")
        await _assert_apis_agree(client, apis)
        await _stop(worker)
    services.close()
    assert_at_rest(server, QUEUE)


@pytest.mark.system("git")
async def test_releases_side_by_side_end_each_job_once_though_a_worker_is_killed(
    before: Path, services: Services, server: redis.Redis
) -> None:
    workers = [services.work(tree=before), services.work(), services.work(tree=before)]
    apis = Apis(services.serve(tree=before), services.serve())
    eventually_sync(lambda: _count_workers(server) == 3, "all three workers run")
    names = itertools.cycle(ROWS)
    submitted: dict[str, str] = {}
    async with httpx2.AsyncClient(timeout=30) as client:
        for number in range(300):
            name = next(names)
            submitted[await _submit(client, apis[number % 2], name)] = name
            if number == 150:
                workers[0].kill()
        for name in ROWS:
            ids = [job_id for job_id, class_name in submitted.items() if class_name == name]
            await _assert_all_completed(client, apis, ids, name)
    for worker in workers[1:]:
        await _stop(worker)
    services.close()
    ended = transitions(server, QUEUE)
    assert {ended[job_id]["completed"] for job_id in submitted} == {1}
    assert_at_rest(server, QUEUE)


async def test_a_job_that_only_a_later_release_can_run_waits_for_a_worker_of_that_release(
    later: Path, services: Services, server: redis.Redis
) -> None:
    worker = services.work()
    apis = Apis(services.serve(tree=later), services.serve())
    async with httpx2.AsyncClient(timeout=30) as client:
        job_id = await _submit(client, apis.other, "virginica")
        await eventually(
            lambda: transitions(server, QUEUE)[job_id]["processing"] >= 2, "it was released twice"
        )
        await _assert_notified_at_once(client, apis.this)
        job = (await client.get(f"{apis.this}/job/{job_id}")).json()
        assert (job["status"], job["model"]) == ("pending", "iris")
        later_worker = services.work(tree=later)
        await _assert_all_completed(client, apis, [job_id], "virginica")
        await _assert_notified_at_once(client, apis.this)
        await _stop(worker)
        await _assert_notified_at_once(client, apis.this)
        await _stop(later_worker)
    services.close()
    assert transitions(server, QUEUE)[job_id]["completed"] == 1
    assert services.log.count("by a later release") == 1
    assert_at_rest(server, QUEUE)


async def _assert_apis_agree(client: httpx2.AsyncClient, apis: Apis) -> None:
    """Asserts that each API handles its own jobs and those of the other."""
    for here, there in (apis, apis[::-1]):
        await _assert_notified_at_once(client, here)
        await _assert_waits_for_a_job_of(client, here, there)
        await _assert_knows_an_idempotency_key_of(client, here, there)
        await _assert_cancels_and_retries_a_job_of(client, here, there)


async def _assert_notified_at_once(client: httpx2.AsyncClient, url: str) -> None:
    for name in ROWS:
        began_at = time.monotonic()
        answer = await _post(client, url, name, headers={"Prefer": "wait=20"})
        assert answer.status_code == 200
        _assert_completed(answer.json(), name)
        assert time.monotonic() - began_at < _NOTIFIED_SECONDS


async def _assert_waits_for_a_job_of(client: httpx2.AsyncClient, here: str, there: str) -> None:
    options = {"delay_seconds": _DELAY_SECONDS, "priority": "high", "ttl_seconds": 300}
    job_id = await _submit(client, there, "setosa", options=options)
    began_at = time.monotonic()
    answer = await client.get(f"{here}/job/{job_id}?wait=20")
    _assert_completed(answer.json(), "setosa")
    assert time.monotonic() - began_at < _NOTIFIED_SECONDS + _DELAY_SECONDS


async def _assert_knows_an_idempotency_key_of(
    client: httpx2.AsyncClient, here: str, there: str
) -> None:
    key = {"Idempotency-Key": f"{here}-{there}-{time.monotonic_ns()}"}
    first = await _post(client, there, "setosa", headers=key)
    repeated = await _post(client, here, "setosa", headers=key)
    different = await _post(client, here, "virginica", headers=key)
    assert first.json()["job_id"] == repeated.json()["job_id"]
    assert different.status_code == 422


async def _assert_cancels_and_retries_a_job_of(
    client: httpx2.AsyncClient, here: str, there: str
) -> None:
    job_id = await _submit(client, there, "versicolor", options={"delay_seconds": 600})
    for round_number, (url, other) in enumerate(((here, there), (there, here)), start=1):
        assert (await client.delete(f"{url}/job/{job_id}")).status_code == 200
        job = (await client.get(f"{other}/job/{job_id}")).json()
        assert (job["status"], job["round"]) == ("cancelled", round_number)
        if round_number == 1:
            assert (await client.post(f"{other}/job/{job_id}/retry")).status_code == 202


async def _post(
    client: httpx2.AsyncClient,
    url: str,
    name: str,
    *,
    options: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> httpx2.Response:
    body = {"data": ROWS[name], "options": options or {}}
    return await client.post(f"{url}/predict", json=body, headers=headers)


async def _submit(
    client: httpx2.AsyncClient, url: str, name: str, options: dict[str, Any] | None = None
) -> str:
    answer = await _post(client, url, name, options=options)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


async def _assert_all_completed(
    client: httpx2.AsyncClient, apis: Apis, job_ids: list[str], name: str
) -> None:
    """Asserts that both APIs show each job as completed, with the right result."""
    for job_id in job_ids:
        jobs = [(await client.get(f"{url}/job/{job_id}?wait=20")).json() for url in apis]
        for job in jobs:
            _assert_completed(job, name)


def _assert_completed(job: dict[str, Any], name: str) -> None:
    assert (job["status"], job["result"]["class_name"]) == ("completed", name)


def _count_workers(server: redis.Redis) -> int:
    return sum(1 for _ in server.scan_iter(keys.worker(QUEUE, "*"), count=1000))


async def _stop(worker: subprocess.Popen[bytes]) -> None:
    worker.send_signal(signal.SIGTERM)
    await eventually(lambda: worker.poll() == 0, "the worker ends")

"""The client against a running service: predictions, jobs, events and operations."""

import asyncio
import inspect
import subprocess
import sys
import threading
import time
from decimal import Decimal
from typing import Any, Final

import numpy as np
import pytest

from asyncinfer import client as public
from asyncinfer.client import (
    AsyncClient,
    AsyncGroup,
    AsyncJob,
    ClearedJobs,
    Client,
    ClientClosed,
    Group,
    InvalidQuery,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobNotFound,
    RequestError,
    WaitingJobs,
    WaitTimeout,
)
from asyncinfer.errors import Forbidden
from asyncinfer.testing import Running
from tests.faults.harness import eventually_sync

SETOSA: Final = [5.1, 3.5, 1.4, 0.2]
VIRGINICA: Final = [6.7, 3.0, 5.2, 2.3]

PAIRS: Final[list[tuple[type, type]]] = [
    (Client, AsyncClient),
    (public.Job, AsyncJob),
    (Group, AsyncGroup),
]


# --- plain and asynchronous --------------------------------------------------------------------


def _parameters_by_method(kind: type) -> dict[str, list[inspect.Parameter]]:
    return {
        name: [
            parameter.replace(annotation=None)
            for parameter in inspect.signature(method).parameters.values()
        ]
        for name, method in inspect.getmembers(kind, callable)
        if not name.startswith("_") or name == "__init__"
    }


@pytest.mark.parametrize(("plain", "asynchronous"), PAIRS)
def test_the_plain_and_the_asynchronous_class_have_the_same_methods(
    plain: type, asynchronous: type
) -> None:
    assert _parameters_by_method(plain) == _parameters_by_method(asynchronous)
    names = {name for name in dir(plain) if not name.startswith("_")}
    assert names == {name for name in dir(asynchronous) if not name.startswith("_")}


def test_importing_it_loads_nothing_heavy_and_is_quick() -> None:
    heavy = ["numpy", "httpx2", "tqdm", "onnxruntime", "starlette", "redis", "pandas", "polars"]
    heavy += ["asyncio"]
    code = (
        "import sys, time\n"
        "begun = time.process_time()\n"
        "import asyncinfer.client\n"
        f"print(time.process_time() - begun, *(name for name in {heavy} if name in sys.modules))"
    )
    output = min(
        (subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(3)),
        key=lambda line: float(line.split()[0]),
    )

    seconds, *loaded = output.split()
    assert loaded == []
    assert float(seconds) < 0.3


async def test_the_plain_client_works_inside_a_running_loop(client: Client) -> None:
    assert client.predict([SETOSA])["class_name"] == "setosa"


def test_one_client_serves_many_threads(client: Client) -> None:
    rows = [SETOSA, VIRGINICA] * 16
    names: dict[int, str] = {}

    def ask(number: int) -> None:
        names[number] = client.predict([rows[number]])["class_name"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [names[number] for number in range(len(rows))] == ["setosa", "virginica"] * 16


def test_a_client_that_was_never_closed_says_so() -> None:
    client = Client("http://127.0.0.1:1")
    with pytest.warns(ResourceWarning, match="never closed"):
        del client


async def test_a_closed_client_says_so(running: Running) -> None:
    client = Client(running.url)
    client.close()
    with pytest.raises(ClientClosed, match="make a new one"):
        client.health()

    aclient = AsyncClient(running.url)
    await aclient.close()
    with pytest.raises(ClientClosed, match="make a new one"):
        await aclient.health()


def test_address_and_key_come_from_the_environment(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCINFER_URL", running.url + "/")
    with Client() as client:
        assert client.url == running.url
        assert client.health().status == "ok"


# --- a prediction ------------------------------------------------------------------------------


def test_a_row_gives_its_labelled_result_in_every_form(client: Client) -> None:
    forms: list[Any] = [
        [SETOSA],
        (tuple(SETOSA),),
        np.array([SETOSA]),
        np.array([SETOSA], np.float32),
        [np.array(SETOSA, np.float32)],
        {"input": np.array([SETOSA], np.float32)},
        {"input": [SETOSA]},
    ]

    for form in forms:
        result = client.predict(form, "iris")
        assert (result["prediction"], result["class_name"]) == (0, "setosa")
        assert sum(result["probabilities"]) == pytest.approx(1)


def test_several_rows_give_a_list(client: Client) -> None:
    for rows in ([SETOSA, VIRGINICA], np.array([SETOSA, VIRGINICA])):
        names = [row["class_name"] for row in client.predict(rows)]
        assert names == ["setosa", "virginica"]


def test_without_labels_the_result_is_arrays_whatever_the_input_is(client: Client) -> None:
    for rows in (
        [[1, 2], [3, 4]],
        np.array([[1, 2], [3, 4]], np.int64),
        np.array([[1, 2], [3, 4]], np.int8),
    ):
        result = client.predict(rows, "int64")
        assert result.dtype == np.int64
        assert result.tolist() == client.predict([[1, 2], [3, 4]], "int64").tolist()


def test_the_tensors_of_a_labelled_model_can_be_requested(client: Client) -> None:
    for rows in ([SETOSA], np.array([SETOSA])):
        tensors = client.predict(rows, answer="tensors")
        assert {name: array.dtype for name, array in tensors.items()} == {
            "label": np.int64,
            "probabilities": np.float32,
        }


def test_half_precision_and_whole_numbers_keep_their_dtype(client: Client) -> None:
    assert client.predict(np.ones((2, 4), np.float16), "half").dtype == np.float16
    assert client.predict(np.ones((2, 2), np.int64), "int64").dtype == np.int64
    assert str(client.predict(np.ones((2, 2)), "bf16").dtype) == "bfloat16"


def test_strings_and_several_inputs_go_as_a_dict(client: Client) -> None:
    feeds = {"a": [[1.0, -2.0]], "b": np.array([3]), "c": np.array([["zwei Wörter"]])}
    result = client.predict(feeds, "several")
    assert result["doubled"].tolist() == [6]
    assert result["positive"].tolist() == [[True, False]]
    assert result["words"].dtype == object

    words = [["é", "b"]]
    listed, packed = (client.predict(form, "bytes") for form in (words, np.array(words)))
    assert listed.tolist() == packed.tolist()


def test_numbers_that_json_does_not_have_are_sent(client: Client) -> None:
    result = client.predict([[float("nan")], [1.0]], "slow")
    assert np.isnan(result[0, 0]) or np.isnan(result).any()


def test_decimals_in_lists_are_numbers(client: Client) -> None:
    assert client.predict([[Decimal(str(number)) for number in SETOSA]])["class_name"] == "setosa"


def test_a_long_list_goes_through_though_json_has_a_limit(client: Client) -> None:
    rows = [[0.123456789] * 64] * 2000
    assert len(client.predict(rows, "digits")) == 2000


def test_every_model_has_an_example_that_works(client: Client) -> None:
    for model in client.models():
        assert client.model(model.model).sha256 == model.sha256
        if model.model != "slow":
            client.predict(model.example(), model.model)
    assert client.model().model == "iris"


def test_validate_runs_nothing(client: Client) -> None:
    understood = client.validate(np.zeros((2, 4)), priority="low")
    assert (understood.model, understood.rows) == ("iris", 2)
    assert understood.options["priority"] == "low"


# --- a job -------------------------------------------------------------------------------------


def test_a_job_is_found_by_its_id(client: Client, running: Running) -> None:
    job = client.submit([SETOSA], "iris", priority="low", group="found-by-id")
    with Client(running.url) as another:
        again = another.job(job.id)
        assert again.result()["class_name"] == "setosa"

    assert job.wait().status == "completed"
    assert (job.model, job.error) == ("iris", None)
    assert list(job.times) == ["created", "started", "finished"]
    assert job.times["created"] <= job.times["finished"]
    assert job.as_dict()["priority"] == "low"
    assert client.group("found-by-id").counts.completed == 1
    assert [found.id for found in client.jobs(group="found-by-id")] == [job.id]
    assert repr(job) == f"<Job {job.id} of iris: completed>"


async def test_a_job_can_be_awaited(aclient: AsyncClient) -> None:
    job = await aclient.submit([VIRGINICA])
    assert (await job)["class_name"] == "virginica"
    assert (await (await aclient.job(job.id)).result())["class_name"] == "virginica"


def test_an_idempotency_key_makes_a_single_job(client: Client) -> None:
    jobs = {client.submit([SETOSA], idempotency_key="mine").id for _ in range(3)}
    assert len(jobs) == 1


def test_a_waiting_job_is_cancelled_and_retried(client: Client) -> None:
    client.pause("iris")
    job = client.submit([SETOSA])
    assert job.cancel().status == "cancelled"
    with pytest.raises(JobCancelled, match="retry it"):
        job.result()
    client.resume("iris")

    assert job.retry().status == "pending"
    assert job.result()["class_name"] == "setosa"
    with pytest.raises(JobFinished, match="already completed"):
        job.cancel()


def test_a_failed_job_says_why(client: Client) -> None:
    with pytest.raises(JobFailed, match="model_failed") as failed:
        client.predict([[9.0]], "picky")
    assert failed.value.job_error[0] == "model_failed"

    job = client.submit(np.array([[9.0]]), "picky").wait()
    assert job.error is not None
    assert job.error.code == "model_failed"


def test_a_timeout_bounds_the_wait_and_the_job_goes_on(client: Client) -> None:
    begun = time.monotonic()
    with pytest.raises(WaitTimeout, match="goes on") as late:
        client.predict([[1000.0]], "slow", timeout=0.2)
    assert time.monotonic() - begun < 3

    assert late.value.job_id
    assert client.job(late.value.job_id).result().tolist() == [[1000.0]]


def test_a_timeout_cancels_the_job_if_requested(client: Client) -> None:
    with pytest.raises(WaitTimeout, match="was cancelled") as late:
        client.predict([SETOSA], delay_seconds=60, timeout=0.2, cancel_on_timeout=True)

    assert late.value.job_id
    assert client.job(late.value.job_id).status == "cancelled"


def test_a_purged_job_is_gone(client: Client) -> None:
    job = client.submit([SETOSA]).wait()
    job.purge()
    with pytest.raises(JobNotFound):
        client.job(job.id)


# --- events ------------------------------------------------------------------------------------


def test_events_of_a_job_come_until_it_has_ended(client: Client) -> None:
    job = client.submit([SETOSA], delay_seconds=0.2)
    events = list(job.events())
    assert events[0].name == "snapshot"
    assert events[-1].name == "completed"
    assert events[-1].data["job_id"] == job.id


async def test_events_of_a_group_say_when_all_jobs_have_ended(aclient: AsyncClient) -> None:
    for _ in range(3):
        await aclient.submit([SETOSA], group="followed")
    group = await aclient.group("followed")

    async with asyncio.timeout(20):
        async for event in group.events():
            if event.name == "done":
                break

    assert (await group.refresh()).progress == 1


# --- operations --------------------------------------------------------------------------------


def test_an_operator_acts_on_a_job_of_another_tenant_and_does_not_see_its_result(
    client: Client,
) -> None:
    client.predict([SETOSA], group="theirs")

    (found,) = client.jobs(tenant="*", group="theirs")
    assert (found.tenant, found.wait(5).status) == ("default", "completed")
    with pytest.raises(Forbidden, match="only to keys of its tenant, default"):
        found.result()
    assert found.refresh().tenant == "default"
    with pytest.raises(JobFinished):
        found.cancel()
    assert client.retry_all([found.id], tenant="acme").retried == ()
    assert client.cancel_all(tenant="acme", group="theirs").cancelled == 0
    assert client.purge(tenant="acme", group="theirs").purged == 0
    found.purge()
    assert client.jobs(tenant="default", group="theirs") == []


async def test_a_cancelled_job_of_another_tenant_is_retried_by_an_operator(
    aclient: AsyncClient,
) -> None:
    await aclient.pause("digits")
    await aclient.submit([[0.0] * 64], "digits", group="elsewhere")
    (found,) = await aclient.jobs(tenant="*", group="elsewhere")
    assert (await found.cancel()).status == "cancelled"
    assert (await found.retry()).tenant == "default"
    assert (await found.cancel()).tenant == "default"
    await found.purge()
    await aclient.resume("digits")


def test_waiting_jobs_are_paused_listed_cancelled_and_purged(client: Client) -> None:
    client.pause("digits")
    jobs = [client.submit([[0.0] * 64], "digits", group="held") for _ in range(3)]
    (queue,) = [queue for queue in client.queues() if queue.model == "digits"]
    assert (queue.paused, queue.waiting) == (True, WaitingJobs(high=0, normal=3, low=0))
    assert client.workers()[0].slots >= 1
    assert client.group("held").progress == 0

    jobs[0].cancel()
    assert client.group("held").cancel().cancelled == 2
    assert client.retry_all([jobs[0].id]).retried == (jobs[0].id,)
    assert client.retry_all(group="held", status="cancelled").retried
    client.resume("digits")
    for job in jobs:
        assert job.wait().refresh().status == "completed"

    assert client.cancel_all(group="held").cancelled == 0
    assert client.purge(group="held").purged == 3
    eventually_sync(lambda: not client.jobs(group="held"), "they are gone")


def test_jobs_are_cancelled_and_deleted_by_their_ids(client: Client) -> None:
    jobs = [client.submit([SETOSA], delay_seconds=60) for _ in range(2)]
    ids = [job.id for job in jobs]

    running = client.purge(ids)
    assert (running.purged, {job.code for job in running.refused}) == (0, {"job_not_finished"})
    for _ in range(2):
        cancelled = client.cancel_all([*ids, "gone"])
        assert (cancelled.cancelled, cancelled.stopping) == (2, 0)
        assert [job.job_id for job in cancelled.refused] == ["gone"]
    assert client.purge([*ids, "gone"]).purged == 2
    assert client.purge([]) == ClearedJobs(cancelled=0)


async def test_nothing_is_done_to_all_jobs_without_a_filter(
    client: Client, aclient: AsyncClient
) -> None:
    job = client.submit([SETOSA]).wait()
    for name in ("cancel_all", "retry_all", "purge", "redeliver_webhooks"):
        with pytest.raises(InvalidQuery, match="with at least one of"):
            getattr(client, name)()
        with pytest.raises(InvalidQuery, match="with at least one of"):
            await getattr(aclient, name)()
    assert job.refresh().status == "completed"
    assert client.purge(status="ended").purged > 0


def test_a_job_is_read_again_when_it_has_ended(client: Client) -> None:
    client.pause("iris")
    job = client.submit([SETOSA], group="read-again")
    assert job.refresh(wait_seconds=0.1).status == "pending"
    client.resume("iris")
    assert job.refresh(wait_seconds=20).status == "completed"
    assert (job.group, job.version) == ("read-again", client.model("iris").version)
    assert list(job.times) == ["created", "started", "finished"]
    assert client.job(job.id, tenant="default").tenant == "default"


async def test_any_request_may_be_sent(client: Client, aclient: AsyncClient) -> None:
    query: dict[str, Any] = {"limit": 1, "group": "nothing", "status": None}
    assert client.request("GET", "/jobs", **query) == {"jobs": [], "cursor": None}
    assert await aclient.request("GET", "/jobs", **query) == {"jobs": [], "cursor": None}
    checked = client.request("POST", "/models/iris/validate", body={"data": [SETOSA]})
    assert checked["rows"] == 1
    with pytest.raises(RequestError, match="nothing at this path"):
        client.request("GET", "/nothing")


def test_a_models_queue_is_emptied(client: Client) -> None:
    client.pause("digits")
    job = client.submit([[0.0] * 64], "digits")
    assert client.cancel_queue("digits").cancelled == 1
    client.resume("digits")
    assert job.refresh().status == "cancelled"


async def test_the_asynchronous_client_does_all_of_that(aclient: AsyncClient) -> None:
    await aclient.pause("digits")
    job = await aclient.submit([[0.0] * 64], "digits", group="held-too")
    assert [listed.id for listed in await aclient.jobs(group="held-too")] == [job.id]
    assert (await aclient.cancel_all(group="held-too")).cancelled == 1
    assert (await job.refresh()).status == "cancelled"
    assert (await job.retry()).status == "pending"
    assert (await job.cancel()).status == "cancelled"
    assert (await aclient.retry_all([job.id])).retried == (job.id,)
    assert (await aclient.cancel_queue("digits")).cancelled == 1
    await aclient.resume("digits")
    assert (await aclient.purge(group="held-too")).purged == 1
    assert {model.model for model in await aclient.models()} >= {"iris"}
    assert (await aclient.model()).model == "iris"
    assert (await aclient.validate([SETOSA])).rows == 1
    assert await aclient.queues()
    assert await aclient.workers()
    latest, purged = (await aclient.audit(limit=2)).entries
    assert (latest.action, latest.jobs, latest.filter["group"]) == ("purge", 1, "held-too")
    assert (purged.action, purged.outcome) == ("resume", "done")
    assert (await aclient.audit(action="pause", tenant="nobody")).entries == ()
    job = await aclient.submit([SETOSA])
    assert [event.name async for event in job.events()][-1] in ("completed", "snapshot")
    assert (await job.wait()).status == "completed"
    await job.purge()
    group = await aclient.group("held-too")
    await group.cancel()

"""Tests of asyncinfer.testing: a whole service with the models of a test."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
import redis

from asyncinfer import api_keys
from asyncinfer.errors import KeyFileRefused
from asyncinfer.testing import (
    InvalidSetting,
    Model,
    ModelRefused,
    NotDrained,
    Running,
    StartError,
    service,
)
from asyncinfer.testing.process import free_port
from asyncinfer.testing.service import refuse_windows
from tests import zoo
from tests.faults.harness import eventually_sync
from tests.process import is_gone, python_process, running_processes

LINUX: Final = sys.platform == "linux"


def call(
    running: Running, method: str, path: str, body: Any = None, *, wait: bool = False
) -> dict[str, Any]:
    """The JSON of a response, whatever its status."""
    headers = {"content-type": "application/json"} | ({"prefer": "wait=20"} if wait else {})
    if running.api_key:
        headers["x-api-key"] = running.api_key
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(running.url + path, content, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            answer = json.load(error)
    return answer


def submit(running: Running, model: str, value: float, **options: Any) -> str:
    body = {"data": [[value]], "options": options}
    return str(call(running, "POST", f"/predict/{model}", body)["job_id"])


def predict(running: Running, model: str, value: float) -> float:
    """The number that a model returns."""
    job = call(running, "POST", f"/predict/{model}", {"data": [[value]]}, wait=True)
    assert job["status"] == "completed", job
    return float(job["result"]["outputs"][0]["data"][0])


def status(running: Running, job_id: str) -> str:
    return str(call(running, "GET", f"/job/{job_id}")["status"])


def folder_of(running: Running) -> Path:
    match = re.search(r"its data in (.*)/data\n", running.log)
    assert match, running.log
    return Path(match[1])


def with_weights_beside(path: Path) -> Path:
    onnx.save(
        zoo.adds(4),
        path,
        save_as_external_data=True,
        location="weights/model.bin",
        size_threshold=0,
    )
    return path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service of every kind of model; each test leaves no unfinished job behind."""
    folder = tmp_path_factory.mktemp("mine")
    onnx.save(zoo.adds(1), folder / "one.onnx")
    (folder / "weights").mkdir()
    zoo.place(folder / "models", "five", zoo.adds(5), toml='description = "adds five"')
    models: dict[str, Model] = {
        "file": folder / "one.onnx",
        "any_rank": zoo.unary("Neg", None),
        "text": str(folder / "one.onnx"),
        "proto": zoo.adds(2),
        "bytes": zoo.adds(3).SerializeToString(),
        "weights": with_weights_beside(folder / "four.onnx"),
        "folder": folder / "models" / "five",
        "slow": zoo.slow(),
    }
    with service(models=models, max_json=4096) as running:
        shutil.rmtree(folder)
        yield running


# --- what is served --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "added"), [("file", 1), ("text", 1), ("proto", 2), ("bytes", 3), ("weights", 4)]
)
def test_a_model_is_served_from_a_file_a_path_a_proto_or_bytes(
    running: Running, model: str, added: int
) -> None:
    assert predict(running, model, 10) == 10 + added


def test_a_models_folder_is_served_with_its_model_toml(running: Running) -> None:
    assert call(running, "GET", "/models/folder")["description"] == "adds five"


def test_it_answers_for_every_model_as_soon_as_the_block_is_entered(running: Running) -> None:
    kinds = {"file", "text", "proto", "bytes", "weights", "folder", "slow", "any_rank"}
    assert set(running.models) == kinds
    assert all(model in repr(running) for model in running.models)


def test_a_running_service_has_a_client(running: Running) -> None:
    assert running.client.health()
    assert running.client is running.client


def test_a_model_of_any_rank_takes_what_it_is_given(running: Running) -> None:
    client = running.client
    (model,) = (entry for entry in client.models() if entry.model == "any_rank")
    arrays: list[Any] = [5.0, [1.0, 2.0], [[1.0], [2.0]], np.ones((1, 2, 1, 2), np.float32)]

    answers = [client.predict(array, model="any_rank") for array in arrays]
    mapped = list(client.map(arrays[1:3], model="any_rank"))

    assert [spec.shape for spec in (*model.inputs, *model.outputs)] == [None, None]
    for array, answer in zip([*arrays, *arrays[1:3]], [*answers, *mapped], strict=True):
        np.testing.assert_array_equal(answer, -np.asarray(array, np.float32))


# --- drain -----------------------------------------------------------------------------------


@pytest.mark.soak
def test_drain_returns_when_all_jobs_have_ended(running: Running) -> None:
    ids = [submit(running, "slow", 100) for _ in range(4)] + [submit(running, "file", 1)]
    ids.append(submit(running, "proto", 1, delay_seconds=0.5))

    running.drain()

    assert {status(running, job_id) for job_id in ids} == {"completed"}


def test_drain_of_nothing_takes_no_time(running: Running) -> None:
    running.drain(timeout_seconds=0)


def test_drain_names_unfinished_jobs_when_time_is_out(running: Running) -> None:
    job_id = submit(running, "slow", zoo.FOREVER)
    call(running, "POST", "/models/file/pause")
    waiting_id = submit(running, "file", 1)
    eventually_sync(lambda: status(running, job_id) == "processing", "the slow one runs")

    with pytest.raises(NotDrained) as error:
        running.drain(timeout_seconds=0.1)

    for unfinished_id in (job_id, waiting_id):
        call(running, "DELETE", f"/job/{unfinished_id}")
    call(running, "POST", "/models/file/resume")
    assert isinstance(error.value, TimeoutError)
    assert "slow: 0 waiting, 1 running" in error.value.detail
    assert "file: 1 waiting, 0 running, and it is paused" in error.value.detail


async def test_an_async_test_waits_for_jobs_while_its_loop_runs_on(running: Running) -> None:
    job_id = await asyncio.to_thread(submit, running, "slow", 100)

    ticks = await ticks_during(running.drained())

    assert ticks > 1
    assert await asyncio.to_thread(status, running, job_id) == "completed"


async def ticks_during(work: Any) -> int:
    """How often the event loop ran another task meanwhile."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    async with asyncio.TaskGroup() as group:
        ticker = group.create_task(tick())
        await work
        ticker.cancel()
    return ticks


# --- settings --------------------------------------------------------------------------------


def test_a_setting_by_keyword_is_in_force(running: Running) -> None:
    answer = call(running, "POST", "/predict/file", {"data": [[1.0]] * 4096})

    assert answer["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_que": 1}, "no setting 'max_que'. Did you mean 'max_queue'?"),
        ({"max_queue": "many"}, "MAX_QUEUE is 'many'; it must be a whole number"),
        ({"port": 8000}, "sets port itself"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=re.escape(message)):
        service(**settings)


def test_keys_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(KeyFileRefused, match="no such folder"), service(api_keys="no such folder"):
        pass


@pytest.mark.soak
async def test_a_second_service_runs_beside_the_first_in_an_async_test(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has API keys, and none of the settings of this process's environment."""
    monkeypatch.setenv("REDIS_URL", "redis://production.example.com")
    keys = tmp_path / "keys"
    keys.write_text(api_keys.entry_of(api_keys.new_key(), "acme", "submit").line())

    async with AsyncExitStack() as stack:
        second_service = service(zoo.slow(), name="slower", api_keys=keys)
        started: list[Running] = []

        async def start() -> None:
            started.append(await stack.enter_async_context(second_service))

        assert await ticks_during(start()) > 10
        (second,) = started
        assert second.models == ("slower",)
        with pytest.raises(RuntimeError, match="runs already"):
            await second_service.__aenter__()
        assert second.url != running.url
        assert await asyncio.to_thread(predict, second, "slower", 1) == 1
        assert await asyncio.to_thread(predict, running, "file", 1) == 2
        assert await asyncio.to_thread(status_without_key, second) == 401
        await asyncio.to_thread(submit, second, "slower", zoo.FOREVER)
        folder = folder_of(second)
        leaving_at = time.monotonic()

    assert time.monotonic() - leaving_at < 5
    assert not folder.exists()
    assert await asyncio.to_thread(predict, running, "file", 1) == 2


def status_without_key(running: Running) -> int:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{running.url}/models/slower")
    with error.value:
        return error.value.code


@pytest.mark.soak
def test_a_redis_that_is_given_is_used_under_a_queue_of_its_own(
    redis_url: str, server: redis.Redis, tmp_path: Path
) -> None:
    path = zoo.place(tmp_path, "churn", zoo.adds(1))
    with service(path, redis_url=redis_url) as running:
        assert running.models == ("churn",)
        assert predict(running, "churn", 1) == 2
        running.drain()
        (queue,) = call(running, "GET", "/health")["queues"]

    assert re.fullmatch("test_[0-9a-f]{16}", queue)
    assert not server.exists("predict_queue:log")


# --- what cannot be started ------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize(
    "others",
    [
        pytest.param({}, id="alone"),
        pytest.param({"good": zoo.adds(1)}, id="beside a good one", marks=pytest.mark.soak),
    ],
)
def test_a_broken_model_is_refused_with_the_reason(others: dict[str, Model]) -> None:
    started = service(models={"churn": b"this is no ONNX file", **others})

    with pytest.raises(ModelRefused, match=r"churn/1/model\.onnx: it is no ONNX file"), started:
        pass


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"-": b""}, "'-' cannot name a model: a model's name is 1 to 64 letters"),
        ({"a": "no/such.onnx"}, "There is no model .*no/such.onnx"),
        ({}, "names no model"),
    ],
)
def test_models_that_are_not_there_are_refused(models: dict[str, Model], message: str) -> None:
    with pytest.raises(StartError, match=message), service(models=models):
        pass


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"no model in {tmp_path}"), service(tmp_path):
        pass


def test_one_model_and_several_are_not_given_together() -> None:
    with pytest.raises(TypeError, match="not both"):
        service("a.onnx", models={"b": "b.onnx"})


def test_windows_is_refused_with_what_to_do() -> None:
    with pytest.raises(StartError, match="REDIS_URL"):
        refuse_windows("win32")


@pytest.mark.skipif(not LINUX, reason="elsewhere a start tries again")
def test_a_port_is_kept_for_the_service_that_is_started() -> None:
    with free_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.soak
async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    async def start() -> None:
        async with asyncio.timeout(0.3), service():
            pass

    before = set(descendants(os.getpid()))
    with pytest.raises(TimeoutError):
        await start()
    assert set(descendants(os.getpid())) <= before


# --- ends ------------------------------------------------------------------------------------

KILLED: Final = """
import threading
from asyncinfer.testing import service

def run():
    with service() as running:
        print(running.log.partition("its data in ")[2].splitlines()[0], flush=True)
        threading.Event().wait()

threading.Thread(target=run).start()
"""


@pytest.mark.soak
def test_a_killed_test_run_leaves_neither_process_nor_file() -> None:
    with python_process("-c", KILLED) as killed:
        folder = Path(killed.read_line()).parent
        pids = descendants(killed.process.pid)
        assert folder.exists()
        assert len(pids) >= 3
        killed.kill()

        eventually_sync(lambda: all(map(is_gone, pids)), "all have ended", seconds=5)
        eventually_sync(lambda: not folder.exists(), "nothing is left", seconds=5)


def descendants(pid: int) -> list[int]:
    found, parents = list(running_processes()), {pid}
    while more := {process.pid for process in found if process.parent_pid in parents} - parents:
        parents |= more
    return sorted(parents - {pid})


# --- pytest ----------------------------------------------------------------------------------

CONFTEST: Final = """
import pytest

pytest_plugins = ["asyncinfer.testing.plugin"]

@pytest.fixture(scope="session")
def asyncinfer_models():
    return {"mine": "mine.onnx"}

@pytest.fixture(scope="session")
def asyncinfer_settings():
    return {"max_queue": 7}
"""

TESTS: Final = """
import os

def test_one(asyncinfer_service):
    assert asyncinfer_service.models == ("mine",)

def test_two(asyncinfer_service):
    asyncinfer_service.drain()
    print("served at", asyncinfer_service.url)
    assert os.environ.get("NEVER_SET"), "fails on purpose"
"""


def run_pytest(folder: Path, *more: str) -> str:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_mine.py").write_text(TESTS)
    onnx.save(zoo.adds(1), folder / "mine.onnx")
    plain = ["-p", "no:valkey", "-p", "no:asyncio", "-W", "error", "-rA"]
    argv = [sys.executable, "-m", "pytest", *plain, *more]
    ran = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    return ran.stdout + ran.stderr


@pytest.mark.soak
def test_the_fixture_serves_the_models_of_a_conftest_and_shows_the_log(
    tmp_path: Path,
) -> None:
    report = run_pytest(tmp_path)

    assert "1 failed, 1 passed" in report, report
    assert "last lines of" in report
    assert "Models   mine (default)" in report


@pytest.mark.soak
def test_each_process_of_xdist_has_a_service_of_its_own(tmp_path: Path) -> None:
    report = run_pytest(tmp_path, "-n", "2", "--dist", "each")

    assert "2 failed, 2 passed" in report, report
    assert len(set(re.findall("served at (.*)", report))) == 2

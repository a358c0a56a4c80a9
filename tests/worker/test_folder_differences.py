"""Model folders that differ from start to start, or between the processes of one Redis."""

import asyncio
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx2
import msgspec
import pytest
import redis

from asyncinfer import settings
from asyncinfer.models.signature import Signature
from asyncinfer.processes import valkey
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import Submissions
from asyncinfer.tensors.datatypes import TensorSpec
from tests import zoo
from tests.cli.command_line import run_command
from tests.faults.harness import eventually_sync
from tests.process import PythonProcess, python_process
from tests.queue_driver import Q, new_job
from tests.serving import ServeProcess, running_serve

ROWS: Final = {"data": [[1.0, 2.0, 3.0]]}


@pytest.fixture(autouse=True)
def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for knob in settings.knobs():
        monkeypatch.delenv(knob.variable, raising=False)


def make_folder(parent_folder: Path, name: str, models: Sequence[str]) -> Path:
    folder = parent_folder / name
    for model in models:
        zoo.place(folder, model, zoo.mlp([3, 2]))
    return folder


def announcement(model: str) -> bytes:
    """The announcement of version 1 of a model, as a worker writes it."""
    spec = TensorSpec("x", "FP32", ("n", 3))
    return msgspec.json.encode(Signature(model, "1", "sha", (spec,), (spec,)))


def model_states(serve: ServeProcess) -> dict[str, tuple[int, bool]]:
    """By model, how many workers serve it, and whether it is the default."""
    return {
        model["model"]: (model["workers"], model["default"])
        for model in serve.get("/models")["models"]
    }


def post(serve: ServeProcess, path: str, **more: Any) -> tuple[int, Any]:
    answer = httpx2.post(serve.banner["URL"] + path, json=ROWS, timeout=30, **more)
    return answer.status_code, answer.json()


def wait_until_models_are(
    serve: ServeProcess, wanted: dict[str, tuple[int, bool]], seconds: float = 30
) -> None:
    eventually_sync(lambda: model_states(serve) == wanted, f"the models are {wanted}", seconds)


def stop(serve: ServeProcess) -> None:
    serve.process.process.send_signal(signal.SIGTERM)
    assert serve.process.process.wait(30) == 0


# --- one folder after another ----------------------------------------------------------------


def leave_earlier_models(data_dir: Path) -> None:
    """What a `serve` of iris and churn leaves in its Valkey, with a job of churn."""

    async def leave() -> None:
        async with (
            valkey.embedded(data_dir) as server,
            Store.open(server.url, queue_name=Q, policy=Policy(), name="test") as store,
        ):
            await store.claim_default_model("iris")
            await Announcements(store).announce_models(
                {model: {"1": announcement(model)} for model in ("iris", "churn")}
            )
            await Submissions(store).submit_many(f"{Q}:churn", [new_job(queue=f"{Q}:churn")])

    asyncio.run(leave())


@pytest.mark.soak
def test_models_and_default_of_an_earlier_folder_are_gone_within_moments(tmp_path: Path) -> None:
    leave_earlier_models(tmp_path / "data")
    folder = make_folder(tmp_path, "wines", ["wine"])
    with running_serve("--model-dir", str(folder), DATA_DIR=str(tmp_path / "data")) as serve:
        assert serve.banner["Models"] == "wine (default)"
        # A job of churn waits, so its announcement stays although no worker serves it.
        wait_until_models_are(serve, {"wine": (1, True), "churn": (0, False)}, 10)
        command = run_command("predict", "1", "2", "3", "--url", serve.banner["URL"])
        assert command.code == 0, command


@pytest.mark.soak
def test_jobs_of_an_earlier_folder_stay_until_they_are_cancelled(tmp_path: Path) -> None:
    data_dir = str(tmp_path / "data")
    first = make_folder(tmp_path, "first", ["iris", "churn", "idle"])
    second = make_folder(tmp_path, "second", ["wine"])
    with running_serve("--model-dir", str(first), DATA_DIR=data_dir) as serve:
        wait_until_models_are(serve, {"churn": (1, False), "idle": (1, False), "iris": (1, True)})
        for model in ("iris", "churn"):
            assert post(serve, f"/models/{model}/pause")[0] == 200
            assert [post(serve, f"/predict/{model}")[0] for _ in range(15)] == [202] * 15
        stop(serve)

    with python_process(
        *("-m", "asyncinfer", "serve", "--model-dir", str(second), "--default-model", "wine"),
        DATA_DIR=data_dir,
    ) as refused:
        assert refused.process.wait() == 2
        assert "asyncinfer cancel --model iris" in refused.read_stderr()

    with running_serve("--model-dir", str(second), DATA_DIR=data_dir) as serve:
        said = serve.process.read_line()
        wait_until_models_are(serve, {"churn": (0, False), "iris": (0, True), "wine": (1, False)})
        assert post(serve, "/predict/idle")[0] in (404, 503)
        run_command("cancel", "--model", "churn", "--url", serve.banner["URL"])
        wait_until_models_are(serve, {"iris": (0, True), "wine": (1, False)})
        run_command("cancel", "--model", "iris", "--url", serve.banner["URL"])
        wait_until_models_are(serve, {"wine": (1, True)})
        eventually_sync(lambda: post(serve, "/predict/iris")[0] == 404, "iris is unknown")
        status, answer = post(serve, "/predict", headers={"Prefer": "wait=20"})
        assert (status, answer["status"], answer["model"]) == (200, "completed", "wine")
    assert f"the default model is iris, of an earlier start; {second} does not have it" in said
    assert "asyncinfer cancel --model iris" in said


@pytest.mark.soak
def test_with_several_models_and_none_that_is_the_default_a_request_must_name_one(
    tmp_path: Path,
) -> None:
    leave_earlier_models(tmp_path / "data")
    folder = make_folder(tmp_path, "several", ["a", "b"])
    with running_serve("--model-dir", str(folder), DATA_DIR=str(tmp_path / "data")) as serve:
        wait_until_models_are(serve, {"a": (1, False), "b": (1, False), "churn": (0, False)})
        eventually_sync(lambda: post(serve, "/predict")[0] == 422, "it asks for a name")
        assert "POST /predict/NAME" in post(serve, "/predict")[1]["detail"]
        stop(serve)

    with running_serve(
        *("--model-dir", str(folder), "--default-model", "b"), DATA_DIR=str(tmp_path / "data")
    ) as serve:
        wait_until_models_are(serve, {"a": (1, False), "b": (1, True), "churn": (0, False)})


@pytest.mark.soak
def test_what_a_killed_serve_left_is_gone_too(tmp_path: Path) -> None:
    data_dir = str(tmp_path / "data")
    with running_serve(
        "--model-dir", str(make_folder(tmp_path, "a", ["iris", "x"])), DATA_DIR=data_dir
    ) as serve:
        wait_until_models_are(serve, {"iris": (1, True), "x": (1, False)})
        serve.process.kill()
    with running_serve(
        "--model-dir", str(make_folder(tmp_path, "b", ["wine"])), DATA_DIR=data_dir
    ) as serve:
        wait_until_models_are(serve, {"wine": (1, True)}, 20)


@pytest.mark.soak
def test_a_redis_that_others_use_too_keeps_what_nobody_serves_now(
    tmp_path: Path, redis_url: str, server: redis.Redis
) -> None:
    server.hset(keys.model(Q, "away"), "1", announcement("away"))
    server.sadd(keys.models(Q), "away")
    folder = make_folder(tmp_path, "own", ["wine"])
    with running_serve("--work", "--model-dir", str(folder), REDIS_URL=redis_url) as serve:
        wait_until_models_are(serve, {"wine": (1, True), "away": (0, False)})
        stop(serve)
    assert server.sismember(keys.models(Q), "away")


# --- one folder beside another ---------------------------------------------------------------


@pytest.fixture(scope="module")
def churn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """A `serve` of one model, churn."""
    place = tmp_path_factory.mktemp("beside")
    folder = make_folder(place, "folder_of_churn", ["churn"])
    with running_serve("--model-dir", str(folder), DATA_DIR=str(place / "data")) as serve:
        wait_until_models_are(serve, {"churn": (1, True)})
        yield serve


def folder_of_churn(serve: ServeProcess) -> str:
    """The model folder of the `churn` fixture's serve."""
    return str(Path(serve.process.environ["DATA_DIR"]).with_name("folder_of_churn"))


@contextmanager
def worker_beside(serve: ServeProcess, cwd: Path, **environ: str) -> Iterator[PythonProcess]:
    data_dir = serve.process.environ["DATA_DIR"]
    path = str(Path(__file__).parents[2])
    with python_process(
        "-m", "asyncinfer", "work", cwd=cwd, DATA_DIR=data_dir, PYTHONPATH=path, **environ
    ) as worker:
        yield worker
        worker.process.terminate()
        worker.process.wait()


@pytest.mark.soak
def test_a_worker_beside_a_serve_takes_its_folder_where_none_is_named(
    churn: ServeProcess, tmp_path: Path
) -> None:
    with worker_beside(churn, tmp_path) as second:
        wait_until_models_are(churn, {"churn": (2, True)})
        second.process.terminate()
        assert f"Serves {folder_of_churn(churn)}, as the running" in second.read_stderr()


@pytest.mark.soak
def test_a_worker_in_another_folder_is_named_in_its_log_and_among_the_problems(
    churn: ServeProcess, tmp_path: Path
) -> None:
    other = make_folder(tmp_path, "model", ["wine"])
    with worker_beside(churn, tmp_path) as second:
        wait_until_models_are(churn, {"churn": (1, True), "wine": (1, False)})

        def problems() -> list[str]:
            models = churn.get("/models")["models"]
            (model,) = (model for model in models if model["model"] == "churn")
            return [problem["reason"] for problem in model["problems"]]

        eventually_sync(lambda: len(problems()) == 1, "churn has a problem")
        for words in (str(other), f"Set MODEL_DIR={folder_of_churn(churn)}"):
            assert words in problems()[0]
        workers = churn.get("/workers")["workers"]
        assert sorted(len(worker["problems"]) for worker in workers) == [0, 1]
        second.process.terminate()
        log = second.read_stderr()
    assert log.count("Other workers serve churn from") == 1
    assert "Only this worker has wine." in log


@pytest.mark.soak
def test_a_doctor_in_another_folder_says_which_is_served(
    churn: ServeProcess, tmp_path: Path
) -> None:
    make_folder(tmp_path, "other", ["wine"])
    argv = ("--data-dir", churn.process.environ["DATA_DIR"], "--url", churn.banner["URL"])
    command = run_command("doctor", *argv, "--model-dir", str(tmp_path / "other"))
    assert f"{tmp_path}/other is examined here" in command.out
    assert f"serves {folder_of_churn(churn)}" in command.out
    assert f"-> asyncinfer doctor --model-dir {folder_of_churn(churn)}" in command.out
    assert "1 warning," in command.out
    assert "; 0 jobs wait, 1 worker\n" in command.out

    same = run_command("doctor", *argv, "--model-dir", folder_of_churn(churn))
    assert "model folder" not in same.out

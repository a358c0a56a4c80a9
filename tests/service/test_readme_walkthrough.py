"""The README and the examples, as a user follows them: one DATA_DIR, several model folders."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx2
import numpy as np
import pytest

from asyncinfer import settings
from tests.docs.examples import example_clients, make_example_models
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY, python_process
from tests.serving import ServeProcess, running_serve, wait_for_result

IRIS_ROW: Final = ("5.1", "3.5", "1.4", "0.2")
EXAMPLES: Final = ["colour", "sentences", "wine"]
AS_NPY: Final = {"content-type": "application/x-npy", "prefer": "wait=1"}
LFS_POINTER: Final = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
TIME_OUT_SECONDS: Final = 60


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for knob in settings.knobs():
        monkeypatch.delenv(knob.variable, raising=False)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


class CommandResult(NamedTuple):
    code: int
    out: str
    err: str


class User:
    """Runs commands in a folder, with the URL of a running `serve`."""

    def __init__(self, folder: Path, serve: ServeProcess | None = None) -> None:
        self.folder = folder
        self.serve = serve

    def run_command(self, *argv: str) -> CommandResult:
        url = self.serve.banner["URL"] if self.serve else "http://127.0.0.1:9"
        done = subprocess.run(
            [sys.executable, "-m", "asyncinfer", *argv],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**os.environ, "ASYNCINFER_URL": url},
            timeout=TIME_OUT_SECONDS,
            check=False,
        )
        return CommandResult(done.returncode, done.stdout, done.stderr)

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
        assert self.serve is not None
        headers = {"content-type": "application/json", "prefer": "wait=10", **headers}
        url = self.serve.banner["URL"] + path
        reply = httpx2.post(url, content=body, headers=headers, timeout=TIME_OUT_SECONDS)
        return reply.status_code, reply.json()

    def run_program(self, program: str) -> str:
        """Runs a Python program against the service; returns its output."""
        assert self.serve is not None
        program = program.replace("http://127.0.0.1:8000", self.serve.banner["URL"])
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=TIME_OUT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run_doctor(self) -> dict[str, list[str]]:
        """The findings of `asyncinfer doctor` with their remedies, by verdict."""
        assert self.serve is not None
        result = self.run_command("doctor", "--json", "--url", self.serve.banner["URL"])
        found: dict[str, list[str]] = {"ok": [], "warning": [], "problem": []}
        for finding in json.loads(result.out)["findings"]:
            found[finding["verdict"]].append(
                f"{finding['about']}: {finding['found']} -> {finding['mend']}"
            )
        assert result.code == bool(found["problem"])
        return found

    def model_states(self) -> dict[str, str]:
        """The last column of `asyncinfer models`, by model."""
        lines = self.run_command("models").out.splitlines()[1:]
        return {line.split()[0]: re.split(r"\s{2,}", line)[-1] for line in lines}

    def queues_in_top(self) -> list[str]:
        _, _, *lines = self.run_command("top", "--once").out.splitlines()
        return [line.split()[0] for line in lines[: lines.index("")]]

    def starved_models(self) -> tuple[list[str], list[str]]:
        """The starved models according to /health and to /queues."""
        assert self.serve is not None
        queues = self.serve.get("/queues")["queues"]
        return (
            self.serve.get("/health")["starved"],
            [queue["model"] for queue in queues if queue["starved"]],
        )

    def press_ctrl_c(self) -> str:
        """Stops `serve`; returns its log."""
        assert self.serve is not None
        self.serve.process.signal_group(signal.SIGINT)
        assert self.serve.process.process.wait(TIME_OUT_SECONDS) == 0
        return self.serve.process.read_stderr()


def iris_body() -> bytes:
    return json.dumps({"data": [list(map(float, IRIS_ROW))]}).encode()


def image_body() -> bytes:
    content = io.BytesIO()
    np.save(content, np.zeros((1, 3, 224, 224), np.float32))
    return content.getvalue()


def refusal(user: User, *argv: str) -> str:
    """Runs a `serve` that must be refused; returns its message."""
    result = user.run_command("serve", *argv)
    assert (result.code, result.out) == (2, ""), result
    return result.err


def offered_models(serve: ServeProcess) -> set[str]:
    """The models that the API lists, loaded or being loaded."""
    listed = serve.get("/models")
    return {model["model"] for model in listed["models"]} | set(listed["loading"])


def wait_for_states(user: User, states: dict[str, str]) -> None:
    eventually_sync(lambda: user.model_states() == states, f"the models are {states}")


@pytest.mark.soak
@pytest.mark.system("curl")
def test_the_steps_of_the_readme_in_one_data_dir_all_work_and_never_hang(
    tmp_path: Path,
) -> None:
    folders = [tmp_path / name for name in ("first", "examples", "bad", "elsewhere")]
    for folder in folders:
        folder.mkdir()
    first, examples, bad, elsewhere = folders

    use_shipped_models(first)
    use_example_models(examples)
    start_with_wrong_settings(examples)
    leave_a_job_behind(examples)
    use_bad_models(bad, examples)
    use_workers_with_other_folders(examples, elsewhere, first)


def use_shipped_models(folder: Path) -> None:
    with running_serve(cwd=folder) as serve:
        user = User(folder, serve)
        # The first prediction comes while the worker is still starting.
        assert '"class_name":"setosa"' in user.run_command("predict", *IRIS_ROW).out
        assert wait_for_result(serve)["result"]["class_name"] == "setosa"
        wait_for_states(user, {"digits": "runs", "iris": "runs"})
        assert user.run_doctor()["problem"] == []
        user.press_ctrl_c()


def use_example_models(folder: Path) -> None:
    make_example_models(folder)
    with running_serve(cwd=folder) as serve:
        user = User(folder, serve)
        # There is no default model; only models of this folder are listed, from the start.
        assert offered_models(serve) <= set(EXAMPLES)
        assert serve.banner["Models"] == "colour, sentences, wine"
        result = user.run_command("predict", *IRIS_ROW)
        assert result.code == 1
        assert "Choose one with --model: colour, sentences, wine." in result.err

        status, reply = user.post("/predict", iris_body())
        assert status == 422
        assert "colour, sentences, wine" in reply["detail"]
        status, reply = user.post("/predict/iris", iris_body())
        assert status == 404
        assert "Known: `colour`, `sentences`, `wine`" in reply["detail"]
        result = user.run_command("predict", *IRIS_ROW, "--model", "iris")
        assert result.code != 0
        assert "Known: `colour`, `sentences`, `wine`" in result.err

        for program, output in example_clients():
            assert user.run_program(program) == output
        assert user.model_states() == dict.fromkeys(EXAMPLES, "runs")
        found = user.run_doctor()
        assert (found["problem"], found["warning"]) == ([], [])
        # A worker announces a model before its status says so; `top` may lag behind.
        eventually_sync(lambda: user.queues_in_top() == EXAMPLES, "top lists the three models")
        assert any("1 alive; no model is the default" in line for line in found["ok"])
        assert user.starved_models() == ([], [])
        log = user.press_ctrl_c()
    assert "The default model was 'iris', which no worker has: there is none now" in log
    assert "Traceback" not in log


def start_with_wrong_settings(folder: Path) -> None:
    """Each start is refused with the allowed values, and changes nothing for later starts."""
    user = User(folder)
    for name in ("nope", "iris"):
        message = refusal(user, "--default-model", name)
        assert f"DEFAULT_MODEL is '{name}'" in message
        assert "Set it to one of: colour, sentences, wine" in message
    assert "MODELS names nope" in refusal(user, "--models", "nope")
    with python_process(
        "-m", "asyncinfer", "serve", "--work", "--models", "a,b", cwd=folder
    ) as serve_work:
        assert serve_work.process.wait(TIME_OUT_SECONDS) == 2
        assert "MODELS names a, b" in serve_work.read_stderr()

    with running_serve("--models", "colour,nope", cwd=folder) as serve:
        user = User(folder, serve)
        wait_for_states(user, {"colour": "runs"})
        eventually_sync(lambda: "nope" in user.run_command("models").err, "nope is a problem")
        user.press_ctrl_c()


def leave_a_job_behind(folder: Path) -> None:
    with running_serve("--default-model", "colour", cwd=folder) as serve:
        user = User(folder, serve)
        wait_for_states(user, dict.fromkeys(EXAMPLES, "runs"))
        assert user.run_command("pause", "colour").code == 0
        status, reply = user.post("/predict", image_body(), **AS_NPY)
        assert (status, reply["waiting_for"]["code"]) == (202, "paused")
        assert "colour: paused; 1 job of colour waits" in " ".join(user.run_doctor()["warning"])
        user.press_ctrl_c()


def use_bad_models(folder: Path, examples: Path) -> None:
    model = folder / "model"
    model.mkdir()
    (model / "lfs.onnx").write_text(LFS_POINTER)
    (model / "page.onnx").write_text("<!DOCTYPE html><html>Not found</html>")
    with running_serve(cwd=folder) as serve:
        user = User(folder, serve)
        eventually_sync(
            lambda: user.model_states() == {"colour": "no worker"}, "only colour is listed"
        )
        assert user.run_command("resume", "colour").code == 0
        eventually_sync(lambda: user.starved_models() == (["colour"], ["colour"]), "it is starved")

        result = user.run_command("predict", "[0]", "--timeout", "3")
        assert result.code != 0
        (job,) = json.loads(user.run_command("jobs", "--status", "pending", "--json").out)
        assert job["waiting_for"]["code"] == "no_worker"
        assert "no worker" in user.run_command("top", "--once").out
        found = user.run_doctor()
        assert json.dumps(found).count("a Git LFS pointer") == 1
        problems = " ".join(found["problem"])
        for message in ("asyncinfer cancel --model colour", "Git LFS pointer", "an HTML page"):
            assert message in problems
        status, reply = user.post("/predict/lfs", iris_body())
        assert status == 404
        assert "git lfs pull" in reply["detail"]

        publish(examples / "model" / "colour", model)
        eventually_sync(
            lambda: serve.get(f"/job/{job['job_id']}")["status"] == "completed",
            "the job that was left behind has run",
        )
        assert user.model_states() == {"colour": "runs"}
        assert user.starved_models() == ([], [])
        user.press_ctrl_c()


def publish(source: Path, into: Path) -> None:
    """Adds a model by a rename, as the README advises."""
    shutil.copytree(source, into.parent / "new")
    into.mkdir(exist_ok=True)
    (into.parent / "new").rename(into / source.name)


def use_workers_with_other_folders(examples: Path, elsewhere: Path, empty: Path) -> None:
    publish(examples / "model" / "wine", elsewhere / "model")
    with running_serve(cwd=examples) as serve:
        user = User(examples, serve)
        wait_for_states(user, dict.fromkeys(EXAMPLES, "runs"))
        assert "colour (default)" in serve.banner["Models"]
        with running_worker(empty):
            eventually_sync(lambda: worker_counts(serve) == [2, 2, 2], "it uses serve's folder")
        eventually_sync(lambda: worker_counts(serve) == [1, 1, 1], "it has ended")
        with running_worker(elsewhere):
            eventually_sync(lambda: worker_counts(serve) == [1, 1, 2], "it has one of the three")
            eventually_sync(
                lambda: "MODEL_DIR=" in user.run_command("models").err, "the difference is reported"
            )
        warnings = " ".join(User(elsewhere, serve).run_doctor()["warning"])
        assert f"{elsewhere}/model is examined here" in warnings
        assert f"asyncinfer doctor --model-dir {examples}/model" in warnings
        user.press_ctrl_c()


@contextmanager
def running_worker(folder: Path) -> Iterator[None]:
    with python_process("-m", "asyncinfer", "work", cwd=folder) as worker:
        yield
        worker.process.terminate()
        assert worker.process.wait(TIME_OUT_SECONDS) == 0


def worker_counts(serve: ServeProcess) -> list[int]:
    """The number of workers of each model."""
    return [model["workers"] for model in serve.get("/models")["models"]]

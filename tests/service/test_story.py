"""The README from top to bottom, as one person follows it: one DATA_DIR, folder after folder."""

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
from tests.docs.markdown import all_blocks, sections_with
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY, parent
from tests.serving import Serve, answer_of, serving

FLOWER: Final = ("5.1", "3.5", "1.4", "0.2")
EXAMPLES: Final = ["colour", "sentences", "wine"]
AS_NPY: Final = {"content-type": "application/x-npy", "prefer": "wait=1"}
LFS_POINTER: Final = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
BOUND_SECONDS: Final = 60


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for knob in settings.knobs():
        monkeypatch.delenv(knob.variable, raising=False)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Person:
    """Types commands in a folder, with the address that `serve` showed."""

    def __init__(self, folder: Path, serve: Serve | None = None) -> None:
        self.folder = folder
        self.serve = serve

    def types(self, *argv: str) -> Said:
        url = self.serve.welcome["URL"] if self.serve else "http://127.0.0.1:9"
        done = subprocess.run(
            [sys.executable, "-m", "asyncinfer", *argv],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**os.environ, "ASYNCINFER_URL": url},
            timeout=BOUND_SECONDS,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def posts(self, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
        assert self.serve is not None
        headers = {"content-type": "application/json", "prefer": "wait=10", **headers}
        url = self.serve.welcome["URL"] + path
        answer = httpx2.post(url, content=body, headers=headers, timeout=BOUND_SECONDS)
        return answer.status_code, answer.json()

    def runs(self, program: str) -> str:
        assert self.serve is not None
        program = program.replace("http://127.0.0.1:8000", self.serve.welcome["URL"])
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=BOUND_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def doctor(self) -> dict[str, list[str]]:
        """What is found by verdict, with what mends it."""
        assert self.serve is not None
        said = self.types("doctor", "--json", "--url", self.serve.welcome["URL"])
        found: dict[str, list[str]] = {"ok": [], "warning": [], "problem": []}
        for one in json.loads(said.out)["findings"]:
            found[one["verdict"]].append(f"{one['about']}: {one['found']} -> {one['mend']}")
        assert said.code == bool(found["problem"])
        return found

    def states(self) -> dict[str, str]:
        """By model, the last words of its line in `asyncinfer models`."""
        lines = self.types("models").out.splitlines()[1:]
        return {line.split()[0]: re.split(r"\s{2,}", line)[-1] for line in lines}

    def queues_in_top(self) -> list[str]:
        _, _, *lines = self.types("top", "--once").out.splitlines()
        return [line.split()[0] for line in lines[: lines.index("")]]

    def starved(self) -> tuple[list[str], list[str]]:
        """As /health and /queues tell it."""
        assert self.serve is not None
        queues = self.serve.get("/queues")["queues"]
        return (
            self.serve.get("/health")["starved"],
            [one["model"] for one in queues if one["starved"]],
        )

    def presses_ctrl_c(self) -> str:
        """Returns what `serve` has said on stderr."""
        assert self.serve is not None
        self.serve.process.signal_group(signal.SIGINT)
        assert self.serve.process.process.wait(BOUND_SECONDS) == 0
        return self.serve.process.complaints()


def flower() -> bytes:
    return json.dumps({"data": [list(map(float, FLOWER))]}).encode()


def picture() -> bytes:
    content = io.BytesIO()
    np.save(content, np.zeros((1, 3, 224, 224), np.float32))
    return content.getvalue()


def make_examples(folder: Path) -> list[tuple[str, str]]:
    """Makes the three models; returns the programs that ask them, with what they print."""
    (section,) = sections_with(r"\AServe your own model\n")
    asks: list[tuple[str, str]] = []
    for part in section.split("\n### ")[1:]:
        blocks = all_blocks(part)
        programs = [block.text for block in blocks if block.language == "python"]
        subprocess.run([sys.executable, "-c", programs[0]], cwd=folder, check=True, timeout=120)
        shown = [block.text for block in blocks if block.language == "text"]
        asks += zip(programs[1:], shown, strict=True)
    return asks


def refused(person: Person, *argv: str) -> str:
    said = person.types("serve", *argv)
    assert (said.code, said.out) == (2, ""), said
    return said.err


def names(serve: Serve) -> set[str]:
    listed = serve.get("/models")
    return {one["model"] for one in listed["models"]} | set(listed["loading"])


def until_states(person: Person, wanted: dict[str, str]) -> None:
    eventually_sync(lambda: person.states() == wanted, f"the models are {wanted}")


@pytest.mark.soak
def test_the_readme_followed_from_top_to_bottom_in_one_data_dir_never_hangs_or_misleads(
    tmp_path: Path,
) -> None:
    made = [tmp_path / name for name in ("first", "examples", "bad", "elsewhere")]
    for folder in made:
        folder.mkdir()
    first, examples, bad, elsewhere = made

    the_shipped_models(first)
    the_examples_in_another_folder(examples)
    wrong_settings(examples)
    a_job_that_is_left_behind(examples)
    a_folder_of_bad_models(bad, examples)
    a_worker_and_a_doctor_elsewhere(examples, elsewhere, first)


def the_shipped_models(folder: Path) -> None:
    with serving(cwd=folder) as serve:
        person = Person(folder, serve)
        # At once: the worker is still being started.
        assert '"class_name":"setosa"' in person.types("predict", *FLOWER).out
        assert answer_of(serve)["result"]["class_name"] == "setosa"
        until_states(person, {"digits": "runs", "iris": "runs"})
        assert person.doctor()["problem"] == []
        person.presses_ctrl_c()


def the_examples_in_another_folder(folder: Path) -> None:
    asks = make_examples(folder)
    with serving(cwd=folder) as serve:
        person = Person(folder, serve)
        # No default: the names that are offered are of this folder, from the first answer on.
        assert names(serve) <= set(EXAMPLES)
        assert serve.welcome["Models"] == "colour, sentences, wine"
        said = person.types("predict", *FLOWER)
        assert said.code == 1
        assert "Choose one with --model: colour, sentences, wine." in said.err

        status, answer = person.posts("/predict", flower())
        assert status == 422
        assert "colour, sentences, wine" in answer["detail"]
        status, answer = person.posts("/predict/iris", flower())
        assert status == 404
        assert "Known: `colour`, `sentences`, `wine`" in answer["detail"]
        said = person.types("predict", *FLOWER, "--model", "iris")
        assert said.code != 0
        assert "Known: `colour`, `sentences`, `wine`" in said.err

        for program, shown in asks:
            assert person.runs(program) == shown
        assert person.states() == dict.fromkeys(EXAMPLES, "runs")
        found = person.doctor()
        assert (found["problem"], found["warning"]) == ([], [])
        # A worker announces a model before it says that it serves it, so `top` may lag behind.
        eventually_sync(lambda: person.queues_in_top() == EXAMPLES, "top lists the three models")
        assert any("1 alive; no model is the default" in line for line in found["ok"])
        assert person.starved() == ([], [])
        log = person.presses_ctrl_c()
    assert "The default model was 'iris', which no worker has: there is none now" in log
    assert "Traceback" not in log


def wrong_settings(folder: Path) -> None:
    """Each is refused with what is right, and no later start suffers from it."""
    person = Person(folder)
    for name in ("nope", "iris"):
        said = refused(person, "--default-model", name)
        assert f"DEFAULT_MODEL is '{name}'" in said
        assert "Set it to one of: colour, sentences, wine" in said
    assert "MODELS names nope" in refused(person, "--models", "nope")
    with parent("-m", "asyncinfer", "serve", "--work", "--models", "a,b", cwd=folder) as both:
        assert both.process.wait(BOUND_SECONDS) == 2
        assert "MODELS names a, b" in both.complaints()

    with serving("--models", "colour,nope", cwd=folder) as serve:
        person = Person(folder, serve)
        until_states(person, {"colour": "runs"})
        eventually_sync(lambda: "nope" in person.types("models").err, "nope is a problem")
        person.presses_ctrl_c()


def a_job_that_is_left_behind(folder: Path) -> None:
    with serving("--default-model", "colour", cwd=folder) as serve:
        person = Person(folder, serve)
        until_states(person, dict.fromkeys(EXAMPLES, "runs"))
        assert person.types("pause", "colour").code == 0
        status, answer = person.posts("/predict", picture(), **AS_NPY)
        assert (status, answer["waiting_for"]["code"]) == (202, "paused")
        assert "colour: paused; 1 job of colour waits" in " ".join(person.doctor()["warning"])
        person.presses_ctrl_c()


def a_folder_of_bad_models(folder: Path, examples: Path) -> None:
    model = folder / "model"
    model.mkdir()
    (model / "lfs.onnx").write_text(LFS_POINTER)
    (model / "page.onnx").write_text("<!DOCTYPE html><html>Not found</html>")
    with serving(cwd=folder) as serve:
        person = Person(folder, serve)
        eventually_sync(lambda: person.states() == {"colour": "no worker"}, "colour is left")
        assert person.types("resume", "colour").code == 0
        eventually_sync(lambda: person.starved() == (["colour"], ["colour"]), "it is starved")

        said = person.types("predict", "[0]", "--timeout", "3")
        assert said.code != 0
        (job,) = json.loads(person.types("jobs", "--status", "pending", "--json").out)
        assert job["waiting_for"]["code"] == "no_worker"
        assert "no worker" in person.types("top", "--once").out
        found = person.doctor()
        assert json.dumps(found).count("a Git LFS pointer") == 1
        problems = " ".join(found["problem"])
        for words in ("asyncinfer cancel --model colour", "Git LFS pointer", "an HTML page"):
            assert words in problems
        status, answer = person.posts("/predict/lfs", flower())
        assert status == 404
        assert "git lfs pull" in answer["detail"]

        publish(examples / "model" / "colour", model)
        eventually_sync(
            lambda: serve.get(f"/job/{job['job_id']}")["status"] == "completed",
            "the job that was left behind has run",
        )
        assert person.states() == {"colour": "runs"}
        assert person.starved() == ([], [])
        person.presses_ctrl_c()


def publish(source: Path, into: Path) -> None:
    """By rename, as the README says."""
    shutil.copytree(source, into.parent / "new")
    into.mkdir(exist_ok=True)
    (into.parent / "new").rename(into / source.name)


def a_worker_and_a_doctor_elsewhere(examples: Path, elsewhere: Path, empty: Path) -> None:
    publish(examples / "model" / "wine", elsewhere / "model")
    with serving(cwd=examples) as serve:
        person = Person(examples, serve)
        until_states(person, dict.fromkeys(EXAMPLES, "runs"))
        assert "colour (default)" in serve.welcome["Models"]
        with work(empty):
            eventually_sync(lambda: workers(serve) == [2, 2, 2], "it takes the folder of `serve`")
        eventually_sync(lambda: workers(serve) == [1, 1, 1], "it has left")
        with work(elsewhere):
            eventually_sync(lambda: workers(serve) == [1, 1, 2], "it has one of the three")
            eventually_sync(lambda: "MODEL_DIR=" in person.types("models").err, "that is told")
        told = " ".join(Person(elsewhere, serve).doctor()["warning"])
        assert f"{elsewhere}/model is examined here" in told
        assert f"asyncinfer doctor --model-dir {examples}/model" in told
        person.presses_ctrl_c()


@contextmanager
def work(folder: Path) -> Iterator[None]:
    with parent("-m", "asyncinfer", "work", cwd=folder) as worker:
        yield
        worker.process.terminate()
        assert worker.process.wait(BOUND_SECONDS) == 0


def workers(serve: Serve) -> list[int]:
    """How many have each of the examples."""
    return [one["workers"] for one in serve.get("/models")["models"]]

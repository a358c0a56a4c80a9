"""Commands that wait say what is missing, and which command helps."""

import contextlib
import io
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from anyio.from_thread import BlockingPortal, start_blocking_portal

from asyncinfer.api.config import ApiConfig
from asyncinfer.cli.doctor.checks import with_embedded_fixes, without_consequences
from asyncinfer.cli.doctor.findings import problem, warning
from asyncinfer.cli.doctor.machine import free_space_finding
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.predict import run
from asyncinfer.client import Cadence, Client, ModelLoading, WaitTimeout
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests import zoo
from tests.api.harness import QUEUE, ManualWorker, announce, running
from tests.cli.command_line import error_line, run_command
from tests.faults.harness import eventually_sync

from .submitted_jobs import submit

ROW = "[5.1, 3.5, 1.4, 0.2]"
NO_WORKER = "No worker has had iris since"


class Starved:
    """An API whose only model was announced by a worker that is gone."""

    def __init__(self, url: str, portal: BlockingPortal, store: Store, server: redis.Redis) -> None:
        self.url = url
        self._server = server
        self._portal = portal
        self._store = store
        self._hand = ManualWorker(store)

    def announce_worker(self, **says: Any) -> None:
        announcements = Announcements(self._store)
        self._portal.call(
            partial(announcements.announce_worker, "host-1-aaaaaa", says, ttl_seconds=10)
        )

    def complete(self) -> None:
        """Waits for a job, and completes all jobs as a worker would."""
        eventually_sync(lambda: bool(self._server.llen(QUEUE)), "a job waits")
        self._portal.start_task_soon(self._hand.complete).result(20)


@asynccontextmanager
async def api(redis_url: str, policy: Policy) -> AsyncIterator[tuple[str, Store]]:
    async with Store.open(
        redis_url, queue_name="predict_queue", policy=policy, name="test"
    ) as store:
        await announce(store, "iris", default="iris")
        async with running(ApiConfig(redis_url=redis_url, policy=policy)) as port:
            yield f"http://127.0.0.1:{port}", store


@pytest.fixture
def starved(
    redis_url: str, server: redis.Redis, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Starved]:
    """The API, in a thread of its own: commands run in the main thread."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(api(redis_url, policy)) as (url, store),
    ):
        monkeypatch.setenv("ASYNCINFER_URL", url)
        yield Starved(url, portal, store, server)


def predict_options(*arguments: str, **more: Any) -> run.PredictOptions:
    """Options of `asyncinfer predict` that report the reason of a wait almost at once."""
    return run.PredictOptions(
        rows=(ROW,),
        model=None,
        read_as=None,
        write_as="ndjson",
        output=None,
        columns=(),
        header=None,
        group=None,
        fresh=False,
        batch="auto",
        in_flight=8,
        priority=None,
        arguments=arguments or ("predict", ROW),
        timeout_seconds=20.0,
        cadence=Cadence(first_check_seconds=0.05, max_check_seconds=0.05),
        **more,
    )


class Stderr(io.TextIOWrapper):
    """A stream that calls `then` once the first line is written."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__(io.BytesIO(), "utf-8", write_through=True)
        self._then = then

    def write(self, text: str) -> int:
        size, then = super().write(text), self._then
        self._then = lambda: None
        then()
        return size

    @property
    def lines(self) -> list[str]:
        content = self.buffer
        assert isinstance(content, io.BytesIO)
        return content.getvalue().decode().splitlines()


def test_predict_says_that_no_worker_has_the_model_and_that_it_goes_on(starved: Starved) -> None:
    err = Stderr(then=starved.complete)
    with (
        contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")),
        contextlib.redirect_stderr(err),
    ):
        assert run.run(ServerOptions(starved.url, None), predict_options()) == 0

    waits, goes_on = err.lines
    assert waits.startswith(f"asyncinfer: 1 row of iris waits: {NO_WORKER}")
    assert "`asyncinfer work`" in waits
    assert goes_on == "asyncinfer: iris goes on."


def test_a_model_is_waited_for_as_long_as_it_is_being_loaded(starved: Starved) -> None:
    starved.announce_worker(state="ready", models=[], loading=["wine"])
    patient = Client(starved.url, retries=0, total_timeout=0.3, wait_for_models=True)
    with patient, pytest.raises(WaitTimeout, match="A worker is loading wine"):
        patient.model("wine")
    with Client(starved.url, retries=0) as client, pytest.raises(ModelLoading):
        client.model("wine")


def test_a_long_run_of_a_file_says_how_to_continue_it(starved: Starved, tmp_path: Path) -> None:
    (tmp_path / "rows.ndjson").write_text(f"{ROW}\n")
    err = Stderr(then=starved.complete)
    patient = msgspec.structs.replace(
        predict_options("predict", "rows.ndjson"),
        rows=(str(tmp_path / "rows.ndjson"),),
        cadence=Cadence(),
        hint_seconds=0.1,
    )
    with (
        contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")),
        contextlib.redirect_stderr(err),
    ):
        assert run.run(ServerOptions(starved.url, None), patient) == 0

    (line,) = err.lines
    assert "To continue this run later: asyncinfer predict rows.ndjson --resume rows-" in line


def test_predict_ends_at_its_timeout_and_can_be_continued(starved: Starved) -> None:
    message = error_line(run_command("predict", ROW, "--timeout", "0.2"), 4)
    assert f"No result in time for 1 row of iris: {NO_WORKER}" in message
    shown = message.partition("Continue with: ")[2]
    assert shown.startswith(f"asyncinfer predict '{ROW}' --timeout 0.2 --resume typed-")

    (job,) = (run_command("jobs", "--json")).json
    assert job["status"] == "pending"
    starved.complete()
    again = run_command("predict", ROW, "--resume", shown.split()[-1])
    assert again.code == 0
    assert len((run_command("jobs", "--json")).json) == 1


def test_many_jobs_of_a_row_each_end_at_the_timeout_too(starved: Starved, tmp_path: Path) -> None:
    (tmp_path / "rows.ndjson").write_text(f"{ROW}\n" * 40)
    path = str(tmp_path / "rows.ndjson")
    message = error_line(run_command("predict", path, "--batch", "1", "--timeout", "0.2"), 4)

    assert f"40 rows of iris: {NO_WORKER}" in message
    assert "--resume rows-" in message


def test_a_server_that_never_answers_ends_at_the_timeout_too() -> None:
    message = error_line(
        run_command("predict", ROW, "--url", "http://127.0.0.1:1", "--timeout", "0.01"), 3
    )
    assert "No answer from http://127.0.0.1:1" in message


@pytest.mark.parametrize("sent", [b"", f"{ROW}\n".encode()], ids=["nothing", "a row"])
def test_stdin_that_stays_silent_ends_at_the_timeout_too(starved: Starved, sent: bytes) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "asyncinfer", "predict", "-", "--timeout", "0.5"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write(sent)
        process.stdin.flush()
        assert process.wait(20) == 4
        assert b"no further row came in time" in process.stderr.read()


def test_a_timeout_is_a_number_of_seconds() -> None:
    # In 0 seconds nothing would be sent, and the command that goes on would find nothing.
    for wrong in ("nan", "-1", "10m", "0"):
        assert "--timeout" in error_line(run_command("predict", ROW, "--timeout", wrong), 2)


def test_a_job_that_waits_is_listed_and_shown_with_its_reason(starved: Starved) -> None:
    submit(starved.url)
    listed = run_command("jobs")
    job_id = listed.out.splitlines()[1].split()[0]

    assert NO_WORKER in listed.out
    assert NO_WORKER in (run_command("job", job_id)).out
    watched = run_command("job", job_id, "--watch", "--timeout", "0")
    assert watched.code == 4
    assert f"pending  {NO_WORKER}" in watched.err


def test_views_name_the_model_that_no_worker_has(starved: Starved) -> None:
    submit(starved.url)

    assert (run_command("models")).out.splitlines()[1].endswith("0  no worker")
    assert "no worker" in (run_command("models", "iris")).out
    top = (run_command("top")).out
    assert "iris no worker" in top
    assert "1 job of iris waits, oldest " in top.partition("PROBLEMS")[2]
    assert "-> asyncinfer work --model-dir FOLDER    # one that has iris" in top


def test_models_that_are_being_loaded_are_listed_as_such(starved: Starved) -> None:
    starved.announce_worker(state="ready", models=[], loading=["iris", "wine"])

    def states() -> list[list[str]]:
        return [line.split() for line in run_command("models").out.splitlines()[1:]]

    eventually_sync(
        lambda: [line[-1] for line in states()] == ["loading"] * 2, "both are listed as loading"
    )
    assert [line[0] for line in states()] == ["iris", "wine"]


@pytest.mark.parametrize("has_it", [True, False])
def test_doctor_names_the_starved_model_and_the_command(
    starved: Starved, tmp_path: Path, has_it: bool
) -> None:
    submit(starved.url)
    folder = tmp_path / "my models"
    folder.mkdir()
    name = "iris" if has_it else "wine"
    (folder / f"{name}.onnx").write_bytes(zoo.mlp([3, 2]).SerializeToString())

    found = run_command("doctor", "--model-dir", str(folder))

    assert found.code == 1
    assert "problem  queue iris: 1 job of iris waits, oldest " in found.out
    assert ", and no worker has it" in found.out
    where = f"'{folder}'" if has_it else "FOLDER    # one that has iris"
    assert f"-> asyncinfer work --model-dir {where}" in found.out
    assert "asyncinfer cancel --model iris" in found.out


def test_a_full_disk_is_one_problem_and_the_remedy_is_to_free_it(tmp_path: Path) -> None:
    full = free_space_finding(tmp_path, 4096)
    effects = [
        problem("Redis disk", "aof_last_write_status is err", "free its disk"),
        warning("Redis", "no `serve` runs its embedded Valkey", "asyncinfer serve"),
    ]

    assert "free the disk of" in with_embedded_fixes(effects, tmp_path)[0].mend
    assert full.verdict == "problem"
    assert full.mend.startswith("free the disk")
    assert without_consequences([*effects, full]) == [full]
    assert without_consequences([*effects, free_space_finding(tmp_path, 1 << 40)])[:2] == effects

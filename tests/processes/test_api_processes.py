"""Several API processes on one address act as one API."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import pytest
import redis

from asyncinfer.cli import main
from asyncinfer.errors import StartError
from asyncinfer.jobs import decode_facts
from asyncinfer.processes import api_processes, valkey
from asyncinfer.processes.api_processes import ApiProcessPlan
from asyncinfer.processes.supervisor import StopSignals
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.api.harness import QUEUE, ROW, ManualWorker, announce
from tests.faults.harness import eventually, eventually_sync
from tests.ports import free_port
from tests.process import is_gone, python_process
from tests.serving import EXIT_REFUSED, ServeProcess, running_serve

TWO: Final = ("--api-processes", "2")

pytestmark = pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="who holds a connection is seen in /proc alone"
)


class Connection:
    """A keep-alive connection; one process answers all its requests."""

    def __init__(self, port: int) -> None:
        self._http = HTTPConnection("127.0.0.1", port, timeout=10)
        assert self.request("GET", "/health/live")["status"]
        self.port = int(self._http.sock.getsockname()[1])

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> None:
        content = {"content-type": "application/json"} if body else {}
        self._http.request(method, path, body and json.dumps(body), content | headers)

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._http.getresponse().read())
        return answer

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> dict[str, Any]:
        self.send(method, path, body, **headers)
        return self.answer()

    def close(self) -> None:
        self._http.close()


def models_of(connection: Connection) -> list[dict[str, Any]]:
    """The models that are served, without those that a worker is loading."""
    models: list[dict[str, Any]] = connection.request("GET", "/models")["models"]
    return models


def holders(port: int, pids: list[int]) -> dict[int, int]:
    """{client's port: pid of the process that holds its connection to `port`}."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    client_ports = {
        f"socket:[{row[9]}]": int(row[2].rpartition(":")[2], 16)
        for row in rows
        if int(row[1].rpartition(":")[2], 16) == port
    }
    return {client_ports[link]: pid for pid in pids for link in _links(pid) if link in client_ports}


def _links(pid: int) -> Iterator[str]:
    """The open descriptors of a process, which may close them, or end, at any time."""
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield os.readlink(path)


class Service:
    """Two API processes that both serve."""

    def __init__(self, serve: ServeProcess) -> None:
        self.serve = serve
        self.port = urlsplit(serve.banner["URL"]).port or 0
        eventually_sync(
            lambda: len(set(self.pids_of_new_connections(4))) == 2, "both processes answer"
        )

    @contextmanager
    def connections(self, count: int) -> Iterator[dict[int, list[Connection]]]:
        """Opens connections: {pid of the process that holds them: connections}."""
        with ExitStack() as stack:
            connections = [
                stack.enter_context(contextlib.closing(Connection(self.port))) for _ in range(count)
            ]
            found = holders(self.port, self.serve.child_pids())
            by_pid: dict[int, list[Connection]] = {}
            for connection in connections:
                by_pid.setdefault(found[connection.port], []).append(connection)
            yield by_pid

    @contextmanager
    def both(self) -> Iterator[tuple[Connection, Connection]]:
        """Opens a connection to each process."""
        with self.connections(40) as by_pid:
            first, second = (connections[0] for connections in by_pid.values())
            yield first, second

    def pids_of_new_connections(self, count: int) -> list[int]:
        with self.connections(count) as by_pid:
            return list(by_pid)


@pytest.fixture(scope="module")
def service(redis_url: str) -> Iterator[Service]:
    """Two processes for all tests in this file; the tests run the jobs."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    anyio.run(_announce_iris, redis_url)
    with running_serve(*TWO, REDIS_URL=redis_url) as serve:
        yield Service(serve)


async def _announce_iris(redis_url: str) -> None:
    async with _store(redis_url) as store:
        await announce(store, "iris", default="iris")


@asynccontextmanager
async def _store(redis_url: str) -> AsyncIterator[Store]:
    async with Store.open(redis_url, queue_name=QUEUE, policy=Policy(), name="test") as store:
        yield store


@pytest.fixture
async def hand(redis_url: str) -> AsyncIterator[ManualWorker]:
    async with _store(redis_url) as store:
        yield ManualWorker(store)


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    # redis-py types every reply as a union of all that RESP can say.
    with redis.Redis.from_url(redis_url) as client:
        yield client


def waiting_apis(client: Any, job_id: str) -> int:
    """The number of API processes that wait for a job."""
    return len(decode_facts(client.hget(keys.facts(QUEUE), job_id)).inboxes)


@pytest.mark.soak
def test_40_keep_alive_connections_are_held_by_both(service: Service) -> None:
    with service.connections(40) as by_pid:
        assert sorted(by_pid) == sorted(service.serve.child_pids())


async def test_40_waits_at_both_processes_end_with_a_job_submitted_to_one(
    service: Service, hand: ManualWorker, client: Any
) -> None:
    with service.connections(40) as by_pid:
        connections = [item for items in by_pid.values() for item in items]
        job_id = connections[0].request("POST", "/predict", {"data": ROW})["job_id"]
        for connection in connections:
            connection.send("GET", f"/job/{job_id}?wait=20")
        await eventually(lambda: waiting_apis(client, job_id) == 2, "both processes wait")
        await hand.complete()

        assert {connection.answer()["status"] for connection in connections} == {"completed"}


async def test_a_job_waited_for_in_one_process_is_cancelled_through_the_other(
    service: Service, client: Any
) -> None:
    with service.both() as (first, second):
        first.send("POST", "/predict", {"data": ROW}, Prefer="wait=20")
        await eventually(lambda: client.llen(QUEUE) == 1, "the job is submitted")
        (job_id,) = (raw_id.decode() for raw_id in client.lrange(QUEUE, 0, -1))

        assert second.request("DELETE", f"/job/{job_id}")["status"] == "cancelled"
        assert first.answer()["status"] == "cancelled"


async def test_one_key_posted_on_20_connections_to_both_processes_makes_one_job(
    service: Service, hand: ManualWorker, client: Any
) -> None:
    with service.connections(20) as by_pid:
        connections = [item for items in by_pid.values() for item in items]
        for connection in connections:
            connection.send("POST", "/predict", {"data": ROW}, **{"Idempotency-Key": "the-one"})

        assert len(by_pid) == 2
        assert len({connection.answer()["job_id"] for connection in connections}) == 1
        assert client.llen(QUEUE) == 1
        await hand.complete()


@pytest.mark.soak
def test_while_a_killed_process_is_started_again_the_other_answers(service: Service) -> None:
    with service.connections(40) as by_pid:
        killed, survivor = by_pid
        os.kill(killed, signal.SIGKILL)
        # A process with several threads is a zombie before its sockets are closed.
        eventually_sync(
            lambda: not Path(f"/proc/{killed}").exists(), "the killed process has left /proc"
        )

        assert by_pid[survivor][0].request("GET", "/health/ready")["status"]
        assert survivor in service.pids_of_new_connections(10)
        eventually_sync(lambda: len(set(service.pids_of_new_connections(10))) == 2, "there are two")
        assert killed not in service.serve.child_pids()


def test_another_serve_on_their_port_is_refused(service: Service, redis_url: str) -> None:
    argv = ("-m", "asyncinfer", "serve", "--port", str(service.port), *TWO)
    with python_process(*argv, REDIS_URL=redis_url) as refused:
        assert refused.process.wait() == EXIT_REFUSED
        assert f"Cannot listen on 127.0.0.1:{service.port}" in refused.read_stderr()


@pytest.mark.soak
def test_the_reason_of_a_refused_start_is_shown_once(
    redis_url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = ("--redis-url", redis_url, "--port", str(free_port()))

    assert main(("serve", *where, *TWO, "--api-keys", str(tmp_path / "no"))) == EXIT_REFUSED
    out, err = capfd.readouterr()
    shown = [line for line in err.splitlines() if str(tmp_path) in line]

    assert out == ""
    assert len(shown) == 1
    assert shown[0].startswith("asyncinfer: Cannot read the API keys")


@pytest.mark.soak
def test_ctrl_c_answers_waiting_clients_and_leaves_no_process(tmp_path: Path) -> None:
    with running_serve(*TWO, DATA_DIR=str(tmp_path)) as serve:
        service = Service(serve)
        later = {"data": ROW, "options": {"delay_seconds": 60}}
        url = valkey.running_url(tmp_path) or ""
        with redis.Redis.from_url(url) as client, service.both() as (first, second):
            eventually_sync(
                lambda: "iris" in (listed["model"] for listed in models_of(first)),
                "a worker has announced it",
            )
            job_id = second.request("POST", "/predict/iris", later)["job_id"]
            for connection in (first, second):
                connection.send("GET", f"/job/{job_id}?wait=60")
            eventually_sync(lambda: waiting_apis(client, job_id) == 2, "both processes wait")
            pids = serve.child_pids()
            serve.process.signal_group(signal.SIGINT)

            assert (first.answer()["status"], second.answer()["status"]) == ("pending", "pending")
        assert serve.process.process.wait() == 0
        assert len(pids) == 4
        assert all(map(is_gone, pids))
        assert "ERROR" not in serve.process.read_stderr()
        stdout = serve.process.process.stdout
        assert stdout is not None
        assert stdout.read() == "", "the welcome is printed once"


@pytest.mark.soak
def test_the_processes_of_a_killed_serve_end(redis_url: str) -> None:
    with running_serve(*TWO, REDIS_URL=redis_url) as serve:
        pids = serve.child_pids()
        serve.process.kill()

        assert len(pids) == 2
        eventually_sync(lambda: all(map(is_gone, pids)), "both have ended", seconds=5)


@pytest.mark.soak
def test_a_second_ctrl_c_ends_processes_that_hang(redis_url: str) -> None:
    with running_serve(*TWO, REDIS_URL=redis_url) as serve:
        pids = Service(serve).serve.child_pids()
        os.kill(pids[0], signal.SIGSTOP)
        serve.process.signal_group(signal.SIGINT)
        eventually_sync(lambda: is_gone(pids[1]), "the one that can has ended")
        serve.process.signal_group(signal.SIGINT)

        assert serve.process.process.wait(timeout=4) == 0
        assert all(map(is_gone, pids))


# --- with stand-ins for the processes --------------------------------------------------------

STAND_IN: Final = """
import os, signal, sys
from pathlib import Path

folder, report_fd = Path(sys.argv[1]), int(sys.argv[2])
(folder / str(os.getpid())).touch()
if word := (folder / "word").read_text():
    os.write(report_fd, word.encode())
if word == "ready":
    signal.pause()
"""
"""Reports the content of a file as the result of its start; without content it ends at once."""


def stand_in_plan(folder: Path, word: str) -> ApiProcessPlan:
    (folder / "word").write_text(word)
    return ApiProcessPlan(
        count=2,
        command=lambda fd, _: (sys.executable, "-c", STAND_IN, str(folder), str(fd)),
        environ=os.environ,
    )


def started_pids(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("[0-9]*")]


async def test_a_process_that_ends_as_it_starts_stops_the_start(tmp_path: Path) -> None:
    plan = stand_in_plan(tmp_path, "")
    with pytest.raises(ExceptionGroup) as group:
        async with api_processes.run_api_processes(plan, StopSignals()) as ready:
            await ready.wait()

    assert group.group_contains(StartError, match="ended during its start")


async def test_a_refusal_by_the_parent_is_the_only_error(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as group:
        async with api_processes.run_api_processes(stand_in_plan(tmp_path, "ready"), StopSignals()):
            raise StartError("no")

    assert [str(error) for error in group.value.exceptions] == ["no"]


@pytest.mark.soak
async def test_a_process_refused_while_others_serve_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with api_processes.run_api_processes(
        stand_in_plan(tmp_path, "ready"), StopSignals()
    ) as ready:
        await ready.wait()
        await eventually(lambda: len(started_pids(tmp_path)) == 2, "both have started")
        (tmp_path / "word").write_text("no such file")
        os.kill(started_pids(tmp_path)[0], signal.SIGKILL)
        await eventually(lambda: "does not start: no such file" in caplog.text, "it is refused")
        (tmp_path / "word").write_text("ready")
        await eventually(lambda: len(started_pids(tmp_path)) == 4, "it is started once more")

    assert all(map(is_gone, started_pids(tmp_path)))

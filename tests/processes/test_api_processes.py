"""Several API processes on one address are one API to their clients."""

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
from asyncinfer.processes.api_processes import ApiProcesses
from asyncinfer.processes.supervisor import Stop
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.api.harness import QUEUE, ROW, Hand, announce
from tests.faults.harness import eventually, eventually_sync
from tests.process import is_gone, parent
from tests.serving import REFUSED, Serve, free_port, serving

TWO: Final = ("--api-processes", "2")

pytestmark = pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="who holds a connection is seen in /proc alone"
)


class Line:
    """A keep-alive connection; what is asked on it is answered by one process."""

    def __init__(self, port: int) -> None:
        self._http = HTTPConnection("127.0.0.1", port, timeout=10)
        assert self.asked("GET", "/health/live")["status"]
        self.port = int(self._http.sock.getsockname()[1])

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> None:
        content = {"content-type": "application/json"} if body else {}
        self._http.request(method, path, body and json.dumps(body), content | headers)

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._http.getresponse().read())
        return answer

    def asked(self, method: str, path: str, body: Any = None, **headers: str) -> dict[str, Any]:
        self.ask(method, path, body, **headers)
        return self.answer()

    def close(self) -> None:
        self._http.close()


def holders(port: int, pids: list[int]) -> dict[int, int]:
    """Which process holds the connection from each client's port to `port`."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    client_ports = {
        f"socket:[{row[9]}]": int(row[2].rpartition(":")[2], 16)
        for row in rows
        if int(row[1].rpartition(":")[2], 16) == port
    }
    return {client_ports[link]: pid for pid in pids for link in _links(pid) if link in client_ports}


def _links(pid: int) -> Iterator[str]:
    """What a process has open; it may close it, or end, meanwhile."""
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield os.readlink(path)


class Service:
    """Two API processes, both up."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.port = urlsplit(serve.welcome["URL"]).port or 0
        eventually_sync(lambda: len(set(self.pids_of_new_lines(4))) == 2, "both processes answer")

    @contextmanager
    def lines(self, count: int) -> Iterator[dict[int, list[Line]]]:
        """New connections, by the process that holds them."""
        with ExitStack() as stack:
            lines = [stack.enter_context(contextlib.closing(Line(self.port))) for _ in range(count)]
            found = holders(self.port, self.serve.children())
            by_pid: dict[int, list[Line]] = {}
            for line in lines:
                by_pid.setdefault(found[line.port], []).append(line)
            yield by_pid

    @contextmanager
    def both(self) -> Iterator[tuple[Line, Line]]:
        """A connection to each process."""
        with self.lines(40) as by_pid:
            one, other = (lines[0] for lines in by_pid.values())
            yield one, other

    def pids_of_new_lines(self, count: int) -> list[int]:
        with self.lines(count) as by_pid:
            return list(by_pid)


@pytest.fixture(scope="module")
def service(redis_url: str) -> Iterator[Service]:
    """For all tests here; jobs are run by hand."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    anyio.run(_announce_iris, redis_url)
    with serving(*TWO, REDIS_URL=redis_url) as serve:
        yield Service(serve)


async def _announce_iris(redis_url: str) -> None:
    async with _store(redis_url) as store:
        await announce(store, "iris", default="iris")


@asynccontextmanager
async def _store(redis_url: str) -> AsyncIterator[Store]:
    async with Store.open(redis_url, queue_name=QUEUE, policy=Policy(), name="test") as it:
        yield it


@pytest.fixture
async def hand(redis_url: str) -> AsyncIterator[Hand]:
    async with _store(redis_url) as store:
        yield Hand(store)


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    # redis-py types every reply as a union of all that RESP can say.
    with redis.Redis.from_url(redis_url) as it:
        yield it


def waited_for_by(client: Any, job_id: str) -> int:
    """How many API processes wait for a job."""
    return len(decode_facts(client.hget(keys.facts(QUEUE), job_id)).inboxes)


@pytest.mark.soak
def test_40_keep_alive_connections_are_held_by_both(service: Service) -> None:
    with service.lines(40) as by_pid:
        assert sorted(by_pid) == sorted(service.serve.children())


async def test_40_waits_at_both_processes_end_with_a_job_submitted_to_one(
    service: Service, hand: Hand, client: Any
) -> None:
    with service.lines(40) as by_pid:
        lines = [line for lines in by_pid.values() for line in lines]
        job_id = lines[0].asked("POST", "/predict", {"data": ROW})["job_id"]
        for line in lines:
            line.ask("GET", f"/job/{job_id}?wait=20")
        await eventually(lambda: waited_for_by(client, job_id) == 2, "both processes wait")
        await hand.complete()

        assert {line.answer()["status"] for line in lines} == {"completed"}


async def test_a_job_waited_for_in_one_process_is_cancelled_through_the_other(
    service: Service, client: Any
) -> None:
    with service.both() as (one, other):
        one.ask("POST", "/predict", {"data": ROW}, Prefer="wait=20")
        await eventually(lambda: client.llen(QUEUE) == 1, "the job is submitted")
        (job_id,) = (it.decode() for it in client.lrange(QUEUE, 0, -1))

        assert other.asked("DELETE", f"/job/{job_id}")["status"] == "cancelled"
        assert one.answer()["status"] == "cancelled"


async def test_one_key_posted_on_20_connections_to_both_processes_makes_one_job(
    service: Service, hand: Hand, client: Any
) -> None:
    with service.lines(20) as by_pid:
        lines = [line for lines in by_pid.values() for line in lines]
        for line in lines:
            line.ask("POST", "/predict", {"data": ROW}, **{"Idempotency-Key": "the-one"})

        assert len(by_pid) == 2
        assert len({line.answer()["job_id"] for line in lines}) == 1
        assert client.llen(QUEUE) == 1
        await hand.complete()


def test_while_a_killed_process_is_started_again_the_other_answers(service: Service) -> None:
    with service.lines(40) as by_pid:
        killed, living = by_pid
        os.kill(killed, signal.SIGKILL)
        # A process of several threads is a zombie before its sockets are closed.
        eventually_sync(lambda: not Path(f"/proc/{killed}").exists(), "nothing is left of it")

        assert by_pid[living][0].asked("GET", "/health/ready")["status"]
        assert living in service.pids_of_new_lines(10)
        eventually_sync(lambda: len(set(service.pids_of_new_lines(10))) == 2, "there are two")
        assert killed not in service.serve.children()


def test_another_serve_on_their_port_is_refused(service: Service, redis_url: str) -> None:
    argv = ("-m", "asyncinfer", "serve", "--port", str(service.port), *TWO)
    with parent(*argv, REDIS_URL=redis_url) as it:
        assert it.process.wait() == REFUSED
        assert f"Cannot listen on 127.0.0.1:{service.port}" in it.complaints()


def test_what_refuses_the_start_is_said_once(
    redis_url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = ("--redis-url", redis_url, "--port", str(free_port()))

    assert main(("serve", *where, *TWO, "--api-keys", str(tmp_path / "no"))) == REFUSED
    out, err = capfd.readouterr()
    said = [line for line in err.splitlines() if str(tmp_path) in line]

    assert out == ""
    assert len(said) == 1
    assert said[0].startswith("asyncinfer: Cannot read the API keys")


@pytest.mark.soak
def test_ctrl_c_answers_those_who_wait_and_leaves_no_process(tmp_path: Path) -> None:
    with serving(*TWO, DATA_DIR=str(tmp_path)) as serve:
        service = Service(serve)
        later = {"data": ROW, "options": {"delay_seconds": 60}}
        url = valkey.running_url(tmp_path) or ""
        with redis.Redis.from_url(url) as client, service.both() as (one, other):
            eventually_sync(lambda: "iris" in str(one.asked("GET", "/models")), "a worker came")
            job_id = other.asked("POST", "/predict/iris", later)["job_id"]
            for line in (one, other):
                line.ask("GET", f"/job/{job_id}?wait=60")
            eventually_sync(lambda: waited_for_by(client, job_id) == 2, "both processes wait")
            pids = serve.children()
            serve.process.signal_group(signal.SIGINT)

            assert (one.answer()["status"], other.answer()["status"]) == ("pending", "pending")
        assert serve.process.process.wait() == 0
        assert len(pids) == 4
        assert all(map(is_gone, pids))
        assert "ERROR" not in serve.process.complaints()
        said_since = serve.process.process.stdout
        assert said_since is not None
        assert said_since.read() == "", "the welcome is printed once"


@pytest.mark.soak
def test_a_killed_serve_takes_its_processes_along(redis_url: str) -> None:
    with serving(*TWO, REDIS_URL=redis_url) as serve:
        pids = serve.children()
        serve.process.kill()

        assert len(pids) == 2
        eventually_sync(lambda: all(map(is_gone, pids)), "both have ended", seconds=5)


@pytest.mark.soak
def test_a_second_ctrl_c_ends_processes_that_hang(redis_url: str) -> None:
    with serving(*TWO, REDIS_URL=redis_url) as serve:
        pids = Service(serve).serve.children()
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
"""Says of its start what a file says now; without a word it just ends."""


def standing_in(folder: Path, word: str) -> ApiProcesses:
    (folder / "word").write_text(word)
    return ApiProcesses(
        count=2,
        command=lambda fd: (sys.executable, "-c", STAND_IN, str(folder), str(fd)),
        environ=os.environ,
    )


def started(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("[0-9]*")]


async def test_a_process_that_ends_as_it_starts_stops_the_start(tmp_path: Path) -> None:
    plan = standing_in(tmp_path, "")
    with pytest.raises(ExceptionGroup) as group:
        async with api_processes.running(plan, Stop()) as ready:
            await ready.wait()

    assert group.group_contains(StartError, match="ended during its start")


async def test_a_refusal_by_the_parent_is_all_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as group:
        async with api_processes.running(standing_in(tmp_path, "ready"), Stop()):
            raise StartError("no")

    assert [str(error) for error in group.value.exceptions] == ["no"]


@pytest.mark.soak
async def test_a_process_refused_while_others_serve_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with api_processes.running(standing_in(tmp_path, "ready"), Stop()) as ready:
        await ready.wait()
        await eventually(lambda: len(started(tmp_path)) == 2, "both have started")
        (tmp_path / "word").write_text("no such file")
        os.kill(started(tmp_path)[0], signal.SIGKILL)
        await eventually(lambda: "does not start: no such file" in caplog.text, "it is refused")
        (tmp_path / "word").write_text("ready")
        await eventually(lambda: len(started(tmp_path)) == 4, "it is started once more")

    assert all(map(is_gone, started(tmp_path)))

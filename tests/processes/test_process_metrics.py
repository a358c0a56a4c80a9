"""The metrics of several API processes: one port adds up what all of them have counted."""

import json
import os
import signal
import sys
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Final

import anyio
import pytest
import redis

from asyncinfer.api.process_figures import ProcessFigures
from asyncinfer.monitoring.counts import Labels
from asyncinfer.monitoring.figures import Figures, encode_figures
from asyncinfer.processes import api_processes
from asyncinfer.processes.api_processes import ApiProcessPlan
from asyncinfer.processes.supervisor import StopSignals
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.api.harness import QUEUE, ROW, announce
from tests.faults.harness import eventually, eventually_sync
from tests.metrics import Scrape, promtool, scrape
from tests.ports import free_port
from tests.process import is_gone
from tests.serving import ServeProcess, running_serve

ACCEPTED: Final = {"method": "POST", "route": "/predict", "status": "202", "wait": "no"}


class MeasuredService:
    """Two API processes, and the port of their metrics."""

    def __init__(self, serve: ServeProcess, metrics_port: int) -> None:
        self.serve = serve
        self.metrics_port = metrics_port

    def submit(self, count: int) -> None:
        """Submits jobs, each on a connection of its own, so that both processes get some."""
        for _ in range(count):
            request = urllib.request.Request(
                f"{self.serve.banner['URL']}/predict",
                json.dumps({"data": ROW}).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert answer.status == 202

    def wait_for(self, submits: int, processes: int = 2) -> Scrape:
        """A scrape that shows so many submits, once it does."""
        found: list[Scrape] = []

        def is_shown() -> bool:
            found.append(scrape(self.metrics_port))
            shown = found[-1]
            return (
                shown("asyncinfer_submits_total", model="iris") == submits
                and shown("asyncinfer_request_seconds_count", **ACCEPTED) == submits
                and shown("asyncinfer_api_processes") == processes
            )

        eventually_sync(is_shown, f"{submits} submits are shown, and {processes} processes")
        return found[-1]


@pytest.fixture(scope="module")
def measured(redis_url: str) -> Iterator[MeasuredService]:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    anyio.run(_announce_iris, redis_url)
    port = free_port()
    argv = ("--api-processes", "2", "--metrics-port", str(port))
    with running_serve(*argv, REDIS_URL=redis_url) as serve:
        yield MeasuredService(serve, port)


async def _announce_iris(redis_url: str) -> None:
    async with Store.open(redis_url, queue_name=QUEUE, policy=Policy(), name="test") as store:
        await announce(store, "iris", default="iris")


@pytest.mark.soak
@pytest.mark.system("promtool")
def test_no_counter_falls_when_a_process_is_killed(measured: MeasuredService) -> None:
    measured.submit(30)
    before = measured.wait_for(30)
    assert before("asyncinfer_api_resident_memory_bytes") > 50_000_000
    assert before("asyncinfer_queue_waiting_jobs", model="iris", priority="normal") == 30
    promtool("check", "metrics", text=before.text)

    killed, survivor = measured.serve.child_pids()
    os.kill(killed, signal.SIGKILL)
    eventually_sync(lambda: is_gone(killed), "the process has ended")
    at_once = scrape(measured.metrics_port)
    restarted = measured.wait_for(30)
    measured.submit(10)
    later = measured.wait_for(40)

    assert survivor in measured.serve.child_pids()
    assert_never_falls(before, at_once, restarted, later)


def assert_never_falls(*scrapes: Scrape) -> None:
    """Asserts that each counter of a scrape is at least as large in the next."""
    for earlier, later in pairwise(scrapes):
        fallen = {
            series: (value, later.values.get(series))
            for series, value in earlier.counters().items()
            if later.values.get(series, -1.0) < value
        }
        assert fallen == {}


# --- with stand-ins for the processes ----------------------------------------------------------

STAND_IN: Final = """
import os, signal, sys

report_fd, figures_fd = int(sys.argv[1]), int(sys.argv[2])
os.write(report_fd, b"ready")
os.write(figures_fd, bytes.fromhex(sys.argv[3]))
os.kill(os.getpid(), int(sys.argv[4])) if sys.argv[4] != "0" else signal.pause()
"""
"""Sends these bytes as its figures; then gets this signal, or waits for 0."""


def stand_in_plan(
    sent: bytes, figures: ProcessFigures, ended_by: signal.Signals | None = None
) -> ApiProcessPlan:
    return ApiProcessPlan(
        count=1,
        command=lambda report_fd, figures_fd: (
            *(sys.executable, "-c", STAND_IN),
            *(str(report_fd), str(figures_fd), sent.hex(), str(int(ended_by or 0))),
        ),
        environ=os.environ,
        figures=figures,
    )


def framed(frame: bytes) -> bytes:
    return len(frame).to_bytes(4, "big") + frame


async def test_what_a_killed_process_has_counted_stays_and_what_it_held_goes() -> None:
    figures = ProcessFigures()
    sent = Figures(counts={"submits": {("iris",): 5}}, gauges={"waits": {(): 3}})
    plan = stand_in_plan(framed(encode_figures(sent)), figures, signal.SIGKILL)
    seen: list[Figures] = []

    def has_ended_twice() -> bool:
        seen.append(figures.total())
        return seen[-1].counts.get("submits") == {("iris",): 10} and not seen[-1].gauges

    async with api_processes.run_api_processes(plan, StopSignals()) as ready:
        await ready.wait()
        await eventually(has_ended_twice, "the sum of two processes is kept")
    sums = [one.counts.get("submits", {}).get(("iris",), 0) for one in seen]
    assert sums == sorted(sums)


async def test_figures_that_come_in_parts_and_frames_are_read() -> None:
    figures = ProcessFigures()
    first, last = (
        encode_figures(Figures(counts={"submits": {(f"model-{n}",): count for n in range(1000)}}))
        for count in (1, 2)
    )
    plan = stand_in_plan(framed(first) + framed(last) + b"\0\0", figures)
    async with api_processes.run_api_processes(plan, StopSignals()) as ready:
        await ready.wait()
        await eventually(
            lambda: sum(figures.total().counts.get("submits", {}).values()) == 2000,
            "the last figures are those of the process",
        )
    assert figures.total().counts["submits"]["model-0",] == 2


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (framed(b"\xc1no figures"), "could not be read"),
        (b"\xff\xff\xff\xff", "not read any more"),
    ],
)
async def test_damaged_figures_are_logged_and_nothing_else_fails(
    sent: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    figures = ProcessFigures()
    async with api_processes.run_api_processes(
        stand_in_plan(sent, figures), StopSignals()
    ) as ready:
        await ready.wait()
        await eventually(lambda: reason in caplog.text, "the log says so")
    assert figures.total() == Figures()


async def test_a_process_sends_large_figures_to_a_slow_parent_and_its_last_ones_at_its_end() -> (
    None
):
    counts: dict[Labels, float] = {(f"a-model-with-a-long-name-{n}",): 1.0 for n in range(5000)}
    sent = encode_figures(Figures(counts={"submits": counts}))
    assert len(sent) > 2 * 64 << 10
    read_fd, write_fd = os.pipe()
    received = bytearray()
    try:
        async with api_processes.sending_figures(write_fd, lambda: sent):
            while len(received) < 4 + len(sent):
                await anyio.wait_readable(read_fd)
                received += os.read(read_fd, 10_000)
        assert received[: 4 + len(sent)] == framed(sent)
        rest = bytes(received[4 + len(sent) :])
        while part := os.read(read_fd, 1 << 20):
            rest += part
    finally:
        os.close(read_fd)
    assert framed(sent).startswith(rest[:1000])
    assert rest


@pytest.mark.soak
def test_the_processes_need_no_folder_for_their_figures(measured: MeasuredService) -> None:
    """A container with a read-only root has none."""
    for pid in (measured.serve.process.process.pid, *measured.serve.child_pids()):
        open_files = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        written = [path for path in open_files if path.startswith("/") and os.path.isfile(path)]
        assert written == []

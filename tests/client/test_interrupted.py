"""Interrupted maps: by Ctrl-C, by a restart of the server, by the end of the process."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from asyncinfer.client import Client
from asyncinfer.testing import Running
from tests.faults.harness import eventually_sync
from tests.ports import free_port
from tests.process import REPOSITORY, PythonProcess, is_gone, python_process, running_processes

_MAPPER: Final = """
import sys
import numpy as np
from asyncinfer.client import Client

url, group, units = sys.argv[1:]
client = Client(url)
rows = np.full((64, 1), float(units))
for number, result in enumerate(client.map(rows, "slow", group=group, batch=1, progress=False)):
    print(number, result.item(), flush=True)
print("all", flush=True)
"""


@contextmanager
def mapping(running: Running, group: str, units: int) -> Iterator[PythonProcess]:
    with python_process("-c", _MAPPER, running.url, group, str(units), cwd=REPOSITORY) as script:
        yield script


def test_ctrl_c_ends_a_script_and_cancels_what_is_queued(running: Running, client: Client) -> None:
    with mapping(running, "stopped", 100) as script:
        assert script.read_line() == "0 100.0"
        script.process.send_signal(signal.SIGINT)
        assert script.process.wait(10) != 0
        assert "KeyboardInterrupt" in script.read_stderr()

    counts = client.group("stopped").counts
    assert counts.pending == 0
    assert counts.completed < 64
    eventually_sync(lambda: client.group("stopped").refresh().counts.processing == 0, "none runs")


def test_ctrl_c_says_how_to_resume(client: Client) -> None:
    results = client.map(np.full((64, 1), 100.0), "slow", batch=1, progress=False)

    def press_ctrl_c() -> None:
        eventually_sync(lambda: bool(client.jobs(group=results.group)), "it has begun")
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press_ctrl_c)

    def read_all() -> None:
        pressing.start()
        list(results)

    with pytest.raises(KeyboardInterrupt) as stopped:
        read_all()
    pressing.join()

    assert any(f"group={results.group!r} to go on" in note for note in stopped.value.__notes__)
    assert client.group(results.group).counts.pending == 0


def test_leaving_a_block_early_cancels_what_is_queued(client: Client) -> None:
    rows = np.full((64, 1), 20.0)
    with client.map(rows, "slow", batch=1, progress=False) as results:
        next(results)

    assert client.group(results.group).counts.pending == 0


@pytest.mark.soak
def test_a_second_ctrl_c_leaves_at_once(running: Running, client: Client) -> None:
    with mapping(running, "left-at-once", 2000) as script:
        eventually_sync(lambda: bool(client.jobs(group="left-at-once")), "it has begun")
        script.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        script.process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        script.process.wait(10)
        assert time.monotonic() - begun < 3
    client.group("left-at-once").cancel()


@pytest.mark.soak
def test_a_map_of_a_killed_process_is_resumed(running: Running, client: Client) -> None:
    with mapping(running, "killed", 100) as script:
        for number in range(10):
            assert script.read_line() == f"{number} 100.0"
        script.kill()

    with mapping(running, "killed", 100) as script:
        assert [script.read_line() for _ in range(65)][-1] == "all"
    assert client.group("killed").counts.completed == 64
    assert client.group("killed").jobs == 64


@contextmanager
def serving(port: int, data_dir: Path, models: Path) -> Iterator[PythonProcess]:
    argv = ("-m", "asyncinfer", "serve", "--port", str(port), "--model-dir", str(models))
    with python_process(*argv, cwd=REPOSITORY, DATA_DIR=str(data_dir)) as server:
        while not server.read_line().strip().startswith("Stop"):
            pass
        yield server


@pytest.mark.soak
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_restarts_during_a_map_loses_and_repeats_nothing(
    how: signal.Signals, tmp_path: Path, model_folder: Path
) -> None:
    port = free_port()
    rows = [[float(number % 3)] for number in range(6000)]
    found: list[float] = []
    begun = threading.Event()

    def use(client: Client) -> None:
        for result in client.map(rows, "picky", group="through", batch=10, progress=False):
            found.append(result.item())
            begun.set()

    with Client(f"http://127.0.0.1:{port}") as client:
        with serving(port, tmp_path, model_folder) as server:
            eventually_sync(lambda: len(client.models()) > 3, "models are announced")
            thread = threading.Thread(target=use, args=(client,))
            thread.start()
            assert begun.wait(10)
            children = [
                process.pid
                for process in running_processes()
                if process.parent_pid == server.process.pid
            ]
            server.process.send_signal(how)
            server.process.wait()
            assert len(found) < 6000
            eventually_sync(lambda: all(map(is_gone, children)), "all of it is gone")
        with serving(port, tmp_path, model_folder):
            thread.join(90)
            assert not thread.is_alive()
            assert found == [number % 3 for number in range(6000)]
            assert client.group("through").counts.completed == 600
            assert client.group("through").jobs == 600


def test_a_script_that_ends_during_a_map_does_not_hang(running: Running) -> None:
    code = (
        "import sys\n"
        "from asyncinfer.client import Client\n"
        "results = Client(sys.argv[1]).map([[5.1, 3.5, 1.4, 0.2]] * 9, batch=1, progress=False)\n"
        "print(next(results)['class_name'])\n"
    )
    argv = [sys.executable, "-c", code, running.url]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, env=dict(os.environ))
    assert (done.stdout, done.returncode) == ("setosa\n", 0), done.stderr
    assert "Traceback" not in done.stderr

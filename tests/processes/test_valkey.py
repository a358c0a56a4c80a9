"""The embedded Valkey keeps its data and its folder, and ends with its `serve`."""

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from asyncinfer.errors import DataDirBusy, StartError
from asyncinfer.processes import valkey
from asyncinfer.processes.memory import usable_bytes
from tests.faults.harness import eventually, eventually_sync
from tests.process import PythonProcess, is_gone, python_process

MIB: Final = 1 << 20

SERVE: Final = """
import asyncio, signal, sys
from pathlib import Path
from asyncinfer.processes import valkey

async def main(data_dir):
    async with valkey.embedded(Path(data_dir)) as server:
        print(server.child.pid, flush=True)
        print(server.url, flush=True)
        await asyncio.Event().wait()

signal.signal(signal.SIGINT, signal.SIG_IGN)
asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture(params=["short", "long " + "x" * 120, 'it\'s a "folder"'])
def data_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def connect(url: str) -> Any:
    """A plain client; redis-py types every reply as a union of all that RESP can say."""
    return redis.Redis.from_url(url)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_its_data_is_there_at_the_next_start(data_dir: Path) -> None:
    async with valkey.embedded(data_dir) as server:
        connect(server.url).set("job", "1")

    async with valkey.embedded(data_dir) as server:
        assert connect(server.url).get("job") == b"1"


async def test_only_its_user_can_connect(data_dir: Path) -> None:
    async with valkey.embedded(data_dir) as server:
        path = Path(connect(server.url).config_get("unixsocket")["unixsocket"])

        assert connect(server.url).config_get("port") == {"port": "0"}
        assert [permissions(place) for place in (path, path.parent, data_dir)] == [0o700] * 3
        assert len(os.fsencode(path)) <= 103


async def test_it_stores_every_write_on_disk(tmp_path: Path) -> None:
    async with valkey.embedded(tmp_path) as server:
        client = connect(server.url)
        names = ("appendonly", "appendfsync", "save", "maxmemory-policy")

        assert client.config_get(*names) == {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }


# --- the limit of its memory -------------------------------------------------------------------


def limit_of(url: str) -> int:
    return int(connect(url).config_get("maxmemory")["maxmemory"])


async def test_it_may_have_a_quarter_of_the_memory_unless_a_limit_is_given(tmp_path: Path) -> None:
    async with valkey.embedded(tmp_path) as server:
        assert limit_of(server.url) == usable_bytes() // 4

    async with valkey.embedded(tmp_path, 50 * MIB) as server:
        assert limit_of(server.url) == 50 * MIB
        server.child.signal(signal.SIGKILL)
        await server.child.wait()
        await server.start()
        assert limit_of(server.url) == 50 * MIB


@pytest.mark.parametrize(
    ("stored", "limit"),
    [(0, 25), (19, 25), (20, 25), (40, 50), (60, 75), (70, 75), (200, 75)],
)
def test_a_restart_leaves_room_above_what_is_stored_but_not_all_memory(
    stored: int, limit: int
) -> None:
    assert valkey.default_max_bytes(stored * MIB, 100 * MIB) == limit * MIB


async def test_a_server_that_was_full_takes_writes_after_a_restart(tmp_path: Path) -> None:
    async with valkey.embedded(tmp_path, memory_bytes=40 * MIB) as server:
        client = connect(server.url)
        client.setrange("job", 12 * MIB, "x")
        with pytest.raises(redis.OutOfMemoryError):
            client.set("more", "1")

    async with valkey.embedded(tmp_path, memory_bytes=40 * MIB) as server:
        assert connect(server.url).set("more", "1")


async def test_a_start_with_more_than_the_limit_says_so_and_refuses_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with valkey.embedded(tmp_path) as server:
        connect(server.url).setrange("job", 20 * MIB, "x")
    assert not caplog.messages

    async with valkey.embedded(tmp_path, 16 * MIB) as server:
        client = connect(server.url)
        with pytest.raises(redis.OutOfMemoryError):
            client.set("more", "1")
        assert client.strlen("job") == 20 * MIB + 1
    (said,) = caplog.messages
    assert "may have 16 MiB (EMBEDDED_MAXMEMORY)" in said


# --- one `serve` at a time ---------------------------------------------------------------------


async def test_a_worker_finds_it_through_the_folder(data_dir: Path) -> None:
    async with valkey.embedded(data_dir) as server:
        assert valkey.running_url(data_dir) == server.url

    assert valkey.running_url(data_dir) is None


async def test_a_second_serve_on_its_folder_is_refused_at_once(tmp_path: Path) -> None:
    async with valkey.embedded(tmp_path) as server:
        with pytest.raises(DataDirBusy, match=f"pid {os.getpid()}.*another DATA_DIR"):
            await valkey.embedded(tmp_path).__aenter__()

        assert connect(server.url).ping()


async def test_it_starts_again_on_the_same_data_after_a_crash(tmp_path: Path) -> None:
    async with valkey.embedded(tmp_path) as server:
        connect(server.url).set("job", "1")
        server.child.signal(signal.SIGKILL)
        assert await server.child.wait() == -signal.SIGKILL
        await server.start()

        assert connect(server.url).get("job") == b"1"


async def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    async with valkey.embedded(tmp_path) as server:
        connect(server.url).set("job", "1")
    manifest = tmp_path / "valkey/appendonlydir/appendonly.aof.manifest"
    manifest.write_text("not a manifest\n")

    with pytest.raises(StartError, match=r"(?s)did not start.*valkey\.log.*manifest"):
        await valkey.embedded(tmp_path).__aenter__()


async def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StartError, match="DATA_DIR"):
        await valkey.embedded(tmp_path / "file").__aenter__()


async def test_a_link_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "valkey").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(StartError, match="not a folder of yours"):
        await valkey.embedded(tmp_path).__aenter__()


# --- with a process of its own ---------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[PythonProcess]:
    with python_process("-c", SERVE, str(tmp_path)) as serve:
        yield serve


def test_it_is_gone_within_5_s_of_a_killed_serve_and_leaves_its_data(
    serve: PythonProcess, tmp_path: Path
) -> None:
    pid, url = int(serve.read_line()), serve.read_line()
    connect(url).set("job", "1")
    serve.kill()

    eventually_sync(lambda: is_gone(pid), "Valkey has ended", seconds=5)
    with python_process("-c", SERVE, str(tmp_path)) as again:
        again.read_line()
        assert connect(again.read_line()).get("job") == b"1"


async def test_the_next_serve_waits_for_the_server_of_a_killed_one(
    serve: PythonProcess, tmp_path: Path
) -> None:
    pid, url = int(serve.read_line()), serve.read_line()
    connect(url).set("job", "1")
    os.kill(pid, signal.SIGSTOP)  # so that it cannot end before we come
    serve.kill()
    with pytest.raises(DataDirBusy, match=f"pid {pid}.*kill {pid}"):
        await valkey.embedded(tmp_path, predecessor_seconds=0.05).__aenter__()
    os.kill(pid, signal.SIGCONT)

    async with valkey.embedded(tmp_path) as server:
        assert connect(server.url).get("job") == b"1"
    await eventually(lambda: is_gone(pid), "the old one has ended")


def test_ctrl_c_does_not_end_it_before_its_serve_does(serve: PythonProcess) -> None:
    pid, url = int(serve.read_line()), serve.read_line()
    serve.signal_group(signal.SIGINT)

    assert connect(url).ping()
    assert os.getpgid(pid) != serve.process.pid, "it gets the terminal's signals, and ends soon"

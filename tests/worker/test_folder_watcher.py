"""The folder watcher outlives replaced, removed and unreadable folders, and logs an outage once."""

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from asyncinfer.worker.models.folder_watcher import folder_changes
from tests import unprivileged
from tests.faults.harness import eventually

_NEVER = 600.0
"""Seconds between reads without a change: so whatever is seen came from the watch or the timer."""


def onnx_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.onnx")] if folder.is_dir() else []


@asynccontextmanager
async def watched_files(folder: Path) -> AsyncIterator[Callable[[], set[str]]]:
    """Watches a folder; gives the names of its ONNX files at the last change."""
    stopping = asyncio.Event()
    seen: set[str] = set()

    async def watch() -> None:
        async for _ in folder_changes(folder, rescan_seconds=_NEVER, stopping=stopping):
            seen.clear()
            seen.update(onnx_files(folder))

    async with asyncio.TaskGroup() as group:
        task = group.create_task(watch())
        try:
            yield lambda: seen
        finally:
            stopping.set()
            await task


async def wait_until_seen(folder: Path, name: str, seen: Callable[[], set[str]]) -> None:
    """Writes the file repeatedly until it is seen, since it is unknown when a watch has begun."""

    def is_seen() -> bool:
        (folder / name).write_bytes(b"x")
        return name in seen()

    await eventually(is_seen, f"{name} is seen", 10)


@pytest.mark.soak
@pytest.mark.parametrize("polling", [False, True], ids=["inotify", "polling"])
async def test_a_folder_that_may_not_be_read_hides_no_change_beside_it(
    tmp_path: Path,
    polling: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    unprivileged.skip_unless_possible()
    for name in ("a", "lost+found", "z"):
        (tmp_path / name).mkdir()
    (tmp_path / "lost+found").chmod(0)
    if polling:
        monkeypatch.setenv("WATCHFILES_FORCE_POLLING", "true")

    with unprivileged.unprivileged():
        async with watched_files(tmp_path) as seen:
            await wait_until_seen(tmp_path / "z", "z.onnx", seen)
            await wait_until_seen(tmp_path / "a", "a.onnx", seen)
            await wait_until_seen(tmp_path, "b.onnx", seen)

    (tmp_path / "lost+found").chmod(0o700)
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == polling, warned
    assert all("cannot be watched: " in line and "lost+found" in line for line in warned)


async def test_a_folder_that_is_replaced_is_followed(tmp_path: Path) -> None:
    folder, other = tmp_path / "models", tmp_path / "other"
    for parent in (folder, other):
        (parent / "m").mkdir(parents=True)
    async with watched_files(folder) as seen:
        await wait_until_seen(folder / "m", "first.onnx", seen)
        folder.rename(tmp_path / "before")
        other.rename(folder)
        await wait_until_seen(folder / "m", "second.onnx", seen)
        assert seen() == {"second.onnx"}


@pytest.mark.soak
async def test_a_folder_that_is_gone_or_a_file_for_a_while_is_followed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    async with watched_files(folder) as seen:
        await wait_until_seen(folder, "first.onnx", seen)
        shutil.rmtree(folder)
        await eventually(lambda: not seen(), "it is seen to be gone", 10)
        folder.write_bytes(b"a file")
        folder.unlink()
        folder.mkdir()
        await wait_until_seen(folder, "again.onnx", seen)
    assert "cannot be watched" not in caplog.text

"""The cache of loaded engines: each version is loaded once, and the least used are dropped."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from msgspec import Struct

from asyncinfer.engine import Engine
from asyncinfer.models.folder import ModelFile
from asyncinfer.processes import tuning

Label: TypeAlias = tuple[str, str]
"""(model, version)"""


def label_of(file: ModelFile) -> Label:
    return file.model, file.version


class CacheBounds(Struct, frozen=True):
    """How much may stay loaded. The engine that was loaded last always may."""

    max_models: int = 32
    """Model versions."""
    max_bytes: int = 0
    """Total size of their files; 0: no limit."""


class _Entry(Struct, frozen=True):
    engine: Engine
    size_bytes: int
    pinned: bool


class EngineCache:
    """Loads engines in a thread and keeps them within bounds. A run under way keeps its engine,
    also when the cache drops it. Its methods are called in the event loop."""

    def __init__(self, load: Callable[[ModelFile], Engine], bounds: CacheBounds) -> None:
        """`load` blocks and runs in the thread, one call at a time."""
        self._load = load
        self._bounds = bounds
        self._entries: dict[Label, _Entry] = {}
        """The least recently used first."""
        self._loading: dict[Label, asyncio.Future[Engine]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._load_count = 0

    @property
    def is_loading(self) -> bool:
        """Whether the thread loads a version now, which would delay the end of this process."""
        return self._load_count > 0

    @property
    def labels(self) -> list[Label]:
        """The loaded versions, the least recently used first."""
        return list(self._entries)

    @property
    def size_bytes(self) -> int:
        """The total size of the files of the loaded versions."""
        return sum(entry.size_bytes for entry in self._entries.values())

    def get(self, label: Label) -> Engine | None:
        """The engine if it is loaded, which then counts as the most recently used; None if it is
        not."""
        entry = self._entries.pop(label, None)
        if entry is None:
            return None
        self._entries[label] = entry
        return entry.engine

    async def fetch(self, file: ModelFile, size_bytes: int) -> Engine:
        """The engine, loaded and put into the cache if need be. Concurrent calls share one load,
        which goes on if a call is cancelled. `size_bytes` is the size of the version's files, which
        counts against the bounds.

        Raises ModelRefused.
        """
        label = label_of(file)
        if engine := self.get(label):
            return engine
        loading = self._loading.get(label)
        if loading is None:
            loading = self._loading[label] = asyncio.ensure_future(self.load(file))
            loading.add_done_callback(lambda done: self._put_loaded(file, size_bytes, done))
        return await asyncio.shield(loading)

    async def load(self, file: ModelFile) -> Engine:
        """Loads a new engine in the thread, after loads under way, without putting it into the
        cache. Raises ModelRefused."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._load_in_thread, file
        )

    def _load_in_thread(self, file: ModelFile) -> Engine:
        """Runs in the thread; counts the load as under way."""
        self._load_count += 1
        try:
            return self._load(file)
        finally:
            self._load_count -= 1

    def put(
        self, file: ModelFile, engine: Engine, size_bytes: int, *, displaces: bool = True
    ) -> None:
        """Puts an engine into the cache, in place of an earlier one of the same version, and drops
        the least used others until all are within bounds; pinned ones stay.

        Without `displaces` the others stay, and this one is dropped soon if there is no room and it
        is not pinned.
        """
        label = label_of(file)
        self.drop(label)
        self._entries[label] = _Entry(engine, size_bytes, file.config.pinned)
        if not (displaces or file.config.pinned):
            if self._is_full():
                # Not at once: the caller still holds it, and would free it in the event loop.
                asyncio.get_running_loop().call_soon(self.drop, label)
            return
        for other, entry in list(self._entries.items()):
            if other != label and not entry.pinned and self._is_full():
                self.drop(other)

    def drop(self, label: Label) -> None:
        """Removes a version from the cache, if it is there, and frees its memory in the thread;
        returns at once."""
        if entry := self._entries.pop(label, None):
            # In the thread, since freeing a large model takes a while: the loop must not wait.
            freed = [entry]
            del entry
            with contextlib.suppress(RuntimeError):  # the cache is closed, so the process ends soon
                self._thread.submit(_free, freed)

    def close(self) -> None:
        """Starts no further load, also none that waits; a load under way goes on, and loaded
        engines stay usable. Does not wait."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _put_loaded(self, file: ModelFile, size_bytes: int, done: "asyncio.Future[Engine]") -> None:
        """Called when a load of `fetch` has ended: puts the engine into the cache, if there is
        one."""
        del self._loading[label_of(file)]
        if not done.cancelled() and not done.exception():
            self.put(file, done.result(), size_bytes)

    def _is_full(self) -> bool:
        """Whether more is loaded than the bounds allow."""
        return len(self._entries) > self._bounds.max_models or (
            0 < self._bounds.max_bytes < self.size_bytes
        )


def _free(freed: list[_Entry]) -> None:
    """Frees the engine in the list, which must be the last reference, and gives memory back to the
    system."""
    freed.clear()
    tuning.release_freed_memory()

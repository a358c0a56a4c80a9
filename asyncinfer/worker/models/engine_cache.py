"""The engines that a worker has loaded: once each, when first asked for, and not too many."""

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
"""A model's name, and a version of it."""


def label_of(file: ModelFile) -> Label:
    return file.model, file.version


class Bounds(Struct, frozen=True):
    """What may stay loaded; what was just loaded always may."""

    max_models: int = 32
    """Versions of models."""
    max_bytes: int = 0
    """Of their files together; 0: no limit."""


class _Book(Struct, frozen=True):
    engine: Engine
    size_bytes: int
    pinned: bool


class Shelf:
    """Lends engines; who runs one keeps it, whether or not it still stands here."""

    def __init__(self, load: Callable[[ModelFile], Engine], bounds: Bounds) -> None:
        self._load = load
        self._bounds = bounds
        self._books: dict[Label, _Book] = {}
        """The least used first."""
        self._loading: dict[Label, asyncio.Future[Engine]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._loads_under_way = 0

    @property
    def is_loading(self) -> bool:
        """Whether its thread loads, and would keep this process from its end."""
        return self._loads_under_way > 0

    @property
    def labels(self) -> list[Label]:
        """What is loaded, the least used first."""
        return list(self._books)

    def get(self, label: Label) -> Engine | None:
        book = self._books.pop(label, None)
        if book is None:
            return None
        self._books[label] = book
        return book.engine

    async def fetch(self, file: ModelFile, size_bytes: int) -> Engine:
        """Loads what is not loaded; all who ask meanwhile wait for that. Raises ModelRefused."""
        label = label_of(file)
        if engine := self.get(label):
            return engine
        loading = self._loading.get(label)
        if loading is None:
            loading = self._loading[label] = asyncio.ensure_future(self.load(file))
            loading.add_done_callback(lambda done: self._loaded(file, size_bytes, done))
        return await asyncio.shield(loading)

    async def load(self, file: ModelFile) -> Engine:
        """A new engine, which nobody else is lent until it is `put` here."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._loaded_in_thread, file
        )

    def _loaded_in_thread(self, file: ModelFile) -> Engine:
        self._loads_under_way += 1
        try:
            return self._load(file)
        finally:
            self._loads_under_way -= 1

    def put(
        self, file: ModelFile, engine: Engine, size_bytes: int, *, displaces: bool = True
    ) -> None:
        """Takes the place of the one before, and that of the least used where there is no room.

        Unless it `displaces` others, it goes itself then.
        """
        label = label_of(file)
        self.drop(label)
        self._books[label] = _Book(engine, size_bytes, file.config.pinned)
        if not (displaces or file.config.pinned):
            if self._is_full():
                # Not at once: the caller still has it, and would free it in the loop.
                asyncio.get_running_loop().call_soon(self.drop, label)
            return
        for other, book in list(self._books.items()):
            if other != label and not book.pinned and self._is_full():
                self.drop(other)

    def drop(self, label: Label) -> None:
        if book := self._books.pop(label, None):
            # In the thread, since to free a large model takes a while: the loop must not wait.
            gone = [book]
            del book
            with contextlib.suppress(RuntimeError):  # closed, and so soon ended
                self._thread.submit(_forget, gone)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _loaded(self, file: ModelFile, size_bytes: int, done: "asyncio.Future[Engine]") -> None:
        del self._loading[label_of(file)]
        if not done.cancelled() and not done.exception():
            self.put(file, done.result(), size_bytes)

    def _is_full(self) -> bool:
        total_bytes = sum(book.size_bytes for book in self._books.values())
        return len(self._books) > self._bounds.max_models or (
            0 < self._bounds.max_bytes < total_bytes
        )


def _forget(gone: list[_Book]) -> None:
    gone.clear()
    tuning.trim()

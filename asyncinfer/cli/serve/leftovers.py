"""What a `serve` with a worker of its own clears away: defaults and models of other folders."""

import logging
import socket
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final

from asyncinfer.cli.serve import configuration
from asyncinfer.errors import AsyncinferError, InvalidSetting, RedisUnavailable, StorageFull
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.settings import Settings

if TYPE_CHECKING:
    from asyncinfer.models.folder import ModelFile
    from asyncinfer.repository.announcements import WorkerSays
    from asyncinfer.repository.leftovers import Leftovers, Unserved

_log = logging.getLogger(__name__)
_limited = LimitedLog(_log)

_FIRST_SECONDS: Final = 0.5
"""Until the worker has said what it has, which takes a second or two."""

_PAUSE_SECONDS: Final = 10.0
_MOST_SHOWN: Final = 10


class Clearing:
    """An embedded server belongs to one `serve`, whose folder may be another at each start. A
    server that others use too belongs to several deployments, one of which may be down for a
    while: of what is there nothing is taken back."""

    def __init__(self, chosen: Settings) -> None:
        self._chosen = chosen
        self._is_embedded = configuration.redis_url(chosen) is None
        self.since_ms = time.time_ns() // 1_000_000
        """Its worker is started after that."""
        self._foreign: str | None = None
        """A default model that is not in the folder."""
        self._unserved: Unserved | None = None
        """The same, when no other worker has it either."""

    # --- at the start ------------------------------------------------------------------------

    def check(self) -> None:
        """Raises InvalidSetting for a default model that nobody can have. An empty folder may
        still be filled."""
        wanted = configuration.default_model(self._chosen)
        if wanted and self._is_embedded and not self._lies_here(wanted) and self._names():
            raise self._no_such_default(wanted)

    async def before_worker(self, url: str) -> None:
        """Settles which model is the default, before a worker and an API go by it."""
        from asyncinfer.repository.leftovers import Leftovers

        async with configuration.store(self._chosen, url) as store:
            leftovers = Leftovers(store, all_here=self._is_embedded)
            try:
                await self._settle_default(leftovers)
                await self._retract_foreign(leftovers)
            except (RedisUnavailable, StorageFull) as error:
                _log.warning("Which model is the default is not settled yet: %s", error.detail)

    async def _settle_default(self, leftovers: "Leftovers") -> None:
        if wanted := configuration.default_model(self._chosen):
            is_nobodys = not (self._lies_here(wanted) or await leftovers.is_known(wanted))
            if is_nobodys and self._names():
                raise self._no_such_default(wanted)
            await leftovers.claim_default_model(wanted)
            return
        stored = await leftovers.default_model()
        if stored is None or self._lies_here(stored):
            return
        self._foreign = stored
        if await leftovers.is_unserved(stored):
            await self._replace(leftovers, stored, self._names(whole=True))

    async def _replace(self, leftovers: "Leftovers", stored: str, names: Collection[str]) -> None:
        from asyncinfer.models.folder import default_model
        from asyncinfer.repository.leftovers import Unserved

        if not self._is_embedded:
            self._unserved = Unserved(stored)
            return
        successor = default_model(None, names)
        self._unserved = await leftovers.replace_default(stored, successor)
        if self._unserved is None:
            self._foreign = None
            now = (
                f"{successor!r} is it now"
                if successor
                else "there is none now. Name one in each request, or with --default-model"
            )
            _log.info("The default model was %r, which no worker has: %s.", stored, now)

    async def _retract_foreign(self, leftovers: "Leftovers") -> None:
        """Before the API answers, so that it never lists models of an earlier folder. Those that
        the folder has are left alone: the worker will announce them."""
        if not self._is_embedded:
            return
        left = await leftovers.unserved_versions(await leftovers.workers())
        foreign = left.keys() - self._in_sight()
        if not foreign:
            return
        try:
            foreign -= {file.model for file in self._files()}
        except OSError:
            return  # the worker says what is wrong with it
        await self._take_back(leftovers, {model: left[model] for model in sorted(foreign)})

    # --- from then on ------------------------------------------------------------------------

    async def beside_worker(self, url: str, worker_pid: Callable[[], int]) -> None:
        """Takes back, again and again, what no worker has and no job waits for."""
        import anyio

        from asyncinfer.repository.leftovers import Leftovers

        if not self._is_embedded:
            return
        async with configuration.store(self._chosen, url) as store:
            leftovers = Leftovers(store, all_here=True)
            while True:
                is_done = False
                try:
                    is_done = await self._clear(leftovers, worker_pid())
                except AsyncinferError as error:
                    _log.debug("Clearing: %s", error.detail)
                except Exception as error:
                    _limited.unexpected("What nobody serves could not be taken back.", error)
                await anyio.sleep(_PAUSE_SECONDS if is_done else _FIRST_SECONDS)

    async def _clear(self, leftovers: "Leftovers", worker_pid: int) -> bool:
        """Returns whether there was a worker of our own to go by, and nothing is left to settle:
        while it is being started (again), what it has must stay."""
        workers = await leftovers.workers()
        own = next((one for one in workers if self._is_own(one, worker_pid)), None)
        if own is None:
            return False
        if self._foreign:
            await self._settle_again(leftovers, own, self._foreign)
        await self._retract(leftovers, own, await leftovers.unserved_versions(workers))
        return self._unserved is None

    def _is_own(self, worker: "WorkerSays", pid: int) -> bool:
        # In a container the worker of the next start may have the pid of the last one's.
        started_ms = worker.started_ms or 0
        return (worker.pid, worker.host) == (pid, socket.gethostname()) and (
            started_ms >= self.since_ms
        )

    async def _settle_again(self, leftovers: "Leftovers", own: "WorkerSays", stored: str) -> None:
        """Replaces a default that no worker had in this round and the one before: a worker beside
        this `serve` that has it may be starting again."""
        import anyio

        from asyncinfer.repository.leftovers import Unserved

        if stored != await leftovers.default_model():
            self._foreign = self._unserved = None
        elif not await leftovers.is_unserved(stored) or stored in await anyio.to_thread.run_sync(
            self._names
        ):
            self._unserved = None
        elif self._unserved is None:
            self._unserved = Unserved(stored)
        else:
            await self._replace(leftovers, stored, {*own.versions, *own.loading})

    async def _retract(
        self, leftovers: "Leftovers", own: "WorkerSays", left: dict[str, list[str]]
    ) -> None:
        lying = await self._lying(own) if left else frozenset()
        gone = {
            model: [version for version in versions if (model, version) not in lying]
            for model, versions in left.items()
        }
        await self._take_back(
            leftovers, {model: gone[model] for model in gone if gone[model] or not left[model]}
        )

    async def _take_back(self, leftovers: "Leftovers", gone: dict[str, list[str]]) -> None:
        taken = []
        for model, versions in gone.items():
            if not await leftovers.retract(model, versions):
                taken += [f"{model}/{version}" for version in versions]
        if taken:
            more = f" and {len(taken) - _MOST_SHOWN} more" if len(taken) > _MOST_SHOWN else ""
            _log.info(
                "Taken back, since no worker has them and no job waits for them: %s%s.",
                ", ".join(taken[:_MOST_SHOWN]),
                more,
            )

    async def _lying(self, own: "WorkerSays") -> frozenset[tuple[str, str]]:
        """Versions in the folder, but for those that the worker has refused: others are not
        announced because they are not loaded yet."""
        import anyio

        files = await anyio.to_thread.run_sync(self._files)
        return frozenset(
            (one.model, one.version)
            for one in files
            if not {one.version, ""} & own.problems.get(one.model, {}).keys()
        )

    # --- the folder --------------------------------------------------------------------------

    def _files(self) -> list["ModelFile"]:
        return configuration.source(self._chosen).files()

    def _lies_here(self, model: str) -> bool:
        return model in self._in_sight() or model in self._names()

    def _in_sight(self) -> set[str]:
        """Models whose files have the usual names. Nothing is loaded to find them: that would cost
        a quarter of a second before the worker is started."""
        if self._chosen.model is not None:
            return set()
        folder = configuration.model_dir(self._chosen)
        found = {file.stem for file in folder.glob("*.onnx") if file.is_file()}
        found |= {file.parent.parent.name for file in folder.glob("*/*/model.onnx")}
        return found & set(self._chosen.models) if self._chosen.models else found

    def _names(self, *, whole: bool = False) -> set[str]:
        """Of the models in the folder, or of those that are not broken at a glance."""
        try:
            files = self._files()
        except OSError:
            return set()  # the worker says what is wrong with it
        return {one.model for one in files if not whole or configuration.is_whole(one)}

    def _no_such_default(self, wanted: str) -> InvalidSetting:
        chosen, names = self._chosen, sorted(self._names())
        shown = ", ".join(names[:_MOST_SHOWN]) + (" and others" if names[_MOST_SHOWN:] else "")
        of = f", of which MODELS={','.join(chosen.models)} is served" if chosen.models else ""
        folder = configuration.model_dir(chosen)
        return InvalidSetting(
            f"DEFAULT_MODEL is {wanted!r}, which {folder} does not have{of}. "
            f"Set it to one of: {shown}; or leave it out."
        )

    # --- told --------------------------------------------------------------------------------

    @property
    def note(self) -> str:
        """What a person is to know of the default model; empty when all is well."""
        found = self._unserved
        if found is None:
            return ""
        where = configuration.model_dir(self._chosen)
        said = f"the default model is {found.model}, of an earlier start; {where} does not have it"
        if not self._is_embedded:
            return f"{said}, and no worker that is alive. For another: --default-model NAME"
        jobs = "1 job waits" if found.jobs == 1 else f"{found.jobs} jobs wait"
        if found.jobs_of != found.model:
            return f"{said}. {found.jobs_of} replaces it once it is idle ({jobs} for it)"
        return (
            f"{said}, and {jobs} for it. To end that: asyncinfer cancel --model {found.model}. "
            "Then another becomes the default; or start with --default-model NAME"
        )

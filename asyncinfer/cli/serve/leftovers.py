"""Removal of default models and announcements that earlier starts of a `serve` left in Redis."""

import logging
import socket
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final

from asyncinfer.cli.serve import configuration
from asyncinfer.errors import AsyncinferError, InvalidSetting, RedisUnavailable, StorageFull
from asyncinfer.jobs import now_ms
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.settings import Settings

if TYPE_CHECKING:
    from asyncinfer.models.folder import ModelFile
    from asyncinfer.repository.announcements import WorkerAnnouncement
    from asyncinfer.repository.unserved_models import UnservedDefault, UnservedModels

_log = logging.getLogger(__name__)
_limited_log = LimitedLog(_log)

_SHORT_PAUSE_SECONDS: Final = 0.5
"""The pause until the worker has announced its models, which takes a second or two."""

_PAUSE_SECONDS: Final = 10.0
_MAX_SHOWN: Final = 10


class LeftoverCleaner:
    """Removes what no worker serves any more, for a `serve` with a worker of its own.

    `serve` calls `check` and `before_worker` before it starts that worker, and runs `beside_worker`
    until its end. An embedded server belongs to one `serve`, whose folder may be another at each
    start. A server that others use too belongs to several deployments, one of which may be down for
    a while: nothing is removed from it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._is_embedded = configuration.redis_url(settings) is None
        self.since_ms = now_ms()
        """The worker is started after this time."""
        self._missing_default: str | None = None
        """The stored default model, if the folder does not have it."""
        self._unserved_default: UnservedDefault | None = None
        """Set while `_missing_default` has not been replaced and no other worker has it either."""

    # --- at the start -----------------------------------------------------------------------

    def check(self) -> None:
        """Raises InvalidSetting if the folder has models, but not the default one of the settings.

        In an empty folder it may still appear. With a Redis of the user's it checks nothing, since
        another worker may have the model.
        """
        wanted = configuration.default_model(self._settings)
        if wanted and self._is_embedded and not self._is_here(wanted) and self._names():
            raise self._unknown_default_error(wanted)

    async def before_worker(self, url: str) -> None:
        """Decides on the default model and retracts old models, before worker and API read them.

        `url` is that of the Redis. Raises InvalidSetting if no worker can have the default model of
        the settings, DefaultModelChanged if others use another, and ServerRefused. If Redis does
        not answer or is full, nothing is decided.
        """
        from asyncinfer.repository.rights import check_start
        from asyncinfer.repository.unserved_models import UnservedModels

        async with configuration.store(self._settings, url) as store:
            leftovers = UnservedModels(store, all_here=self._is_embedded)
            try:
                await check_start(store)
                await self._decide_default(leftovers)
                await self._retract_missing_models(leftovers)
            except (RedisUnavailable, StorageFull) as error:
                # This process or its API processes report it.
                _log.debug("The default model could not be checked yet: %s", error.detail)

    async def _decide_default(self, leftovers: "UnservedModels") -> None:
        """Stores the default model of the settings, or replaces a stored one that nobody serves."""
        if wanted := configuration.default_model(self._settings):
            is_known = self._is_here(wanted) or await leftovers.is_known(wanted)
            if not is_known and self._names():
                raise self._unknown_default_error(wanted)
            await leftovers.claim_default_model(wanted)
            return
        stored = await leftovers.default_model()
        if stored is None or self._is_here(stored):
            return
        self._missing_default = stored
        if await leftovers.is_unserved(stored):
            await self._replace(leftovers, stored, self._names(intact=True))

    async def _replace(
        self, leftovers: "UnservedModels", stored: str, names: Collection[str]
    ) -> None:
        """Makes one of `names` the default in place of `stored`, unless jobs of either keep it.

        `names` are models that are there. On a server of the user's it replaces nothing. Sets
        `_unserved_default` if `stored` remains; else logs what replaces it.
        """
        from asyncinfer.models.folder import default_model
        from asyncinfer.repository.unserved_models import UnservedDefault

        if not self._is_embedded:
            self._unserved_default = UnservedDefault(stored)
            return
        successor = default_model(None, names)
        self._unserved_default = await leftovers.replace_default_model(stored, successor)
        if self._unserved_default is None:
            self._missing_default = None
            outcome = (
                f"{successor!r} replaces it"
                if successor
                else "there is none now. Name one in each request, or with --default-model"
            )
            _log.info("The default model was %r, which no worker has: %s.", stored, outcome)

    async def _retract_missing_models(self, leftovers: "UnservedModels") -> None:
        """Retracts models of an earlier folder before the API starts, so that it never lists them.

        Those that the folder has are kept, since the worker will announce them. With a Redis of the
        user's, or if the folder cannot be read, it does nothing.
        """
        if not self._is_embedded:
            return
        unserved = await leftovers.unserved_versions(await leftovers.workers())
        missing = unserved.keys() - self._visible_names()
        if not missing:
            return
        try:
            missing -= {file.model for file in self._files()}
        except OSError:
            return  # the worker reports what is wrong with the folder
        await self._retract_versions(
            leftovers, {model: unserved[model] for model in sorted(missing)}
        )

    # --- from then on -----------------------------------------------------------------------

    async def beside_worker(self, url: str, worker_pid: Callable[[], int]) -> None:
        """Until it is cancelled, retracts what no worker has and no job waits for; never raises.

        With a Redis of the user's it returns at once. `worker_pid` returns the pid of the own
        worker, which may be started again. `url` is that of the Redis.
        """
        import anyio

        from asyncinfer.repository.unserved_models import UnservedModels

        if not self._is_embedded:
            return
        async with configuration.store(self._settings, url) as store:
            leftovers = UnservedModels(store, all_here=True)
            while True:
                is_done = False
                try:
                    is_done = await self._clear(leftovers, worker_pid())
                except AsyncinferError as error:
                    _log.debug("Leftovers could not be removed: %s", error.detail)
                except Exception as error:
                    _limited_log.unexpected(
                        "Models that no worker serves could not be removed.", error
                    )
                await anyio.sleep(_PAUSE_SECONDS if is_done else _SHORT_PAUSE_SECONDS)

    async def _clear(self, leftovers: "UnservedModels", worker_pid: int) -> bool:
        """Runs one round; returns whether the own worker was there and the default model is served.

        While that worker is being started (again), its models must stay, so nothing is done.
        """
        workers = await leftovers.workers()
        own = next((worker for worker in workers if self._is_own(worker, worker_pid)), None)
        if own is None:
            return False
        if self._missing_default:
            await self._reconsider_default(leftovers, own, self._missing_default)
        await self._retract(leftovers, own, await leftovers.unserved_versions(workers))
        return self._unserved_default is None

    def _is_own(self, worker: "WorkerAnnouncement", pid: int) -> bool:
        """Whether an announcement is of the worker that this `serve` has started, with this pid."""
        # In a container the worker of the next start may have the pid of the last one's.
        started_ms = worker.started_ms or 0
        return (worker.pid, worker.host) == (pid, socket.gethostname()) and (
            started_ms >= self.since_ms
        )

    async def _reconsider_default(
        self, leftovers: "UnservedModels", own: "WorkerAnnouncement", stored: str
    ) -> None:
        """Replaces a default model that no worker had in this round and the round before.

        A worker beside this `serve` that has the model may be starting again.
        """
        import anyio

        from asyncinfer.repository.unserved_models import UnservedDefault

        if stored != await leftovers.default_model():
            self._missing_default = self._unserved_default = None
        elif not await leftovers.is_unserved(stored) or stored in await anyio.to_thread.run_sync(
            self._names
        ):
            self._unserved_default = None
        elif self._unserved_default is None:
            self._unserved_default = UnservedDefault(stored)
        else:
            await self._replace(leftovers, stored, {*own.versions, *own.loading})

    async def _retract(
        self, leftovers: "UnservedModels", own: "WorkerAnnouncement", unserved: dict[str, list[str]]
    ) -> None:
        """Retracts versions, by model, unless the own worker still has to load them."""
        pending = await self._versions_to_load(own) if unserved else frozenset()
        gone = {
            model: [version for version in versions if (model, version) not in pending]
            for model, versions in unserved.items()
        }
        await self._retract_versions(
            leftovers, {model: gone[model] for model in gone if gone[model] or not unserved[model]}
        )

    async def _retract_versions(
        self, leftovers: "UnservedModels", versions_by_model: dict[str, list[str]]
    ) -> None:
        """Retracts versions unless jobs wait for their model; logs those that are retracted."""
        retracted = []
        for model, versions in versions_by_model.items():
            if not await leftovers.retract(model, versions):
                retracted += [f"{model}/{version}" for version in versions]
        if retracted:
            more = len(retracted) - _MAX_SHOWN
            _log.info(
                "Removed, since no worker has them and no job waits for them: %s%s.",
                ", ".join(retracted[:_MAX_SHOWN]),
                f" and {more} more" if more > 0 else "",
            )

    async def _versions_to_load(self, own: "WorkerAnnouncement") -> frozenset[tuple[str, str]]:
        """Pairs of model and version that are in the folder and that the worker has not refused.

        One of them that is not announced is not loaded yet.
        """
        import anyio

        files = await anyio.to_thread.run_sync(self._files)
        return frozenset(
            (file.model, file.version)
            for file in files
            if not {file.version, ""} & own.problems.get(file.model, {}).keys()
        )

    # --- the folder -------------------------------------------------------------------------

    def _files(self) -> list["ModelFile"]:
        """Reads the folder; raises ModelDirUnreadable, or an OSError."""
        return configuration.source(self._settings).files()

    def _is_here(self, model: str) -> bool:
        """Whether the folder has a model of this name, intact or not."""
        return model in self._visible_names() or model in self._names()

    def _visible_names(self) -> set[str]:
        """Names of models in the folder whose files have the usual names; empty if MODEL is set.

        Finding them imports nothing: that would cost a quarter of a second before the worker is
        started.
        """
        if self._settings.model is not None:
            return set()
        folder = configuration.model_dir(self._settings)
        found = {file.stem for file in folder.glob("*.onnx") if file.is_file()}
        found |= {file.parent.parent.name for file in folder.glob("*/*/model.onnx")}
        return found & set(self._settings.models) if self._settings.models else found

    def _names(self, *, intact: bool = False) -> set[str]:
        """Names of the models in the folder; `intact` leaves out those that are visibly broken.

        An empty set if the folder cannot be read.
        """
        try:
            files = self._files()
        except OSError:
            return set()  # the worker reports what is wrong with the folder
        return {file.model for file in files if not intact or configuration.looks_intact(file)}

    def _unknown_default_error(self, wanted: str) -> InvalidSetting:
        """Returns the error for a default model that the folder lacks; it lists what is there."""
        settings, names = self._settings, sorted(self._names())
        shown = ", ".join(names[:_MAX_SHOWN]) + (" and others" if names[_MAX_SHOWN:] else "")
        of = f", of which MODELS={','.join(settings.models)} is served" if settings.models else ""
        folder = configuration.model_dir(settings)
        return InvalidSetting(
            f"DEFAULT_MODEL is {wanted!r}, which {folder} does not have{of}. "
            f"Set it to one of: {shown}; or leave it out."
        )

    # --- the banner -------------------------------------------------------------------------

    @property
    def note(self) -> str:
        """A remark for the banner on a default model that no worker has; empty if there is none."""
        unserved = self._unserved_default
        if unserved is None:
            return ""
        folder = configuration.model_dir(self._settings)
        text = (
            f"the default model is {unserved.model}, of an earlier start; {folder} does not have it"
        )
        if not self._is_embedded:
            return f"{text}, and no live worker has it. For another: --default-model NAME"
        jobs = "1 job waits" if unserved.jobs == 1 else f"{unserved.jobs} jobs wait"
        if unserved.jobs_of != unserved.model:
            return f"{text}. {unserved.jobs_of} replaces it once it is idle ({jobs} for it)"
        return (
            f"{text}, and {jobs} for it. Cancel them: asyncinfer cancel --model {unserved.model}. "
            "Then another becomes the default; or start with --default-model NAME"
        )

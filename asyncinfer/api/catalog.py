"""The models that workers have announced, as this API last saw them."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final

import anyio
from msgspec import Struct
from msgspec.structs import replace

from asyncinfer.api.worker_snapshot import WorkerSnapshot
from asyncinfer.errors import (
    InvalidInput,
    ModelLoading,
    ModelNotFound,
    NoModelAnnounced,
    RedisUnavailable,
    RequestError,
    StorageFull,
    VersionNotFound,
)
from asyncinfer.models.folder import is_valid_name, version_order
from asyncinfer.models.signature import Signature, read_signature
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import (
    AnnouncedModels,
    Announcements,
    models_to_come,
    upcoming_models,
)
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.store import Store
from asyncinfer.tensors.json_errors import unknown_name_detail

_REFRESH_SECONDS: Final = 2.0
_MIN_REFRESH_SECONDS: Final = 0.2
"""A request for an unknown model refreshes the catalog at once, but not more often than this."""

_MAX_LOST_SECONDS: Final = 6.0
"""How long a missing model may still come back: after Redis was emptied, workers announce each
model again within seconds."""

_NOTHING_ANNOUNCED: Final = AnnouncedModels(None, {})

_log = logging.getLogger(__name__)
_limited_log = LimitedLog(_log)


class Served(Struct, frozen=True):
    """A served model: its queue, and the version that runs its jobs."""

    queue: str
    signature: Signature
    versions: tuple[str, ...]
    """Newest first."""
    signatures: Mapping[str, Signature]
    """The signature of every version, newest first."""
    is_loading: Callable[[str], bool] = bool
    """Whether a worker has not yet loaded this version of the model."""

    def signature_of(self, version: str | None) -> Signature:
        """The signature of a version, or of the served one for None. Raises VersionNotFound, or
        ModelLoading if a worker is loading the version."""
        if version is None:
            return self.signature
        if version not in self.signatures:
            if self.is_loading(version):
                raise _loading_error(f"version {version} of {self.signature.model}")
            raise VersionNotFound(
                f"{self.signature.model} has no version {version}; it has "
                f"{', '.join(self.versions)}. Leave `version` out for {self.signature.version}."
            )
        return self.signatures[version]


class Catalog:
    """Knows the served models and the default model of one API process; empty until the first
    `refresh`, then refreshed every two seconds by `run`."""

    def __init__(
        self,
        inspection: Inspection,
        store: Store,
        default_model: str | None,
        own_worker_since_ms: int | None = None,
    ) -> None:
        """`default_model` is the configured one, None without one. `own_worker_since_ms` is when
        `serve` started its own worker, in Unix time; None without one."""
        self._announcements = Announcements(store)
        self.worker_snapshot = WorkerSnapshot(
            inspection, store, self._queues, own_worker_since_ms=own_worker_since_ms
        )
        self._store = store
        self._configured_default = default_model
        self._announced = _NOTHING_ANNOUNCED
        self._served: dict[str, Served] = {}
        self._seen_at: dict[str, float] = {}
        self._last_default = default_model
        self._has_no_default = False
        """Workers announce that there is no default model, so requests need not wait for one."""
        self._models_are_loading = False
        """Whether some of these workers have not loaded all of their models."""
        self._lock = anyio.Lock()
        self._refreshed_at = -_MIN_REFRESH_SECONDS
        self._redis_error: RedisUnavailable | None = None

    async def run(self) -> None:
        """Refreshes every two seconds until cancelled."""
        while True:
            await anyio.sleep(_REFRESH_SECONDS)
            await self.refresh()

    async def refresh(self) -> None:
        """Reads the announced models now. Does not raise if Redis does not answer: the last models
        stay, and `find` and `list_served` raise the error for what is then not known."""
        async with self._lock:
            await self._refresh()

    @property
    def default_model(self) -> str | None:
        """The default model; while Redis names none, the last one known. None if there is none."""
        return self._announced.default_model or self._last_default

    async def find(self, name: str | None) -> Served:
        """Returns the model called `name`, or for None the default or only model; looks in Redis
        once if it is not known. Raises ModelNotFound, ModelLoading, NoModelAnnounced, InvalidInput
        (no default among several models) or RedisUnavailable."""
        served = self.find_known(name)
        if served is None:
            _check_name(name)
            await self._refresh_soon()
            served = self.find_known(name)
        if served is None:
            raise self._not_served_error(name)
        return served

    def find_known(self, name: str | None) -> Served | None:
        """As `find` without a look in Redis: None if the model is unknown or not certain."""
        default = self._announced.default_model
        if default is None and not self._has_no_default:
            # Redis has lost the name of the default model, and workers write it again within
            # seconds. Until then that model's queue would be a guess; other queues are certain.
            return self._served.get(name) if name not in (None, self.default_model) else None
        if model := name or default:
            return self._served.get(model)
        if len(self._served) != 1 or self._models_are_loading:
            # While models are being loaded, the first loaded one may not be the only one.
            return None
        return next(iter(self._served.values()))

    async def list_served(self) -> list[Served]:
        """All served models by name; may be empty. Raises RedisUnavailable if none is known because
        Redis is away."""
        if not self._served:
            await self._refresh_soon()
        if self._redis_error and not self._served:
            raise self._redis_error
        return [self._served[name] for name in sorted(self._served)]

    def _not_served_error(self, name: str | None) -> RequestError:
        """Returns the error that `find` raises, which says why the model cannot be used:
        RedisUnavailable if the last refresh failed, since the model may then exist, or why Redis
        takes no writes if no model is known."""
        # A client takes a 404 as final, so it gets one only after both refreshes have succeeded.
        if redis_error := self._redis_error or self.worker_snapshot.redis_error:
            return redis_error
        requested = name or self.default_model
        if not self._served and (refusal := self.worker_snapshot.writes_refusal):
            # A worker that may not write announces nothing, so no model is known.
            return refusal
        if self._is_loading(requested):
            return _loading_error(
                requested or "its models, and which one is the default is not known yet"
            )
        is_default = name in (None, self.default_model) and not self._has_no_default
        if self._served and is_default and self._announced.default_model is None:
            return NoModelAnnounced(
                "Redis does not name a default model; after a loss of its data workers write the "
                "name again within seconds. Retry in a moment.",
                retry_after_seconds=1,
            )
        if requested and (reasons := self.worker_snapshot.refusal_reasons(requested)):
            return ModelNotFound(f"Model {requested!r} cannot be used. {' '.join(reasons[:3])}")
        if not self._served:
            return self._nothing_served_error(requested)
        if is_default or name in self._seen_at:
            return _not_announced_error(requested)
        if name is None:
            names = ", ".join(sorted(self._served))
            return InvalidInput(
                f"There are several models and none is the default: POST /predict/NAME with one "
                f"of {names}."
            )
        return ModelNotFound(f"Model {name!r}: {unknown_name_detail(name, self._served)}")

    def _is_loading(self, name: str | None, version: str | None = None) -> bool:
        """Whether a worker has not yet loaded or announced the model, or this version of it. With
        no name: whether a worker is loading any model."""
        snapshot = self.worker_snapshot
        if name is None:
            return bool(models_to_come(snapshot.workers.values(), self._served))
        if snapshot.is_loading(name, version):
            return True
        announced = self._announced.models.get(name, {})
        is_announced = bool(announced) if version is None else version in announced
        return snapshot.has_in_folder(name, version) and not is_announced

    def _nothing_served_error(self, requested: str | None) -> NoModelAnnounced:
        """Returns the error if no model is served. Without Retry-After if workers are alive but
        load nothing: they will announce nothing until their folder changes."""
        workers = list(self.worker_snapshot.workers.values())
        if not workers or any(worker.models or upcoming_models(worker) for worker in workers):
            return _not_announced_error(requested)
        refused = sorted({model for worker in workers for model in worker.problems})
        if refused:
            count, model = len(refused), refused[0]
            why = self.worker_snapshot.refusal_reasons(model)[0]
            folder = "in the workers' folder"
            fact = (
                f"None of the {count} models {folder} can be served."
                if count > 1
                else f"The only model {folder} cannot be served."
            )
            return NoModelAnnounced(
                f"{fact} {model}: {why} "
                "GET /models lists all problems; a model is loaded as soon as its file is fixed."
            )
        return NoModelAnnounced(
            "The workers' model folder is empty. Put an ONNX file there (MODEL_DIR); it is loaded "
            "at once."
        )

    def _queues(self) -> list[str]:
        """The queues of all served models."""
        return [served.queue for served in self._served.values()]

    async def _refresh_soon(self) -> None:
        """Refreshes models and workers once for all requests that wait for it, at least 0.2 s after
        the last time. Does nothing if another request's refresh began meanwhile, or the last one
        failed."""
        requested_at = time.monotonic()
        async with self._lock:
            if self._redis_error or self._refreshed_at >= requested_at:
                return
            await anyio.sleep(
                max(0.0, self._refreshed_at + _MIN_REFRESH_SECONDS - time.monotonic())
            )
            await self._refresh()
            await self.worker_snapshot.refresh()

    async def _refresh(self) -> None:
        """Reads the announcements; the caller holds the lock. If Redis does not answer, keeps the
        models and sets `_redis_error` instead of raising it."""
        self._refreshed_at = time.monotonic()
        try:
            announced = await self._announcements.read_models()
            if announced.default_model is None:
                announced = await self._restore_default(announced)
        except RedisUnavailable as error:
            self._redis_error = error
            return
        self._redis_error = None
        self._remember_default(announced.default_model)
        if announced != self._announced:
            # The snapshot comes first: a worker announces itself before its models, and an answer
            # must not say that a model which was just found has no worker.
            await self.worker_snapshot.refresh()
            self._served = self._build_served(announced)
            self._announced = announced
        # Models that disappeared stay in it for as long as they may come back.
        now = time.monotonic()
        recent = {
            name: seen_at
            for name, seen_at in self._seen_at.items()
            if now - seen_at < _MAX_LOST_SECONDS
        }
        self._seen_at = recent | dict.fromkeys(self._served, now)

    def _remember_default(self, name: str | None) -> None:
        """Keeps the name for a later loss; logs a warning if another model is now the default. Does
        nothing for None."""
        if name is None:
            return
        self._has_no_default = False
        if self._last_default not in (None, name):
            _log.warning(
                "Redis names %r as the default model, which was %r: requests that name no model "
                "go to it from now on.",
                name,
                self._last_default,
            )
        self._last_default = name

    async def _restore_default(self, announced: AnnouncedModels) -> AnnouncedModels:
        """For when Redis names no default model: writes the configured one, or finds out from the
        workers whether there is one at all. Returns the announcements, with the default model if
        Redis has one now. Raises RedisUnavailable."""
        if self._configured_default:
            with suppress(StorageFull):
                agreed = await self._store.agree_on_default_model(self._configured_default)
                return replace(announced, default_model=agreed or None)
        workers = (await self._announcements.read_workers()).values()
        self._models_are_loading = any(upcoming_models(worker) for worker in workers)
        defaults = [worker.default_model for worker in workers]
        self._has_no_default = None in defaults and not any(defaults)
        if self._has_no_default:
            self._last_default = None
        return announced

    def _build_served(self, announced: AnnouncedModels) -> dict[str, Served]:
        """The served models by name, each with its readable versions; models without any are left
        out."""
        served = {}
        for model, bodies in announced.models.items():
            if signatures := _signatures(model, bodies):
                versions = tuple(sorted(signatures, key=version_order, reverse=True))
                requested = announced.default_versions.get(model, "")
                served[model] = Served(
                    keys.queue(self._store.queue_name, model, announced.default_model),
                    signatures.get(requested) or signatures[versions[0]],
                    versions,
                    {version: signatures[version] for version in versions},
                    partial(self._is_loading, model),
                )
        return served


def _not_announced_error(name: str | None) -> NoModelAnnounced:
    """Makes the error for a model, or for None any model, that a worker may still announce."""
    model = f"the model {name!r}" if name else "a model"
    return NoModelAnnounced(
        f"No worker has announced {model} yet; one may still be starting. "
        "Retry in a moment, or start one that has it with `asyncinfer work`.",
        retry_after_seconds=1,
    )


def _loading_error(loaded: str) -> ModelLoading:
    """Makes the error while a worker loads something; `loaded` is its name in the message."""
    return ModelLoading(f"A worker is loading {loaded}. Retry in a moment.", retry_after_seconds=1)


def _check_name(name: str | None) -> None:
    """Raises ModelNotFound if no model can have this name; None is allowed."""
    if name is not None and not is_valid_name(name):
        raise ModelNotFound(
            "A model's name has 1 to 64 letters, digits, `_`, `.` and `-`, begins with a letter "
            "or digit, and is not `stats`. GET /models lists the models."
        )


def _signatures(model: str, bodies: Mapping[str, bytes]) -> dict[str, Signature]:
    """The signatures by version; announcements that cannot be read or are not of this model and
    version are left out, with a warning in the log."""
    signatures = {}
    for version, body in bodies.items():
        signature = read_signature(body)
        if signature and (signature.model, signature.version) == (model, version):
            signatures[version] = signature
        else:
            _limited_log.warning(
                f"The announcement of version {version[:64]!r} of the model {model[:64]!r} in "
                "Redis cannot be read, so the version is not served."
            )
    return signatures

"""The models that workers have announced, as the API last saw them."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final

import anyio
from msgspec import Struct
from msgspec.structs import replace

from asyncinfer.api.worker_snapshot import Workforce
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
from asyncinfer.models.folder import valid_name
from asyncinfer.models.signature import Signature, read_signature
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import (
    Announced,
    Announcements,
    models_to_come,
    worker_says,
)
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.store import Store
from asyncinfer.tensors.json_errors import unknown_name

_REFRESH_SECONDS: Final = 2.0
_AT_ONCE_SECONDS: Final = 0.2
"""An unknown model is looked for at once, but not more often than this."""

_LOST_SECONDS: Final = 6.0
"""For so long a model that is gone may come back: a Redis that was emptied hears of each from its
workers, who announce every few seconds."""

"""When somebody has to mend something first."""

_NOTHING: Final = Announced(None, {})

_log = logging.getLogger(__name__)
_limited_log = LimitedLog(_log)


class Served(Struct, frozen=True):
    """A model that can be asked: its queue, and the version that answers."""

    queue: str
    signature: Signature
    versions: tuple[str, ...]
    """Newest first."""
    signatures: Mapping[str, Signature]
    """Of every version, newest first."""
    is_loading: Callable[[str], bool] = bool
    """Whether a worker has yet to load this version of the model."""

    def of(self, version: str | None) -> Signature:
        """The signature of the version asked for; None asks for the served one."""
        if version is None:
            return self.signature
        if version not in self.signatures:
            if self.is_loading(version):
                raise _loading(f"version {version} of {self.signature.model}")
            raise VersionNotFound(
                f"{self.signature.model} has no version {version}; it has "
                f"{', '.join(self.versions)}. Leave `version` out for {self.signature.version}."
            )
        return self.signatures[version]


class Catalog:
    def __init__(
        self,
        inspection: Inspection,
        store: Store,
        default_model: str | None,
        own_worker_since_ms: int | None = None,
    ) -> None:
        self._announcements = Announcements(store)
        self.workforce = Workforce(
            inspection, store, self._queues, own_worker_since_ms=own_worker_since_ms
        )
        self._store = store
        self._configured_default = default_model
        self._announced = _NOTHING
        self._served: dict[str, Served] = {}
        self._seen_at: dict[str, float] = {}
        self._last_default = default_model
        self._has_no_default = False
        """Workers say that no model is the default, so that none is to be waited for."""
        self._more_to_come = False
        """Some of them have not loaded all of their models."""
        self._lock = anyio.Lock()
        self._looked_at = -_AT_ONCE_SECONDS
        self._trouble: RedisUnavailable | None = None

    async def run(self) -> None:
        """Keeps the picture fresh; runs as long as the API does."""
        while True:
            await anyio.sleep(_REFRESH_SECONDS)
            await self.refresh()

    async def refresh(self) -> None:
        async with self._lock:
            await self._look()

    @property
    def default_model(self) -> str | None:
        """The default model, or the last one while Redis names none."""
        return self._announced.default_model or self._last_default

    async def find(self, name: str | None) -> Served:
        """The model called `name`, or the default one; raises what to answer instead."""
        served = self._find(name)
        if served is None:
            _check_name(name)
            await self._look_at_once()
            served = self._find(name)
        if served is None:
            raise self._missing(name)
        return served

    async def all(self) -> list[Served]:
        if not self._served:
            await self._look_at_once()
        if self._trouble and not self._served:
            raise self._trouble
        return [self._served[name] for name in sorted(self._served)]

    def _find(self, name: str | None) -> Served | None:
        default = self._announced.default_model
        if default is None and not self._has_no_default:
            # Redis has lost the name. Its queue would be a guess, and workers write the name
            # again within seconds; the queue of any other model is certain.
            return self._served.get(name) if name not in (None, self.default_model) else None
        if asked := name or default:
            return self._served.get(asked)
        if len(self._served) != 1 or self._more_to_come:
            # The first of several that are being loaded is not the only one.
            return None
        return next(iter(self._served.values()))

    def _missing(self, name: str | None) -> RequestError:
        # A client takes a 404 for final, so it is told only what both looks saw just now.
        if trouble := self._trouble or self.workforce.trouble:
            return trouble
        wanted = name or self.default_model
        if self._is_loading(wanted):
            return _loading(wanted or "its models, and which one is the default is not known yet")
        is_default = name in (None, self.default_model) and not self._has_no_default
        if self._served and is_default and self._announced.default_model is None:
            return NoModelAnnounced(
                "Redis does not say which model is the default; the workers write it again within "
                "seconds of a Redis that has lost it. Retry in a moment.",
                retry_after_seconds=1,
            )
        if wanted and (reasons := self.workforce.refused(wanted)):
            return ModelNotFound(f"Model {wanted!r} cannot be used. {' '.join(reasons[:3])}")
        if not self._served:
            return self._nothing_served(wanted)
        if is_default or name in self._seen_at:
            return _not_announced(wanted)
        if name is None:
            names = ", ".join(sorted(self._served))
            return InvalidInput(
                f"There are several models and none is the default: POST /predict/NAME with one "
                f"of {names}."
            )
        return ModelNotFound(f"Model {name!r}: {unknown_name(name, self._served)}")

    def _is_loading(self, name: str | None, version: str | None = None) -> bool:
        """Whether a worker has yet to load the model, or a version of it, or to announce it. With
        no name: any."""
        workforce = self.workforce
        if name is None:
            return bool(workforce.loading)
        if workforce.is_loading(name, version):
            return True
        announced = self._announced.models.get(name, {})
        is_announced = bool(announced) if version is None else version in announced
        return workforce.names(name, version) and not is_announced

    def _nothing_served(self, wanted: str | None) -> NoModelAnnounced:
        """Workers that live and load nothing will announce nothing, until their folder changes: the
        answer says no time to ask again."""
        workers = list(self.workforce.workers.values())
        if not workers or any(one.models or models_to_come(one) for one in workers):
            return _not_announced(wanted)
        refused = sorted({model for one in workers for model in one.problems})
        if refused:
            count, model = len(refused), refused[0]
            why = self.workforce.refused(model)[0]
            folder = "in the workers' folder"
            fact = (
                f"None of the {count} models {folder} can be served."
                if count > 1
                else f"The only model {folder} cannot be served."
            )
            return NoModelAnnounced(
                f"{fact} {model}: {why} "
                "GET /models lists all problems; what is mended there is loaded at once."
            )
        return NoModelAnnounced(
            "The workers' model folder is empty. Put an ONNX file there (MODEL_DIR); it is loaded "
            "at once."
        )

    def _queues(self) -> list[str]:
        return [one.queue for one in self._served.values()]

    async def _look_at_once(self) -> None:
        """Many may ask for what is not there: one looks, the others take what it saw."""
        asked_at = time.monotonic()
        async with self._lock:
            if self._trouble or self._looked_at >= asked_at:
                return
            await anyio.sleep(max(0.0, self._looked_at + _AT_ONCE_SECONDS - time.monotonic()))
            await self._look()
            await self.workforce.refresh()

    async def _look(self) -> None:
        self._looked_at = time.monotonic()
        try:
            announced = await self._announcements.announced()
            if announced.default_model is None:
                announced = await self._without_default(announced)
        except RedisUnavailable as error:
            self._trouble = error
            return
        self._trouble = None
        self._note_default(announced.default_model)
        if announced != self._announced:
            # Before the models can be asked: a worker says that it lives before it announces
            # them, and who submits must not be told that there is none.
            await self.workforce.refresh()
            self._served = self._served_of(announced)
            self._announced = announced
        # Those that are gone stay in it for as long as they count as lost.
        now = time.monotonic()
        known = {name: at for name, at in self._seen_at.items() if now - at < _LOST_SECONDS}
        self._seen_at = known | dict.fromkeys(self._served, now)

    def _note_default(self, name: str | None) -> None:
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

    async def _without_default(self, announced: Announced) -> Announced:
        """Redis names no default model: restores the configured one, or asks whether there is
        one at all."""
        if self._configured_default:
            with suppress(StorageFull):
                agreed = await self._store.agree_on_default_model(self._configured_default)
                return replace(announced, default_model=agreed or None)
        workers = (await self._announcements.workers()).values()
        said = [worker_says(body) for body in workers]
        self._more_to_come = any(models_to_come(one) for one in said)
        defaults = [one.default_model for one in said]
        self._has_no_default = None in defaults and not any(defaults)
        if self._has_no_default:
            self._last_default = None
        return announced

    def _served_of(self, announced: Announced) -> dict[str, Served]:
        found = {}
        for model, bodies in announced.models.items():
            if signatures := _signatures(model, bodies):
                versions = tuple(sorted(signatures, key=_age))
                wanted = announced.default_versions.get(model, "")
                found[model] = Served(
                    keys.queue(self._store.n, model, announced.default_model),
                    signatures.get(wanted) or signatures[versions[0]],
                    versions,
                    {version: signatures[version] for version in versions},
                    partial(self._is_loading, model),
                )
        return found


def _not_announced(name: str | None) -> NoModelAnnounced:
    what = f"the model {name!r}" if name else "a model"
    return NoModelAnnounced(
        f"No worker has announced {what} yet; one may still be starting. "
        "Retry in a moment, or start one that has it with `asyncinfer work`.",
        retry_after_seconds=1,
    )


def _loading(what: str) -> ModelLoading:
    return ModelLoading(f"A worker is loading {what}. Retry in a moment.", retry_after_seconds=1)


def _check_name(name: str | None) -> None:
    if name is not None and not valid_name(name):
        raise ModelNotFound(
            "A model's name has 1 to 64 letters, digits, `_`, `.` and `-`, begins with a letter "
            "or digit, and is not `stats`. GET /models lists the models."
        )


def _signatures(model: str, bodies: Mapping[str, bytes]) -> dict[str, Signature]:
    """By version; without announcements that no worker of a model and version like these made."""
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


def _age(version: str) -> tuple[int, str]:
    """Orders versions newest first."""
    return (-int(version), version) if version.isdecimal() else (0, version)

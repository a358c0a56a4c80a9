"""The models that workers have announced, as the API last saw them."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import anyio
from msgspec import Struct
from msgspec.structs import replace

from asyncinfer import keys
from asyncinfer.errors import (
    InvalidInput,
    ModelNotFound,
    NoModelAnnounced,
    RedisUnavailable,
    RequestError,
    StorageFull,
    VersionNotFound,
)
from asyncinfer.faults import unknown_name
from asyncinfer.limited_log import LimitedLog
from asyncinfer.models import Signature, read_signature, valid_name
from asyncinfer.repository.inspect import Announced, Inspection, worker_says
from asyncinfer.repository.store import Store

_REFRESH_SECONDS: Final = 2.0
_AT_ONCE_SECONDS: Final = 0.2
"""An unknown model is looked for at once, but not more often than this."""

_LOST_SECONDS: Final = 6.0
"""For so long a model that is gone may come back: a Redis that was emptied hears of each from its
workers, who announce every few seconds."""

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

    def of(self, version: str | None) -> Signature:
        """The signature of the version asked for; None asks for the served one."""
        if version is None:
            return self.signature
        if version not in self.signatures:
            raise VersionNotFound(
                f"{self.signature.model} has no version {version}; it has "
                f"{', '.join(self.versions)}. Leave `version` out for {self.signature.version}."
            )
        return self.signatures[version]


class Catalog:
    def __init__(self, inspection: Inspection, store: Store, default_model: str | None) -> None:
        self._inspection = inspection
        self._store = store
        self._configured_default = default_model
        self._announced = _NOTHING
        self._served: dict[str, Served] = {}
        self._seen_at: dict[str, float] = {}
        self._last_default = default_model
        self._has_no_default = False
        """Workers say that no model is the default, so that none is to be waited for."""
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
        return next(iter(self._served.values())) if len(self._served) == 1 else None

    def _missing(self, name: str | None) -> RequestError:
        if self._trouble:
            return self._trouble
        is_default = name in (None, self.default_model) and not self._has_no_default
        if self._served and is_default and self._announced.default_model is None:
            return NoModelAnnounced(
                "Redis does not say which model is the default; the workers write it again within "
                "seconds of a Redis that has lost it. Retry in a moment.",
                retry_after_seconds=1,
            )
        if not self._served or is_default or name in self._seen_at:
            return NoModelAnnounced(
                "No worker has announced this model yet; one may still be starting. "
                "Retry in a moment, or start one with `asyncinfer work`.",
                retry_after_seconds=1,
            )
        if name is None:
            names = ", ".join(sorted(self._served))
            return InvalidInput(
                f"There are several models and none is the default: POST /predict/NAME with one "
                f"of {names}."
            )
        return ModelNotFound(f"Model {name!r}: {unknown_name(name, self._served)}")

    async def _look_at_once(self) -> None:
        """Many may ask for what is not there: one looks, the others take what it saw."""
        asked_at = time.monotonic()
        async with self._lock:
            if self._trouble or self._looked_at >= asked_at:
                return
            await anyio.sleep(max(0.0, self._looked_at + _AT_ONCE_SECONDS - time.monotonic()))
            await self._look()

    async def _look(self) -> None:
        self._looked_at = time.monotonic()
        try:
            announced = await self._inspection.announced()
            if announced.default_model is None:
                announced = await self._without_default(announced)
        except RedisUnavailable as error:
            self._trouble = error
            return
        self._trouble = None
        self._note_default(announced.default_model)
        if announced != self._announced:
            self._served = _served(announced, self._store.n)
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
        workers = (await self._inspection.workers()).values()
        defaults = [worker_says(body).default_model for body in workers]
        self._has_no_default = None in defaults and not any(defaults)
        if self._has_no_default:
            self._last_default = None
        return announced


def _check_name(name: str | None) -> None:
    if name is not None and not valid_name(name):
        raise ModelNotFound(
            "A model's name has 1 to 64 letters, digits, `_`, `.` and `-`, begins with a letter "
            "or digit, and is not `stats`. GET /models lists the models."
        )


def _served(announced: Announced, n: str) -> dict[str, Served]:
    found = {}
    for model, bodies in announced.models.items():
        if signatures := _signatures(model, bodies):
            versions = tuple(sorted(signatures, key=_age))
            wanted = announced.default_versions.get(model, "")
            served = signatures.get(wanted) or signatures[versions[0]]
            newest_first = {version: signatures[version] for version in versions}
            found[model] = Served(
                keys.queue(n, model, announced.default_model), served, versions, newest_first
            )
    return found


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

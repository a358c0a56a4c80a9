"""The models that workers have announced, as the API last saw them."""

import logging
import time
from collections.abc import Mapping
from typing import Final

import anyio
from msgspec import Struct

from asyncinfer import keys
from asyncinfer.errors import (
    InvalidInput,
    ModelNotFound,
    NoModelAnnounced,
    RedisUnavailable,
    RequestError,
    VersionNotFound,
)
from asyncinfer.faults import unknown_name
from asyncinfer.limited_log import LimitedLog
from asyncinfer.models import Signature, read_signature, valid_name
from asyncinfer.repository.inspect import Announced, Inspection

_REFRESH_SECONDS: Final = 2.0
_AT_ONCE_SECONDS: Final = 0.2
"""An unknown model is looked for at once, but not more often than this."""

_NOTHING: Final = Announced(None, {})

_limited_log = LimitedLog(logging.getLogger(__name__))


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
    def __init__(self, inspection: Inspection, n: str, default_model: str | None) -> None:
        self._inspection = inspection
        self._n = n
        self._configured_default = default_model
        self._announced = _NOTHING
        self._served: dict[str, Served] = {}
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
        return self._announced.default_model or self._configured_default

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
        asked = name or self.default_model
        if asked is not None:
            return self._served.get(asked)
        return next(iter(self._served.values())) if len(self._served) == 1 else None

    def _missing(self, name: str | None) -> RequestError:
        if self._trouble:
            return self._trouble
        default = self.default_model
        if not self._served or (default is not None and name in (None, default)):
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
        except RedisUnavailable as error:
            self._trouble = error
            return
        self._trouble = None
        if announced != self._announced:
            self._served = _served(announced, self._n, self._configured_default)
            self._announced = announced


def _check_name(name: str | None) -> None:
    if name is not None and not valid_name(name):
        raise ModelNotFound(
            "A model's name has 1 to 64 letters, digits, `_`, `.` and `-`, begins with a letter "
            "or digit, and is not `stats`. GET /models lists the models."
        )


def _served(announced: Announced, n: str, configured_default: str | None) -> dict[str, Served]:
    default = announced.default_model or configured_default
    found = {}
    for model, bodies in announced.models.items():
        if signatures := _signatures(model, bodies):
            versions = tuple(sorted(signatures, key=_age))
            wanted = announced.default_versions.get(model, "")
            served = signatures.get(wanted) or signatures[versions[0]]
            newest_first = {version: signatures[version] for version in versions}
            found[model] = Served(keys.queue(n, model, default), served, versions, newest_first)
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

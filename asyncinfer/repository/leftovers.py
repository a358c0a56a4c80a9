"""What earlier starts left in Redis that no living worker has: versions, and the default model."""

import os
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec import Struct

from asyncinfer.errors import DefaultModelChanged
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements, WorkerSays, serves, worker_says
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.untrusted import decoding


class Unserved(Struct, frozen=True):
    """A default model that no living worker has, and the jobs that keep it from being replaced."""

    model: str
    jobs: int = 0
    """That wait or run."""
    jobs_of: str = ""
    """The model that they are of: this one, or the one that would replace it."""


class Leftovers:
    """Finds what nobody serves, and takes it back where no job waits for it."""

    def __init__(self, store: Store, *, all_here: bool = False) -> None:
        """`all_here`: every worker runs on this machine, so that its process can be looked for."""
        self._store = store
        self._all_here = all_here
        self._announcements = Announcements(store)

    # --- workers -----------------------------------------------------------------------------

    async def workers(self) -> list[WorkerSays]:
        """What those say that live. One that was killed is counted for 15 s, except where its
        process can be looked for."""
        said = map(worker_says, (await self._announcements.workers()).values())
        return [one for one in said if not (self._all_here and _has_ended(one))]

    async def is_known(self, model: str) -> bool:
        """Whether a worker has announced it, or will."""
        if await self._store.look("EXISTS", keys.model(self._store.n, model), otherwise=0):
            return True
        return not await self.is_unserved(model)

    # --- the default model -------------------------------------------------------------------

    async def claim_default_model(self, name: str) -> None:
        """Makes `name` the default model, as an operator set it; raises DefaultModelChanged where
        jobs or living workers go by another one."""
        stored = await self._store.default_model()
        if stored not in (None, name):
            serving = [one for one in await self.workers() if serves(one, stored)]
            if serving:
                raise DefaultModelChanged(_why_not(stored, name, serving))
        await self._store.claim_default_model(name)

    async def default_model(self) -> str | None:
        return await self._store.default_model()

    async def is_unserved(self, model: str) -> bool:
        """Whether no living worker has it, or loads it."""
        return not any(serves(one, model) for one in await self.workers())

    async def replace_default(self, stored: str, name: str | None) -> Unserved | None:
        """Makes `name` the default in place of one that nobody serves; with None there is no
        default then. Returns what is in its way."""
        jobs = await self._store.replace_default_model(stored, name or "")
        if jobs is None or not any(jobs):
            return None
        old, new = jobs
        return Unserved(stored, old or new, stored if old else name or "")

    # --- versions ----------------------------------------------------------------------------

    async def unserved_versions(self, workers: Iterable[WorkerSays]) -> dict[str, list[str]]:
        """What is announced and none of `workers` has; under a model also no version at all."""
        n, workers = self._store.n, list(workers)
        known = await self._store.look("SMEMBERS", keys.models(n), otherwise=())
        found = {}
        for model in sorted(filter(None, map(decoding.name, known))):
            fields = await self._store.look("HKEYS", keys.model(n, model), otherwise=(b"",))
            versions = list(filter(None, map(decoding.name, fields)))
            left = [one for one in versions if not any(_has(it, model, one) for it in workers)]
            if left or not fields:
                found[model] = left
        return found

    async def retract(self, model: str, versions: Sequence[str]) -> int:
        """Takes versions back that nobody has; returns how many jobs of the model keep it from
        being done."""
        store, default = self._store, await self._store.default_model()
        queues = {keys.queue(store.n, model, default), keys.queue(store.n, model, None)}
        announced = (keys.models(store.n), keys.model(store.n, model))
        names = [*announced, keys.default_versions(store.n), *sorted(queues)]
        args = [encode_args({"model": model, "versions": versions})]
        return int(await store.call(script("retract"), names, args))


def _has(worker: WorkerSays, model: str, version: str) -> bool:
    if model in worker.loading or version in worker.versions.get(model, {}):
        return True
    # A model that is leaving still runs what waits for it, and older releases name no versions.
    return model in worker.models and model not in worker.versions


def _has_ended(worker: WorkerSays) -> bool:
    # Signal 0 only asks, but on Windows it is a Ctrl-C.
    if not worker.pid or worker.host != socket.gethostname() or sys.platform == "win32":
        return False
    try:
        os.kill(worker.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return _is_zombie(worker.pid)


def _is_zombie(pid: int) -> bool:
    """Ended, and its new parent has not asked how: in a container that may be never."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] == ["Z"]


def _why_not(stored: str, name: str, serving: Sequence[WorkerSays]) -> str:
    shown = ", ".join(sorted(f"{one.host} (pid {one.pid})" for one in serving)[:3])
    return (
        f"DEFAULT_MODEL is {name!r}, but the default model on this Redis is {stored!r}, and "
        f"workers that are alive serve it: {shown}. Stop every worker that has another "
        f"DEFAULT_MODEL first, or set DEFAULT_MODEL={stored}."
    )

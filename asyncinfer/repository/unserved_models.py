"""Models without a live worker: announced versions and the default model of earlier starts."""

import logging
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec import Struct

from asyncinfer.errors import DefaultModelChanged, RedisUnavailable, StorageFull
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements, WorkerAnnouncement, serves_or_loads
from asyncinfer.repository.audit import AuditEntries
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.untrusted import decoding

_audit_log = logging.getLogger("asyncinfer.audit")


class UnservedDefault(Struct, frozen=True):
    """A default model without a live worker, and the jobs that prevent replacing it."""

    model: str
    jobs: int = 0
    """How many jobs wait or run."""
    jobs_of: str = ""
    """The model of those jobs: this one, or the one that would replace it."""


class UnservedModels:
    """Finds models that no live worker serves, and retracts those for which no job waits."""

    def __init__(self, store: Store, *, all_here: bool = False) -> None:
        """`all_here`: every worker runs on this machine, so that one that was killed is known."""
        self._store = store
        self._all_here = all_here
        self._announcements = Announcements(store)
        self._audit_entries = AuditEntries(store)

    # --- workers -----------------------------------------------------------------------------

    async def workers(self) -> list[WorkerAnnouncement]:
        """The announcements of live workers. A killed worker counts as live for 15 s, unless its
        process is known to have ended."""
        workers = (await self._announcements.read_workers()).values()
        return [worker for worker in workers if not (self._all_here and _has_ended(worker))]

    async def is_known(self, model: str) -> bool:
        """Whether a worker has announced the model, or is loading it."""
        if await self._store.read("EXISTS", keys.model(self._store.queue_name, model), otherwise=0):
            return True
        return not await self.is_unserved(model)

    # --- the default model -------------------------------------------------------------------

    async def claim_default_model(self, name: str) -> None:
        """Makes `name` the default model, as the operator set it. Raises DefaultModelChanged if
        jobs or live workers use another default model."""
        stored = await self._store.default_model()
        if stored not in (None, name):
            serving = [worker for worker in await self.workers() if serves_or_loads(worker, stored)]
            if serving:
                raise DefaultModelChanged(_explain_refusal(stored, name, serving))
        if await self._store.claim_default_model(name) is not None:
            await self._note_default(name)

    async def default_model(self) -> str | None:
        return await self._store.default_model()

    async def is_unserved(self, model: str) -> bool:
        """Whether no live worker serves or loads the model."""
        return not any(serves_or_loads(worker, model) for worker in await self.workers())

    async def replace_default_model(self, stored: str, name: str | None) -> UnservedDefault | None:
        """Makes `name` the default model in place of the unserved `stored`; None: no default model.
        Returns the jobs that prevent it, or None if it is done."""
        jobs = await self._store.replace_default_model(stored, name or "")
        if jobs is None:
            await self._note_default(name or "")
        if jobs is None or not any(jobs):
            return None
        old, new = jobs
        return UnservedDefault(stored, old or new, stored if old else name or "")

    async def _note_default(self, name: str) -> None:
        """Adds an audit entry for a default model that has replaced another, unless Redis takes
        none: a start must not fail by that."""
        _audit_log.info("default by this process: model=%r", name)
        try:
            await self._audit_entries.add("default", {"model": name})
        except (RedisUnavailable, StorageFull) as error:
            _audit_log.warning("The line before has no entry in the audit log: %s", error.detail)

    # --- versions ----------------------------------------------------------------------------

    async def unserved_versions(
        self, workers: Iterable[WorkerAnnouncement]
    ) -> dict[str, list[str]]:
        """{model: announced versions that none of `workers` has}. An empty list stands for a model
        that is announced without any version."""
        n, workers = self._store.queue_name, list(workers)
        unserved = {}
        for model in await self._announcements.read_model_names():
            fields = await self._store.read("HKEYS", keys.model(n, model), otherwise=(b"",))
            versions = [
                version
                for version in filter(None, map(decoding.name, fields))
                if not any(_has(worker, model, version) for worker in workers)
            ]
            if versions or not fields:
                unserved[model] = versions
        return unserved

    async def retract(self, model: str, versions: Sequence[str]) -> int:
        """Retracts versions that no worker has; returns how many jobs of the model prevent it, 0 if
        it is done."""
        store, default = self._store, await self._store.default_model()
        queues = {
            keys.queue(store.queue_name, model, default),
            keys.queue(store.queue_name, model, None),
        }
        announcements = (keys.models(store.queue_name), keys.model(store.queue_name, model))
        names = [*announcements, keys.default_versions(store.queue_name), *sorted(queues)]
        args = [encode_args({"model": model, "versions": versions})]
        return int(await store.call(script("retract"), names, args))


def _has(worker: WorkerAnnouncement, model: str, version: str) -> bool:
    if model in worker.loading or version in worker.versions.get(model, {}):
        return True
    # A removed model still runs its waiting jobs, and older releases announce no versions.
    return model in worker.models and model not in worker.versions


def _has_ended(worker: WorkerAnnouncement) -> bool:
    # Signal 0 only tests for the process, but on Windows it is a Ctrl-C.
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
    """Whether a process has ended and its parent has not read its exit code; in a container that
    may never happen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] == ["Z"]


def _explain_refusal(stored: str, name: str, serving: Sequence[WorkerAnnouncement]) -> str:
    shown = ", ".join(sorted(f"{worker.host} (pid {worker.pid})" for worker in serving)[:3])
    return (
        f"DEFAULT_MODEL is {name!r}, but the default model on this Redis is {stored!r}, and "
        f"workers that are alive serve it: {shown}. Stop every worker that has another "
        f"DEFAULT_MODEL first, or set DEFAULT_MODEL={stored}."
    )

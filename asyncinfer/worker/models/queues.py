"""The queues that a worker takes jobs from, and the default model, whose queue is QUEUE_NAME."""

import logging
import time
from collections.abc import Iterator
from typing import Final

from asyncinfer.errors import RedisRefused
from asyncinfer.models.folder import default_model, is_valid_name
from asyncinfer.models.signature import Signature
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store
from asyncinfer.worker.claiming.batch_window import QueueBatching
from asyncinfer.worker.models.version_table import VersionTable

_log = logging.getLogger(__name__)

_FORMER_SECONDS: Final = 60.0
"""How long a worker whose model was the default still checks QUEUE_NAME for jobs of it."""


class Queues:
    """One queue for each model that is served, and stray queues while jobs wait in them.

    A job names its model in its record, so it can run from any queue. Jobs come into another
    queue than their model's when the API that submitted them knew another default model than the
    worker: while Redis had lost the name, or had another one from an older dump. Such stray queues
    are checked once in an announcement round, and not with each claim, which would slow the claims
    of a worker of one model.
    """

    def __init__(
        self,
        store: Store,
        table: VersionTable,
        default_model: str | None,
        *,
        max_batch: int,
        default_is_set: bool = False,
    ) -> None:
        """`default_model` None: it is not known yet. `default_is_set`: whether it was configured
        for this worker; that changes only what is logged."""
        self.default_model = default_model
        self._store = store
        self._announcements = Announcements(store)
        self._table = table
        self._max_batch = max_batch
        self._default_is_set = default_is_set
        self.has_no_default = False
        """Whether there is no default model although all models of the start are loaded."""
        self._former_defaults: dict[str, float] = {}
        """By model that was the default, until when, on the monotonic clock."""
        self._queues_with_stray_jobs: set[str] = set()
        """The stray queues that had jobs in the last round."""
        self._last_served: set[str] = set()
        self._is_failing = False

    def served(self) -> dict[str, QueueBatching]:
        """The queues to take jobs from, and how their jobs share runs. Remembers which, for
        `have_changed`."""
        queues = self._current_queues()
        self._last_served = set(queues)
        return queues

    def model_of(self, queue: str) -> str | None:
        """The model of a job in this queue that names none; None for QUEUE_NAME if there is no
        default model."""
        return keys.model_of(self._store.queue_name, queue, self.default_model)

    @property
    def have_changed(self) -> bool:
        """Whether `served` would return other queues than the last time."""
        return set(self._current_queues()) != self._last_served

    async def synchronize(self) -> None:
        """One round with Redis, which may change what `served` returns: adopts the default model
        that Redis names, checks the stray queues for jobs, and writes the name of the default model
        and the list of queues where Redis has lost them.

        Logs what Redis refuses, once; raises RedisUnavailable.
        """
        try:
            await self._agree_on_default()
            self._queues_with_stray_jobs = await self._store.queues_with_jobs(
                list(self._stray_queues())
            )
            await self._announcements.announce_queues(self._current_queues().keys())
        except RedisRefused as error:
            if not self._is_failing:
                _log.error("The default model and the list of queues: %s", error.detail)
            self._is_failing = True
        else:
            self._is_failing = False

    def _current_queues(self) -> dict[str, QueueBatching]:
        """The queues of the served models and the stray queues that had jobs in the last round,
        without a call to Redis."""
        own = {
            keys.queue(self._store.queue_name, model, self.default_model): self._batching(signature)
            for model, signature in self._served_signatures()
        }
        stray = {
            queue: self._batching(signature)
            for queue, signature in self._stray_queues().items()
            if queue in self._queues_with_stray_jobs
        }
        return stray | own

    async def _agree_on_default(self) -> None:
        """Makes the default model here and in Redis the same: Redis decides, where it has a name.

        Raises RedisRefused if the name in Redis is not a model's name, and RedisUnavailable.
        """
        ours = self.default_model
        if ours is None:
            agreed = await self._store.default_model() or await self._default_from_folder()
        else:
            agreed = await self._store.agree_on_default_model(ours)
        if agreed is None or agreed == ours:
            return
        if agreed and not is_valid_name(agreed):
            raise RedisRefused(
                f"Redis names {agreed!r} as the default model, which is not a model's name. Delete "
                f"the key {keys.default_model(self._store.queue_name)!r}; workers write it again."
            )
        self._adopt(agreed)

    async def _default_from_folder(self) -> str | None:
        """The default model by what is in the folder, once that is loaded; writes it to Redis, but
        returns the one that Redis names if another worker was first.

        None while it is not loaded yet. Sets `has_no_default` where the folder has none.
        """
        if self.has_no_default:
            return None
        served = {model for model, _ in self._table.uncontested_signatures()}
        name = default_model(None, self._table.names)
        if name in served:
            agreed = await self._store.agree_on_default_model(name)
            if not agreed:
                # Redis says that there is no default, for the folder of an earlier start.
                await self._store.claim_default_model(name)
            return agreed or name
        self.has_no_default = bool(served) and not self._table.loading
        return None

    def _adopt(self, agreed: str) -> None:
        """Uses this default model from now on, and logs that; an empty name stands for none. Jobs
        of the former default are still taken from QUEUE_NAME for a minute."""
        if self.default_model is None:
            _log.info("The default model of the queue %r is %r.", self._store.queue_name, agreed)
            self.default_model = agreed
            return
        origin = remedy = ""
        if self._default_is_set and agreed:
            origin = " from DEFAULT_MODEL (or MODEL)"
            remedy = f" Set DEFAULT_MODEL={agreed} here too; a start with another may be refused."
        _log.warning(
            "Redis names %s as the default model of the queue %r, and this worker had %r%s. It "
            "goes by Redis from now on, since all processes must agree.%s",
            repr(agreed) if agreed else "none",
            self._store.queue_name,
            self.default_model,
            origin,
            remedy,
        )
        self._former_defaults[self.default_model] = time.monotonic()
        self.default_model = agreed or None

    def _stray_queues(self) -> dict[str, Signature]:
        """Queues in which jobs of the served models may have come by another default model, with
        the signature of the model: QUEUE_NAME:MODEL of the default model, and QUEUE_NAME of a model
        that was the default lately."""
        n, oldest = self._store.queue_name, time.monotonic() - _FORMER_SECONDS
        queues = {}
        for model, signature in self._served_signatures():
            if model == self.default_model:
                queues[f"{n}:{model}"] = signature
            elif self._former_defaults.get(model, oldest) > oldest:
                queues[n] = signature
        return queues

    def _served_signatures(self) -> Iterator[tuple[str, Signature]]:
        """Each served model with the signature of its default version."""
        for model, version in sorted(self._table.served.items()):
            if version.signature:
                yield model, version.signature

    def _batching(self, signature: Signature) -> QueueBatching:
        """How jobs of this model share runs; a batch is full at the model's limit on jobs or at
        this worker's MAX_BATCH, if that is less."""
        full_jobs = min(signature.max_batch_jobs or self._max_batch, self._max_batch)
        return QueueBatching(signature.batched, signature.max_wait_ms / 1000, full_jobs)

"""Which queues a worker takes jobs from, and which model the unnamed one is for."""

import logging
import time
from collections.abc import Iterator
from typing import Final

from asyncinfer.errors import RedisRefused
from asyncinfer.models.folder import default_model, valid_name
from asyncinfer.models.signature import Signature
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store
from asyncinfer.worker.claiming.batch_window import Sharing
from asyncinfer.worker.models.library import Library

log = logging.getLogger(__name__)

_FORMER_SECONDS: Final = 60.0
"""How long QUEUE_NAME is still looked at by a worker whose model was the default until then."""


class Queues:
    """One queue for each model that is served, and those beside it while jobs lie there.

    A job names its model in its record, so it can run from any queue. Jobs lie beside their
    model's queue when whoever submitted them knew another default model than the worker: while
    Redis had lost the name, or had another one in an older dump. Such queues are looked at once
    in a round and not with each claim, which would cost every claim of a worker of one model.
    """

    def __init__(
        self,
        store: Store,
        library: Library,
        default_model: str | None,
        *,
        max_batch: int,
        default_is_set: bool = False,
    ) -> None:
        self.default_model = default_model
        self._store = store
        self._announcements = Announcements(store)
        self._library = library
        self._max_batch = max_batch
        self._default_is_set = default_is_set
        self.has_no_default = False
        """Whether no model is the default, now that all of a start are loaded."""
        self._former: dict[str, float] = {}
        """Models that were the default until then."""
        self._beside: set[str] = set()
        """Queues beside those of the models, in which jobs were seen."""
        self._handed_out: set[str] = set()
        self._refused = False

    def served(self) -> dict[str, Sharing]:
        """The queues to take jobs from, and how their jobs share runs."""
        found = self._found()
        self._handed_out = set(found)
        return found

    def model_of(self, queue: str) -> str | None:
        """The model that a job means which does not name one."""
        return keys.model_of(self._store.n, queue, self.default_model)

    @property
    def are_others(self) -> bool:
        """Whether `served` gives other queues than the last time."""
        return set(self._found()) != self._handed_out

    async def settle(self) -> None:
        """One round with Redis: learns what changes `served`, and restores the name of the
        default model and the list of queues where Redis has lost them."""
        try:
            await self._agree_on_default()
            self._beside = await self._store.queues_with_jobs(list(self._candidates()))
            await self._announcements.announce_queues(self._found().keys())
        except RedisRefused as error:
            if not self._refused:
                log.error("The default model and the list of queues: %s", error.detail)
            self._refused = True
        else:
            self._refused = False

    def _found(self) -> dict[str, Sharing]:
        own = {
            keys.queue(self._store.n, model, self.default_model): self._sharing(signature)
            for model, signature in self._models()
        }
        beside = {
            queue: self._sharing(signature)
            for queue, signature in self._candidates().items()
            if queue in self._beside
        }
        return beside | own

    async def _agree_on_default(self) -> None:
        ours = self.default_model
        if ours is None:
            agreed = await self._store.default_model() or await self._first_default()
        else:
            agreed = await self._store.agree_on_default_model(ours)
        if agreed is None or agreed == ours:
            return
        if agreed and not valid_name(agreed):
            raise RedisRefused(
                f"Redis names {agreed!r} as the default model, which is no name of a model. Delete "
                f"the key {keys.default_model(self._store.n)!r}; workers write it again."
            )
        self._adopt(agreed)

    async def _first_default(self) -> str | None:
        """As the folder has it at the start; what cannot be loaded is no default."""
        if self.has_no_default:
            return None
        served = {model for model, _ in self._library.announced()}
        name = default_model(None, self._library.names)
        if name in served:
            agreed = await self._store.agree_on_default_model(name)
            if not agreed:
                # There was to be none for the folder of an earlier start. This one has one.
                await self._store.claim_default_model(name)
            return agreed or name
        self.has_no_default = bool(served) and not self._library.loading
        return None

    def _adopt(self, agreed: str) -> None:
        """An empty name: it was decided that there is none any more."""
        if self.default_model is None:
            log.info("The default model of the queue %r is %r.", self._store.n, agreed)
            self.default_model = agreed
            return
        origin = remedy = ""
        if self._default_is_set and agreed:
            origin = " from DEFAULT_MODEL (or MODEL)"
            remedy = f" Set DEFAULT_MODEL={agreed} here too; a start with another may be refused."
        log.warning(
            "Redis names %s as the default model of the queue %r, and this worker had %r%s. It "
            "goes by Redis from now on, since all processes must agree.%s",
            repr(agreed) if agreed else "none",
            self._store.n,
            self.default_model,
            origin,
            remedy,
        )
        self._former[self.default_model] = time.monotonic()
        self.default_model = agreed or None

    def _candidates(self) -> dict[str, Signature]:
        """Queues where jobs of our models may lie beside the queues of these models."""
        n, oldest = self._store.n, time.monotonic() - _FORMER_SECONDS
        found = {}
        for model, signature in self._models():
            if model == self.default_model:
                found[f"{n}:{model}"] = signature
            elif self._former.get(model, oldest) > oldest:
                found[n] = signature
        return found

    def _models(self) -> Iterator[tuple[str, Signature]]:
        for model, version in sorted(self._library.served.items()):
            if version.signature:
                yield model, version.signature

    def _sharing(self, signature: Signature) -> Sharing:
        most = self._max_batch
        full_jobs = min(signature.max_batch_jobs or most, most)
        return Sharing(signature.batched, signature.max_wait_ms / 1000, full_jobs)

"""A model folder that is changed under a worker, and the clients of what it serves."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import onnx

from asyncinfer.jobs import SCHEMA, Record, new_id
from asyncinfer.models.signature import Signature
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements, WorkerSays, worker_says
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored
from asyncinfer.repository.submissions import NewJob, Submissions
from asyncinfer.worker.models.engine_cache import Bounds
from asyncinfer.worker.worker import WorkerConfig
from tests.faults.load_client import answer

from .harness import eventually
from .processes import Crew, OpenCrew

CONFIG = WorkerConfig(concurrency=2, rescan_seconds=0.5)


class Folder:
    """A model folder that is changed as operators do."""

    def __init__(self, path: Path) -> None:
        self.path = path / "models"
        self._staging = path / "staging"
        self.path.mkdir()

    def publish(
        self, model: onnx.ModelProto | bytes, version: int, name: str = "m", toml: str = ""
    ) -> Path:
        """By rename, as is right."""
        content = model if isinstance(model, bytes) else model.SerializeToString()
        staged = self._staging / f"{name}-{version}"
        staged.mkdir(parents=True)
        (staged / "model.onnx").write_bytes(content)
        (self.path / name).mkdir(exist_ok=True)
        if toml:
            (self.path / name / "model.toml").write_text(toml)
        return staged.rename(self.path / name / str(version)) / "model.onnx"

    def publish_with_weights(self, model: onnx.ModelProto, version: int) -> Path:
        """The weights in a file of their own; returns it."""
        path = self._staging / str(version) / "model.onnx"
        path.parent.mkdir(parents=True)
        onnx.save_model(
            model, path, save_as_external_data=True, location="weights.bin", size_threshold=0
        )
        return path.parent.rename(self.path / "m" / str(version)) / "weights.bin"

    def remove(self, version: int, name: str = "m") -> None:
        shutil.rmtree(self.path / name / str(version))


class Shop:
    """What clients see and do."""

    def __init__(self, store: Store) -> None:
        self._announcements = Announcements(store)
        self._submissions = Submissions(store)
        self._n = store.n

    async def submit(self, value: object, version: str | None = None, name: str = "m") -> str:
        now_ms = 1
        queue = keys.queue(self._n, name, "m")
        record = Record(SCHEMA, queue, name, "default", now_ms, version=version)
        job = NewJob(new_id(now_ms), queue, msgspec.json.encode([[value]]), record)
        (submitted,) = await self._submissions.submit_many(queue, [job])
        assert submitted.verdict in ("ok", "exists")
        return job.job_id

    async def ended(self, job_id: str) -> Stored:
        found: list[Stored] = []

        async def has_ended() -> bool:
            stored = await self._submissions.read(job_id)
            found[:] = [stored] if stored else []
            return bool(stored and stored.status in ("completed", "failed"))

        await eventually(has_ended, "the job has ended")
        return found[0]

    async def ask(self, value: float, version: str | None = None, name: str = "m") -> float:
        """The answer, when the job completes."""
        stored = await self.ended(await self.submit(value, version, name))
        assert stored.status == "completed", stored.error
        return answer(stored)

    async def versions(self, name: str = "m") -> dict[str, Signature]:
        """What is announced of a model."""
        announced = (await self._announcements.announced()).models.get(name, {})
        return {
            version: msgspec.json.decode(body, type=Signature)
            for version, body in announced.items()
        }

    async def says(self) -> list[WorkerSays]:
        return [worker_says(body) for body in (await self._announcements.workers()).values()]

    async def problems(self, name: str = "m") -> dict[str, str]:
        found: dict[str, str] = {}
        for says in await self.says():
            found |= says.problems.get(name, {})
        return found

    async def until_announced(self, *versions: str, name: str = "m") -> None:
        async def is_so() -> bool:
            return set(await self.versions(name)) == set(versions)

        await eventually(is_so, f"{name} has the versions {versions}", 20)

    async def until_refused(self, version: str, why: str, name: str = "m") -> None:
        async def is_so() -> bool:
            return why in (await self.problems(name)).get(version, "")

        await eventually(is_so, f"version {version} is refused: {why}", 20)

    async def until_served(self, version: str) -> None:
        async def is_so() -> bool:
            return any(says.served.get("m") == version for says in await self.says())

        await eventually(is_so, f"version {version} is served", 20)


@asynccontextmanager
async def serving(
    crew: OpenCrew,
    folder: Folder,
    shop: Shop,
    bounds: Bounds | None = None,
    *,
    allow_custom_ops: bool = False,
    unprivileged: bool = False,
) -> AsyncIterator[Crew]:
    """One worker on the folder, which leaves well at the end."""
    with crew(
        model_dir=str(folder.path),
        models=(),
        default_model="m",
        worker=CONFIG,
        bounds=bounds or Bounds(),
        allow_custom_ops=allow_custom_ops,
        unprivileged=unprivileged,
    ) as crewed:
        worker = crewed.hire()
        assert await shop.ask(1) == 2
        yield crewed
        assert not worker.died()
        assert await worker.stop() == 0

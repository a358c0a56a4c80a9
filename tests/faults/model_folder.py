"""A model folder that a test changes while a worker serves it, and a client of its models."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import onnx

from asyncinfer.jobs import SCHEMA, Record, new_id
from asyncinfer.models.signature import Signature
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import (
    Announcements,
    WorkerAnnouncement,
)
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.repository.submissions import NewJob, Submissions
from asyncinfer.worker.models.engine_cache import CacheBounds
from asyncinfer.worker.worker import WorkerConfig
from tests.faults.load_client import result_value

from .harness import eventually
from .processes import OpenWorkers, Workers

CONFIG = WorkerConfig(concurrency=2, rescan_seconds=0.5)


class ModelFolder:
    """A model folder that is changed as operators change it."""

    def __init__(self, path: Path) -> None:
        self.path = path / "models"
        self._staging = path / "staging"
        self.path.mkdir()

    def publish(
        self, model: onnx.ModelProto | bytes, version: int, name: str = "m", toml: str = ""
    ) -> Path:
        """Adds a version by a rename, as the documents advise; returns the model's file."""
        content = model if isinstance(model, bytes) else model.SerializeToString()
        staged = self._staging / f"{name}-{version}"
        staged.mkdir(parents=True)
        (staged / "model.onnx").write_bytes(content)
        (self.path / name).mkdir(exist_ok=True)
        if toml:
            (self.path / name / "model.toml").write_text(toml)
        return staged.rename(self.path / name / str(version)) / "model.onnx"

    def publish_with_weights(self, model: onnx.ModelProto, version: int) -> Path:
        """Adds a version whose weights are in a file of their own; returns that file."""
        path = self._staging / str(version) / "model.onnx"
        path.parent.mkdir(parents=True)
        onnx.save_model(
            model, path, save_as_external_data=True, location="weights.bin", size_threshold=0
        )
        return path.parent.rename(self.path / "m" / str(version)) / "weights.bin"

    def remove(self, version: int, name: str = "m") -> None:
        shutil.rmtree(self.path / name / str(version))


class ModelClient:
    """A client of the models in the folder, which also reads what workers announce."""

    def __init__(self, store: Store) -> None:
        self._announcements = Announcements(store)
        self._submissions = Submissions(store)
        self._n = store.queue_name

    async def submit(self, value: object, version: str | None = None, name: str = "m") -> str:
        now_ms = 1
        queue = keys.queue(self._n, name, "m")
        record = Record(SCHEMA, queue, name, "default", now_ms, version=version)
        job = NewJob(new_id(now_ms), queue, msgspec.json.encode([[value]]), record)
        (submitted,) = await self._submissions.submit_many(queue, [job])
        assert submitted.verdict in ("ok", "exists")
        return job.job_id

    async def wait_for_end(self, job_id: str) -> StoredJob:
        jobs: list[StoredJob] = []

        async def has_ended() -> bool:
            stored = await self._submissions.read(job_id)
            jobs[:] = [stored] if stored else []
            return bool(stored and stored.status in ("completed", "failed"))

        await eventually(has_ended, "the job has ended")
        return jobs[0]

    async def predict(self, value: float, version: str | None = None, name: str = "m") -> float:
        """Submits and waits; returns the result. Fails the test if the job does not complete."""
        stored = await self.wait_for_end(await self.submit(value, version, name))
        assert stored.status == "completed", stored.error
        return result_value(stored)

    async def announced_versions(self, name: str = "m") -> dict[str, Signature]:
        """The signature of each announced version of a model."""
        announced = (await self._announcements.read_models()).models.get(name, {})
        return {
            version: msgspec.json.decode(body, type=Signature)
            for version, body in announced.items()
        }

    async def announcements(self) -> list[WorkerAnnouncement]:
        """What each worker announces of itself."""
        return list((await self._announcements.read_workers()).values())

    async def problems(self, name: str = "m") -> dict[str, str]:
        """The reason by version, of the versions of a model that a worker refuses."""
        reasons: dict[str, str] = {}
        for worker in await self.announcements():
            reasons |= worker.problems.get(name, {})
        return reasons

    async def wait_until_announced(self, *versions: str, name: str = "m") -> None:
        """Waits until these versions, and no other, are announced."""

        async def is_announced() -> bool:
            return set(await self.announced_versions(name)) == set(versions)

        await eventually(is_announced, f"{name} has the versions {versions}", 20)

    async def wait_until_refused(self, version: str, reason: str, name: str = "m") -> None:
        async def is_refused() -> bool:
            return reason in (await self.problems(name)).get(version, "")

        await eventually(is_refused, f"version {version} is refused: {reason}", 20)

    async def wait_until_served(self, version: str) -> None:
        """Waits until a worker serves this version of the model `m` by default."""

        async def is_served() -> bool:
            return any(worker.served.get("m") == version for worker in await self.announcements())

        await eventually(is_served, f"version {version} is served", 20)


@asynccontextmanager
async def serving(
    open_workers: OpenWorkers,
    folder: ModelFolder,
    model_client: ModelClient,
    bounds: CacheBounds | None = None,
    *,
    allow_custom_ops: bool = False,
    unprivileged: bool = False,
) -> AsyncIterator[Workers]:
    """Runs one worker on the folder; asserts at the end that it stops with exit code 0."""
    with open_workers(
        model_dir=str(folder.path),
        models=(),
        default_model="m",
        worker=CONFIG,
        bounds=bounds or CacheBounds(),
        allow_custom_ops=allow_custom_ops,
        unprivileged=unprivileged,
    ) as workers:
        worker = workers.start()
        assert await model_client.predict(1) == 2
        yield workers
        assert not worker.has_ended()
        assert await worker.stop() == 0

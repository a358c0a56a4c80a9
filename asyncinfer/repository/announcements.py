"""What workers announce: themselves, their models, versions and default versions."""

from typing import Annotated, Final

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from asyncinfer.schemas.operations import JobsDone
from asyncinfer.untrusted import decoding


class Announced(Struct, frozen=True):
    """What workers have announced: {model: {version: signature as JSON}}."""

    default_model: str | None
    models: dict[str, dict[str, bytes]]
    default_versions: dict[str, str] = {}
    """Of models whose served version is not simply the highest."""


_Count = Annotated[int, Meta(ge=0, le=1 << 53)]


_Seconds = Annotated[float, Meta(ge=0, le=1e9)]


class WorkerSays(Struct, frozen=True):
    """What a living worker says of its models; the older its release, the less."""

    models: tuple[str, ...] = ()
    state: str = ""
    """starting (serves nothing yet, and has something to load), ready, draining or hung."""
    loading: tuple[str, ...] = ()
    """Models that lie in its folder and are not loaded yet; at most 10,000."""
    loading_versions: dict[str, tuple[str, ...]] = {}
    """Of its other models, the versions that are not loaded yet; at most 10,000."""
    model_dir: str | None = None
    """The folder it serves, or the one file, as an absolute path."""
    versions: dict[str, dict[str, str]] = {}
    """{model: {version: sha256}}, what it serves."""
    served: dict[str, str] = {}
    """{model: version}, for jobs that ask for none."""
    problems: dict[str, dict[str, str]] = {}
    """{model: {version: why it is not served, or not as its file is now}}."""
    loaded: tuple[str, ...] = ()
    """model/version, as they are in its memory, the least used first."""
    run_times: dict[str, dict[str, _Seconds]] = {}
    """{model: {rows of a run: seconds}}, as measured."""
    seconds_per_job: dict[str, _Seconds] = {}
    """{model: slot time a job took lately}."""
    concurrency: _Count = 0
    host: str | None = None
    pid: _Count | None = None
    busy: _Count | None = None
    """Slots that have a batch."""
    started_ms: int | None = None
    jobs_done: JobsDone | None = None
    default_model: str | UnsetType | None = UNSET
    """The model that QUEUE_NAME itself serves; None where it knows that there is none."""


_read_worker = decoding.reader(msgspec.json.Decoder(WorkerSays).decode)


def worker_says(body: bytes) -> WorkerSays:
    """An empty announcement where the bytes are corrupt."""
    return _read_worker(body) or WorkerSays()


def models_to_come(says: WorkerSays) -> set[str]:
    """Models that a worker will claim jobs of and does not yet: they lie in its folder, or are
    loaded and about to be announced."""
    if says.state not in ("starting", "ready"):
        return set()
    return {*says.loading, *says.versions} - {*says.models}


def serves(worker: WorkerSays, model: str) -> bool:
    """Whether it claims the jobs of a model, or will once it has loaded it."""
    return model in worker.models or model in worker.versions or model in worker.loading


ANNOUNCE_SECONDS: Final = 3.0

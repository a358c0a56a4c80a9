"""The worker process of the fault tests: the real one, which can die or fail at a chosen step."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from asyncinfer.repository.policy import Policy
from asyncinfer.worker.held_claim import Step
from asyncinfer.worker.models.engine_cache import CacheBounds
from asyncinfer.worker.models.source import ModelSource
from asyncinfer.worker.process import WorkerProcessConfig, run
from asyncinfer.worker.worker import WorkerConfig
from tests import unprivileged

POLICY: Final = Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600)
"""Short times, so that a test can wait for the recovery of lost jobs."""


class WorkerSettings(msgspec.Struct, kw_only=True):
    """The settings of a worker under test."""

    redis_url: str
    model_dir: str
    policy: Policy = POLICY
    worker: WorkerConfig = WorkerConfig(concurrency=1, prediction_timeout_seconds=60)
    models: tuple[str, ...] = ()
    default_model: str | None = None
    bounds: CacheBounds = CacheBounds()
    monitor_port: int | None = None
    allow_custom_ops: bool = False
    unprivileged: bool = False
    """Whether it can read only files whose mode allows it, also as root."""
    die_at: Step | None = None
    """The step of a job at which it kills itself with SIGKILL."""
    fail_at: Step | None = None
    """The step of a job at which it raises an unexpected error."""
    run_seconds: float = 0.0
    """How much longer each run takes, however busy the machine is: as on an accelerator."""


def _on_step(settings: WorkerSettings) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        if step == settings.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == settings.fail_at:
            raise RuntimeError(f"a bug at {step!r}")
        if step == "running":
            time.sleep(settings.run_seconds)

    return on_step


def _only_model(models: tuple[str, ...]) -> str | None:
    return models[0] if len(models) == 1 else None


def main() -> int:
    settings = msgspec.json.decode(sys.argv[1], type=WorkerSettings)
    if settings.unprivileged:
        unprivileged.drop()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("asyncinfer.worker.running").setLevel(logging.DEBUG)
    process = WorkerProcessConfig(
        redis_url=settings.redis_url,
        queue_name="predict_queue",
        policy=settings.policy,
        source=ModelSource(Path(settings.model_dir), settings.models),
        bounds=settings.bounds,
        default_model=settings.default_model or _only_model(settings.models),
        worker=settings.worker,
        monitor_port=settings.monitor_port,
        allow_custom_ops=settings.allow_custom_ops,
    )
    return run(process, _on_step(settings))


if __name__ == "__main__":
    sys.exit(main())

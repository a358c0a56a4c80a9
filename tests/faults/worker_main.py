"""A worker process for the fault tests: the real one, told in JSON, dying where it is told to."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from asyncinfer.repository.policy import Policy
from asyncinfer.worker.held_claim import Step
from asyncinfer.worker.models.engine_cache import Bounds
from asyncinfer.worker.models.source import Source
from asyncinfer.worker.process import WorkerProcess, run
from asyncinfer.worker.worker import WorkerConfig
from tests import unprivileged


class Order(msgspec.Struct, kw_only=True):
    """What a test wants of a worker."""

    redis_url: str
    model_dir: str
    policy: Policy = Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600)
    worker: WorkerConfig = WorkerConfig(concurrency=1)
    models: tuple[str, ...] = ()
    default_model: str | None = None
    bounds: Bounds = Bounds()
    monitor_port: int | None = None
    allow_custom_ops: bool = False
    unprivileged: bool = False
    """Reads only what modes allow, also as root."""
    die_at: Step | None = None
    """Kills itself with SIGKILL when it first comes to this step."""
    fail_at: Step | None = None
    """Raises what nobody foresaw at this step."""


def _watcher(order: Order) -> Callable[[Step], None]:
    def on_step(reached: Step) -> None:
        if reached == order.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if reached == order.fail_at:
            raise RuntimeError(f"a bug at {reached!r}")

    return on_step


def _only(models: tuple[str, ...]) -> str | None:
    return models[0] if len(models) == 1 else None


def main() -> int:
    order = msgspec.json.decode(sys.argv[1], type=Order)
    if order.unprivileged:
        unprivileged.drop()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    process = WorkerProcess(
        redis_url=order.redis_url,
        queue_name="predict_queue",
        policy=order.policy,
        source=Source(Path(order.model_dir), order.models),
        bounds=order.bounds,
        default_model=order.default_model or _only(order.models),
        worker=order.worker,
        monitor_port=order.monitor_port,
        allow_custom_ops=order.allow_custom_ops,
    )
    return run(process, _watcher(order))


if __name__ == "__main__":
    sys.exit(main())

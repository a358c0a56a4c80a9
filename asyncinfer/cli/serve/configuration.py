"""What each part is given, from the settings."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from asyncinfer.errors import InvalidSetting, StartError
from asyncinfer.settings import Settings

if TYPE_CHECKING:
    from asyncinfer.api.config import ApiConfig
    from asyncinfer.models.folder import ModelFile
    from asyncinfer.repository.policy import Policy
    from asyncinfer.repository.store import Store
    from asyncinfer.worker.models.source import Source
    from asyncinfer.worker.process import WorkerProcess


def redis_url(chosen: Settings) -> str | None:
    if chosen.redis_url or not chosen.redis_host:
        return chosen.redis_url
    host = f"[{chosen.redis_host}]" if ":" in chosen.redis_host else quote(chosen.redis_host)
    return f"redis://{host}:{chosen.redis_port}"


def reachable_redis_url(chosen: Settings) -> str:
    """That of the settings, else of the embedded server that runs for this DATA_DIR."""
    url = redis_url(chosen)
    if url is None:
        from asyncinfer.processes import valkey

        url = valkey.running_url(data_dir(chosen))
    if url is None:
        raise StartError(
            "There is no Redis to take jobs from. Set REDIS_URL, or start `asyncinfer serve` on "
            f"this machine with the same DATA_DIR ({data_dir(chosen)})."
        )
    return url


def data_dir(chosen: Settings) -> Path:
    import platformdirs

    return (chosen.data_dir or platformdirs.user_state_path("asyncinfer")).absolute()


def model_dir(chosen: Settings) -> Path:
    from asyncinfer.models.folder import find_model_dir

    folder = find_model_dir(chosen.model_dir, cwd=Path.cwd())
    if not folder.is_dir():
        raise StartError(f"MODEL_DIR {folder} is no folder. Set it to your folder of models.")
    return folder


def source(chosen: Settings) -> "Source":
    from asyncinfer.worker.models.source import Source

    file = model_file(chosen)
    folder = file.parent if file else model_dir(chosen)
    return Source(folder, chosen.models, file)


def is_whole(file: "ModelFile") -> bool:
    """Whether a version is not broken at a glance."""
    from asyncinfer.models import onnx_file

    return not file.problem and onnx_file.looks_whole(file.path)


def model_file(chosen: Settings) -> Path | None:
    """The one file to serve; raises InvalidSetting when it cannot be one."""
    if chosen.model is None:
        return None
    from asyncinfer.models.folder import NAME_RULE, valid_name

    file = chosen.model.absolute()
    if file.suffix != ".onnx" or not file.is_file():
        raise InvalidSetting(f"MODEL {chosen.model} is no .onnx file. Set it to one that exists.")
    if not valid_name(file.stem):
        raise InvalidSetting(f"MODEL: rename {file.name}, which names the model: {NAME_RULE}.")
    if chosen.default_model not in (None, file.stem):
        raise InvalidSetting(
            f"MODEL makes {file.stem!r} the default model, but DEFAULT_MODEL is "
            f"{chosen.default_model!r}. Set one of the two."
        )
    return file


def default_model(chosen: Settings) -> str | None:
    file = model_file(chosen)
    return file.stem if file else chosen.default_model


def store(chosen: Settings, url: str) -> AbstractAsyncContextManager["Store"]:
    from asyncinfer.repository.store import Store

    return Store.open(url, queue_name=chosen.queue_name, policy=policy(chosen), name="cli")


def policy(chosen: Settings) -> "Policy":
    from asyncinfer.repository.policy import Policy

    return Policy(
        job_ttl_seconds=chosen.job_ttl,
        failed_ttl_seconds=chosen.failed_ttl,
        keep_input=chosen.keep_input,
        max_queue=chosen.max_queue,
        max_queue_bytes=chosen.max_queue_bytes,
        lease_seconds=chosen.lease_seconds,
        reap_seconds=chosen.reap_seconds,
        max_deliveries=chosen.max_deliveries,
    )


def api_config(chosen: Settings, url: str, own_worker_since_ms: int | None) -> "ApiConfig":
    from asyncinfer.api.config import ApiConfig

    return ApiConfig(
        redis_url=url,
        queue_name=chosen.queue_name,
        policy=policy(chosen),
        default_model=default_model(chosen),
        own_worker_since_ms=own_worker_since_ms,
        host=chosen.host,
        port=chosen.port,
        allowed_hosts=chosen.allowed_hosts,
        allowed_origins=chosen.allowed_origins,
        api_keys=chosen.api_keys,
        max_body_bytes=chosen.max_body,
        max_json_bytes=chosen.max_json,
    )


def worker_process(chosen: Settings, url: str) -> "WorkerProcess":
    from asyncinfer.processes.cpus import cores
    from asyncinfer.worker.models.engine_cache import Bounds
    from asyncinfer.worker.process import WorkerProcess
    from asyncinfer.worker.worker import WorkerConfig

    concurrency = chosen.concurrency or cores()
    return WorkerProcess(
        redis_url=url,
        queue_name=chosen.queue_name,
        policy=policy(chosen),
        source=source(chosen),
        bounds=Bounds(chosen.max_models, chosen.max_model_bytes),
        default_model=default_model(chosen),
        intra_op_threads=max(1, cores() // concurrency),
        allow_custom_ops=chosen.allow_custom_ops,
        monitor_port=chosen.monitor_port,
        monitor_host=chosen.monitor_host,
        worker=WorkerConfig(
            concurrency=concurrency,
            max_batch=chosen.max_batch,
            brpop_timeout_seconds=chosen.brpop_timeout,
            prediction_timeout_seconds=chosen.prediction_timeout,
            drain_timeout_seconds=chosen.drain_timeout,
            rescan_seconds=chosen.rescan_seconds,
        ),
    )

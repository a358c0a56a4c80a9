"""Configurations of API, worker and store, made from the settings."""

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
    from asyncinfer.telemetry.tracing import Tracing
    from asyncinfer.webhooks.config import WebhookConfig
    from asyncinfer.worker.models.source import ModelSource
    from asyncinfer.worker.process import WorkerProcessConfig


def redis_url(settings: Settings) -> str | None:
    """REDIS_URL, else one of REDIS_HOST and REDIS_PORT; None for the embedded Valkey."""
    if settings.redis_url or not settings.redis_host:
        return settings.redis_url
    host = f"[{settings.redis_host}]" if ":" in settings.redis_host else quote(settings.redis_host)
    return f"redis://{host}:{settings.redis_port}"


def reachable_redis_url(settings: Settings) -> str:
    """The Redis of the settings, else the embedded one that runs for this DATA_DIR.

    Raises StartError if neither is there.
    """
    url = redis_url(settings)
    if url is None:
        from asyncinfer.processes import valkey

        url = valkey.running_url(data_dir(settings))
    if url is None:
        raise StartError(
            "There is no Redis to take jobs from. Set REDIS_URL, or start `asyncinfer serve` on "
            f"this machine with the same DATA_DIR ({data_dir(settings)})."
        )
    return url


def data_dir(settings: Settings) -> Path:
    """The absolute path of DATA_DIR, else of the user's state folder; it need not exist."""
    import platformdirs

    return (settings.data_dir or platformdirs.user_state_path("asyncinfer")).absolute()


def model_dir(settings: Settings) -> Path:
    """The folder of the models to serve; raises StartError if it is no folder."""
    from asyncinfer.models.folder import find_model_dir

    folder = find_model_dir(settings.model_dir, cwd=Path.cwd())
    if not folder.is_dir():
        raise StartError(f"MODEL_DIR {folder} is not a folder. Set it to your folder of models.")
    return folder


def source(settings: Settings) -> "ModelSource":
    """The folder or the one file of models to serve, which is not read yet.

    Raises StartError if it is not there, and InvalidSetting if MODEL cannot be served.
    """
    from asyncinfer.worker.models.source import ModelSource

    file = model_file(settings)
    folder = file.parent if file else model_dir(settings)
    return ModelSource(folder, settings.models, file)


def looks_intact(file: "ModelFile") -> bool:
    """Whether a version's file is not visibly broken.

    It is not loaded, so a worker may still refuse it.
    """
    from asyncinfer.models import onnx_file

    return not file.problem and onnx_file.looks_complete(file.path)


def model_file(settings: Settings) -> Path | None:
    """The absolute path of the setting MODEL; None if that is not set.

    Raises InvalidSetting if it is no .onnx file, its name cannot be a model's, or DEFAULT_MODEL
    names another model.
    """
    if settings.model is None:
        return None
    from asyncinfer.models.folder import NAME_RULE, is_valid_name

    file = settings.model.absolute()
    if file.suffix != ".onnx" or not file.is_file():
        raise InvalidSetting(f"MODEL {settings.model} is no .onnx file. Set it to one that exists.")
    if not is_valid_name(file.stem):
        raise InvalidSetting(
            f"MODEL: rename {file.name}, whose name becomes the model's: {NAME_RULE}."
        )
    if settings.default_model not in (None, file.stem):
        raise InvalidSetting(
            f"MODEL makes {file.stem!r} the default model, but DEFAULT_MODEL is "
            f"{settings.default_model!r}. Set one of the two."
        )
    return file


def default_model(settings: Settings) -> str | None:
    """The default model that the settings name; None leaves the choice to the worker.

    Raises InvalidSetting as `model_file` does; whether such a model exists is not checked.
    """
    file = model_file(settings)
    return file.stem if file else settings.default_model


def store(settings: Settings, url: str) -> AbstractAsyncContextManager["Store"]:
    """The store on the server at `url`, which is opened and closed as an `async with`.

    The log reports its outages and refusals, but not in the parent of several API processes: these
    report them, and the parent makes too few calls to notice their end.
    """
    from asyncinfer.processes.outage import report_of
    from asyncinfer.repository.store import Store

    return Store.open(
        url,
        queue_name=settings.queue_name,
        policy=policy(settings),
        name="cli",
        report=report_of(url) if settings.api_processes == 1 else None,
    )


def policy(settings: Settings) -> "Policy":
    """The rules that the store applies to jobs, from the settings."""
    from asyncinfer.repository.policy import Policy

    return Policy(
        job_ttl_seconds=settings.job_ttl,
        failed_ttl_seconds=settings.failed_ttl,
        keep_input=settings.keep_input,
        max_queue=settings.max_queue,
        max_queue_bytes=settings.max_queue_bytes,
        max_kept_bytes=settings.max_kept_bytes,
        max_webhooks=settings.max_webhooks,
        max_webhook_bytes=settings.max_webhook_bytes,
        lease_seconds=settings.lease_seconds,
        reap_seconds=settings.reap_seconds,
        max_deliveries=settings.max_deliveries,
    )


def check_traces(settings: Settings) -> None:
    """Raises StartError if TRACES is on and OpenTelemetry is not installed."""
    if settings.traces == "off":
        return
    from importlib.util import find_spec

    needed = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
    try:
        is_installed = all(map(find_spec, needed))
    except ModuleNotFoundError:
        is_installed = False
    if not is_installed:
        raise StartError(
            "TRACES is on, and OpenTelemetry is not installed. Run "
            "`pip install 'asyncinfer[otel]'`, or set TRACES=off."
        )


def _tracing(settings: Settings, service_name: str) -> "Tracing | None":
    """The tracing of this process, None with TRACES=off; raises StartError as `check_traces`."""
    if settings.traces == "off":
        return None
    check_traces(settings)
    from asyncinfer.telemetry.tracing import open_tracing

    return open_tracing(service_name)


def api_config(settings: Settings, url: str, own_worker_since_ms: int | None) -> "ApiConfig":
    """The configuration of an API process; `url` is that of its Redis.

    `own_worker_since_ms` is a time in milliseconds since 1970 after which the worker of the same
    `serve` was started; None if it has none.
    """
    from asyncinfer.api.config import ApiConfig

    return ApiConfig(
        redis_url=url,
        queue_name=settings.queue_name,
        policy=policy(settings),
        default_model=default_model(settings),
        own_worker_since_ms=own_worker_since_ms,
        host=settings.host,
        port=settings.port,
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
        api_keys=settings.api_keys,
        max_body_bytes=settings.max_body,
        max_json_bytes=settings.max_json,
        max_ttl_seconds=settings.max_ttl,
        max_inflight_bytes=settings.max_inflight_bytes,
        express=settings.express,
        access_log=settings.access_log,
        webhooks=_webhooks(settings),
        tracing=_tracing(settings, "asyncinfer-api"),
    )


def _webhooks(settings: Settings) -> "WebhookConfig":
    """What an API process knows of webhooks."""
    from asyncinfer.webhooks.config import WebhookConfig

    return WebhookConfig(
        sends=settings.webhooks,
        secrets=settings.webhook_secrets,
        allow=settings.webhook_allow,
        proxy_url=settings.webhook_proxy,
        public_url=settings.public_url and settings.public_url.rstrip("/"),
    )


def worker_process(settings: Settings, url: str) -> "WorkerProcessConfig":
    """The configuration of a worker; `url` is that of its Redis. Nothing is started.

    Raises StartError as `source` does.
    """
    from asyncinfer.processes.cpus import usable_cores
    from asyncinfer.worker.models.engine_cache import CacheBounds
    from asyncinfer.worker.process import WorkerProcessConfig
    from asyncinfer.worker.worker import WorkerConfig

    concurrency = settings.concurrency or usable_cores()
    return WorkerProcessConfig(
        redis_url=url,
        queue_name=settings.queue_name,
        policy=policy(settings),
        source=source(settings),
        bounds=CacheBounds(settings.max_models, settings.max_model_bytes),
        default_model=default_model(settings),
        intra_op_threads=max(1, usable_cores() // concurrency),
        allow_custom_ops=settings.allow_custom_ops,
        monitor_port=settings.monitor_port,
        monitor_host=settings.monitor_host,
        tracing=_tracing(settings, "asyncinfer-worker"),
        worker=WorkerConfig(
            concurrency=concurrency,
            max_batch=settings.max_batch,
            brpop_timeout_seconds=settings.brpop_timeout,
            prediction_timeout_seconds=settings.prediction_timeout,
            drain_timeout_seconds=settings.drain_timeout,
            rescan_seconds=settings.rescan_seconds,
        ),
    )

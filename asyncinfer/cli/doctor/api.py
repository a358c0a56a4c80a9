"""Checks of the running API: its port, its answers, the models and queues it reports."""

import shlex
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from asyncinfer.cli.addresses import api_url, shown_url
from asyncinfer.cli.api_client import connect
from asyncinfer.cli.doctor.findings import Finding, ok, problem, warning
from asyncinfer.cli.doctor.machine import port_is_taken
from asyncinfer.cli.exit_codes import in_terminal_words
from asyncinfer.cli.model_reasons import split_reason
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.output import counted
from asyncinfer.cli.serve import configuration
from asyncinfer.cli.starved_queues import (
    queue_name,
    starved_remedy,
    starved_text,
    waiting_jobs,
    waiting_text,
)
from asyncinfer.client import Client, Queue
from asyncinfer.errors import AsyncinferError, StartError
from asyncinfer.settings import Settings


def examine_api(
    settings: Settings, url: str | None, api_key: str | None, ca: str | None
) -> Iterator[Finding]:
    """Checks the API at `url`, else at the address of the settings, and the monitor port.

    With `url` it is a problem if nothing listens there; without it, it means that `serve` can use
    the port. The key `api_key` is sent with each request; None sends none.
    """
    address = url or api_url(settings.host, settings.port)
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not port_is_taken(parts.hostname or "127.0.0.1", port):
        yield _nothing_listens(shown_url(address), required=url is not None)
    else:
        with connect(ServerOptions(address, api_key, ca)) as client:
            yield from _examine_answers(client, shown_url(address), settings)
    if settings.monitor_port and port_is_taken(settings.monitor_host, settings.monitor_port):
        found = f"port {settings.monitor_port} is in use: by a worker of yours or another program"
        yield ok("monitor port", found)


def _nothing_listens(address: str, *, required: bool) -> Finding:
    """A problem if `required`, else an ok: the port is free for `serve`."""
    if required:
        mend = "asyncinfer serve, or correct the URL"
        return problem("API", f"nothing listens at {address}", mend)
    return ok("port", f"{address} is free for `asyncinfer serve`")


def _examine_answers(client: Client, address: str, settings: Settings) -> Iterator[Finding]:
    """Checks a server that listens at `address`: whether it is asyncinfer, its queues and models.

    Of the settings only the next port and the model folder are used, for the advice.
    """
    try:
        health = client.health()
    except AsyncinferError as error:
        if error.code == "not_asyncinfer":
            mend = f"stop it, or choose another port: asyncinfer serve --port {settings.port + 1}"
            yield problem("port", f"another program answers at {address}", mend)
        elif error.code == "connection_failed":
            what, _, mend = in_terminal_words(error.detail).partition(". ")
            yield problem("API", what, mend.rstrip("."))
        else:
            yield problem("API", f"{address}: {error.detail}", "read the log of `asyncinfer serve`")
        return
    if health.queues is None:
        # Only a key with the scope `read` is sent the queues; a missing key is found below.
        yield ok("API", f"answers at {address}")
        yield from _examine_served_models(client, ())
        return
    waiting = sum(health.queues.values())
    queues = _queues(client)
    starved = [queue for queue in queues if queue.starved]
    waits = f"{counted(waiting, 'job')} {'waits' if waiting == 1 else 'wait'}"
    found = f"answers at {address}; {waits}, {counted(health.workers or 0, 'worker')}"
    if health.reason:
        found = f"{found}; it accepts no jobs: {health.reason.code}: {health.reason.message}"
        yield problem("API", found, _mend(health.reason.code))
    elif waiting and not health.workers and not starved:
        yield problem("API", f"{found}: no worker is alive", "asyncinfer work")
    else:
        yield ok("API", found)
    for queue in starved:
        mend = starved_remedy(queue, _folder_with(queue_name(queue), settings))
        yield problem(f"queue {queue_name(queue)}", starved_text(queue), mend)
    held_up = [queue for queue in queues if queue.paused and waiting_jobs(queue)]
    yield from _examine_served_models(client, held_up)


def _mend(code: str) -> str:
    """What makes an API accept jobs again, by the code with which it refuses them."""
    mends = {
        "storage_full": "asyncinfer purge --status completed, or more memory for Redis",
        "disk_full": "free the disk of Redis, then: redis-cli BGSAVE",
        "redis_read_only": "point REDIS_URL of the API at the primary, or at its sentinels",
        "too_few_replicas": "start a replica of Redis",
        "redis_permission_denied": "redis-cli ACL SETUSER, with the rules of docs/security.md",
    }
    return mends.get(code, "see the log of `asyncinfer serve`")


def _queues(client: Client) -> list[Queue]:
    """The queues that the API reports; an empty list if it refuses or fails."""
    try:
        return client.queues()
    except AsyncinferError:
        # /health answered a moment ago; a server that fails now is reported by the next check.
        return []


def _folder_with(model: str, settings: Settings) -> str:
    """The model folder of the settings if it has the model, quoted for a shell; else ""."""
    try:
        source = configuration.source(settings)
        names = {file.model for file in source.files()}
    except (StartError, OSError):
        return ""
    return shlex.quote(str(source.watched_folder)) if model in names else ""


def _examine_served_models(client: Client, held_up: Sequence[Queue]) -> Iterator[Finding]:
    """Checks what the API says of its models: versions that workers refuse, and pauses.

    `held_up` are the queues of paused models that have jobs.
    """
    try:
        listed = client.catalog()
    except AsyncinferError as error:
        if error.code in ("unauthorized", "forbidden"):
            mend = "set ASYNCINFER_API_KEY to a key with the scope read"
            yield warning("API key", error.detail, mend)
        else:
            yield problem("models served", error.detail, "read the log of the workers")
        return
    for entry in listed.all_problems:
        name = "/".join(filter(None, (entry.model, entry.version)))
        reason, remedy = split_reason(entry.model, entry.version, entry.reason)
        mend = f"{remedy or 'correct or replace the file'}; workers notice that by themselves"
        if "MODEL_DIR" in entry.reason:
            mend = remedy or "start that worker with another MODEL_DIR or MODELS"
        yield warning(f"worker {entry.worker}", f"{name}: {reason}", mend)
    paused = [model.model for model in listed.models if model.paused]
    if paused:
        mend = f"asyncinfer resume {paused[0]}"
        found = "; ".join([f"{', '.join(paused)}: paused", *map(waiting_text, held_up)])
        yield warning("models served", found, mend)
    if listed.models:
        yield ok("models served", ", ".join(model.model for model in listed.models))

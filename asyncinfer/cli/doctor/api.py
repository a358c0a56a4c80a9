"""What a doctor says of the API: whether it answers, how, and who has its port."""

import shlex
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from msgspec import UnsetType

from asyncinfer.cli.addresses import api_url
from asyncinfer.cli.api_client import ModelList, Service
from asyncinfer.cli.doctor.findings import Finding, ok, problem, warning
from asyncinfer.cli.doctor.machine import port_is_taken
from asyncinfer.cli.options import Server
from asyncinfer.cli.output import counted
from asyncinfer.cli.serve import configuration
from asyncinfer.cli.starved_queues import (
    mend_starved,
    queue_name,
    told_starved,
    told_waiting,
    waiting_jobs,
)
from asyncinfer.errors import AsyncinferError, StartError
from asyncinfer.schemas.operations import Queue, QueueList
from asyncinfer.schemas.responses import Health
from asyncinfer.settings import Settings


def examine_api(chosen: Settings, url: str | None, api_key: str | None) -> Iterator[Finding]:
    """At `url`, else where these settings would have it."""
    at = url or api_url(chosen.host, chosen.port)
    parts = urlsplit(at)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not port_is_taken(parts.hostname or "127.0.0.1", port):
        yield _silent(at, asked=url is not None)
    else:
        with Service(Server(at, api_key)) as service:
            yield from _answers(service, at, chosen)
    if chosen.monitor_port and port_is_taken(chosen.monitor_host, chosen.monitor_port):
        found = f"port {chosen.monitor_port} is in use: by a worker of yours, or a stranger"
        yield ok("monitor port", found)


def _silent(at: str, *, asked: bool) -> Finding:
    if asked:
        return problem("API", f"nothing listens at {at}", "asyncinfer serve, or correct the URL")
    return ok("port", f"{at} is free for `asyncinfer serve`")


def _answers(service: Service, at: str, chosen: Settings) -> Iterator[Finding]:
    try:
        health = service.ask_as(Health, "GET", "/health")
    except AsyncinferError as error:
        if error.code == "not_asyncinfer":
            mend = f"stop it, or choose another port: asyncinfer serve --port {chosen.port + 1}"
            yield problem("port", f"another program answers at {at}", mend)
        else:
            yield problem("API", f"{at}: {error.detail}", "look at the log of `asyncinfer serve`")
        return
    if isinstance(health.queues, UnsetType):
        # How much waits is told to keys with the scope `read`; a missing one is found below.
        yield ok("API", f"answers at {at}")
        yield from _models(service, ())
        return
    waiting = sum(health.queues.values())
    queues = _queues(service)
    starved = [one for one in queues if one.starved]
    waits = f"{counted(waiting, 'job')} {'waits' if waiting == 1 else 'wait'}"
    found = f"answers at {at}; {waits}, {counted(health.workers or 0, 'worker')}"
    if waiting and not health.workers and not starved:
        yield problem("API", f"{found}: nobody works", "asyncinfer work")
    else:
        yield ok("API", found)
    for one in starved:
        mend = mend_starved(one, _folder_of(queue_name(one), chosen))
        yield problem(f"queue {queue_name(one)}", told_starved(one), mend)
    yield from _models(service, [one for one in queues if one.paused and waiting_jobs(one)])


def _queues(service: Service) -> list[Queue]:
    try:
        return service.ask_as(QueueList, "GET", "/queues").queues
    except AsyncinferError:
        # It was let in to /health a moment ago: a server that now fails is found out below.
        return []


def _folder_of(model: str, chosen: Settings) -> str:
    """The folder of these settings where it has the model, for a shell; else empty."""
    try:
        source = configuration.source(chosen)
        names = {file.model for file in source.files()}
    except (StartError, OSError):
        return ""
    return shlex.quote(str(source.watched)) if model in names else ""


def _models(service: Service, held_up: Sequence[Queue]) -> Iterator[Finding]:
    """`held_up` are the queues of paused models that have jobs."""
    try:
        listed = service.ask_as(ModelList, "GET", "/models")
    except AsyncinferError as error:
        if error.code in ("unauthorized", "forbidden"):
            mend = "export ASYNCINFER_API_KEY=..., a key with the scope read"
            yield warning("API key", error.detail, mend)
        else:
            yield problem("models served", error.detail, "look at the log of the workers")
        return
    for one in listed.all_problems:
        name = "/".join(filter(None, (one.get("model"), one.get("version"))))
        reason = str(one.get("reason"))
        mend = "replace the file; a worker looks again by itself"
        if "MODEL_DIR" in reason:
            mend = "start that worker with another MODEL_DIR or MODELS"
        yield warning(f"worker {one.get('worker')}", f"{name}: {reason}", mend)
    paused = [one.model for one in listed.models if one.paused]
    if paused:
        mend = f"asyncinfer resume {paused[0]}"
        found = "; ".join([f"{', '.join(paused)}: paused", *map(told_waiting, held_up)])
        yield warning("models served", found, mend)
    if listed.models:
        yield ok("models served", ", ".join(one.model for one in listed.models))

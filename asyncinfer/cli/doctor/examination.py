"""Everything that a doctor looks at, in the order in which it matters."""

from pathlib import Path

from asyncinfer.cli import parts
from asyncinfer.cli.doctor.api import examine_api
from asyncinfer.cli.doctor.findings import Finding, problem, warning
from asyncinfer.cli.doctor.machine import examine_machine
from asyncinfer.cli.doctor.models import examine_models
from asyncinfer.cli.doctor.server import examine_redis
from asyncinfer.errors import StartError
from asyncinfer.settings import Settings


def examine(chosen: Settings, url: str | None, api_key: str | None) -> list[Finding]:
    import anyio

    return [
        *anyio.run(_examine_redis, chosen),
        *anyio.run(_examine_models, chosen),
        *examine_machine(chosen, _embedded_data_dir(chosen)),
        *examine_api(chosen, url, api_key),
    ]


async def _examine_redis(chosen: Settings) -> list[Finding]:
    try:
        url = parts.reachable_redis_url(chosen)
    except StartError:
        where = f"no REDIS_URL, and no `serve` runs its embedded Valkey on {parts.data_dir(chosen)}"
        return [warning("Redis", where, "asyncinfer serve")]
    return await examine_redis(url, chosen.queue_name, _examined(chosen))


def _examined(chosen: Settings) -> Path | None:
    """The folder or the one file that is examined; None where there is no such folder."""
    try:
        return parts.source(chosen).path
    except StartError:
        return None


async def _examine_models(chosen: Settings) -> list[Finding]:
    try:
        source = parts.source(chosen)
    except StartError as error:
        return [problem("models", error.detail, "set MODEL_DIR, or MODEL to one file")]
    return await examine_models(source, allow_custom_ops=chosen.allow_custom_ops)


def _embedded_data_dir(chosen: Settings) -> Path | None:
    return None if parts.redis_url(chosen) else parts.data_dir(chosen)

"""All checks of `doctor`, the most important first."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from asyncinfer.cli.doctor.api import examine_api
from asyncinfer.cli.doctor.findings import Finding, problem, warning
from asyncinfer.cli.doctor.machine import examine_machine
from asyncinfer.cli.doctor.models import examine_models
from asyncinfer.cli.doctor.redis import examine_redis
from asyncinfer.cli.serve import configuration
from asyncinfer.errors import StartError
from asyncinfer.settings import Settings


def examine(
    settings: Settings, url: str | None, api_key: str | None, ca: str | None = None
) -> list[Finding]:
    """Runs all checks of `doctor` and returns the findings, Redis first and the API last.

    `url`, `api_key` and `ca` are those of the API, None if not given. It loads each model in a
    child process, which may take minutes. A server that does not answer or a folder that cannot be
    read is a finding, not an exception.
    """
    import anyio

    found = [
        *with_embedded_fixes(anyio.run(_examine_redis, settings), _embedded_data_dir(settings)),
        *anyio.run(_examine_models, settings),
        *examine_machine(settings, _embedded_data_dir(settings)),
        *examine_api(settings, url, api_key, ca),
    ]
    return without_repeats(without_consequences(found))


def without_repeats(found: Sequence[Finding]) -> list[Finding]:
    """The findings without those that the API's workers report and a check of a model found too."""
    reasons = {finding.found for finding in found if finding.about.startswith("model ")}
    return [
        finding
        for finding in found
        if not (finding.about.startswith("worker ") and finding.found.partition(": ")[2] in reasons)
    ]


def with_embedded_fixes(found: Sequence[Finding], data_dir: Path | None) -> list[Finding]:
    """A copy in which the fixes of Redis problems are those for an embedded Valkey of `serve`.

    `data_dir` is that Valkey's folder; None if Redis is not embedded: then nothing is replaced.
    """
    if data_dir is None:
        return list(found)
    fixes = {
        "Redis": "read the log of `asyncinfer serve`, or restart it",
        "Redis memory": "raise EMBEDDED_MAXMEMORY or lower JOB_TTL, and restart `asyncinfer serve`",
        "Redis disk": f"free the disk of {data_dir}; then the jobs go on by themselves",
    }
    return [
        msgspec.structs.replace(finding, mend=fixes.get(finding.about, finding.mend))
        if finding.verdict == "problem"
        else finding
        for finding in found
    ]


def without_consequences(found: Sequence[Finding]) -> list[Finding]:
    """Leaves out problems of Redis if the disk of DATA_DIR is full.

    That is why its Valkey does not write, answer or start.
    """
    if not any(finding.about == "DATA_DIR disk" for finding in found):
        return list(found)
    consequences = ("Redis", "Redis disk")
    return [
        finding for finding in found if finding.verdict == "ok" or finding.about not in consequences
    ]


async def _examine_redis(settings: Settings) -> list[Finding]:
    """Checks the Redis of the settings or the running embedded one; warns if there is neither."""
    try:
        url = configuration.reachable_redis_url(settings)
    except StartError:
        folder = configuration.data_dir(settings)
        reason = f"REDIS_URL is not set, and no `serve` runs an embedded Valkey in {folder}"
        return [warning("Redis", reason, "asyncinfer serve")]
    return await examine_redis(url, settings.queue_name, _models_path(settings))


def _models_path(settings: Settings) -> Path | None:
    """The folder or the one file of the models; None if it is not there."""
    try:
        return configuration.source(settings).path
    except StartError:
        return None


async def _examine_models(settings: Settings) -> list[Finding]:
    """Checks the model folder of the settings; a problem if there is no such folder."""
    try:
        source = configuration.source(settings)
    except StartError as error:
        return [problem("models", error.detail, "set MODEL_DIR, or MODEL to one file")]
    return await examine_models(source, allow_custom_ops=settings.allow_custom_ops)


def _embedded_data_dir(settings: Settings) -> Path | None:
    """The data folder of the embedded Valkey; None if the settings name a Redis."""
    return None if configuration.redis_url(settings) else configuration.data_dir(settings)

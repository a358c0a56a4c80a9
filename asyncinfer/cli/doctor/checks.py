"""Everything that a doctor looks at, in the order in which it matters."""

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


def examine(chosen: Settings, url: str | None, api_key: str | None) -> list[Finding]:
    import anyio

    found = [
        *mended_by_serve(anyio.run(_examine_redis, chosen), _embedded_data_dir(chosen)),
        *anyio.run(_examine_models, chosen),
        *examine_machine(chosen, _embedded_data_dir(chosen)),
        *examine_api(chosen, url, api_key),
    ]
    return without_repeats(without_effects(found))


def without_repeats(found: Sequence[Finding]) -> list[Finding]:
    """What a worker refuses for the reason that was found here too is one problem."""
    here = {one.found for one in found if one.about.startswith("model ")}
    return [
        one
        for one in found
        if not (one.about.startswith("worker ") and one.found.partition(": ")[2] in here)
    ]


def mended_by_serve(found: Sequence[Finding], data_dir: Path | None) -> list[Finding]:
    """Nobody starts or mends the embedded Valkey by hand: `data_dir` where it is that."""
    if data_dir is None:
        return list(found)
    mends = {
        "Redis": "look at the log of `asyncinfer serve`, or stop and start it",
        "Redis disk": f"free the disk of {data_dir}; the jobs go on by themselves then",
    }
    return [
        msgspec.structs.replace(one, mend=mends.get(one.about, one.mend))
        if one.verdict == "problem"
        else one
        for one in found
    ]


def without_effects(found: Sequence[Finding]) -> list[Finding]:
    """A full disk of DATA_DIR is why its Valkey does not write, answer or start: one problem."""
    if not any(one.about == "DATA_DIR disk" for one in found):
        return list(found)
    return [one for one in found if one.verdict == "ok" or one.about not in ("Redis", "Redis disk")]


async def _examine_redis(chosen: Settings) -> list[Finding]:
    try:
        url = configuration.reachable_redis_url(chosen)
    except StartError:
        folder = configuration.data_dir(chosen)
        where = f"no REDIS_URL, and no `serve` runs its embedded Valkey on {folder}"
        return [warning("Redis", where, "asyncinfer serve")]
    return await examine_redis(url, chosen.queue_name, _examined(chosen))


def _examined(chosen: Settings) -> Path | None:
    """The folder or the one file that is examined; None where there is no such folder."""
    try:
        return configuration.source(chosen).path
    except StartError:
        return None


async def _examine_models(chosen: Settings) -> list[Finding]:
    try:
        source = configuration.source(chosen)
    except StartError as error:
        return [problem("models", error.detail, "set MODEL_DIR, or MODEL to one file")]
    return await examine_models(source, allow_custom_ops=chosen.allow_custom_ops)


def _embedded_data_dir(chosen: Settings) -> Path | None:
    return None if configuration.redis_url(chosen) else configuration.data_dir(chosen)

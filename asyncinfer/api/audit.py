"""The audit log: a line and an entry for what is done to many jobs, to models, across tenants."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.api.http.messages import Request
from asyncinfer.api.services import Services
from asyncinfer.errors import Forbidden, RequestError
from asyncinfer.repository.audit import BROKEN_OFF, DONE, shortened
from asyncinfer.schemas.requests import ALL_TENANTS, AUDIT_ACTIONS
from asyncinfer.untrusted.printable import printable_json

_OF_ONE: Final = ("/job/", "/group/{group}/webhook/")
"""How the paths of routes about one job, or one webhook of a group, begin."""
_READS: Final = ("list", "read")

_log = logging.getLogger("asyncinfer.audit")


class Audit:
    """The outcome of a request, for its line; `audited` yields it."""

    def __init__(self) -> None:
        self.count: int | None = 0
        """Jobs that the request changed or showed; set it inside `audited`. None: it is about a
        model as such."""


@asynccontextmanager
async def audited(
    services: Services,
    request: Request[Any],
    verb: str,
    criteria: Mapping[str, object],
    *,
    of_many: bool = False,
    over_tenants: bool = False,
) -> AsyncIterator[Audit]:
    """Writes a line to the audit log when the block ends, also if it raises; and adds an entry,
    unless the request only reads. Does neither if a caller stays within its tenant, unless the act
    is `of_many` jobs, or `over_tenants`, which means all tenants. `criteria` are what the jobs were
    selected by, by name; empty values are left out."""
    audit, outcome = Audit(), BROKEN_OFF
    try:
        yield audit
        outcome = DONE
    except RequestError as error:
        outcome = error.code
        raise
    finally:
        across = request.reach.across or over_tenants
        if across or of_many:
            tenant = request.reach.tenant or ALL_TENANTS
            act = _Act(
                verb=verb,
                criteria=_given({"tenant": ALL_TENANTS if over_tenants else tenant, **criteria}),
                jobs=audit.count,
                outcome=outcome,
                is_across=across,
            )
            await _note(services, request, act)


async def note_refusal(
    services: Services, request: Request[Any], method: str, path: str, error: Forbidden
) -> None:
    """Writes a line and adds an entry for a request that `audited` would have noted, and that was
    refused since its key lacks a scope; does nothing for another. `path` is that of the route."""
    filters = msgspec.structs.asdict(request.query)
    verb = path.rpartition("/")[2]
    is_purge = filters.pop("purge", False)
    if method == "DELETE":
        verb = "purge" if is_purge else "cancel"
    elif path.startswith("/models/") and verb == "cancel":
        verb = "cancel_queue"
    is_of_own_one = path.startswith(_OF_ONE) and not filters.get("tenant")
    if verb not in AUDIT_ACTIONS or is_of_own_one:
        return
    named = {"job_id": "id", "model": "model", "group": "group"}
    criteria = {
        "tenant": request.tenant,
        **_given(filters),
        **_given({name: request.path(part) for name, part in named.items()}),
    }
    act = _Act(verb=verb, criteria=criteria, jobs=0, outcome=error.code, is_across=False)
    await _note(services, request, act)


class _Act(Struct, frozen=True, kw_only=True):
    """What is noted of a request."""

    verb: str
    criteria: dict[str, str | int | bool]
    jobs: int | None
    outcome: str
    is_across: bool


def _given(criteria: Mapping[str, object]) -> dict[str, str | int | bool]:
    """The criteria that are not empty."""
    return {
        name: value for name, value in criteria.items() if value and isinstance(value, str | int)
    }


async def _note(services: Services, request: Request[Any], act: _Act) -> None:
    """Logs the act with its outcome: how many jobs, `done`, the code of an error or `broken_off`.
    Adds its entry, unless Redis takes none, which is logged: the act itself is done."""
    admission, outcome = request.admission, act.outcome
    if outcome == DONE and act.jobs is not None:
        outcome = f"{act.jobs} jobs"
    _log.info(
        "%s by tenant=%s key=%s: %s: %s",
        act.verb,
        admission.tenant,
        admission.shown_key or "none",
        " ".join(f"{name}={_text(value)}" for name, value in act.criteria.items()),
        outcome,
        extra={"request_id": request.request_id},
    )
    if act.verb in _READS:
        return
    try:
        await services.audit_entries.add(
            act.verb,
            act.criteria,
            by=(admission.tenant, admission.shown_key),
            jobs=act.jobs,
            outcome=act.outcome,
            of_tenants=not act.is_across,
        )
    except RequestError as error:
        _log.warning("The line before has no entry in the audit log: %s", error.detail)


def _text(value: str | int | bool) -> str:
    """The value as JSON in printable characters, a string cut to 128: a name in a query may hold a
    line break or a control character."""
    return printable_json(msgspec.json.encode(shortened(value)).decode())

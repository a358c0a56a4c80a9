"""The route of the audit log."""

from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.services import Services
from asyncinfer.schemas.requests import AuditQuery


async def list_audit(services: Services, request: Request[AuditQuery]) -> Reply:
    """What was done to many jobs, to models and across tenants, newest first.

    One page, which may be short, and the cursor of the next, None at the end. Raises InvalidQuery
    for an invalid cursor, and RedisUnavailable.
    """
    query = request.query
    page = await services.audit_log.page(
        action=query.action,
        tenant=request.reach.tenant if request.reach.across else None,
        limit=query.limit,
        cursor=query.cursor,
    )
    return json_reply(200, page)

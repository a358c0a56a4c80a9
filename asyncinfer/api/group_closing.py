"""Closing a group, and the errors if it is not closed."""

from typing import Final

from asyncinfer.api.group_lookup import group_not_found_error
from asyncinfer.api.inputs.new_job import webhooks_full_error
from asyncinfer.api.services import Services
from asyncinfer.errors import GroupClosed, InvalidQuery, TooManyGroups
from asyncinfer.jobs import Options
from asyncinfer.repository.closed_groups import MAX_CLOSING
from asyncinfer.repository.deliveries import Target

_FULL_RETRY_SECONDS: Final = 30
_FULL: Final = {
    "full": f"{MAX_CLOSING:,} closed groups with a webhook, of all tenants together, have jobs "
    "that have not ended.",
    "tenant_full": "Your closed groups with a webhook whose jobs have not ended are as many as may "
    f"still be closed by all tenants: a tenant has half of {MAX_CLOSING:,} at the most, and less "
    "where others have some.",
}


def group_to_close(options: Options) -> str:
    """The group that `close=true` in a query closes; raises InvalidQuery if none is named."""
    if options.group is None:
        raise InvalidQuery(
            "Query parameter `close`: it closes the group of what is submitted; name one with "
            "`group`, in the query where the body has lines."
        )
    return options.group


async def close_group(
    services: Services, tenant: str, group: str, target: Target | None = None
) -> None:
    """Lets no more jobs join a group; once all have ended, its webhook goes to `target`, if any.
    Raises GroupNotFound, GroupClosed if it has another webhook, TooManyGroups, WebhooksFull or
    RedisUnavailable."""
    verdict = await services.closed_groups.close(tenant, group, target)
    if verdict == "absent":
        raise group_not_found_error()
    if verdict == "other":
        raise GroupClosed(
            f"The group {group} was closed with another webhook, which stays as it is. Close it "
            "with the same webhook, or with none."
        )
    if verdict in _FULL:
        raise TooManyGroups(
            f"{_FULL[verdict]} Close this one once others have ended, or without a webhook.",
            retry_after_seconds=_FULL_RETRY_SECONDS,
        )
    if verdict == "webhooks_full":
        raise webhooks_full_error(services.config.policy)

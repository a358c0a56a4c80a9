"""Answers about webhooks: what became of their deliveries, and which hosts fail."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

DeliveryStatus = Literal["pending", "delivered", "gone", "given_up"]

_ROUND = "The round of the job that ended; of a group when it was closed, in ms since 1970."
_WEBHOOK_ID = "The `webhook-id` that the receiver sees, the same in each try."


class WebhookAttempt(Struct, frozen=True, kw_only=True):
    """One try to tell the end of a job or a group."""

    at: datetime | None
    status: Annotated[int | None, Meta(description="Of the answer; null without one.")]
    error: Annotated[str | None, Meta(description="Why there was no answer; null with one.")]
    seconds: float


class WebhookDelivery(Struct, frozen=True, kw_only=True):
    """The telling of one end of a job or a group."""

    webhook_id: Annotated[str, Meta(description=_WEBHOOK_ID)]
    round: Annotated[int, Meta(description=_ROUND)]
    event: Annotated[
        str, Meta(description="How it ended: completed, failed or cancelled; of a group `ended`.")
    ]
    status: Annotated[
        DeliveryStatus,
        Meta(description="`pending`: to come; `gone`: the receiver answered 410."),
    ]
    tries: Annotated[int, Meta(description="Since it began, or was started anew.")]
    next_at: Annotated[datetime | None, Meta(description="When the next try is due.")]
    attempts: Annotated[list[WebhookAttempt], Meta(description="The last 20, the oldest first.")]


class JobWebhook(Struct, frozen=True, kw_only=True):
    """The webhook of a job, and what became of its deliveries."""

    job_id: str
    url: Annotated[
        str | None, Meta(description="Where it goes; across tenants only the host, as a URL.")
    ]
    events: Annotated[list[str], Meta(description="The ends that are told.")]
    deliveries: Annotated[
        list[WebhookDelivery], Meta(description="One for each round that ended so, in order.")
    ]


class GroupWebhook(Struct, frozen=True, kw_only=True):
    """The webhook of a closed group, and what became of its delivery."""

    group: str
    url: str
    deliveries: Annotated[
        list[WebhookDelivery], Meta(description="One, once all jobs of the group have ended.")
    ]


class WebhookHost(Struct, frozen=True, kw_only=True):
    """The deliveries to a host that are to come or were given up."""

    host: str
    pending: Annotated[int, Meta(description="Deliveries to come.")]
    failing: Annotated[int, Meta(description="Those of them whose last try failed.")]
    given_up: Annotated[int, Meta(description="Deliveries that were given up lately.")]
    last_status: Annotated[int | None, Meta(description="Of the last answer; null without one.")]
    last_error: Annotated[str | None, Meta(description="Why the last try had no answer.")]
    last_at: Annotated[datetime | None, Meta(description="When the last try began.")]
    next_at: Annotated[datetime | None, Meta(description="When the first one to come is due.")]


_CURSOR = "The `cursor` of the next page; null on the last page."


class WebhookList(Struct, frozen=True):
    """A page of the hosts that webhooks go to, those with most failures first; one that has more
    deliveries is on a later page, too."""

    hosts: list[WebhookHost]
    cursor: Annotated[str | None, Meta(description=_CURSOR)]


class RedeliverResult(Struct, frozen=True):
    """How many deliveries were started anew."""

    redelivered: int
    refused: Annotated[int, Meta(description="For which there was no room (MAX_WEBHOOKS).")]
    cursor: Annotated[
        str | None, Meta(description="Send the request again with it; null: none are left.")
    ]

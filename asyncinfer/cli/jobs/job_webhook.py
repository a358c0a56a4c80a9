"""The lines of `asyncinfer job ID` on the job's webhook."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from asyncinfer.cli.output import utc
from asyncinfer.errors import RequestError

if TYPE_CHECKING:
    from asyncinfer.client import Job, WebhookDelivery


def webhook_lines(job: "Job") -> Iterator[str]:
    """What became of each delivery of the job's webhook, in order; nothing if it has none."""
    try:
        webhook = job.webhook()
    except RequestError as error:
        if error.status != 404:  # it has no webhook, or was deleted a moment ago
            raise
        return
    yield f"{webhook.url or 'a URL that is not kept'} is told of: {', '.join(webhook.events)}"
    for delivery in webhook.deliveries:
        yield f"{delivery.event}, round {delivery.round}: {_delivery_text(delivery)}"


def _delivery_text(delivery: "WebhookDelivery") -> str:
    """What became of a delivery, and when the next try is."""
    last = delivery.attempts[-1] if delivery.attempts else None
    reason = (last.error or f"HTTP {last.status}") if last else ""
    tries = f"{delivery.tries} {'try' if delivery.tries == 1 else 'tries'}"
    match delivery.status:
        case "delivered":
            return f"delivered after {tries}, {utc(last.at) if last else ''}".rstrip(", ")
        case "gone":
            return f"given up: the receiver answered that it is gone ({reason})"
        case "given_up":
            return f"given up after {tries}: {reason}"
        case _:
            failed = f"{tries} failed: {reason}; " if delivery.tries else ""
            return f"{failed}next try {utc(delivery.next_at) or 'at once'}"

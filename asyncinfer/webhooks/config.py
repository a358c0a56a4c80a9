"""The configuration of webhooks in an API process."""

from pathlib import Path

from msgspec import Struct


class WebhookConfig(Struct, frozen=True, kw_only=True):
    """What an API process knows of webhooks when it is started."""

    sends: bool = True
    """Whether this process sends webhooks; others may do it instead."""
    secrets: Path | None = None
    allow: tuple[str, ...] = ()
    """`host:port` of receivers that may have http and any address."""
    proxy_url: str | None = None
    public_url: str | None = None
    """Where clients reach the API, without a slash at its end."""

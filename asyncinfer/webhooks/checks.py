"""What is checked of a webhook before its job is accepted."""

import math
import time

from asyncinfer.errors import WebhookRefused
from asyncinfer.webhooks.config import WebhookConfig
from asyncinfer.webhooks.secrets_file import LOOK_SECONDS, Secrets, SecretsFile
from asyncinfer.webhooks.url_rules import Target, UrlRules

_NO_SECRETS = Secrets()


class WebhookChecks:
    """Checks webhooks at a submit and again at each send, since anyone may write to Redis; one for
    each API process."""

    def __init__(
        self, config: WebhookConfig, *, needs_secret: bool, look_seconds: float = LOOK_SECONDS
    ) -> None:
        """Reads the file of secrets. `needs_secret` says whether a webhook without a secret is
        refused, as where API keys are in use; the file is read again every `look_seconds`.
        Raises SecretsFileRefused and InvalidSetting."""
        self.rules = UrlRules(config.allow)
        self.file = (
            SecretsFile(config.secrets, look_seconds=look_seconds) if config.secrets else None
        )
        self.needs_secret = needs_secret
        self.passed_at = -math.inf
        """When a webhook was last accepted, by the monotonic clock in seconds."""

    def check(self, url: str, tenant: str) -> Target:
        """The parts of a URL that a tenant's webhook may have; does no I/O. Raises WebhookRefused
        if the URL is not allowed, or if it needs a secret and has none."""
        target = self.rules.check(url)
        if self.needs_secret and not self.keys_of(tenant, target.host):
            raise WebhookRefused(
                f"The tenant {tenant} has no secret for webhooks to {target.host}. Ask the "
                "operator for a line in WEBHOOK_SECRETS."
            )
        self.passed_at = time.monotonic()
        return target

    def keys_of(self, tenant: str, host: str) -> tuple[bytes, ...]:
        """The keys that sign a tenant's webhooks to a host, as they are now."""
        secrets = self.file.secrets if self.file else _NO_SECRETS
        return secrets.keys_of(tenant, host)

"""A sender of webhooks as an API process runs it, for tests in one process."""

import base64
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from standardwebhooks.webhooks import Webhook as StandardWebhook

from asyncinfer.api.views import job_view
from asyncinfer.jobs import Webhook
from asyncinfer.repository.store import Store
from asyncinfer.webhooks.answers import TRY_SECONDS
from asyncinfer.webhooks.bodies import Bodies
from asyncinfer.webhooks.checks import WebhookChecks
from asyncinfer.webhooks.config import WebhookConfig
from asyncinfer.webhooks.figures import WebhookFigures
from asyncinfer.webhooks.posting import Poster
from asyncinfer.webhooks.resolver import Resolver, look_up
from asyncinfer.webhooks.sender import LEASE_SECONDS, Sender
from tests.webhooks.receiver import Received, Receiver

SECRETS = tuple("whsec_" + base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))


def secrets_file(folder: Path, *lines: str) -> Path:
    path = folder / "secrets"
    path.write_text("".join(f"{line}\n" for line in lines))
    path.chmod(0o600)
    return path


def is_signed(request: Received, secret: str) -> bool:
    """Whether the library of Standard Webhooks accepts the request; it raises if not."""
    StandardWebhook(secret).verify(request.body, dict(request.headers))
    return True


def webhook(url: str, **options: Any) -> Webhook:
    return Webhook(url=url, **options)


class RunningSender:
    """A sender that runs, and what it counts."""

    def __init__(self, sender: Sender, checks: WebhookChecks, figures: WebhookFigures) -> None:
        self.sender = sender
        self.checks = checks
        self.figures = figures

    def tries(self) -> dict[tuple[str, ...], int]:
        return dict(self.figures.tries)


@asynccontextmanager
async def running_sender(
    store: Store,
    *receivers: Receiver,
    secrets: Path | None = None,
    needs_secret: bool = False,
    public_url: str | None = None,
    resolve: Callable[[str], Sequence[str]] = look_up,
    try_seconds: float = TRY_SECONDS,
    lease_seconds: float = LEASE_SECONDS,
) -> AsyncIterator[RunningSender]:
    """Runs a sender that may call these receivers; it is closed at the end of the block."""
    allow = tuple(f"{host}:{each.port}" for each in receivers for host in each.names)
    config = WebhookConfig(secrets=secrets, allow=allow)
    checks, figures = (
        WebhookChecks(config, needs_secret=needs_secret, look_seconds=0.05),
        WebhookFigures(),
    )
    checks.passed_at = 0.0

    def open_poster() -> Poster:
        return Poster(checks.rules, Resolver(resolve), try_seconds=try_seconds)

    bodies = Bodies(lambda stored: job_view(stored, None), public_url)
    sender = Sender(store, checks, open_poster, bodies, figures, lease_seconds=lease_seconds)
    async with anyio.create_task_group() as group:
        group.start_soon(sender.run)
        if checks.file:
            group.start_soon(checks.file.run)
        try:
            yield RunningSender(sender, checks, figures)
        finally:
            with anyio.CancelScope(shield=True):
                await sender.close()
            group.cancel_scope.cancel()

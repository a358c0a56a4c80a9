"""The sender of webhooks of one API process, from its start to its end."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from asyncinfer.api.services import Services
from asyncinfer.api.views import job_view
from asyncinfer.webhooks.bodies import Bodies
from asyncinfer.webhooks.resolver import Resolver
from asyncinfer.webhooks.sender import Sender

if TYPE_CHECKING:
    from asyncinfer.webhooks.posting import Poster


@asynccontextmanager
async def sending_webhooks(services: Services) -> AsyncIterator[None]:
    """Sends webhooks within the block, if this process does, and reads the file of secrets again
    when it changes. At the end it waits up to 2 s for tries that run."""
    async with anyio.create_task_group() as group:
        if services.webhook_checks.file:
            group.start_soon(services.webhook_checks.file.run)
        sender = _sender(services) if services.config.webhooks.sends else None
        if sender:
            group.start_soon(sender.run)
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                if sender:
                    await sender.close()
            group.cancel_scope.cancel()


def _sender(services: Services) -> Sender:
    config, catalog = services.config.webhooks, services.catalog

    def open_poster() -> "Poster":
        from asyncinfer.webhooks.posting import Poster

        return Poster(services.webhook_checks.rules, Resolver(), proxy_url=config.proxy_url)

    bodies = Bodies(lambda stored: job_view(stored, catalog.default_model), config.public_url)
    return Sender(
        services.store, services.webhook_checks, open_poster, bodies, services.webhook_figures
    )

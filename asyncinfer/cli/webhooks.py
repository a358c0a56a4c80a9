"""The command `webhooks`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from asyncinfer.cli import options
from asyncinfer.cli.api_client import connect
from asyncinfer.cli.exit_codes import EXIT_FAILED, say_error
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.output import say, say_json, say_on_stderr, show, utc

if TYPE_CHECKING:
    from asyncinfer.client import Client, WebhookHost


@options.command(
    "webhooks",
    "asyncinfer webhooks",
    "asyncinfer webhooks --redeliver --host hooks.example.com",
    "asyncinfer webhooks --redeliver --given-up",
)
@click.option(
    "--redeliver",
    is_flag=True,
    help="Send those again that were given up or whose last try failed, at once.",
)
@click.option("--host", metavar="HOST", help="Only those to this host, as listed.")
@click.option("--model", metavar="NAME", help="With --redeliver: only those of this model.")
@click.option("--given-up", is_flag=True, help="With --redeliver: only those that were given up.")
@options.tenant("Webhooks")
@options.server
@options.as_json
def webhooks(
    redeliver: bool,
    host: str | None,
    model: str | None,
    given_up: bool,
    tenant: str | None,
    server: ServerOptions,
    as_json: bool,
) -> int:
    """List the hosts that webhooks go to; send many again.

    A host is listed while a webhook to it is to come, or was given up lately; those that fail most
    come first. `--redeliver` needs at least one of --host, --model and --given-up.
    """
    filters = {"host": host, "model": model, "given_up": given_up, "tenant": tenant}
    if redeliver and not (host or model or given_up):
        raise click.UsageError("Say which to send again: by --host, --model or --given-up.")
    if not redeliver and (model or given_up):
        raise click.UsageError("--model and --given-up go with --redeliver.")
    with connect(server) as client:
        if redeliver:
            return _redeliver(client, filters, as_json)
        _list(client.webhooks(tenant=tenant), host, as_json)
    return 0


def _redeliver(client: "Client", filters: dict[str, Any], as_json: bool) -> int:
    """Sends webhooks again, and says how many; returns 1 if some were refused."""
    done = client.redeliver_webhooks(**filters)
    if as_json:
        say_json(done)
    else:
        say(f"{done.redelivered:,} sent again.\n")
    if done.refused:
        say_error(f"{done.refused:,} had no room: raise MAX_WEBHOOKS, or try again later.")
    return EXIT_FAILED if done.refused else 0


def _list(hosts: "Sequence[WebhookHost]", host: str | None, as_json: bool) -> None:
    wanted = [one for one in hosts if host in (None, one.host)]
    if as_json:
        say_json(wanted)
        return
    counts = ("PENDING", "FAILING", "GIVEN UP")
    show(("HOST", *counts, "LAST TRY", "AT", "NEXT"), map(_row, wanted), numeric=counts)
    if not wanted:
        say_on_stderr("No webhook is to be delivered, and none was given up lately.")


def _row(one: "WebhookHost") -> Sequence[object]:
    """The cells of a host; times are UTC."""
    last = one.last_status or one.last_error or ""
    times = utc(one.last_at), utc(one.next_at)
    return one.host, one.pending, one.failing, one.given_up, last, *times

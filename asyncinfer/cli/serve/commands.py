"""The commands that start something: `serve`, `work`, and the keys they know callers by."""

import sys

import click

from asyncinfer.cli import options
from asyncinfer.cli.output import say
from asyncinfer.errors import InvalidSetting
from asyncinfer.settings import Settings


@options.command(
    "serve",
    "asyncinfer serve --port 8001 --job-ttl 600    # seconds that an ended job is kept",
    "REDIS_URL=redis://127.0.0.1:6379 asyncinfer serve --work",
    options_metavar="[--help] [setting ...]",
)
@click.option("--work", is_flag=True, help="Run a worker too, beside your Redis.")
@click.option(
    "--insecure", is_flag=True, help="Let everyone in who reaches HOST, without API keys."
)
@options.knobs()
def serve(*, work: bool, insecure: bool, chosen: Settings) -> int:
    """Run the API; with no Redis configured, all of it.

    Settings are given by flag or by environment variable, [NAMED] here; a flag wins.
    """
    from asyncinfer.cli.serve.serve import run_serve

    return run_serve(chosen, work=work, insecure=insecure)


@options.command(
    "work",
    "asyncinfer work --concurrency 4 --prediction-timeout 30    # threads; seconds a run may take",
    "REDIS_URL=redis://127.0.0.1:6379 asyncinfer work --models iris,digits",
    options_metavar="[--help] [setting ...]",
)
@options.knobs()
def work(chosen: Settings) -> int:
    """Run a worker.

    It takes jobs from REDIS_URL, or from the embedded Valkey of a `serve` with the same DATA_DIR.
    Settings are given by flag or by environment variable, [NAMED] here; a flag wins.
    """
    from asyncinfer.cli.serve.work import run_work

    return run_work(chosen)


@options.command(
    "keygen",
    "asyncinfer keygen >> keys",
    "asyncinfer keygen --tenant acme --scopes submit,read >> keys",
    "asyncinfer keygen --tenant ops --scopes read,admin,operator >> keys",
)
@click.option("--tenant", default="default", show_default=True, help="Whose jobs it sees.")
@click.option(
    "--scopes",
    default="submit,read",
    show_default=True,
    help="Of submit, read, admin (workers, pause), operator (jobs of all tenants).",
)
@options.as_json
def keygen(tenant: str, scopes: str, as_json: bool) -> None:
    """Make an API key.

    The key is shown once, on stderr. Its line for the API_KEYS file goes to stdout.
    """
    from asyncinfer import api_keys

    key = api_keys.new_key()
    try:
        entry = api_keys.entry_of(key, tenant, scopes)
    except ValueError as error:
        raise InvalidSetting(f"No key made: {error}.") from error
    if as_json:
        from asyncinfer.cli.output import say_json

        say_json({"key": key, "line": entry.line()})
        return
    sys.stderr.write(f"The key, shown only now: {key}\nIts line for the API_KEYS file:\n")
    sys.stderr.flush()
    say(f"{entry.line()}\n")

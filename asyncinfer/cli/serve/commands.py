"""The commands `serve`, `work` and `keygen`."""

import sys

import click

from asyncinfer.cli import options
from asyncinfer.cli.output import say, say_json
from asyncinfer.errors import InvalidSetting
from asyncinfer.settings import Settings


@options.command(
    "serve",
    "asyncinfer serve --port 8001 --job-ttl 600    # seconds that a completed job is kept",
    "REDIS_URL=redis://127.0.0.1:6379 asyncinfer serve --work",
    options_metavar="[--help] [setting ...]",
    cls=options.SettingsCommand,
)
@click.option("--work", is_flag=True, help="Also run a worker, with your Redis.")
@click.option(
    "--insecure",
    is_flag=True,
    help="Serve on HOST without API keys, to everyone who reaches it.",
)
@options.all_settings()
def serve(*, work: bool, insecure: bool, settings: Settings) -> int:
    """Run the API; with no Redis set, also a Valkey and a worker.

    Each setting is a flag or the environment variable in [BRACKETS]; a flag wins.
    """
    from asyncinfer.cli.serve.serve import run_serve

    return run_serve(settings, work=work, insecure=insecure)


@options.command(
    "work",
    "asyncinfer work --concurrency 4 --prediction-timeout 30    # threads; seconds a run may take",
    "REDIS_URL=redis://127.0.0.1:6379 asyncinfer work --models iris,digits",
    options_metavar="[--help] [setting ...]",
    cls=options.SettingsCommand,
)
@options.all_settings()
def work(settings: Settings) -> int:
    """Run a worker.

    It takes jobs from REDIS_URL, or from the embedded Valkey of a `serve` with the same DATA_DIR.
    Each setting is a flag or the environment variable in [BRACKETS]; a flag wins.
    """
    from asyncinfer.cli.serve.work import run_work

    return run_work(settings)


@options.command(
    "keygen",
    "asyncinfer keygen >> keys",
    "asyncinfer keygen --tenant acme --scopes submit,read >> keys",
    "asyncinfer keygen --tenant ops --scopes read,admin,operator >> keys",
)
@click.option("--tenant", default="default", show_default=True, help="The tenant of the key.")
@click.option(
    "--scopes",
    default="submit,read",
    show_default=True,
    help="Some of: submit; read; admin (see workers, pause models); operator (see all tenants' "
    "jobs).",
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
        say_json({"key": key, "line": entry.line()})
        return
    sys.stderr.write(f"The key, shown only now: {key}\nIts line for the API_KEYS file:\n")
    sys.stderr.flush()
    say(f"{entry.line()}\n")

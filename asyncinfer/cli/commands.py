"""The commands there are, each imported only when it is used."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

import click

from asyncinfer import __version__
from asyncinfer.cli.refusing import EXIT_CANNOT_START, EXIT_CODES, complain

NAME: Final = "asyncinfer"
COMPLETE_VARIABLE: Final = "_ASYNCINFER_COMPLETE"


class _Listed(NamedTuple):
    module: str
    text: str


SECTIONS: Final = {
    "Run the service": {
        "serve": _Listed("starting", "Run the API; with no Redis configured, all of it."),
        "work": _Listed("starting", "Run a worker."),
        "keygen": _Listed("starting", "Make an API key."),
        "doctor": _Listed("doctor", "Find what is wrong here, and the command that mends it."),
    },
    "Use it": {
        "predict": _Listed("predict", "Run rows of a file, of stdin or of the command line."),
        "bench": _Listed("bench", "Measure a model on your deployment, and what limits it."),
    },
    "See and steer it": {
        "top": _Listed("top", "Watch queues and workers, live."),
        "jobs": _Listed("jobs", "List jobs, the newest first."),
        "job": _Listed("jobs", "Show a job with its result."),
        "dead": _Listed("jobs", "List dead letters: jobs given up that may deserve another try."),
        "cancel": _Listed("ending", "Cancel jobs, by name or all that match."),
        "retry": _Listed("ending", "Run failed or cancelled jobs again."),
        "purge": _Listed("ending", "Delete ended jobs with their data."),
        "models": _Listed("models", "List models, or show one with its example."),
        "pause": _Listed("models", "Take a model's jobs in, and run none."),
        "resume": _Listed("models", "Run a paused model's jobs again."),
    },
    "Beside it": {
        "completion": _Listed("completion", "Print the completion script of a shell."),
    },
}
_LISTED: Final = {name: one for section in SECTIONS.values() for name, one in section.items()}

_EPILOG: Final = """\
Commands of the last three groups speak HTTP: --url or ASYNCINFER_URL says where (default
http://127.0.0.1:8000), ASYNCINFER_API_KEY who you are. With --json they print JSON, in a pipe no
colour and nothing but data; NO_COLOR is honoured."""


class _Commands(click.Group):
    """Lists its commands without importing them."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_LISTED)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _LISTED:
            return None
        module = importlib.import_module(f"asyncinfer.cli.{_LISTED[name].module}")
        found: click.Command = getattr(module, name)
        return found

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for title, listed in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, one.text) for name, one in listed.items()], col_max=12)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


@click.group(
    NAME,
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
    subcommand_metavar="COMMAND [ARGS]...",
)
@click.version_option(__version__, message="asyncinfer %(version)s")
def commands() -> None:
    """Any ONNX model behind a durable job queue."""


def parsed(arguments: Sequence[str]) -> int:
    """Runs what was asked for; --help and --version end with SystemExit."""
    if COMPLETE_VARIABLE in os.environ:
        commands.main(list(arguments), prog_name=NAME)  # prints what may follow, and exits
    try:
        with commands.make_context(NAME, list(arguments), obj=tuple(arguments)) as context:
            return int(commands.invoke(context) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(f"{error.format_message()}\n")
        return EXIT_CANNOT_START
    except click.ClickException as error:
        complain(_one_line(error))
        return EXIT_CANNOT_START
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)


def _one_line(error: click.ClickException) -> str:
    said = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx:
        return f"{said} See `{error.ctx.command_path} --help`."
    return said

"""The commands there are, each imported only when it is used."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

import click

from asyncinfer import __version__
from asyncinfer.cli.exit_codes import EXIT_CANNOT_START, EXIT_CODES, EXIT_INTERRUPTED, complain

NAME: Final = "asyncinfer"
COMPLETE_VARIABLE: Final = "_ASYNCINFER_COMPLETE"


class _Listed(NamedTuple):
    module: str
    text: str


SECTIONS: Final = {
    "Run the service": {
        "serve": _Listed("serve.commands", "Run the API; with no Redis configured, all of it."),
        "work": _Listed("serve.commands", "Run a worker."),
        "keygen": _Listed("serve.commands", "Make an API key."),
        "doctor": _Listed(
            "doctor.command", "Find what is wrong here, and the command that mends it."
        ),
    },
    "Use it": {
        "predict": _Listed(
            "predict.command", "Run rows of a file, of stdin or of the command line."
        ),
        "bench": _Listed(
            "bench.command", "Measure a model on your deployment, and what limits it."
        ),
    },
    "See and steer it": {
        "top": _Listed("top.command", "Watch queues and workers, live."),
        "jobs": _Listed("jobs.listing", "List jobs, the newest first."),
        "job": _Listed("jobs.listing", "Show a job with its result."),
        "dead": _Listed(
            "jobs.listing", "List dead letters: jobs given up that may deserve another try."
        ),
        "cancel": _Listed("jobs.actions", "Cancel jobs, by id or all that match."),
        "retry": _Listed("jobs.actions", "Run failed or cancelled jobs again."),
        "purge": _Listed("jobs.actions", "Delete ended jobs with their data."),
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
Commands that use, see or steer a service speak HTTP: --url or ASYNCINFER_URL says where (default
http://127.0.0.1:8000), ASYNCINFER_API_KEY who you are. With --json they print JSON, in a pipe no
colour and nothing but data; NO_COLOR is honoured."""


class _Commands(click.Group):
    """Lists its commands without importing them."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [name for name in _LISTED if _is_here(name)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if not _is_here(name):
            return None
        found: click.Command = getattr(importlib.import_module(_module(name)), name)
        return found

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(context)
        if args[0] not in names and not context.resilient_parsing:
            context.fail(f"No such command {args[0]!r}.{_nearest(args[0], names)}")
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for title, listed in SECTIONS.items():
            rows = [(name, one.text) for name, one in listed.items() if _is_here(name)]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=12)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


def _is_here(name: str) -> bool:
    """A name may be taken before its module is written."""
    return name in _LISTED and importlib.util.find_spec(_module(name)) is not None


def _module(name: str) -> str:
    return f"asyncinfer.cli.{_LISTED[name].module}"


def _nearest(name: str, names: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, 1)
    return f" Did you mean {near[0]!r}?" if near else ""


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
    except UnicodeEncodeError:
        # A file's name may be any bytes; what is sent to a server is text.
        wrong = [word for word in arguments if not _is_text(word)]
        if not wrong:
            raise
        complain(f"{wrong[0]!r} is not valid UTF-8, so that no job or model has such a name.")
        return EXIT_CANNOT_START
    except click.Abort:  # Ctrl-C at a question
        return EXIT_INTERRUPTED
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)


def _is_text(word: str) -> bool:
    """Bytes that are not UTF-8 come as lone surrogates (PEP 383)."""
    return not any("\ud800" <= one <= "\udfff" for one in word)


def _one_line(error: click.ClickException) -> str:
    said = " ".join(error.format_message().split())
    said += "" if said.endswith((".", "?", "!")) else "."
    if isinstance(error, click.UsageError) and error.ctx:
        return f"{said} See `{error.ctx.command_path} --help`."
    return said

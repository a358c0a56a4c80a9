"""The list of commands; each command's module is imported only when it is used."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

import click

from asyncinfer import __version__
from asyncinfer.cli.exit_codes import EXIT_CANNOT_START, EXIT_CODES, EXIT_INTERRUPTED, say_error
from asyncinfer.errors import AsyncinferError

NAME: Final = "asyncinfer"
COMPLETE_VARIABLE: Final = "_ASYNCINFER_COMPLETE"


class _Entry(NamedTuple):
    """A command: the module in asyncinfer.cli that has it, and its line in the list of commands."""

    module: str
    text: str


SECTIONS: Final = {
    "Run the service": {
        "serve": _Entry(
            "serve.commands",
            "Run the API; with no Redis set, also a Valkey and a worker.",
        ),
        "work": _Entry("serve.commands", "Run a worker."),
        "keygen": _Entry("serve.commands", "Make an API key."),
        "doctor": _Entry(
            "doctor.command", "Check Redis, models and API, and name the fix of each problem."
        ),
    },
    "Run predictions": {
        "predict": _Entry(
            "predict.command", "Predict rows of a file, of stdin or of the command line."
        ),
        "bench": _Entry(
            "bench.command", "Measure throughput and latency of a model, and name the bottleneck."
        ),
    },
    "Inspect and control": {
        "top": _Entry("top.command", "Watch queues and workers, live."),
        "jobs": _Entry("jobs.listing", "List jobs, the newest first."),
        "job": _Entry("jobs.listing", "Show a job with its result."),
        "dead": _Entry(
            "jobs.listing", "List dead letters: jobs that were given up and can be retried."
        ),
        "cancel": _Entry("jobs.actions", "Cancel jobs, by id or by filter."),
        "retry": _Entry("jobs.actions", "Run failed or cancelled jobs again."),
        "purge": _Entry("jobs.actions", "Delete ended jobs with their data."),
        "models": _Entry("models", "List models, or show one with its example."),
        "pause": _Entry("models", "Pause a model: accept its jobs, but run none of them."),
        "resume": _Entry("models", "Resume a paused model."),
        "webhooks": _Entry("webhooks", "List the hosts that webhooks go to; send many again."),
        "audit": _Entry("audit", "List what operators did, the newest first."),
    },
    "Other": {
        "completion": _Entry("completion", "Print the completion script of a shell."),
    },
}
_ENTRIES: Final = {name: entry for section in SECTIONS.values() for name, entry in section.items()}

_EPILOG: Final = """\
Commands that talk to a running service use HTTP: its address is --url or ASYNCINFER_URL (default
http://127.0.0.1:8000), your API key --api-key or ASYNCINFER_API_KEY. With --json they print JSON.
Output into a pipe is data only, without colour; NO_COLOR is honoured."""


class _Commands(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The names of the commands, in the order of the help."""
        return [name for name in _ENTRIES if _exists(name)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Imports and returns the command; None if there is none of this name."""
        if not _exists(name):
            return None
        command: click.Command = getattr(importlib.import_module(_module(name)), name)
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but the error for an unknown name suggests a similar one."""
        names = self.list_commands(context)
        if args[0] not in names and not context.resilient_parsing:
            context.fail(f"No such command {args[0]!r}.{_suggestion(args[0], names)}")
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands by section, and the exit codes, into --help."""
        for title, entries in SECTIONS.items():
            rows = [(name, entry.text) for name, entry in entries.items() if _exists(name)]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=12)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


def _exists(name: str) -> bool:
    """Whether the name is listed and its module is installed; the module is not imported."""
    return name in _ENTRIES and importlib.util.find_spec(_module(name)) is not None


def _module(name: str) -> str:
    return f"asyncinfer.cli.{_ENTRIES[name].module}"


def _suggestion(name: str, names: Sequence[str]) -> str:
    """A sentence that names the most similar command, after a space; "" if none is similar."""
    import difflib

    matches = difflib.get_close_matches(name, names, 1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


@click.group(
    NAME,
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
    subcommand_metavar="COMMAND [ARGS]...",
)
@click.version_option(__version__, message="asyncinfer %(version)s")
def commands() -> None:
    """Serve ONNX models behind a durable job queue."""


def parse_and_run(arguments: Sequence[str]) -> int:
    """Runs the command in `arguments`, without the program's name, and returns its exit code.

    Wrong usage becomes one line on stderr and the code 2. AsyncinferErrors of the command are not
    caught; --help and --version end with SystemExit.
    """
    if COMPLETE_VARIABLE in os.environ:
        commands.main(list(arguments), prog_name=NAME)  # prints the completions, and exits
    try:
        with commands.make_context(NAME, list(arguments), obj=tuple(arguments)) as context:
            return int(commands.invoke(context) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(f"{error.format_message()}\n")
        return EXIT_CANNOT_START
    except click.ClickException as error:
        say_error(_one_line(error))
        return EXIT_CANNOT_START
    except (UnicodeEncodeError, AsyncinferError) as error:
        # A file's name may be any bytes, but a request to a server is text.
        is_encoding = any(isinstance(each, UnicodeEncodeError) for each in (error, error.__cause__))
        invalid = [word for word in arguments if not _is_text(word)]
        if not (is_encoding and invalid):
            raise
        say_error(f"{invalid[0]!r} is not valid UTF-8, so no job or model has this name.")
        return EXIT_CANNOT_START
    except click.Abort:  # Ctrl-C at a prompt
        return EXIT_INTERRUPTED
    except click.exceptions.Exit as exit_error:
        sys.exit(exit_error.exit_code)


def _is_text(word: str) -> bool:
    """Whether an argument of the command line is valid UTF-8.

    Bytes that are not arrive as unpaired surrogates (PEP 383).
    """
    return not any("\ud800" <= character <= "\udfff" for character in word)


def _one_line(error: click.ClickException) -> str:
    """The error of click as one line that says which --help to read."""
    message = " ".join(error.format_message().split())
    message += "" if message.endswith((".", "?", "!")) else "."
    if isinstance(error, click.UsageError) and error.ctx:
        return f"{message} See `{error.ctx.command_path} --help`."
    return message

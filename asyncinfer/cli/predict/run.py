"""The run of `predict`: reads rows, sends them in jobs and writes results and errors in order."""

import contextlib
import hashlib
import math
import re
import shlex
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import click
import msgspec
from msgspec import Struct

from asyncinfer.cli.exit_codes import EXIT_FAILED, say_error
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.output import counted, say_on_stderr
from asyncinfer.cli.predict import readers, writers
from asyncinfer.cli.predict.cells import WordCell, parse_cell, parse_number
from asyncinfer.cli.predict.progress import progress
from asyncinfer.cli.predict.row_errors import error_text
from asyncinfer.cli.predict.same_file import check_output
from asyncinfer.cli.predict.tables import ReadOptions, Row
from asyncinfer.cli.predict.writers import Record
from asyncinfer.client import (
    Cadence,
    Client,
    Model,
    ProgressBar,
    SlowMapWarning,
    WaitTimeout,
)
from asyncinfer.errors import AsyncinferError, FileRefused, GroupNotFound, RequestError
from asyncinfer.jobs import Priority

_STATUSES_OF_ALL_ROWS: Final = frozenset({401, 403, 404, 503})
"""These concern the server, the key or the model."""

_MAX_SHOWN_ERRORS: Final = 100
"""The number of failed rows that get a line on stderr; the output has the error of each."""

_OMITTED_OPTIONS: Final = ("--api-key", "--resume")
"""Options with a value that the command to continue a run does not repeat."""


class PredictOptions(Struct, frozen=True, kw_only=True):
    """The options of `predict`."""

    rows: tuple[str, ...]
    """A file, - for stdin, or rows as numbers or JSON."""
    model: str | None
    read_as: str | None
    write_as: str | None
    output: str | None
    columns: tuple[str, ...]
    header: bool | None
    separator: str | None = None
    """The separator of a CSV; None if it is detected."""
    group: str | None
    """The group of an earlier run to continue."""
    fresh: bool
    batch: int | Literal["auto"]
    in_flight: int
    priority: Priority | None
    arguments: tuple[str, ...]
    """The command line, without the program's name."""
    timeout_seconds: float = math.inf
    cadence: Cadence = Cadence()
    hint_seconds: float = 10.0
    """After this time a run is long enough to print how to continue it."""


class _Source(Struct, frozen=True):
    """The rows of a run, and the group that its jobs are in."""

    rows: Iterator[Row]
    total: int | None
    """About how many rows; None if that could only be counted by reading them all."""
    group: str
    is_file: bool


def run(server: ServerOptions, options: PredictOptions) -> int:
    """Predicts all rows, writes a record for each, and returns the exit code, 1 if a row failed.

    Raises what ends the run as a whole: FileRefused, WaitTimeout after `timeout_seconds`,
    ConnectionFailed, KeyboardInterrupt and others. Results that came before are in the output.
    """
    file_format = writers.format_of(options.output, options.write_as)
    if _is_file(options.rows):
        check_output(options.rows[0], options.output)
    deadline = time.monotonic() + options.timeout_seconds
    with Client(
        server.url,
        server.api_key,
        ca=server.ca,
        total_timeout=options.timeout_seconds,
        wait_for_models=True,
        on_wait=say_error,
        cadence=options.cadence,
    ) as client:
        source = _open_source(options, client, deadline)
        if options.group and options.group != source.group:
            _check_group(client, options.group)
            source = msgspec.structs.replace(source, group=options.group)
        with (
            _hint_after_a_while(options, source),
            writers.writer(options.output, file_format) as writer,
            progress(source.total, file_format, options.output) as bar,
            _printed_warnings(),
        ):
            failed = _write_all(client, options, source, writer, bar)
    if failed > _MAX_SHOWN_ERRORS:
        say_error(f"{failed:,} rows failed in all; the output has the error of each.")
    return EXIT_FAILED if failed else 0


@contextlib.contextmanager
def _printed_warnings() -> Iterator[None]:
    """Prints SlowMapWarnings as lines on stderr, without a place in the code, in its block."""

    def print_warning(message: Warning | str, *_: Any, **more: Any) -> None:
        say_error(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", SlowMapWarning)
        warnings.showwarning = print_warning
        yield


def _write_all(
    client: Client,
    options: PredictOptions,
    source: _Source,
    writer: writers.Writer,
    bar: ProgressBar | None,
) -> int:
    """Writes a record for each row and returns the number of rows that failed.

    If the run ends early, says how many rows are done and how to continue, and raises the error:
    WaitTimeout with that text, any other after a line on stderr.
    """
    failed = done = 0
    try:
        for record in _records(client, options, source):
            done += 1
            if error := record.get("error"):
                failed += 1
                if failed <= _MAX_SHOWN_ERRORS:
                    say_on_stderr(f"row {record['row']}: {error['detail']}")
            writer.write(record)
            if bar:
                bar.advance(1, errors=bool(error))
    except KeyboardInterrupt:
        say_error(f"Interrupted after {counted(done, 'row')}. {_continue_advice(options, source)}")
        raise
    except WaitTimeout as error:
        raise WaitTimeout(
            f"{error.detail} Done: {counted(done, 'row')}. Jobs that were submitted go on. "
            f"Continue with: {_resume_command(options.arguments, source.group)}",
            waiting_for=error.waiting_for,
        ) from error
    except AsyncinferError as error:
        if done:
            say_error(f"Stopped after {counted(done, 'row')}. {_continue_advice(options, source)}")
        raise error
    return failed


def _records(client: Client, options: PredictOptions, source: _Source) -> Iterator[Record]:
    """Records in the order of the rows, with errors for those that cannot be sent.

    Raises an error that concerns the server, the key or the model (401, 403, 404, 503, or no
    answer) instead of making a record of it. Closing it cancels the jobs that have not ended.
    """
    pending: deque[Row] = deque()

    def values() -> Iterator[Any]:
        for row in source.rows:
            pending.append(row)
            if not row.problem:
                yield row.value

    model = client.model(options.model)
    with client.map(
        values(),
        options.model,
        batch=options.batch,
        in_flight=options.in_flight,
        progress=False,
        on_error="return",
        group=source.group,
        priority=options.priority,
    ) as results:
        for result in results:
            yield from _unreadable_records(pending)
            yield _record(pending.popleft(), result, model)
        yield from _unreadable_records(pending)


def _unreadable_records(pending: deque[Row]) -> Iterator[Record]:
    """Takes the rows that cannot be sent from the front of `pending`, and yields their records."""
    while pending and pending[0].problem:
        row = pending.popleft()
        yield {"row": row.number, "error": {"code": "unreadable_row", "detail": row.problem}}


# --- records -------------------------------------------------------------------------------


def _record(row: Row, result: Any, model: Model) -> Record:
    """The record of a row from its result or error; raises errors that concern no single row.

    A result that is no dict gets the name of the model's first output.
    """
    if isinstance(result, RequestError) and result.status in _STATUSES_OF_ALL_ROWS:
        raise result
    if isinstance(result, AsyncinferError):
        detail = error_text(result, row.value, model)
        return {"row": row.number, "error": {"code": result.code, "detail": detail}}
    if isinstance(result, dict):
        return {"row": row.number, **{name: _to_json(value) for name, value in result.items()}}
    name = model.outputs[0].name if model.outputs else "result"
    return {"row": row.number, name: _to_json(result)}


def _to_json(value: Any) -> Any:
    """An array as lists and a number of numpy as Python's; other values unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


# --- sources -------------------------------------------------------------------------------


def _open_source(options: PredictOptions, client: Client, deadline: float) -> _Source:
    """The rows that the arguments name, the first already read, and the group of their jobs.

    Raises FileRefused if there are none or they cannot be read.
    """
    first = options.rows[0]
    if _is_file(options.rows):
        path = None if first == "-" else Path(first)
        if path and not path.is_file():
            raise FileRefused(
                f"There is no file {first}. Give the path of a file, - for stdin, or a row as "
                "numbers or JSON: asyncinfer predict 5.1 3.5 1.4 0.2."
            )
        return _open_file(options, path, client.model(options.model), deadline)
    rows = _inline_rows(options, client)
    return _Source(rows, None, f"typed-{uuid.uuid4().hex[:12]}", False)


def _is_file(rows: Sequence[str]) -> bool:
    """Whether the arguments are a file's name or -, as they are neither numbers nor JSON."""
    first = rows[0]
    is_inline = first.lstrip().startswith(("[", "{")) or parse_number(first) is not None
    return len(rows) == 1 and not is_inline


def _inline_rows(options: PredictOptions, client: Client) -> Iterator[Row]:
    """The rows of the command line: numbers are one row; JSON is one row or a list of rows.

    Raises FileRefused if they are neither.
    """
    _check_inline_options(options)
    words = options.rows
    try:
        values = _numbers(words) or [readers.decode_json(word) for word in words]
    except readers.NumberBeyond as error:
        raise FileRefused(f"{error}.") from error
    except ValueError as error:
        raise FileRefused(
            f"{' '.join(words)[:60]!r} is no row ({error}). Give numbers, a row as JSON, or one "
            "file."
        ) from error
    if len(values) == 1 and isinstance(values[0], list):
        (rows,) = values
        if rows and isinstance(rows[0], list | dict):
            values = rows
    numbered = list(enumerate(values, start=1))
    if not options.columns and not any(isinstance(value, dict) for value in values):
        return iter([Row(number, value) for number, value in numbered])
    read_options = _read_options(options, client.model(options.model), math.inf)
    return iter([readers.json_row(number, value, read_options) for number, value in numbered])


def _numbers(words: Sequence[str]) -> list[Any]:
    """A list of one row of numbers; an empty list if a word is no number.

    Raises FileRefused for a word that is like a number.
    """
    try:
        return [[parse_cell(word) for word in words]]
    except WordCell:
        return []
    except ValueError as error:
        raise FileRefused(f"{error}.") from error


def _check_inline_options(options: PredictOptions) -> None:
    """Raises FileRefused for an option that is only for files."""
    given = {
        "--from": options.read_as,
        "--header": options.header,
        "--separator": options.separator,
    }
    for flag, value in given.items():
        if value is not None:
            raise FileRefused(f"{flag} is for a file or stdin, not for a row as an argument.")


def _open_file(
    options: PredictOptions, path: Path | None, model: Model, deadline: float
) -> _Source:
    """The rows of a file, or of stdin for None, which is read up to `deadline`.

    Without --fresh the group of a file is made from its name, its content, the model's file and the
    options, so that the same run continues; else it is random.
    """
    rows = readers.with_first_read(_read_options(options, model, deadline))
    if path is None or options.fresh or not path.is_file():
        name = path.stem if path else "stdin"
        return _Source(rows, None, f"{_group_name(name)}-{uuid.uuid4().hex[:12]}", True)
    choices = f"{options.columns}{options.header}{options.separator or ''}{options.batch}"
    digest, lines = _digest(path, f"{model.sha256}{choices}")
    is_lines = path.suffix.lower() in (".csv", ".tsv", ".ndjson", ".jsonl")
    return _Source(
        rows, lines if is_lines else None, f"{_group_name(path.stem)}-{digest[:12]}", True
    )


def _read_options(options: PredictOptions, model: Model, deadline: float) -> ReadOptions:
    """How to read rows for this model; `deadline` is on the monotonic clock."""
    required = [spec for spec in model.inputs if not spec.optional]
    are_single = all(spec.shape and spec.shape[1:] in ((), (1,)) for spec in required)
    return ReadOptions(
        source=options.rows[0],
        file_format=options.read_as,
        columns=options.columns,
        header=options.header,
        separator=options.separator,
        inputs={spec.name: spec.rank or 0 for spec in model.inputs},
        text_inputs=frozenset(spec.name for spec in model.inputs if spec.datatype == "BYTES"),
        single_inputs=frozenset(spec.name for spec in required) if are_single else frozenset(),
        deadline=deadline,
    )


def _digest(path: Path, salt: str) -> tuple[str, int]:
    """The SHA-256 of `salt` and the file's content, in hexadecimal, and its number of line ends.

    `salt` is what else determines the results.
    """
    digest, lines = hashlib.sha256(salt.encode()), 0
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
            lines += chunk.count(b"\n")
    return digest.hexdigest(), lines


def _group_name(name: str) -> str:
    """A file's name as the start of a group's name: at most 40 letters, digits and hyphens."""
    return re.sub("[^A-Za-z0-9]", "-", name).strip("-")[:40] or "rows"


# --- continuing ----------------------------------------------------------------------------


def _check_group(client: Client, group: str) -> None:
    """Raises UsageError if there is no such group, as its name may be mistyped."""
    try:
        client.group(group)
    except GroupNotFound as error:
        raise click.UsageError(
            f"There is no group {group!r} to continue, so nothing was run. Correct its name, or "
            "leave --resume out: a file that ran before continues without it."
        ) from error


@contextlib.contextmanager
def _hint_after_a_while(options: PredictOptions, source: _Source) -> Iterator[None]:
    """Prints once how to continue, on stderr, if its block lasts `hint_seconds` and reads a file.

    A long run may not be able to say so at its end.
    """
    line = f"To continue this run later: {_resume_command(options.arguments, source.group)}"
    timer = threading.Timer(options.hint_seconds, say_error, (line,))
    timer.daemon = True
    if source.is_file:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _continue_advice(options: PredictOptions, source: _Source) -> str:
    """A sentence on how to continue a run that ended early."""
    if not source.is_file:
        return "Run the command again."
    command = _resume_command(options.arguments, source.group)
    return f"Results are kept for a day. Continue with: {command}"


def _resume_command(arguments: Sequence[str], group: str) -> str:
    """The command line with --resume GROUP, without --api-key, --fresh and an earlier --resume."""
    words, skip = [], False
    for word in arguments:
        is_kept = not skip and word.partition("=")[0] not in (*_OMITTED_OPTIONS, "--fresh")
        skip = not skip and word in _OMITTED_OPTIONS
        if is_kept:
            words.append(word)
    return shlex.join(["asyncinfer", *words, "--resume", group])

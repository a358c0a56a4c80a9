"""Many rows through the service: read, sent in jobs, answered in order, with their errors."""

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
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

import msgspec
from msgspec import Struct

from asyncinfer.cli.api_client import ApiClient
from asyncinfer.cli.exit_codes import EXIT_FAILED, say_error
from asyncinfer.cli.options import Server
from asyncinfer.cli.output import say_on_stderr
from asyncinfer.cli.predict import readers, writers
from asyncinfer.cli.predict.progress import Progress, progress
from asyncinfer.cli.predict.readers import Row
from asyncinfer.cli.predict.writers import Record
from asyncinfer.client import WaitTimeout
from asyncinfer.client._client import asked_of
from asyncinfer.client._map.results import Results
from asyncinfer.client._protocol import Pause
from asyncinfer.client._wait_reasons import CADENCE, Cadence, Notices
from asyncinfer.errors import AsyncinferError, Fault, FileRefused, RequestError

if TYPE_CHECKING:
    from asyncinfer.client import Model

_RETRIES: Final = 5
"""A server that restarts is waited for, about a minute."""

_PLACE: Final = re.compile(r"/data/\d+/?([\d/]*)\Z")
_ITS_ROW: Final = re.compile(r"\Arow \d+ (?=has )")
_TOLD_ERRORS: Final = 100
"""So many rows have a line of their own on stderr; the output has all."""


_SECRET: Final = ("--api-key", "--resume")


class Asked(Struct, frozen=True, kw_only=True):
    rows: tuple[str, ...]
    model: str | None
    read_as: str | None
    write_as: str | None
    output: str | None
    columns: tuple[str, ...]
    header: bool | None
    group: str | None
    fresh: bool
    batch: int | Literal["auto"]
    in_flight: int
    priority: str | None
    typed: tuple[str, ...]
    """The command line."""
    timeout_seconds: float = math.inf
    cadence: Cadence = CADENCE
    resumed_seconds: float = 10.0
    """From here on a run is long enough to say how it is taken up again."""


class _Source(Struct, frozen=True):
    rows: Iterator[Row]
    total: int | None
    """About how many; None where that takes reading them all."""
    group: str
    is_file: bool


def run(server: Server, asked: Asked) -> int:
    form = writers.form_of(asked.output, asked.write_as)
    until = time.monotonic() + asked.timeout_seconds
    with ApiClient(server, retries=_RETRIES, until=until, waits_for_models=True) as api:
        api.client._driver.on_pause = _Pauses(asked.cadence).hear
        source = _source(asked, api, until)
        group = asked.group or source.group
        with (
            _said_later(asked, source, group),
            writers.writer(asked.output, form) as writer,
            progress(source.total, form, asked.output) as bar,
            _warnings_told(),
        ):
            failed = _run(api, asked, source, group, writer, bar)
    if failed > _TOLD_ERRORS:
        say_error(f"{failed:,} rows failed in all; the output has the error of each.")
    return EXIT_FAILED if failed else 0


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    """What the client warns of, in a line of its own and without a place in our code."""
    from asyncinfer.client import SlowMapWarning

    def tell(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say_error(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", SlowMapWarning)
        warnings.showwarning = tell
        yield


def _run(
    api: ApiClient,
    asked: Asked,
    source: _Source,
    group: str,
    writer: writers.Writer,
    bar: Progress,
) -> int:
    """How many rows failed."""
    failed = done = 0
    try:
        for record in _records(api, asked, source.rows, group):
            done += 1
            if error := record.get("error"):
                failed += 1
                if failed <= _TOLD_ERRORS:
                    say_on_stderr(f"row {record['row']}: {error['detail']}")
            writer.write(record)
            bar.advance(failed=bool(error))
    except KeyboardInterrupt:
        say_error(f"Interrupted after {done:,} rows. {_go_on(asked, source, group)}")
        raise
    except WaitTimeout as error:
        raise WaitTimeout(
            f"{error.detail} {done:,} rows are done. Jobs that were sent go on; take them up "
            f"again with: {_resumed(asked.typed, group)}",
            waiting_for=error.waiting_for,
        ) from error
    except AsyncinferError as error:
        if done:
            say_error(f"Stopped after {done:,} rows. {_go_on(asked, source, group)}")
        raise error
    return failed


def _records(api: ApiClient, asked: Asked, rows: Iterator[Row], group: str) -> Iterator[Record]:
    """In the order of the rows; those that cannot be sent are in their places."""
    pending: deque[Row] = deque()

    def sent() -> Iterator[Any]:
        for row in rows:
            pending.append(row)
            if not row.problem:
                yield row.value

    model = api.client.model(asked.model)
    names = [spec.name for spec in model.outputs]
    client, options = api.client, {"priority": asked.priority, "group": group}
    wanted = msgspec.structs.replace(
        asked_of(asked.model, asked.batch, asked.in_flight, False, "return", options),
        cadence=asked.cadence,
    )
    results = Results(client._server, client._driver, sent(), wanted, _Lines())
    with contextlib.closing(results):
        for result in results:
            yield from _bad_ones(pending)
            yield _record(pending.popleft(), result, names)
        yield from _bad_ones(pending)


class _Lines:
    """Takes the place of the client's own bar: tells on stderr why nothing comes."""

    def advance(self, rows: int, errors: int) -> None: ...

    def say(self, line: str) -> None:
        say_error(line)

    def close(self) -> None: ...


class _Pauses:
    """Says why a request before the first row is sent again, once that takes long."""

    def __init__(self, cadence: Cadence) -> None:
        self._cadence = cadence
        self._notices = Notices(_Lines().say, cadence)
        self._began = 0.0

    def hear(self, pause: Pause) -> None:
        now = time.monotonic()
        self._began = self._began or now
        if now + pause.seconds - self._began >= self._cadence.after_seconds:
            self._notices.hear(pause.reason, "It is tried again", "")


def _bad_ones(pending: deque[Row]) -> Iterator[Record]:
    while pending and pending[0].problem:
        row = pending.popleft()
        yield {"row": row.number, "error": {"code": "unreadable_row", "detail": row.problem}}


# --- results ---------------------------------------------------------------------------------


def _record(row: Row, result: Any, names: Sequence[str]) -> Record:
    if isinstance(result, AsyncinferError):
        _refuse_no_server(result)
        return {"row": row.number, "error": {"code": result.code, "detail": _detail(result)}}
    if isinstance(result, dict):
        return {"row": row.number, **{name: _plain(one) for name, one in result.items()}}
    name = next(iter(names), "result")
    return {"row": row.number, name: _plain(result)}


def _refuse_no_server(error: AsyncinferError) -> None:
    """What is wrong with the server or the key is wrong with no row."""
    if isinstance(error, RequestError) and error.status in (401, 403, 404, 503):
        raise error


def _detail(error: AsyncinferError) -> str:
    """Without the row's place in its job, which nobody knows."""
    faults = error.faults if isinstance(error, RequestError) else ()
    return "; ".join(map(_fault, faults)) or error.detail


def _fault(fault: Fault) -> str:
    detail = _ITS_ROW.sub("", fault.detail)
    found = _PLACE.fullmatch(fault.pointer)
    place = found[1] if found else fault.pointer
    return f"value at {place}: {detail}" if place else detail


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


# --- sources ---------------------------------------------------------------------------------


def _source(asked: Asked, api: ApiClient, until: float) -> _Source:
    first = asked.rows[0]
    if len(asked.rows) == 1 and not _is_typed(first):
        path = None if first == "-" else Path(first)
        if path and not path.is_file():
            raise FileRefused(
                f"There is no file {first}. Give the path of one, - for stdin, or a row as numbers "
                "or JSON: asyncinfer predict 5.1 3.5 1.4 0.2."
            )
        return _file(asked, path, api.client.model(asked.model), until)
    rows = _typed_rows(asked, api)
    return _Source(rows, None, f"typed-{uuid.uuid4().hex[:12]}", False)


def _is_typed(text: str) -> bool:
    return text.lstrip().startswith(("[", "{")) or readers.number(text) is not None


def _typed_rows(asked: Asked, api: ApiClient) -> Iterator[Row]:
    """Numbers are one row; JSON is one, or a list of them."""
    words = asked.rows
    with contextlib.suppress(ValueError):
        return iter([Row(1, [readers.cell(word) for word in words])])
    try:
        found = [msgspec.json.decode(word) for word in words]
    except msgspec.DecodeError as error:
        raise FileRefused(
            f"{' '.join(words)[:60]!r} is no row ({error}). Give numbers, a row as JSON, or one "
            "file."
        ) from error
    if len(found) == 1 and isinstance(found[0], list) and found[0] and _is_row(found[0][0]):
        found = found[0]
    if not any(isinstance(row, dict) for row in found):
        return iter([Row(number, row) for number, row in enumerate(found, start=1)])
    how = _how(asked, api.client.model(asked.model), math.inf)
    return iter([readers.json_row(number, row, how) for number, row in enumerate(found, start=1)])


def _is_row(value: Any) -> bool:
    return isinstance(value, list | dict)


def _file(asked: Asked, path: Path | None, model: "Model", until: float) -> _Source:
    rows = readers.begun(readers.rows(_how(asked, model, until)))
    if path is None or asked.fresh or not path.is_file():
        name = path.stem if path else "stdin"
        return _Source(rows, None, f"{_word(name)}-{uuid.uuid4().hex[:12]}", True)
    digest, lines = _digest(path, f"{model.sha256}{asked.columns}{asked.header}{asked.batch}")
    is_lines = path.suffix.lower() in (".csv", ".tsv", ".ndjson", ".jsonl")
    return _Source(rows, lines if is_lines else None, f"{_word(path.stem)}-{digest[:12]}", True)


def _how(asked: Asked, model: "Model", until: float) -> readers.Asked:
    needed = [spec for spec in model.inputs if not spec.optional]
    are_single = all(spec.shape and spec.shape[1:] in ((), (1,)) for spec in needed)
    return readers.Asked(
        source=asked.rows[0],
        form=asked.read_as,
        columns=asked.columns,
        header=asked.header,
        inputs={spec.name: spec.rank or 0 for spec in model.inputs},
        text_inputs=frozenset(spec.name for spec in model.inputs if spec.datatype == "BYTES"),
        single_inputs=frozenset(spec.name for spec in needed) if are_single else frozenset(),
        until=until,
    )


def _digest(path: Path, salt: str) -> tuple[str, int]:
    """Of the file and of what else makes the answers; and its lines."""
    digest, lines = hashlib.sha256(salt.encode()), 0
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
            lines += chunk.count(b"\n")
    return digest.hexdigest(), lines


def _word(name: str) -> str:
    """As the name of a group may have it."""
    kept = "".join(one if one.isascii() and one.isalnum() else "-" for one in name).strip("-")
    return kept[:40] or "rows"


# --- taking up again -------------------------------------------------------------------------


@contextlib.contextmanager
def _said_later(asked: Asked, source: _Source, group: str) -> Iterator[None]:
    """How to take a long run up again, also where it cannot say so at its end."""
    line = f"To take this up again: {_resumed(asked.typed, group)}"
    timer = threading.Timer(asked.resumed_seconds, say_error, (line,))
    timer.daemon = True
    if source.is_file:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _go_on(asked: Asked, source: _Source, group: str) -> str:
    if not source.is_file:
        return "Run it again."
    return f"What is done is kept for a day. Go on with: {_resumed(asked.typed, group)}"


def _resumed(typed: Sequence[str], group: str) -> str:
    words, skip = [], False
    for word in typed:
        is_kept = not skip and word.partition("=")[0] not in (*_SECRET, "--fresh")
        skip = not skip and word in _SECRET
        if is_kept:
            words.append(word)
    return shlex.join(["asyncinfer", *words, "--resume", group])

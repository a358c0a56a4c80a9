"""Logging of long-running commands, and their event loop."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final, Literal

from asyncinfer.untrusted.printable import printable, printable_line

LOOP: Final = {"use_uvloop": sys.platform != "win32"}
"""Options of anyio's asyncio backend; there is no uvloop for Windows."""

Role = Literal["api", "worker", "parent"]
"""What a process does: answer requests, run jobs, or only start and restart the others."""

FIELDS: Final = (
    *("job_id", "request_id", "model", "code", "worker"),
    *("method", "path", "status", "duration_ms", "client"),
)
"""What a line in JSON has besides its message, where it is about a job or a request."""


class _TextFormatter(logging.Formatter):
    """Keeps a message on one line, and escapes control characters in all of a record."""

    def __init__(self, role: Role) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {role} %(process)d %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """The time in UTC, to the millisecond."""
        return _utc(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record, with line ends in its message escaped."""
        return printable_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record and its traceback, with control characters escaped."""
        return printable(super().format(record))


class _JsonFormatter(logging.Formatter):
    """A JSON object for each record, on one line."""

    def __init__(self, role: Role) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """The object of a record; a traceback is its member `exception`."""
        line: dict[str, Any] = {
            "time": _utc(record),
            "level": record.levelname,
            "role": self._role,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name in FIELDS if (value := getattr(record, name, None))}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # In ASCII, since names from Redis may hold what is no UTF-8.
        return json.dumps(line, default=str)


def _utc(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def set_up_logging(role: Role, level: str, form: str) -> None:
    """Logs to stderr; does nothing if logging is set up already. `level` and `form` are LOG_LEVEL
    and LOG_FORMAT.

    Libraries log from WARNING on: at DEBUG some log what they send.
    """
    formatter = _JsonFormatter(role) if form == "json" else _TextFormatter(role)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    own_level = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(own_level, logging.WARNING), handlers=[handler])
    logging.getLogger("asyncinfer").setLevel(own_level)
    logging.captureWarnings(True)

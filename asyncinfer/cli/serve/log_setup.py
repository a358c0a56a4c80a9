"""Logging of long-running commands, and their event loop."""

import logging
import sys
from typing import Final

from asyncinfer.untrusted.printable import printable, printable_line

LOOP: Final = {"use_uvloop": sys.platform != "win32"}
"""Options of anyio's asyncio backend; there is no uvloop for Windows."""


class _Formatter(logging.Formatter):
    """Keeps a message on one line, and escapes control characters in all of a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record, with line ends in its message escaped."""
        return printable_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record and its traceback, with control characters escaped."""
        return printable(super().format(record))


def set_up_logging() -> None:
    """Logs to stderr from the level INFO on; does nothing if logging is set up already."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)

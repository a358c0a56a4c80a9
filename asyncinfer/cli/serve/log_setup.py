"""How long-running commands speak: what they say, and their log."""

import logging
import sys
from typing import Final

from asyncinfer.untrusted.printable import printable, printable_line

LOOP: Final = {"use_uvloop": sys.platform != "win32"}


class _Formatter(logging.Formatter):
    """A message is one line, and no part of a log commands a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)

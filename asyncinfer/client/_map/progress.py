"""A progress bar in a terminal or notebook, and lines beside it. The only door to tqdm."""

import logging
import sys
import warnings
from typing import Any, Final, Protocol

from asyncinfer.untrusted.printable import printable_line

_log: Final = logging.getLogger("asyncinfer.client")


class Progress(Protocol):
    def advance(self, rows: int, errors: int) -> None: ...

    def say(self, line: str) -> None:
        """Why nothing comes, or that it goes on."""

    def close(self) -> None: ...


class _Silent:
    def advance(self, rows: int, errors: int) -> None: ...

    def say(self, line: str) -> None:
        _log.warning("%s", printable_line(line))

    def close(self) -> None: ...


class _Bar:
    """Rows that are done, their rate, the time that is left."""

    def __init__(self, total: int | None, title: str) -> None:
        with warnings.catch_warnings():
            # Of a notebook without widgets, which gets a bar of text.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm

            self._bar: Any = tqdm(total=total, desc=title, unit="row", unit_scale=True)
        self._errors = 0

    def advance(self, rows: int, errors: int) -> None:
        if errors:
            self._errors += errors
            self._bar.set_postfix(errors=self._errors, refresh=False)
        self._bar.update(rows)

    def say(self, line: str) -> None:
        self._bar.write(printable_line(line), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def progress(shown: bool, total: int | None, title: str) -> Progress:
    return _Bar(total, title) if shown else _Silent()

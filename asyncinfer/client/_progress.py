"""A progress bar in a terminal or notebook. The only door to tqdm."""

import warnings
from typing import Any, Protocol


class Progress(Protocol):
    def advance(self, rows: int, errors: int) -> None: ...

    def close(self) -> None: ...


class _Silent:
    def advance(self, rows: int, errors: int) -> None: ...

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

    def close(self) -> None:
        self._bar.close()


def progress(shown: bool, total: int | None, title: str) -> Progress:
    return _Bar(total, title) if shown else _Silent()

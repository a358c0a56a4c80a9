"""The check that nothing that ran in a test wrote a traceback to a log."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

MARK = "Traceback (most recent call last)"


@pytest.fixture(autouse=True)
def no_traceback(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> Iterator[None]:
    """Fails a test that is not marked `traceback` if a log has a traceback: an unexpected error.

    The logs are those of this process and the `*.log` files in the test's folder.
    """
    yield
    if request.node.get_closest_marker("traceback"):
        return
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    found = [*_of_records(records), *_of_files(tmp_path.rglob("*.log"))]
    if found:
        pytest.fail("A log has a traceback:\n" + "\n".join(found), pytrace=False)


def _of_records(records: Iterable[logging.LogRecord]) -> Iterator[str]:
    for record in records:
        if (record.exc_info and record.exc_info[0]) or MARK in record.getMessage():
            yield logging.Formatter("%(name)s %(message)s").format(record)


def _of_files(paths: Iterable[Path]) -> Iterator[str]:
    for path in sorted(paths):
        text = path.read_text(errors="replace")
        if (at := text.find(MARK)) >= 0:
            yield f"{path.name}: {text[max(0, at - 500) : at + 3000]}"

"""The sessions and programs of the pages, run in their order on one service.

It has the shipped models. What needs a model of its own is in `test_examples.py`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from asyncinfer.client import Client
from tests.docs.environment import clear_environment
from tests.docs.markdown import (
    URL,
    Page,
    as_shown,
    check_step,
    is_alike,
    page,
    run_programs,
    run_step,
    steps,
)
from tests.faults.harness import eventually_sync
from tests.serving import running_serve, wait_for_result

pytestmark = pytest.mark.system("curl")

_VARYING: Final = re.compile(rf"{URL}/(queues|workers|scale/iris|health)$")
"""Requests whose answers have figures of the moment: only their members are compared."""


class RunningService(NamedTuple):
    url: str
    folder: Path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that has run a job (which needs curl), and the folder in which commands are run."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as monkeypatch:
        clear_environment(monkeypatch)
        with running_serve(cwd=folder, DATA_DIR=str(folder / "data")) as serve:
            wait_for_result(serve)
            with Client(serve.banner["URL"]) as client:
                eventually_sync(lambda: len(client.models()) == 2, "both models are served")
            monkeypatch.setenv("ASYNCINFER_URL", serve.banner["URL"])
            yield RunningService(serve.banner["URL"], folder)


def check_sessions(part: Page, service: RunningService) -> None:
    """Runs all commands of the part; asserts that they print what is shown."""
    ids: dict[str, str] = {}
    for console in part.texts("console"):
        for step in steps(console):
            if _VARYING.search(step.command):
                output = run_step(step, service.url, service.folder, ids)
                shown, real = (json.loads(as_shown(text, {})) for text in (step.shown, output))
                assert is_alike(shown, real), output
            else:
                check_step(step, service.url, service.folder, ids)


@pytest.mark.parametrize("part", [page("README.md").section("A session"), page("http.md")])
def test_the_requests_of_the_page_print_the_answers_that_are_shown(
    part: Page, service: RunningService
) -> None:
    check_sessions(part, service)


@pytest.mark.soak
@pytest.mark.parametrize(
    "part", [page("README.md").section("From a terminal"), page("command-line.md")]
)
def test_the_commands_of_the_page_print_the_outputs_that_are_shown(
    part: Page, service: RunningService
) -> None:
    check_sessions(part, service)


def test_the_programs_of_the_pages_print_the_outputs_that_are_shown(
    service: RunningService,
) -> None:
    parts = [page("README.md").section("From Python"), page("http.md"), page("client.md")]
    shown = [(program, output) for part in parts for program, output in part.programs() if output]
    # One process runs them all, since importing numpy and pandas takes longer than they do.
    outputs = run_programs([program for program, _ in shown], service.url, service.folder)
    for output, (_, expected) in zip(outputs, shown, strict=True):
        assert as_shown(output, {}) == as_shown(expected, {})

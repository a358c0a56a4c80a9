"""All pages: the README is short, every page is in the index, and links and figures are right."""

import inspect
import re
from typing import Final

import pytest

from asyncinfer import client
from asyncinfer.api_keys import SCOPES
from asyncinfer.cli.commands import SECTIONS
from asyncinfer.cli.exit_codes import EXIT_CODES
from tests.docs.markdown import DOCS, Page, all_pages, page
from tests.process import REPOSITORY

MAX_README_LINES: Final = 350


def test_the_readme_is_short() -> None:
    assert len(page("README.md").text.splitlines()) <= MAX_README_LINES


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    linked = {DOCS / target for target in re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", index, re.M)}
    assert linked == set(all_pages()) - {REPOSITORY / "README.md", DOCS / "README.md"}


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {REPOSITORY / target for target in targets(page("README.md").text)}
    assert set(all_pages()) - {REPOSITORY / "README.md"} <= linked


@pytest.mark.parametrize("name", [str(path.relative_to(REPOSITORY)) for path in all_pages()])
def test_every_link_has_an_existing_target(name: str) -> None:
    path = REPOSITORY / name
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", path.read_text()):
        target, _, anchor = link.partition("#")
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), link
        assert not anchor or anchor in Page(linked, linked.read_text()).anchors, link


def test_no_page_installs_the_package_from_an_index_that_does_not_have_it() -> None:
    paths = [*all_pages(), DOCS / "notebook.ipynb", REPOSITORY / "CHANGELOG.md"]
    found = {
        path: re.findall(r"pip install[^`\n&]* asyncinfer(?=[ `])", path.read_text())
        for path in paths
    }
    assert {path for path, commands in found.items() if commands} == set()


def targets(text: str) -> list[str]:
    """The files that a text links to, without anchors."""
    return re.findall(r"\]\((?!https?://|#)([^)#]+)", text)


def test_the_table_of_scopes_has_all_scopes() -> None:
    rows = page("security.md").section("API keys").rows()
    assert [row[0] for row in rows] == ["scope", *(f"`{scope}`" for scope in SCOPES)]


def test_the_table_of_commands_has_all_commands() -> None:
    rows = page("command-line.md").rows()
    shown = [name for row in rows for name in re.findall(r"`([a-z]+)`", row[0])]
    assert sorted(shown) == sorted(name for section in SECTIONS.values() for name in section)


def test_the_table_of_exit_codes_is_that_of_the_help() -> None:
    rows = page("command-line.md").section("Output").rows()
    assert rows[1:] == [[str(code), meaning] for code, meaning in EXIT_CODES.items()]


def test_the_table_of_client_arguments_has_all_arguments() -> None:
    named = [row[0].split("`")[1] for row in page("client.md").section("Connect").rows()[1:]]
    for kind in (client.Client, client.AsyncClient):
        assert set(inspect.signature(kind).parameters) == set(named)


def test_the_table_of_client_errors_has_all_errors() -> None:
    rows = page("client.md").section("Errors").rows()
    shown = [name for row in rows[1:] for name in re.findall(r"`(\w+)`", row[0])]
    public = {name: getattr(client, name) for name in client.__all__}
    classes = {name: kind for name, kind in public.items() if isinstance(kind, type)}
    errors = {name for name, kind in classes.items() if issubclass(kind, Exception)}
    assert set(shown) | {"AsyncinferError"} == errors
    assert len(shown) == len(set(shown))


# --- figures -------------------------------------------------------------------------------

BENCHMARK: Final = REPOSITORY / "tests" / "benchmarks" / "README.md"
FIGURES: Final = {
    "submits, 32 connections, a worker running": ("submit per second", "submit p99 ms"),
    "submit to result, 32 connections": ("done per second",),
    "one job at a time, waited for": ("single p50 ms",),
    "5,000 waiting Iris jobs, one worker": ("drain iris 1 per second",),
    "5,000 waiting jobs of a 1.9 M-parameter MLP, one worker": ("drain mlp 1 per second",),
    "`serve` to the first result": ("start to first result seconds",),
}
"""The figures of the benchmark's table that each row of the README shows."""

_NUMBER: Final = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\d)")


def test_the_figures_of_the_readme_are_those_of_the_benchmark() -> None:
    measured = {row[0]: row[1:] for row in Page(BENCHMARK, BENCHMARK.read_text()).rows()}
    rows = page("README.md").section("How fast").rows()[1:]
    assert [row[0] for row in rows] == list(FIGURES)
    for title, ours, plain, ratio in rows:
        for position, name in enumerate(FIGURES[title]):
            for cell, figure in zip((ours, plain), measured[name], strict=False):
                assert_rounded(cell, position, figure)
        assert_rounded(ratio, 0, measured[FIGURES[title][0]][2])


def assert_rounded(cell: str, position: int, figure: str) -> None:
    """Asserts that a number of the cell is the first one of the figure, rounded as it is shown. A
    cell without numbers shows nothing."""
    shown = _NUMBER.findall(cell)
    if shown:
        number = shown[position].replace(",", "")
        decimals = len(number.partition(".")[2])
        assert float(number) == round(float(_NUMBER.findall(figure)[0].replace(",", "")), decimals)

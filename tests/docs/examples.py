"""The examples of own models in the pages: programs that make models, and send requests to them."""

from pathlib import Path

from tests.docs.markdown import URL, Page, page, run_programs


def example_pages() -> list[Page]:
    """The pages that make models: each program without the service's address makes one."""
    return [page("README.md").section("Serve your own model"), page("examples.md")]


def make_example_models(folder: Path) -> int:
    """Runs the programs that make models, in a folder; returns their number."""
    programs = [program for part in example_pages() for program, _ in part.programs()]
    makers = [program for program in programs if URL not in program]
    assert run_programs(makers, URL, folder) == [""] * len(makers)
    return len(makers)


def example_clients() -> list[tuple[str, str]]:
    """The programs that send requests, each with the output that is shown."""
    programs = [shown for part in example_pages() for shown in part.programs()]
    return [(program, output) for program, output in programs if URL in program]

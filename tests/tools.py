"""Programs of Debian packages that tests need: which are missing here, and what happens then.

A test names them with `@pytest.mark.system("curl")`. `python -m tests.tools` prints the packages
that this machine lacks.
"""

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

import pytest


class Tool(NamedTuple):
    """A program, the Debian package to install for it, and a file that it reads."""

    program: str
    package: str
    data: Path | None = None

    def is_installed(self) -> bool:
        return bool(shutil.which(self.program)) and (self.data is None or self.data.exists())


TOOLS: Final = {
    tool.program: tool
    for tool in (
        Tool("curl", "curl"),
        Tool("git", "git"),
        Tool("localedef", "locales", Path("/usr/share/i18n/locales/en_US")),
        Tool("promtool", "prometheus"),
        Tool("redis-server", "redis-server"),
    )
}
"""Without those that every Debian has, such as bash."""


def require(programs: Iterable[str]) -> None:
    """Ends the test as `missing` does if one of these programs is not installed."""
    absent = [program for program in programs if not TOOLS[program].is_installed()]
    if absent:
        packages = " ".join(TOOLS[program].package for program in absent)
        missing(f"needs {' and '.join(absent)}: apt-get install {packages}")


def missing(need: str) -> NoReturn:
    """Skips the test because of what this machine lacks; in CI, where CI is set, fails it."""
    if os.environ.get("CI"):
        pytest.fail(need, pytrace=False)
    pytest.skip(need)


if __name__ == "__main__":
    sys.stdout.write(
        " ".join(tool.package for tool in TOOLS.values() if not tool.is_installed()) + "\n"
    )

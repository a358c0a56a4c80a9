"""The page on the tests: the files and folders that it names exist."""

import re
from typing import Final

from tests.process import REPOSITORY

TESTS: Final = REPOSITORY / "tests"
PAGE: Final = (TESTS / "README.md").read_text()


def test_every_test_file_of_the_page_exists() -> None:
    names = re.findall(r"`((?:\w+/)+|(?:\w+/)?\w+\.py)`", PAGE)
    assert len(names) > 50
    roots = (TESTS, REPOSITORY)
    assert not [name for name in names if not any((root / name).exists() for root in roots)]

"""The architecture page: its paths exist, and its rooms and doors are those of the layer test."""

import re
from typing import Final

from tests.process import REPOSITORY
from tests.rooms import DOORS, ROOMS

PAGE: Final = (REPOSITORY / "asyncinfer" / "docs" / "architecture.md").read_text()
_ROOM: Final = re.compile(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \| (.+?) \| (.*?) ?\|$", re.MULTILINE)


def test_every_path_of_the_page_exists() -> None:
    paths = set(re.findall(r"`((?:asyncinfer|tests)/[\w/.]+)`", PAGE))
    assert len(paths) > 25
    assert not [path for path in paths if not (REPOSITORY / path).exists()]


def test_the_rooms_of_the_page_are_those_of_the_layer_test_in_the_same_order() -> None:
    rows: dict[int, set[str]] = {}
    for row, room, _, _ in _ROOM.findall(PAGE):
        rows.setdefault(int(row), set()).add(room)
    assert [rows[row] for row in sorted(rows)] == [set(row) for row in ROOMS]


def test_the_doors_of_the_page_are_those_of_the_layer_test() -> None:
    doors = {
        library: room
        for _, room, _, libraries in _ROOM.findall(PAGE)
        for library in re.findall(r"\w+", libraries)
    }
    assert doors == {name: room for name, room in DOORS.items() if not name.endswith("_extensions")}


def test_every_folder_of_the_package_is_explained() -> None:
    folders = [path.name for path in (REPOSITORY / "asyncinfer").iterdir() if path.is_dir()]
    assert [
        name for name in folders if not name.startswith("__") and f"`{name}/`" not in PAGE
    ] == []

"""The check that the tests run the code of this checkout."""

from pathlib import Path

import pytest

from tests import checkout


@pytest.mark.parametrize(
    ("copy", "difference"),
    [
        ({"a.py": "1", "lua/b.lua": "2"}, None),
        ({"a.py": "1", "lua/b.lua": "2", "note.md": "3"}, None),
        ({"a.py": "1", "lua/b.lua": "0"}, "lua/b.lua"),
        ({"a.py": "1"}, "lua/b.lua"),
        ({"a.py": "1", "lua/b.lua": "2", "removed.py": ""}, "removed.py"),
    ],
)
def test_an_installed_copy_that_differs_is_found(
    tmp_path: Path, copy: dict[str, str], difference: str | None
) -> None:
    package = {"a.py": "1", "lua/b.lua": "2"}
    for folder, files in (("package", package), ("copy", copy)):
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    assert checkout.first_difference(tmp_path / "package", tmp_path / "copy") == difference

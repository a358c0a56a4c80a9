"""The check that tests, and the processes that they start, run the code of this checkout."""

import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parent.parent
PACKAGE: Final = REPOSITORY / "asyncinfer"

_CODE_SUFFIXES: Final = {".py", ".lua"}
_ADDED_BY_THE_WHEEL: Final = "_models"


def problem() -> str | None:
    """What is wrong, with its remedy, if an import of asyncinfer gives other code than this
    checkout holds; None if all is well. An installed copy with the same code is well."""
    for copy in {_imported_here(), _imported_by_a_child()} - {None, PACKAGE}:
        assert copy is not None
        if name := first_difference(PACKAGE, copy):
            return (
                f"asyncinfer is imported from {copy}, whose {name} is not that of this checkout: "
                "tests would run other code. Install this checkout "
                "(`pip install -e '.[dev]'`), or set PYTHONPATH to its root."
            )
    return None


def first_difference(package: Path, copy: Path) -> str | None:
    """The first file of code that only one of the two folders has, or that differs; or None."""
    files, copied = dict(_code_files(package)), dict(_code_files(copy))
    for name in sorted(files.keys() | copied.keys()):
        if name not in files or name not in copied or _differ(files[name], copied[name]):
            return name
    return None


def _differ(file: Path, copy: Path) -> bool:
    return file.stat().st_size != copy.stat().st_size or file.read_bytes() != copy.read_bytes()


def _code_files(package: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(package):
        folders[:] = [name for name in folders if name != _ADDED_BY_THE_WHEEL]
        for name in names:
            path = Path(folder, name)
            if path.suffix in _CODE_SUFFIXES:
                yield path.relative_to(package).as_posix(), path


def _imported_here() -> Path | None:
    return _package_in(sys.path)


def _imported_by_a_child() -> Path | None:
    """What a Python in another folder imports: it lacks the path that pytest added to its own."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [entry for entry in sys.path if Path(entry).resolve() != REPOSITORY]
    return _package_in([*inherited, *others])


def _package_in(path: list[str]) -> Path | None:
    spec = PathFinder.find_spec("asyncinfer", [entry for entry in path if entry])
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).resolve().parent

"""The order of the rooms: imports go one way, without circles, and each library has one door."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.process import REPOSITORY
from tests.rooms import DOORS, INSIDE, ROOMS

PACKAGE = REPOSITORY / "asyncinfer"


# A library's parts without documentation may change in any release. Of those of redis-py, one file
# uses some, which checks at the start whether they are as expected (`tests/repository/test_wire.py`
# tells which are not). Names that begin with `_` are used of no library.
UNDOCUMENTED = {
    "repository/wire.py": ("_reader", "_writer", "make_connection", "ssl_context"),
}
"""The file that may use undocumented parts of a library, and the names of these."""

PYTHONS_PRIVATE = {"_exit", "_getframe"}


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    return tuple(_names_imported(_parsed(path), path))


def _names_imported(module: ast.Module, path: Path) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _row(rows: Sequence[Sequence[str]], part: str) -> int:
    """The index of the row with `part`; fails if there is none."""
    (found,) = [index for index, row in enumerate(rows) if part in row] or [-1]
    assert found >= 0, f"{part} has no place in tests/rooms.py; add it there"
    return found


@functools.cache
def _edges() -> tuple[tuple[str, str], ...]:
    """Pairs of dotted names: a module, and one that it imports, also only for type checkers."""
    modules = {_dotted(path): path for path in _modules()}
    edges = []
    for name, path in modules.items():
        for imported in _imports(path):
            # `from asyncinfer.jobs import Record` imports asyncinfer.jobs.
            target = imported if imported in modules else imported.rpartition(".")[0]
            if target in modules and target not in (name, "asyncinfer"):
                edges.append((name, target))
    return tuple(edges)


def _dotted(path: Path) -> str:
    return ".".join(("asyncinfer", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


def test_the_root_imports_nothing() -> None:
    assert not _imports(PACKAGE / "__init__.py")


def test_a_room_imports_only_from_rooms_below_it() -> None:
    assert [
        f"{name} imports {target}"
        for name, target in _edges()
        if not _is_below(ROOMS, name.split(".")[1], target.split(".")[1])
    ] == []


def test_a_room_has_an_order_of_its_own() -> None:
    assert [
        f"{room}: {name} imports {target}"
        for room, rows in INSIDE.items()
        for name, target in _edges_inside(f"asyncinfer.{room}.")
        if not _is_below(rows, name, target)
    ] == []


def _edges_inside(prefix: str) -> Iterator[tuple[str, str]]:
    """The parts of a room that import each other."""
    for name, target in _edges():
        if name.startswith(prefix) and target.startswith(prefix):
            own, other = (module.removeprefix(prefix).split(".")[0] for module in (name, target))
            yield own, other


def _is_below(rows: Sequence[Sequence[str]], own: str, other: str) -> bool:
    return own == other or _row(rows, other) < _row(rows, own)


def test_no_files_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, target in _edges():
        graph.setdefault(name, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_each_library_has_one_door() -> None:
    users = {
        (library, _room(path))
        for path in _modules()
        for library in {name.split(".")[0] for name in _imports(path)} & DOORS.keys()
    }
    assert users <= DOORS.items(), users - DOORS.items()


def test_no_test_module_or_conftest_is_imported() -> None:
    modules = sorted((REPOSITORY / "tests").rglob("*.py"))
    assert len(modules) > 100
    imports = re.compile(r"^\s*(from|import) .*\b(test_\w+|conftest)\b", re.MULTILINE)
    assert [
        f"{path.relative_to(REPOSITORY)}: {found[0].strip()}"
        for path in modules
        for found in imports.finditer(path.read_text())
    ] == []


def test_the_command_line_uses_the_client_as_its_users_do() -> None:
    for path in sorted((PACKAGE / "cli").rglob("*.py")):
        modules = [name for name in _imports(path) if name.startswith("asyncinfer.client.")]
        assert not [name for name in modules if "._" in name], path
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
                assert ast.unparse(node.value) in ("self", "os"), f"{path}:{node.lineno}"


def test_no_private_part_of_a_library_is_used() -> None:
    for path in _modules():
        for name in _imports(path):
            parts = name.split(".")
            is_private = any(part.startswith("_") and part != "__future__" for part in parts)
            assert parts[0] == "asyncinfer" or not is_private, f"{path} imports {name}"
            # uvicorn's HTTP implementation has no documentation.
            assert not name.startswith("uvicorn."), f"{path} imports {name}"
        for owner, attribute in _attributes(path):
            is_own = owner in ("self", "cls") or attribute in PYTHONS_PRIVATE
            is_private = attribute.startswith("_") and not attribute.startswith("__")
            is_allowed = attribute in UNDOCUMENTED.get(str(path.relative_to(PACKAGE)), ())
            assert is_own or is_allowed or not is_private, f"{path} uses {owner}.{attribute}"


@pytest.mark.parametrize("allowed", UNDOCUMENTED)
def test_undocumented_parts_of_a_library_are_used_in_one_file(allowed: str) -> None:
    names = set(UNDOCUMENTED[allowed])
    for path in _modules():
        used = {name for owner, name in _attributes(path) if owner not in ("self", "cls")}
        imported = {name.rpartition(".")[2] for name in _imports(path)}
        if path != PACKAGE / allowed:
            assert not names & (used | imported), path


@functools.cache
def _attributes(path: Path) -> frozenset[tuple[str, str]]:
    """Each `owner.attribute` in the module; owners that are no plain name are `()`."""
    return frozenset(
        (node.value.id if isinstance(node.value, ast.Name) else "()", node.attr)
        for node in ast.walk(_parsed(path))
        if isinstance(node, ast.Attribute)
    )


def test_each_module_has_a_one_line_summary() -> None:
    docstrings = {path: ast.get_docstring(_parsed(path)) for path in _modules()}
    summaries = {path: (text or "").partition("\n")[0] for path, text in docstrings.items()}
    assert [
        f"{path}: {summary!r}"
        for path, summary in summaries.items()
        if not summary.rstrip().endswith((".", ":", ")"))
    ] == []


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("asyncinfer", ("numpy", "onnxruntime", "redis", "starlette", "msgspec")),
        ("asyncinfer.cli", ("numpy", "onnxruntime", "redis", "starlette", "uvicorn")),
        (
            "asyncinfer.cli.serve.api_process, asyncinfer.cli.serve.serve, "
            "asyncinfer.cli.serve.commands, asyncinfer.cli.serve.work",
            ("numpy",),
        ),
        ("asyncinfer.api.app", ("onnxruntime", "httpcore2")),
        ("asyncinfer.client", ("numpy", "onnxruntime", "redis", "starlette", "httpx2", "tqdm")),
        ("asyncinfer.testing", ("numpy", "onnxruntime", "redis", "starlette", "httpx2", "pytest")),
        ("asyncinfer.worker.process", ("starlette", "uvicorn", "watchfiles")),
    ],
)
def test_a_module_loads_only_what_it_needs(modules: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {modules}; print(sorted(set({heavy!r}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"

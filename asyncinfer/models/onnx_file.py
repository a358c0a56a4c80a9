"""The locations of external weights in an ONNX file, read from its bytes without trusting them.

The `onnx` package is not needed for serving, so this reads the protobuf wire format itself.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from asyncinfer.errors import ModelRefused
from asyncinfer.models import file_kind
from asyncinfer.untrusted import file_access
from asyncinfer.untrusted.printable import printable_line

_GRAPH: Final = 7
_FIELDS: Final[dict[str, dict[int, str]]] = {
    "model": {_GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "function": {7: "node", 11: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""For each kind of message in onnx.proto, the numbers of the fields that lead to a tensor, and the
kind of each."""

_MAX_MESSAGES: Final = 20_000_000
_VARINT, _I64, _BYTES, _I32 = 0, 1, 2, 5
NO_END: Final = -1
"""The end that `fields` yields for a whole number."""


class DamagedFile(ValueError):
    """The bytes are not the protobuf of a model."""


def check_weights(path: Path, shown: str) -> None:
    """Raises ModelRefused unless it is an ONNX file whose weights are in its own folder.

    `shown` is its name in messages. It reads the structure of the whole file; weights are not
    loaded.
    """
    folder = path.parent
    if not path.stat().st_size:
        raise ModelRefused(f"{shown}: it is empty")
    try:
        found = weights_locations(path)
    except DamagedFile as error:
        if kind := file_kind.guess_instead_of_model(path):
            raise ModelRefused(f"{shown}: it is no ONNX file, but {kind}") from error
        raise ModelRefused(
            f"{shown}: it is no ONNX file, or damaged: {error}; copy or download it again"
        ) from error
    for location in sorted(found):
        problem = _problem(folder, location)
        if problem:
            where = f"{shown}: its weights lie in {printable_line(location)!r}, which"
            raise ModelRefused(f"{where} {problem}")


def weights_locations(path: Path) -> set[str]:
    """The locations of external weights that a file names, as they are written in it.

    They may lead anywhere. Raises DamagedFile, ValueError if the file is empty, or OSError.
    """
    with mapped(path) as content:
        return set(find_locations(content))


def looks_complete(path: Path) -> bool:
    """Whether the file may be a complete model; False if it is unreadable, raises nothing.

    It is as fast for a large file as for a small one, since only the outermost fields are read.
    """
    try:
        with mapped(path) as content:
            # All fields are read, because a truncated file is only noticed at its end.
            return _GRAPH in {number for number, _, _ in fields(content, 0, len(content))}
    except (OSError, ValueError):  # an empty file cannot be mapped, a damaged one not read
        return False


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """The file's bytes, mapped into memory until the end of the block; they are released then.

    Raises ValueError if the file is empty, or OSError.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        view = memoryview(content)
        try:
            yield view
        finally:
            view.release()


_PUT_IT_HERE: Final = "; put the file itself beside the model"


def _problem(folder: Path, location: str) -> str:
    """What is wrong with a location of weights, in words that follow `which`; "" if nothing is."""
    relative = Path(location)
    if relative.is_absolute() or "\\" in location or "\0" in location or ".." in relative.parts:
        return f"is no plain path within the model's folder{_PUT_IT_HERE}"
    target = folder / relative
    if not target.resolve().is_relative_to(folder.resolve()):
        return f"is a link that leads out of the model's folder{_PUT_IT_HERE}"
    if not os.path.lexists(target):
        return f"is not there{_PUT_IT_HERE}"
    if problem := file_access.unreadable_reason(target):
        return problem
    if target.stat().st_nlink > 1:
        return f"is a hard link, so that it may be another file's content{_PUT_IT_HERE}"
    if not target.stat().st_size:
        return "is empty; copy or download it again"
    if kind := file_kind.guess_instead_of_weights(target):
        return f"is {kind}"
    return ""


def find_locations(content: memoryview) -> Iterator[str]:
    """Every `location` of external data in a serialized model, with repeats; raises DamagedFile.

    Bytes that are not UTF-8 become surrogates.
    """
    pending = [("model", 0, len(content))]
    messages = 0
    while pending:
        kind, start, end = pending.pop()
        messages += 1
        if messages > _MAX_MESSAGES:
            raise DamagedFile("too many parts")
        if kind == "entry":
            yield from _location(content, start, end)
            continue
        inside = _FIELDS[kind]
        for number, begin, stop in fields(content, start, end):
            if number in inside:
                pending.append((inside[number], begin, stop))


def _location(content: memoryview, start: int, end: int) -> Iterator[str]:
    """The value of an entry in these bounds, if its key is `location`; else nothing."""
    key = value = b""
    for number, begin, stop in fields(content, start, end):
        if number == 1:
            key = bytes(content[begin:stop])
        elif number == 2:
            value = bytes(content[begin:stop])
    if key == b"location":
        yield value.decode("utf-8", "surrogateescape")


def fields(
    content: memoryview, at: int, end: int, *, with_numbers: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each length-delimited field of the message in `content[at:end]`.

    With `with_numbers` also its whole numbers, which have no sign: the field's number, the value,
    and NO_END. Other fields are skipped. Raises DamagedFile.
    """
    while at < end:
        tag, at = read_varint(content, at, end)
        if tag < 8:  # rejects a file of zeros, such as preallocated space
            raise DamagedFile("a field without a number")
        kind = tag & 7
        if kind == _VARINT:
            value, at = read_varint(content, at, end)
            if with_numbers:
                yield tag >> 3, value, NO_END
            continue
        if kind == _BYTES:
            size, at = read_varint(content, at, end)
        elif kind in (_I64, _I32):
            size = 8 if kind == _I64 else 4
        else:
            raise DamagedFile(f"a field of kind {kind}")
        if size > end - at:
            raise DamagedFile(_too_long(size - (end - at), end, content))
        if kind == _BYTES:
            yield tag >> 3, at, at + size
        at += size


def _too_long(missing_bytes: int, end: int, content: memoryview) -> str:
    """The detail of a field that is `missing_bytes` longer than its message; `end` is its end."""
    if end < len(content):
        return "a field is longer than the message that contains it"
    return f"{missing_bytes} bytes are missing at its end"


def read_varint(content: memoryview, at: int, end: int) -> tuple[int, int]:
    """The number without a sign that starts at `at`, and the offset after it.

    Raises DamagedFile if it does not end before `end`, or has more than 10 bytes.
    """
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise DamagedFile("it ends within a number")
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise DamagedFile("a number is too long")

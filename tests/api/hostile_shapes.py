"""Requests of any size that once cost far more than their size, and plain ones to compare with."""

from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import TensorSpec

PIXELS = 64

MODELS = {
    # Rows of one width, as most models have them.
    "digits": Signature(
        model="digits",
        version="1",
        sha256="0" * 64,
        inputs=(TensorSpec("input", "FP32", ("batch", PIXELS)),),
        outputs=(
            TensorSpec("label", "INT64", ("batch",)),
            TensorSpec("probabilities", "FP32", ("batch", 10)),
        ),
    ),
    # Rows of any width.
    "series": Signature(
        model="series",
        version="1",
        sha256="0" * 64,
        inputs=(TensorSpec("input", "FP64", ("batch", "length")),),
        outputs=(TensorSpec("mean", "FP64", ("batch",)),),
    ),
    "words": Signature(
        model="words",
        version="1",
        sha256="0" * 64,
        inputs=(TensorSpec("input", "BYTES", ("batch",)),),
        outputs=(TensorSpec("label", "INT64", ("batch",)),),
    ),
}

_ROW = b"[" + b",".join(b"%d.%d" % (pixel % 16, pixel % 10) for pixel in range(PIXELS)) + b"]"
_TENSOR = b'{"name":"input","shape":[1,64],"datatype":"FP32","data":' + _ROW + b"}"
_TENSOR_HEAD = b'{"inputs":[{"name":"input","datatype":"FP32"'
_EMPTY = b'{"name":"input","shape":[1,64],"datatype":"FP32","data":['


def filled(size: int, head: bytes, piece: bytes, tail: bytes, between: bytes = b",") -> bytes:
    """A body of about `size` bytes: `head`, as many pieces as fit, `tail`."""
    count = (size - len(head) - len(tail)) // (len(piece) + len(between))
    return head + between.join([piece] * count) + tail


def plain(size: int) -> bytes:
    """An ordinary request of about `size` bytes for the model `digits`."""
    return filled(size, b'{"data":[', _ROW, b"]}")


def plain_tensor(size: int) -> bytes:
    """The same rows as a named tensor."""
    rows = size // (len(_ROW) + 1)
    head = b'{"inputs":[{"name":"input","shape":[%d,64],"datatype":"FP32","data":[' % rows
    return head + b",".join([_ROW] * rows) + b"]}]}"


def hostile(size: int) -> dict[str, tuple[str, bytes]]:
    """By the name of each attack: the model that it is sent to, and the body."""
    beside = b'{"inputs":[' + _TENSOR + b"],"
    options = b'{"data":[' + _ROW + b'],"options":{'
    return {
        "one output many times": (
            "digits",
            filled(size, beside + b'"outputs":[', b'{"name":"label"}', b"]}"),
        ),
        "many unknown outputs": (
            "digits",
            filled(size, beside + b'"outputs":[', b'{"name":"x"}', b"]}"),
        ),
        "many outputs without a name": (
            "digits",
            filled(size, beside + b'"outputs":[', b"{}", b"]}"),
        ),
        "many inputs without a name": ("digits", filled(size, b'{"inputs":[', b"{}", b"]}")),
        "many inputs that are numbers": ("digits", filled(size, b'{"inputs":[', b"0", b"]}")),
        "one input many times": ("digits", filled(size, b'{"inputs":[', _TENSOR, b"]}")),
        "a shape of many dimensions": (
            "digits",
            filled(
                size,
                b'{"inputs":[{"name":"input","datatype":"FP32","data":[1],"shape":[',
                b"1",
                b"]}]}",
            ),
        ),
        "more elements than the shape takes": (
            "digits",
            filled(size, b'{"inputs":[' + _EMPTY, b"1", b"]}]}"),
        ),
        "empty lists for elements": (
            "digits",
            filled(size, b'{"inputs":[' + _EMPTY, b"[]", b"]}]}"),
        ),
        "one key of an input many times": (
            "digits",
            filled(size, b'{"inputs":[{"name":"input",', b'"data":0', b"}]}"),
        ),
        "empty rows": ("digits", filled(size, b'{"data":[', b"[]", b"]}")),
        "numbers for rows": ("digits", filled(size, b'{"data":[', b"1", b"]}")),
        "nulls for rows": ("digits", filled(size, b'{"data":[', b"null", b"]}")),
        "rows of two widths": ("series", filled(size, b'{"data":[', b"[1,2,3],[1,2]", b"]}")),
        "rows nested 400 deep": (
            "series",
            filled(size, b'{"data":[', b"[" * 400 + b"]" * 400, b"]}"),
        ),
        "one long row whose last number is none": (
            "series",
            filled(size, b'{"data":[[', b"1.5", b",null]]}"),
        ),
        "many rows of which the last is none": (
            "digits",
            filled(size, b'{"data":[', _ROW, b",null]}"),
        ),
        "numbers of 300 digits": ("series", filled(size, b'{"data":[[', b"9" * 300, b"]]}")),
        "one number of a million digits": ("series", b'{"data":[[' + b"9" * (size - 13) + b"]]}"),
        "an object for rows": ("digits", filled(size, b'{"data":{', b'"a":1', b"}}")),
        "empty strings": ("words", filled(size, b'{"data":[', b'""', b"]}")),
        "escaped strings": ("words", filled(size, b'{"data":["', b"\\u0061", b'"]}', b"")),
        "one option many times": ("digits", filled(size, options, b'"delay_seconds":0', b"}}")),
        "an unknown option with a long name": ("digits", options + b'"' + b"a" * size + b'":1}}'),
        "a long group": ("digits", options + b'"group":"' + b"a" * size + b'"}}'),
        "`data` many times": ("digits", filled(size, b"{", b'"data":0', b"}")),
        "`data` escaped many times": ("digits", filled(size, b"{", b'"d\\u0061ta":0', b"}")),
        "an unknown key with a long name": ("digits", b'{"' + b"a" * size + b'":1}'),
        "a key of backslashes": ("digits", b'{"' + b"\\\\" * (size // 2) + b'":1}'),
        "white space": ("digits", b'{"data":[' + _ROW + b"]," + b" " * size + b'"options":{}}'),
        "a string without an end": ("digits", b'{"data":["' + b"a" * size),
    }

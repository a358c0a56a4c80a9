"""The JSON result of a single job, as tests compare it."""

from collections.abc import Sequence

from asyncinfer.models.results import render_results
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import Array


def render_result(outputs: Sequence[Array], signature: Signature) -> bytes:
    return next(render_results(outputs, [{}], signature, None))

"""Queues and workers at one moment."""

from typing import TYPE_CHECKING

from msgspec import Struct

from asyncinfer.schemas.operations import Queue, Worker

if TYPE_CHECKING:
    pass


class Seen(Struct, frozen=True):
    at: float
    """Seconds since 1970."""
    source: str
    queues: list[Queue]
    workers: list[Worker] | None
    """None where the API key may not see them."""

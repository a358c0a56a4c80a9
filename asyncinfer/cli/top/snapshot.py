"""Queues and workers at one moment."""

from msgspec import Struct

from asyncinfer.schemas.operations import Queue, Worker


class Snapshot(Struct, frozen=True):
    at: float
    """Seconds since 1970."""
    source: str
    queues: list[Queue]
    workers: list[Worker] | None
    """None where the API key may not see them."""

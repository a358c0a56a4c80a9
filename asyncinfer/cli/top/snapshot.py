"""Queues and workers at one moment."""

from datetime import datetime

from msgspec import Struct

from asyncinfer.schemas.operations import Queue, Worker


class Snapshot(Struct, frozen=True):
    at: datetime
    """In UTC."""
    source: str
    queues: list[Queue]
    workers: list[Worker] | None
    """None where the API key may not see them."""

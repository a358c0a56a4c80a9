"""How much of everything is measured, and where."""

import tempfile
from pathlib import Path
from typing import Final

from msgspec import Struct

Figures = dict[str, float]


class Scale(Struct, frozen=True, kw_only=True):
    """How much of everything."""

    requests: int
    drained: int
    drains: int
    """How often a turn of the service: each of its drains is over in a quarter of a second."""
    single: int
    idle_seconds: float
    bare_seconds: float
    backlogs: tuple[int, ...]


FULL: Final = Scale(
    requests=6_000,
    drained=5_000,
    drains=3,
    single=400,
    idle_seconds=5,
    bare_seconds=1,
    backlogs=(1_000, 100_000, 1_000_000),
)
QUICK: Final = Scale(
    requests=2_000,
    drained=2_000,
    drains=1,
    single=200,
    idle_seconds=2,
    bare_seconds=0.3,
    backlogs=(1_000,),
)


class Room(Struct, frozen=True):
    """Where measures work."""

    folder: Path
    models: Path
    scale: Scale

    def new(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

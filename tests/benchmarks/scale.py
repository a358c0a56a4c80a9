"""The amounts of requests and jobs that are measured, and the folders for it."""

import tempfile
from pathlib import Path
from typing import Final

from msgspec import Struct

Figures = dict[str, float]


class Scale(Struct, frozen=True, kw_only=True):
    """The amounts of requests, jobs and seconds of each measure."""

    requests: int
    drained: int
    drains: int
    """Drains per turn of the service, since each takes only a quarter of a second."""
    single: int
    idle_seconds: float
    bare_seconds: float
    backlogs: tuple[int, ...]


FULL: Final = Scale(
    requests=6_000,
    drained=5_000,
    drains=3,
    single=400,
    idle_seconds=10,
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


class Workspace(Struct, frozen=True):
    """The folders and amounts of all measures."""

    folder: Path
    models: Path
    scale: Scale

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

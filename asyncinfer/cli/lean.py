"""What a process that serves keeps from being loaded, or looked for, while it starts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from asyncinfer import garbage


@contextmanager
def lean_start() -> Iterator[None]:
    """To be entered before numpy is imported, and left when the process ends."""
    # numpy starts a thread for each core to multiply matrices, which no service of ours does.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with garbage.left_until_settled():
        yield

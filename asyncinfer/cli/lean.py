"""What a process that serves does without, so as to start soon."""

import os

from asyncinfer.processes import tuning


def lean_start() -> None:
    """To be called before numpy is imported."""
    # numpy starts a thread for each core to multiply matrices, which no service of ours does.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    tuning.starting()

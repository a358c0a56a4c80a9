"""How a process that lives long collects its garbage."""

import gc
from typing import Final

_YOUNG_OBJECTS: Final = 20_000


def settle() -> None:
    """To be called once all is loaded: leaves that out of every collection to come, and collects
    more rarely. With Python's own threshold (700) collections were 7 % of the API's time and
    most of its slowest replies."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)

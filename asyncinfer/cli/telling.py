"""How long-running commands speak: what they say, and their log."""

import logging
import sys
from typing import Final

LOOP: Final = {"use_uvloop": sys.platform != "win32"}


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def set_up_logging() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)

"""Every entry of the zoo, by name."""

from typing import Final

from tests.zoo import crossing, flowing, lifelike, plain
from tests.zoo.entry import Entry

_PARTS: Final = (plain, crossing, flowing, lifelike)

ENTRIES: Final[dict[str, Entry]] = {
    entry.name: entry for part in _PARTS for entry in part.entries()
}

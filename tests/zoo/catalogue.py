"""All entries of the zoo, by name."""

from typing import Final

from tests.zoo import basic, control_flow, realistic, row_dependent
from tests.zoo.entry import Entry

_PARTS: Final = (basic, row_dependent, control_flow, realistic)

ENTRIES: Final[dict[str, Entry]] = {
    entry.name: entry for part in _PARTS for entry in part.entries()
}

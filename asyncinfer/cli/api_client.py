"""The client of a command, and the run times of a model that it reads."""

from typing import TYPE_CHECKING, Final

from asyncinfer.cli.options import ServerOptions

if TYPE_CHECKING:
    from asyncinfer.client import Client

_RETRIES: Final = 2
"""Two retries take some two seconds, which is enough while a person waits."""


def connect(server: ServerOptions, *, retries: int = _RETRIES) -> "Client":
    """A client of the service, which a `with` closes; nothing is sent yet.

    Raises WrongAddress for a URL that cannot be one.
    """
    from asyncinfer.client import Client

    return Client(server.url, server.api_key, retries=retries, ca=server.ca)


def seconds_by_rows(times: dict[str, float]) -> list[tuple[int, float]]:
    """Pairs of the number of rows and the seconds of a run, fewest rows first.

    `times` has the seconds by the number of rows as a string; entries with another key are left
    out.
    """
    return sorted(
        (int(rows), spent) for rows, spent in times.items() if rows.isdecimal() and len(rows) < 19
    )

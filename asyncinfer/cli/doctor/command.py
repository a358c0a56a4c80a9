"""`asyncinfer doctor`: what is wrong here, and the command that mends it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from asyncinfer.cli import options
from asyncinfer.cli.output import counted
from asyncinfer.settings import Settings
from asyncinfer.untrusted.printable import printable_line

if TYPE_CHECKING:
    from asyncinfer.cli.doctor.findings import Finding

_STYLES: Final = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@options.command(
    "doctor",
    "asyncinfer doctor",
    "asyncinfer doctor --json > findings.json",
    "asyncinfer doctor --redis-url redis://127.0.0.1:6379 --model-dir ./model",
)
@click.option(
    "--url",
    envvar="ASYNCINFER_URL",
    help="The API to look at. Default: http://HOST:PORT of the settings. [ASYNCINFER_URL]",
)
@click.option(
    "--api-key",
    envvar="ASYNCINFER_API_KEY",
    metavar="KEY",
    help="Better in the environment, since `ps` shows it here. [ASYNCINFER_API_KEY]",
)
@options.as_json
@options.knobs(hidden=True)
def doctor(url: str | None, api_key: str | None, as_json: bool, chosen: Settings) -> int:
    """Find what is wrong here, and the command that mends it.

    Looks at Redis (reachable, version, eviction, persistence, memory, round trip, clock), at each
    model by loading it in a child process as a worker does, at cores against threads, memory,
    ports, API keys and the API. Takes every setting that `serve` and `work` take, by flag or
    environment variable: run it with theirs. Exits with 1 when there is a problem.
    """
    from asyncinfer.cli.doctor.checks import examine

    findings = examine(chosen, url, api_key)
    if as_json:
        from asyncinfer.cli.output import say_json

        say_json({"findings": findings})
    else:
        _show(findings)
    return 1 if any(one.verdict == "problem" for one in findings) else 0


def _show(findings: Sequence["Finding"]) -> None:
    from asyncinfer.cli.output import console, styled

    to = console()
    for one in findings:
        line = styled(f"{one.verdict:<8} ", _STYLES[one.verdict])
        line.append(printable_line(f"{one.about}: "), "bold")
        line.append(printable_line(one.found), "")
        to.print(line, soft_wrap=True)
        if one.mend:
            to.print(styled(printable_line(f"         -> {one.mend}"), "cyan"), soft_wrap=True)
    counts = {verdict: sum(it.verdict == verdict for it in findings) for verdict in _STYLES}
    wrong = ", ".join(counted(counts[verdict], verdict) for verdict in ("problem", "warning"))
    to.print(f"{wrong}, {counts['ok']} ok")

"""`asyncinfer doctor`: problems of an installation, and how to fix each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from asyncinfer.cli import options
from asyncinfer.cli.output import console, counted, say_json, styled
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
    help="Address of the API. Default: http://HOST:PORT of the settings. [ASYNCINFER_URL]",
)
@options.api_key
@options.ca
@options.as_json
@options.all_settings(hidden=True)
def doctor(
    url: str | None, api_key: str | None, ca: str | None, as_json: bool, settings: Settings
) -> int:
    """Check Redis, models and API, and name the fix of each problem.

    Checks Redis (reachable, version, eviction, persistence, memory, round trip, clock), each model
    (by loading it in a child process, as a worker does), cores, memory, disk, ports, API keys, and
    the running API. Takes every setting of `serve` and `work`, as a flag or environment variable:
    run it with the same settings. Exits with 1 if there is a problem.
    """
    from asyncinfer.cli.doctor.checks import examine

    findings = examine(settings, url, api_key, ca)
    if as_json:
        say_json({"findings": findings})
    else:
        _show(findings)
    return 1 if any(finding.verdict == "problem" for finding in findings) else 0


def _show(findings: Sequence["Finding"]) -> None:
    """Prints each finding, with its fix in a second line, and the totals, on stdout."""
    target = console()
    for finding in findings:
        line = styled(f"{finding.verdict:<8} ", _STYLES[finding.verdict])
        line.append(printable_line(f"{finding.about}: "), "bold")
        line.append(printable_line(finding.found), "")
        target.print(line, soft_wrap=True)
        if finding.mend:
            fix = styled(printable_line(f"         -> {finding.mend}"), "cyan")
            target.print(fix, soft_wrap=True)
    verdicts = [finding.verdict for finding in findings]
    problems = counted(verdicts.count("problem"), "problem")
    warnings = counted(verdicts.count("warning"), "warning")
    target.print(f"{problems}, {warnings}, {verdicts.count('ok')} ok")

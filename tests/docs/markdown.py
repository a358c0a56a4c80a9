"""Code blocks of documents: runs their commands, and compares output with what is shown."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from tests.process import REPOSITORY

README: Final = (REPOSITORY / "README.md").read_text()


class Block(NamedTuple):
    language: str
    text: str


def all_blocks(text: str) -> list[Block]:
    matches = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(language, text) for language, text in matches]


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return [block.text for block in all_blocks(README) if block.language == language]


def sections_with(pattern: str) -> list[str]:
    """The README's sections that match a pattern."""
    return [part for part in README.split("\n## ") if re.search(pattern, part)]


class Step(NamedTuple):
    command: str
    shown: str


def steps(console: str) -> Iterator[Step]:
    """The commands of a console session, each with the output that is shown."""
    for part in console.split("$ ")[1:]:
        command, _, shown = part.partition("\n")
        yield Step(command, shown.strip())


def as_shown(output: str, ids: Mapping[str, str], digits: int = 4) -> str:
    """An output with shown job ids, without times and names of workers, and with fewer digits."""
    for real, shown in ids.items():
        output = output.replace(real, shown)
    output = re.sub(r'"worker":"[^"]+"', '"worker":"WORKER"', output)
    output = re.sub(r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "TIME", output)
    return re.sub(r"\d\.\d{5,}(e-\d+)?", lambda number: f"{float(number[0]):.{digits}f}", output)


def check_step(step: Step, url: str, folder: Path, ids: dict[str, str], digits: int = 4) -> None:
    """Runs a command; asserts that its output has every line that is shown.

    Adds to `ids` the ids of the jobs in the output, with the ids that are shown.
    """
    command = step.command.replace("http://127.0.0.1:8000", url)
    for real, shown in ids.items():
        command = command.replace(shown, real)
    output = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=folder, check=True
    ).stdout.replace("\r", "")
    job_ids = re.findall(r"\b[0-9a-f]{32}\b", output)
    ids |= dict(zip(job_ids, re.findall(r"\b[0-9a-f]{32}\b", step.shown), strict=False))
    lines = as_shown(output, ids, digits).splitlines()
    for line in as_shown(step.shown, ids, digits).splitlines():
        assert line in lines, f"$ {step.command}\n{output}"


@contextmanager
def running_command(command: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command in the background, with its output in the file `said`; kills it at the end."""
    with (folder / "said").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"], stdout=log, stderr=log, cwd=folder
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def has_started(process: subprocess.Popen[bytes], log: str) -> bool:
    """Whether the last line of a start is in the log: of `serve` or of `work`.

    Fails the test if the process has ended.
    """
    assert process.poll() is None, log
    return "\n  Stop " in log or "Serves " in log

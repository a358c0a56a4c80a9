"""Blocks of a page: its commands run, and their output compared with what is shown."""

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
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(language, text) for language, text in found]


def blocks(language: str) -> list[str]:
    return [block.text for block in all_blocks(README) if block.language == language]


def sections_with(pattern: str) -> list[str]:
    return [part for part in README.split("\n## ") if re.search(pattern, part)]


class Step(NamedTuple):
    command: str
    shown: str


def steps(console: str) -> Iterator[Step]:
    for part in console.split("$ ")[1:]:
        command, _, shown = part.partition("\n")
        yield Step(command, shown.strip())


def as_shown(answer: str, ids: Mapping[str, str], digits: int = 4) -> str:
    """An answer as the README would print it: names and times are those of the day."""
    for real, told in ids.items():
        answer = answer.replace(real, told)
    answer = re.sub(r'"worker":"[^"]+"', '"worker":"WORKER"', answer)
    answer = re.sub(r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "TIME", answer)
    return re.sub(r"\d\.\d{5,}(e-\d+)?", lambda number: f"{float(number[0]):.{digits}f}", answer)


def check_step(step: Step, url: str, folder: Path, ids: dict[str, str], digits: int = 4) -> None:
    """Runs a command as a reader would; `ids` gains the names of its jobs, as shown."""
    command = step.command.replace("http://127.0.0.1:8000", url)
    for real, told in ids.items():
        command = command.replace(told, real)
    said = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=folder, check=True
    ).stdout.replace("\r", "")
    found = re.findall(r"\b[0-9a-f]{32}\b", said)
    ids |= dict(zip(found, re.findall(r"\b[0-9a-f]{32}\b", step.shown), strict=False))
    lines = as_shown(said, ids, digits).splitlines()
    for line in as_shown(step.shown, ids, digits).splitlines():
        assert line in lines, f"$ {step.command}\n{said}"


@contextmanager
def shell(command: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"], stdout=said, stderr=said, cwd=folder
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def is_up(process: subprocess.Popen[bytes], said: str) -> bool:
    """`serve` ends what it says with how to stop it, `work` with what it serves."""
    assert process.poll() is None, said
    return "\n  Stop " in said or "Serves " in said

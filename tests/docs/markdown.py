"""Pages and their code blocks: runs their commands and programs, and compares the outputs."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.process import REPOSITORY

DOCS: Final = REPOSITORY / "asyncinfer" / "docs"
URL: Final = "http://127.0.0.1:8000"
"""The address of the service in every page."""

_FENCED: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# --- pages ---------------------------------------------------------------------------------


class Block(NamedTuple):
    language: str
    text: str


class Page(NamedTuple):
    """A document, or a section of one."""

    path: Path
    text: str

    @property
    def blocks(self) -> list[Block]:
        return [Block(*match) for match in _FENCED.findall(self.text)]

    def texts(self, language: str) -> list[str]:
        """The texts of the blocks in a language."""
        return [block.text for block in self.blocks if block.language == language]

    def section(self, title: str) -> "Page":
        """The part below a title, up to the next one of the same or a higher level."""
        match = re.search(rf"^(#+) {re.escape(title)}$", self._without_code, re.MULTILINE)
        assert match, f"{self.path.name} has no section {title!r}"
        level = len(match[1])
        following = re.compile(rf"^#{{1,{level}}} ", re.MULTILINE)
        end = following.search(self._without_code, match.end())
        return Page(self.path, self.text[match.end() : end and end.start()])

    @property
    def _without_code(self) -> str:
        """The text with a blank in place of each character of a block, whose comments may look like
        titles."""
        return _FENCED.sub(lambda match: re.sub(".", " ", match[0]), self.text)

    @property
    def anchors(self) -> set[str]:
        """The anchors of its titles, as GitHub makes them."""
        titles = re.findall(r"^#+ (.*)$", self._without_code, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    def rows(self) -> list[list[str]]:
        """The cells of all rows of its tables."""
        lines = re.findall(r"^\| (.*) \|$", self.text, re.MULTILINE)
        return [[cell.strip() for cell in line.split("|")] for line in lines]

    def programs(self) -> list[tuple[str, str]]:
        """Each Python program with its output: the `text` block that follows it, else empty."""
        following = [*self.blocks[1:], Block("", "")]
        return [
            (block.text, after.text if after.language == "text" else "")
            for block, after in zip(self.blocks, following, strict=True)
            if block.language == "python"
        ]


@cache
def page(name: str) -> Page:
    """A page of `asyncinfer/docs`, or `README.md` of the repository."""
    path = REPOSITORY / name if name == "README.md" else DOCS / name
    return Page(path, path.read_text())


def all_pages() -> list[Path]:
    """The README and all pages of `asyncinfer/docs`."""
    return [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(DOCS.rglob("*.ipynb"))]


# --- sessions ------------------------------------------------------------------------------


class Step(NamedTuple):
    command: str
    shown: str


def steps(console: str) -> Iterator[Step]:
    """The commands of a console session, each with the output that is shown."""
    for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield Step(command, shown.strip())


def as_shown(output: str, ids: Mapping[str, str], digits: int = 4) -> str:
    """An output with shown job ids and fewer digits, and without what differs between runs: times,
    names of workers, positions in lists and event streams, and how long runs took."""
    for real, shown in ids.items():
        output = output.replace(real, shown)
    output = re.sub(r'"worker":"[^"]+"', '"worker":"WORKER"', output)
    output = re.sub(r'"run_times":\{(?:[^{}]|\{[^{}]*\})*\}', '"run_times":{}', output)
    output = re.sub(r'"queues":\{[^}]*\}', '"queues":{}', output)
    output = re.sub(r'"request_id":"[^"]+"', '"request_id":"REQUEST"', output)
    output = re.sub(r'"cursor":"[^"]+"', '"cursor":"CURSOR"', output)
    output = re.sub(r'"(at_ms|seconds)":[0-9.]+', r'"\1":0', output)
    # The phrase of a status is that of the Python.
    output = output.replace("422 Unprocessable Content", "422 Unprocessable Entity")
    output = re.sub(r"^id: \S+$", "id: POSITION", output, flags=re.MULTILINE)
    output = re.sub(r"\d{4}-\d\d-\d\dT[0-9:.]+Z|(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\dZ", "TIME", output)
    return re.sub(r"\d\.\d{5,}(e-\d+)?", lambda number: f"{float(number[0]):.{digits}f}", output)


def check_step(step: Step, url: str, folder: Path, ids: dict[str, str], digits: int = 4) -> None:
    """Runs a command; asserts that its output has every line that is shown.

    Adds to `ids` the ids of the jobs in the output, with the ids that are shown.
    """
    output = run_step(step, url, folder, ids)
    job_ids = re.findall(r"\b[0-9a-f]{32}\b", output)
    ids |= dict(zip(job_ids, re.findall(r"\b[0-9a-f]{32}\b", step.shown), strict=False))
    lines = as_shown(output, ids, digits).splitlines()
    for line in as_shown(step.shown, ids, digits).splitlines():
        assert line in lines, f"$ {step.command}\n{output}"


def run_step(step: Step, url: str, folder: Path, ids: Mapping[str, str]) -> str:
    """Runs a command against the service at `url`, with real ids for those shown; returns its
    output. Fails the test if it failed, but for a time-out of curl that the command asks for."""
    command = step.command.replace(URL, url)
    for real, shown in ids.items():
        command = command.replace(shown, real)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == (28 if "--max-time" in command else 0), (command, done)
    return done.stdout.replace("\r", "")


def is_alike(shown: Any, real: Any) -> bool:
    """Whether two decoded JSON texts have the same members and types, as far as neither is empty or
    null."""
    match shown, real:
        case dict(), dict():
            if not (shown and real):
                return True
            return shown.keys() == real.keys() and all(is_alike(shown[k], real[k]) for k in shown)
        case list(), list():
            return not (shown and real) or is_alike(shown[0], real[0])
        case (None, _) | (_, None):
            return True
        case _:
            return type(shown) is type(real)


# --- programs ------------------------------------------------------------------------------

_RUNNER: Final = """\
import contextlib, io, json, sys

for program in json.load(sys.stdin):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    print(json.dumps(output.getvalue()))
"""


def run_programs(programs: Sequence[str], url: str, folder: Path) -> list[str]:
    """Runs programs one after the other in one process, against the service at `url`; returns
    their outputs. Fails the test if one fails."""
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER],
        input=json.dumps([program.replace(URL, url) for program in programs]),
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- commands in the background ------------------------------------------------------------


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

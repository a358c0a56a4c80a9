"""The documents about own models: their programs are run, their tables compared with the code."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from asyncinfer.models.config import ModelConfig
from asyncinfer.tensors.datatypes import DTYPES
from tests.docs.markdown import Block, all_blocks, as_shown, check_step, sections_with, steps
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY
from tests.serving import ServeProcess, running_serve

PAGE: Final = (REPOSITORY / "asyncinfer" / "docs" / "models.md").read_text()
URL: Final = "http://127.0.0.1:8000"
DIGITS: Final = 2
"""The number of a result's digits that are equal on all machines that train the models."""


# --- programs ------------------------------------------------------------------------------


def chapter() -> list[Block]:
    """The code blocks of the README's chapter, and then of the page."""
    (section,) = sections_with(r"\AServe your own model\n")
    return [*all_blocks(section), *all_blocks(PAGE)]


def programs() -> Iterator[tuple[str, str]]:
    """Each Python program with its output: the `text` block that follows it."""
    blocks = chapter()
    for block, following in zip(blocks, [*blocks[1:], Block("", "")], strict=True):
        if block.language == "python":
            yield block.text, following.text if following.language == "text" else ""


@pytest.mark.soak
@pytest.mark.system("curl")
def test_every_program_of_the_documents_prints_the_output_that_is_shown(folder: Path) -> None:
    makers = [program for program, _ in programs() if URL not in program]
    for process in [start(program, folder) for program in makers]:
        assert wait_for_output(process) == ""
    with running_serve(cwd=folder, DATA_DIR=str(folder / "data")) as serve:
        eventually_sync(
            lambda: len(serve.get("/models")["models"]) == len(makers), "all models are listed"
        )
        check_clients(serve, folder)


def check_clients(serve: ServeProcess, folder: Path) -> None:
    url = serve.banner["URL"]
    for program, shown in programs():
        if URL in program:
            assert shown, "a program that sends requests is followed by its output"
            output = wait_for_output(start(program.replace(URL, url), folder))
            assert as_shown(output, {}, DIGITS) == as_shown(shown, {}, DIGITS)
    for block in chapter():
        for step in steps(block.text) if block.language == "console" else ():
            # The files that skl2onnx writes, and so their hashes, differ between its releases.
            shown = re.sub(r'"sha256":"[0-9a-f]{64}",', "", step.shown)
            command = step.command + """ | sed -E 's/"sha256":"[0-9a-f]{64}",//'"""
            check_step(step._replace(command=command, shown=shown), url, folder, {}, DIGITS)


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def wait_for_output(process: subprocess.Popen[str]) -> str:
    """Waits until a program has ended; returns its output. Fails the test if it failed."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def test_programs_are_short() -> None:
    longest = max(len(program.splitlines()) for program, _ in programs())
    assert longest <= 28


# --- tables --------------------------------------------------------------------------------


def rows(text: str) -> list[list[str]]:
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [line.split(" | ") for line in lines]


def page_section(title: str) -> str:
    (section,) = [part for part in PAGE.split("\n## ") if part.startswith(f"{title}\n")]
    return section


def keys_of(defaults: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in defaults.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_every_key_of_model_toml_is_in_the_table_with_its_default() -> None:
    shown = {
        key.strip("`"): None
        if default == "absent"
        else tomllib.loads(f"x = {default.strip('`')}")["x"]
        for key, default, _ in rows(page_section("model.toml"))
        if key.startswith("`")
    }

    assert shown == dict(keys_of(msgspec.json.decode(msgspec.json.encode(ModelConfig()))))


def test_every_key_of_model_toml_in_the_readme_exists() -> None:
    (section,) = sections_with(r"\AServe your own model\n")
    known = dict(keys_of(msgspec.to_builtins(ModelConfig())))
    tables = {name.partition(".")[0] for name in known if "." in name}
    named = re.findall(rf"`((?:{'|'.join(tables)})\.\w+)", section)

    assert named
    assert set(named) <= known.keys()


def test_every_datatype_is_in_the_table_with_its_numpy_name_and_size() -> None:
    table = [row for row in rows(page_section("Inputs and outputs")) if row[0].startswith("`")]
    shown = {row[1].strip("`"): re.findall(r"`(\w+)`", row[2])[0] for row in table}
    sizes = {row[1].strip("`"): int(row[3].partition(":")[0].partition(" ")[0]) for row in table}

    assert shown == {name: str(dtype) for name, dtype in DTYPES.items()}
    assert all(sizes[name] == DTYPES[name].itemsize for name in sizes if name != "BYTES")


def test_every_link_of_the_page_has_an_existing_target() -> None:
    titles = {title.lower().replace(" ", "-").strip(".") for title in _titles()}
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGE):
        path, _, title = target.partition("#")
        assert (REPOSITORY / "asyncinfer" / "docs" / path).exists(), target
        assert title in titles | {""}, target


def _titles() -> list[str]:
    return re.findall(r"^##+ (.*)$", PAGE + (REPOSITORY / "README.md").read_text(), re.MULTILINE)

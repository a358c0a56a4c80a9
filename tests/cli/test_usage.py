"""Wrong usage is one line on stderr, and --help is fast."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

import click
import pytest

from asyncinfer.cli import main
from asyncinfer.cli.commands import commands
from asyncinfer.settings import knobs

HEAVY: Final = ("numpy", "rich", "redis", "httpx2", "onnxruntime", "starlette", "argparse")
HELP_SECONDS: Final = 0.3
COMMANDS: Final = commands.list_commands(click.Context(commands))


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_error:
        main((*argv, "--help"))
    assert exit_error.value.code == 0
    return capsys.readouterr().out


def error_line(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("asyncinfer: ")
    return line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("serv",), "No such command 'serv'. Did you mean 'serve'? See `asyncinfer --help`."),
        (("nonsense",), "No such command 'nonsense'."),
        (("serve", "--job-tt", "9"), "'--job-tt'"),
        (("serve", "--job", "9"), "'--job'"),
        (("serve", "--port"), "'--port' requires an argument"),
        (("serve", "--work=yes"), "'--work' does not take a value"),
        (("keygen", "x"), "unexpected extra argument (x). See"),
        (("completion", "tcsh"), "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
        (("completion",), "Choose from: bash, zsh, fish. See `asyncinfer completion --help`."),
    ],
)
def test_wrong_usage_is_one_line(
    argv: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_line(capsys, argv)


def test_an_option_is_met_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--job-ttl" in error_line(capsys, ("serve", "--job-tt", "9"))


def test_every_listed_command_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {name: help_of(capsys, name) for name in COMMANDS}
    assert [name for name in shown if f"Usage: asyncinfer {name} " not in shown[name]] == []


def test_help_lists_each_command_that_can_be_used_and_each_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first_words = [line.split()[0] for line in help_of(capsys).splitlines() if line.strip()]

    assert {"serve", "work", "keygen", "completion"} <= set(COMMANDS) <= set(first_words)
    assert {"0", "1", "2", "3", "130"} <= set(first_words)
    assert "api-process" not in first_words


@pytest.mark.parametrize("name", ["serve", "work"])
def test_help_lists_advanced_settings_under_a_heading_of_their_own(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common, _, advanced = help_of(capsys, name).partition("\nAdvanced:\n")

    for knob in knobs():
        shown_in, other = (advanced, common) if knob.advanced else (common, advanced)
        assert f"  {knob.flag} " in shown_in
        assert f"  {knob.flag} " not in other
    assert 10 < sum(not knob.advanced for knob in knobs()) <= 15


def test_help_has_a_unit_in_the_singular_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert re.findall(r"Default:\s+1\s+\w*[^\Ws]s\b", help_of(capsys, name)) == []
    assert re.search(r"\b1\s+process\.", help_of(capsys, "serve"))


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import atexit, sys; from asyncinfer.cli import main; "
        f"atexit.register(lambda: print(sorted(set({HEAVY!r}) & set(sys.modules)))); "
        "main(['--help'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_help_takes_less_than_300_ms_of_a_core() -> None:
    """The cheapest of a few runs counts: the caches of a busy machine are cold."""
    assert min(_cpu_seconds_of_help() for _ in range(5)) < HELP_SECONDS


def _cpu_seconds_of_help() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "asyncinfer", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("argv", [("--help",), ("keygen",)])
def test_a_closed_pipe_prints_no_error(argv: Sequence[str]) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with os.fdopen(write_fd, "wb") as pipe:
        ran = subprocess.run(
            [sys.executable, "-m", "asyncinfer", *argv],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ran.returncode == 141
    assert "Error" not in ran.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(("completion", shell)) == 0
    assert f"_ASYNCINFER_COMPLETE={shell}_complete" in capsys.readouterr().out
    assert f"asyncinfer completion {shell}" in help_of(capsys, "completion")


def test_completion_offers_commands_and_flags() -> None:
    def offered(words: str) -> list[str]:
        environ = {
            "_ASYNCINFER_COMPLETE": "bash_complete",
            "COMP_WORDS": f"asyncinfer {words}",
            "COMP_CWORD": str(len(words.split())),
        }
        ran = subprocess.run(
            [sys.executable, "-m", "asyncinfer"],
            env={**os.environ, **environ},
            check=True,
            capture_output=True,
            text=True,
        )
        return [line.partition(",")[2] for line in ran.stdout.splitlines()]

    assert "serve" in offered("ser")
    assert "--job-ttl" in offered("serve --job")


def test_bash_accepts_the_completion_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("completion", "bash")) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, capture_output=True)
